"""Trimmed mean of per-example gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from jaxnum.core.precision import accumulator
from jaxnum.transforms import per_example


def trimmed_mean(c: int, *, axis: int = 0) -> aggregating.Aggregator:
    """Mean over examples without the c largest and the c smallest values of each coordinate.

    Of the order statistics x_(1) <= ... <= x_(m) of a coordinate those from c + 1 to m - c are averaged, m - 2 c of
    them; `winsorized_mean` keeps m terms.

    Args:
      c: values dropped at each end, >= 0, less than half of the examples.
      axis: the axis of examples in every leaf of the updates.

    Returns:
      An `optax.experimental.aggregating.Aggregator`, as `winsorized_mean`.

    Raises:
      ValueError: c is no integer of at least 0; at update, no `params`, fewer than 2 c + 1 examples.
      ShapeError, DtypeError, TreeError: updates without the axis of examples, or that do not match `params`.

    Cost: a sort of the examples, coordinate by coordinate.

    Numerics: a NaN in a coordinate makes that coordinate NaN; up to c infinite values of a sign are dropped. Sums in at
      least float32. Real and imaginary parts are coordinates of their own.

    Source: D. Yin, Y. Chen, K. Ramchandran, P. Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
      Statistical Rates", 2018, arXiv 1803.01498, definition 2.

    Example:
      >>> import jax.numpy as jnp
      >>> gradients = jnp.array([[1.0], [2.0], [3.0], [1000.0]])
      >>> update, _ = trimmed_mean(1).update(gradients, (), jnp.zeros(1))
      >>> float(update[0])
      2.5
    """
    c = per_example.count("trimmed_mean", "c", c, 0)

    def combine(updates: Any, size: int) -> Any:
        def leaf(g: jax.Array) -> jax.Array:
            ordered = jnp.sort(g, axis=0)  # NaN last
            middle = jnp.mean(ordered[c : size - c], axis=0, dtype=accumulator(g.dtype)).astype(g.dtype)
            return jnp.where(jnp.isnan(ordered[-1]), jnp.nan, middle)

        return jax.tree.map(leaf, updates)

    return per_example.aggregator("trimmed_mean", 2 * c + 1, combine, axis)
