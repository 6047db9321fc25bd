"""Trimmed mean of per-example gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

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

    Cost: 4 c + 4 comparisons an example and coordinate for small c.

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
            low, high = per_example.smallest(g, c + 1)[c], -per_example.smallest(-g, c + 1)[c]
            # What lies between is kept, and of the values at a bound those that are not among the c beyond it.
            between = per_example.total(jnp.where((low < g) & (g < high), g, 0))
            at_low, at_high = (per_example.total(kept.astype(g.dtype)) - c for kept in (g <= low, g >= high))
            middle = (between + at_low * low + at_high * high) / (size - 2 * c)
            return jnp.where(low == high, low, middle).astype(g.dtype)

        return jax.tree.map(leaf, updates)

    return per_example.aggregator("trimmed_mean", 2 * c + 1, combine, axis)
