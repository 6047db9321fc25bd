"""Median of the means of groups of per-example gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from jaxnum.core.precision import accumulator
from jaxnum.transforms import per_example


def median_of_means(groups: int | None = 3, *, axis: int = 0) -> aggregating.Aggregator:
    """Mean of each of several groups of examples, then the median of the means, coordinate by coordinate.

    Fewer than half of the groups may hold anything at all, and the result stays within the range of the others' means.
    Three groups are the cheap choice; as many as examples give the coordinate-wise median, one gives the mean. For an
    even number of groups it is the mean of the two in the middle.

    Args:
      groups: number of groups, at least 1; None makes every example its own. Group j has the examples from
        j m // groups on: a batch must come in random order, as that of any sampler does. Sorted data defeat it.
      axis: the axis of examples in every leaf of the updates.

    Returns:
      An `optax.experimental.aggregating.Aggregator`, as `winsorized_mean`.

    Raises:
      ValueError: groups is no integer of at least 1; at update, no `params`, fewer examples than groups.
      ShapeError, DtypeError, TreeError: updates without the axis of examples, or that do not match `params`.

    Cost: one pass over the examples and groups^2 / 2 comparisons a coordinate. Where the examples' gradients do not fit
      in memory, take those of the groups' mean losses, [groups, ...], by `jax.lax.map`, and `median_of_means(None)`.

    Numerics: means in at least float32. Real and imaginary parts are coordinates of their own. A NaN in any group's
      mean of a coordinate makes that coordinate NaN.

    Source: S. Chatterjee, P. Zielinski, "On the Generalization Mystery in Deep Learning", 2022, arXiv 2203.10036, the
      variant RM3 for three groups.

    Example:
      >>> import jax.numpy as jnp
      >>> gradients = jnp.array([[1.0], [3.0], [4.0], [6.0], [1000.0], [-5.0]])
      >>> update, _ = median_of_means(3).update(gradients, (), jnp.zeros(1))
      >>> float(update[0])
      5.0
    """
    if groups is not None:
        groups = per_example.count("median_of_means", "groups", groups, 1, ", or None")

    def combine(updates: Any, size: int) -> Any:
        count = size if groups is None else groups
        edges = [j * size // count for j in range(count + 1)]

        def leaf(g: jax.Array) -> jax.Array:
            wide = g.astype(accumulator(g.dtype))
            means = jnp.stack([wide[a:b].mean(axis=0) for a, b in zip(edges[:-1], edges[1:], strict=True)])
            low = per_example.smallest(means, count // 2 + 1)
            median = low[-1] if count % 2 else (low[-1] + low[-2]) / 2
            return median.astype(g.dtype)

        return jax.tree.map(leaf, updates)

    return per_example.aggregator("median_of_means", groups or 1, combine, axis)
