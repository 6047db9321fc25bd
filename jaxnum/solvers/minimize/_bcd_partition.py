"""Fixed blocks for block coordinate descent: coordinates dealt out by their bounds, and forests in a sparse graph.

Source: Nutini, Laradji & Schmidt 2022.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnum.solvers.minimize._forest_solve import Forest, forest_solve_order
from kernels_pallas import checks


def bcd_partition(lipschitz: Any, block_size: int, *, order: str = "sorted") -> np.ndarray:
    """Fixed blocks for `bcd`, each coordinate in one.

    Args:
      lipschitz: [d] bounds of the second derivatives along the coordinates, concrete.
      block_size: coordinates in a block, Python int >= 1; the last block may have fewer.
      order: "sorted" puts large bounds with large ones, which the paper finds best; "average" deals them out like
        cards; "given" leaves the coordinates where they are.

    Returns:
      int32 [K, block_size], -1 where the last block ends.

    Raises:
      ValueError: an unknown order, block_size below 1, no coordinates.
      ShapeError: lipschitz is not one axis.

    Cost: one sort on the host.

    Source: Nutini, Laradji & Schmidt (2022), section 5.2.

    Example:
      >>> import numpy as np
      >>> bcd_partition(np.array([1.0, 9.0, 2.0, 8.0]), 2).tolist()
      [[1, 3], [2, 0]]
    """
    checks.choice("bcd_partition", "order", order, ("sorted", "average", "given"))
    checks.shape("bcd_partition", lipschitz=(lipschitz, "D"))
    ok = isinstance(block_size, int) and not isinstance(block_size, bool) and block_size >= 1
    checks.value("bcd_partition", "block_size", ok, "be a Python int >= 1", block_size)
    bounds = np.asarray(lipschitz)
    checks.value("bcd_partition", "lipschitz", bounds.size > 0, "have at least one entry", bounds.size)
    ranked = np.arange(bounds.size) if order == "given" else np.argsort(-bounds, kind="stable")
    count = -(-bounds.size // block_size)
    padded = np.full(count * block_size, -1, np.int32)
    padded[: bounds.size] = ranked
    return padded.reshape(block_size, count).T.copy() if order == "average" else padded.reshape(count, block_size)


def bcd_partition_forests(A: Any, *, scores: Any = None) -> Forest:
    """Forests that together hold every coordinate, as blocks of `bcd`: each as large as the graph allows.

    The first is that of `forest_solve_order`. Each of the next begins with the coordinates that no earlier one holds,
    and goes on, in the order of the scores, with those that are held already. A grid of any size takes two, of about
    two thirds of it each.

    Args:
      A: [d, d] symmetric, as for `forest_solve_order`: where the Hessian of f may be nonzero.
      scores: None (visit in order), or [d] real.

    Returns:
      A `Forest` whose leaves have a leading axis [K] over the forests.

    Raises:
      ShapeError, ValueError: as `forest_solve_order`.

    Cost: on the host, K passes over the nonzeros, and K no more than the largest degree plus 1.

    Source: Nutini, Laradji & Schmidt (2022), section 5.4.

    Example:
      >>> import numpy as np
      >>> bcd_partition_forests(np.ones((3, 3))).mask.tolist()
      [[True, True, False], [True, False, True]]
    """
    first = forest_solve_order(A, scores=scores)
    size = first.mask.shape[0]
    rank = np.arange(size) if scores is None else np.empty(size, np.int64)
    if scores is not None:
        rank[np.argsort(-np.asarray(scores, np.float64), kind="stable")] = np.arange(size)
    forests, held = [first], np.asarray(first.mask)
    while not held.all():
        forests.append(forest_solve_order(A, scores=np.where(held, -1 - rank, size - rank)))
        held = held | np.asarray(forests[-1].mask)
    levels, width = (max(forest.nodes.shape[axis] for forest in forests) for axis in (0, 1))

    def padded(places: Any) -> np.ndarray:
        # Roots are the last level: what is added comes before the leaves.
        rows, columns = places.shape
        return np.pad(places, ((levels - rows, 0), (0, width - columns)), constant_values=size)

    nodes, parents = (np.stack([padded(getattr(f, name)) for f in forests]) for name in ("nodes", "parents"))
    return Forest(jnp.asarray(nodes), jnp.asarray(parents), jnp.stack([forest.mask for forest in forests]))
