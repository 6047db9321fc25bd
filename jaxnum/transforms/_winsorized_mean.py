"""Winsorised and trimmed means of per-example gradients: no example moves a coordinate further than its neighbours."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax.experimental import aggregating

from jaxnum.core.precision import accumulator
from jaxnum.transforms import per_example
from kernels_pallas import checks


def winsorized_mean(c: float, *, method: str = "order", axis: int = 0) -> aggregating.Aggregator:
    """Mean over examples after the c largest and the c smallest values of each coordinate are pulled in.

    With order statistics x_(1) <= ... <= x_(m) of one coordinate over m examples, every value is clipped to
    [x_(c+1), x_(m-c)] and the m values are averaged. c = 0 is the mean, the largest c for odd m the median. Under label
    noise it learns what many examples agree on and memorises little.

    Args:
      c: values pulled in at each end, an integer >= 0, less than half of the examples; a percentage from 0 to 50 where
        method = "linear".
      method: "order" for the bounds above; "linear" for the c-th and the (100 - c)-th percentile, interpolated between
        order statistics as `jnp.percentile` does, which follows the size of the batch.
      axis: the axis of examples in every leaf of the updates.

    Returns:
      An `optax.experimental.aggregating.Aggregator`: per-example gradients [m, ...] -> [...]. With an optimiser:
      `aggregating.process(optax.identity(), winsorized_mean(1), optax.adam(1e-3))`.

    Raises:
      ValueError: c is out of range, method is unknown; at update, no `params`, or fewer than 2 c + 1 examples, where c
        counts them.
      ShapeError, DtypeError, TreeError: updates without the axis of examples, or that do not match `params`.

    Cost: 4 c + 4 comparisons an example and coordinate for small c; memory of the per-example gradients, which
      `winsorized_value_and_grad` does without.

    Numerics: a NaN in a coordinate makes that coordinate NaN; an infinite value is pulled in like any other. Sums in at
      least float32. Real and imaginary parts are coordinates of their own. The mean is biased where gradients are
      skewed, and Adam's second moment sees less variance. Sharded over examples, all of them are gathered.

    Source: S. Chatterjee, P. Zielinski, "On the Generalization Mystery in Deep Learning", 2022, arXiv 2203.10036; there
      c is a percentage.

    Example:
      >>> import jax.numpy as jnp
      >>> gradients = jnp.array([[1.0], [2.0], [3.0], [4.0], [1000.0]])
      >>> update, _ = winsorized_mean(1).update(gradients, (), jnp.zeros(1))
      >>> float(update[0])
      3.0
    """
    name = "winsorized_mean"
    checks.choice(name, "method", method, ("order", "linear"))
    if method == "order":
        c = per_example.count(name, "c", c, 0)
    else:
        number = isinstance(c, (int, float, np.integer, np.floating)) and not isinstance(c, bool)
        checks.value(name, "c", number and 0 <= c <= 50, "be a percentage from 0 to 50", c)

    def combine(updates: Any, size: int) -> Any:
        # Before the lowest value that stays as it is: how many others, and how far from the next.
        place, between = (c, 0.0) if method == "order" else divmod(c / 100 * (size - 1), 1)

        def lowest(g: jax.Array) -> jax.Array:
            at = int(place)
            ordered = per_example.smallest(g, at + 1 + (between > 0))
            return (1 - between) * ordered[at] + between * ordered[at + 1] if between else ordered[at]

        def leaf(g: jax.Array) -> jax.Array:
            wide = g.astype(accumulator(g.dtype)) if between else g
            return per_example.mean(jnp.clip(wide, lowest(wide), -lowest(-wide))).astype(g.dtype)

        return jax.tree.map(leaf, updates)

    return per_example.aggregator(name, 2 * int(c) + 1 if method == "order" else 1, combine, axis)
