"""Winsorised and trimmed means of per-example gradients: no example moves a coordinate further than its neighbours."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from jaxnum.transforms import per_example


def winsorized_mean(c: int, *, axis: int = 0) -> aggregating.Aggregator:
    """Mean over examples after the c largest and the c smallest values of each coordinate are pulled in.

    With order statistics x_(1) <= ... <= x_(m) of one coordinate over m examples, every value is clipped to
    [x_(c+1), x_(m-c)] and the m values are averaged. c = 0 is the mean, the largest c for odd m the median. Under label
    noise it learns what many examples agree on and memorises little.

    Args:
      c: values pulled in at each end, >= 0, less than half of the examples.
      axis: the axis of examples in every leaf of the updates.

    Returns:
      An `optax.experimental.aggregating.Aggregator`: per-example gradients [m, ...] -> [...]. With an optimiser:
      `aggregating.process(optax.identity(), winsorized_mean(1), optax.adam(1e-3))`.

    Raises:
      ValueError: c is no integer of at least 0; at update, no `params`, fewer than 2 c + 1 examples.
      ShapeError, DtypeError, TreeError: updates without the axis of examples, or that do not match `params`.

    Cost: 4 c + 4 comparisons an example and coordinate for small c; memory of the per-example gradients.

    Numerics: a NaN in a coordinate makes that coordinate NaN; an infinite value is pulled in like any other. Sums in at
      least float32. Real and imaginary parts are coordinates of their own. The mean is biased where gradients are
      skewed, and Adam's second moment sees less variance. Sharded over examples, all of them are gathered.

    Source: S. Chatterjee, P. Zielinski, "On the Generalization Mystery in Deep Learning", 2022, arXiv 2203.10036; there
      c is a percentile.

    Example:
      >>> import jax.numpy as jnp
      >>> gradients = jnp.array([[1.0], [2.0], [3.0], [4.0], [1000.0]])
      >>> update, _ = winsorized_mean(1).update(gradients, (), jnp.zeros(1))
      >>> float(update[0])
      3.0
    """
    c = per_example.count("winsorized_mean", "c", c, 0)

    def combine(updates: Any, size: int) -> Any:
        def leaf(g: jax.Array) -> jax.Array:
            low, high = per_example.smallest(g, c + 1)[-1], -per_example.smallest(-g, c + 1)[-1]
            return per_example.mean(jnp.clip(g, low, high))

        return jax.tree.map(leaf, updates)

    return per_example.aggregator("winsorized_mean", 2 * c + 1, combine, axis)
