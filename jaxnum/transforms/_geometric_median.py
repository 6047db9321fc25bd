"""Geometric median of per-example gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from jaxnum.core.precision import accumulator
from jaxnum.transforms import per_example
from kernels_pallas import checks


def geometric_median(*, iterations: int = 16, eps: float = 1e-6, axis: int = 0) -> aggregating.Aggregator:
    """The point whose distances to the examples' gradients, as whole vectors, have the smallest sum.

    Weiszfeld's iteration z <- sum_i w_i g_i / sum_i w_i with w_i = 1 / max(||g_i - z||, eps s), from the
    coordinate-wise median, s the median distance from there. Fewer than half of the examples may be anything finite and
    move it a bounded way; unlike coordinate-wise medians it turns with the coordinates.

    Args:
      iterations: at least 1; the error falls at a linear rate.
      eps: > 0, least distance relative to s, so that a point on an example has a weight.
      axis: the axis of examples in every leaf of the updates.

    Returns:
      An `optax.experimental.aggregating.Aggregator`, as `winsorized_mean`.

    Raises:
      ValueError: iterations is no integer of at least 1, eps not above 0; at update, no `params`.
      ShapeError, DtypeError, TreeError: updates without the axis of examples, or that do not match `params`.

    Cost: two passes over the per-example gradients an iteration.

    Numerics: in at least float32. Non-finite gradients make everything NaN.

    Source: E. Weiszfeld, Tohoku Mathematical Journal 43, 1937; as an aggregator: K. Pillutla, S. Kakade, Z. Harchaoui,
      "Robust Aggregation for Federated Learning", 2022, algorithm 2.

    Example:
      >>> import jax.numpy as jnp
      >>> gradients = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1000.0, 1000.0]])
      >>> update, _ = geometric_median().update(gradients, (), jnp.zeros(2))
      >>> bool(jnp.all(update < 1.0))
      True
    """
    iterations = per_example.count("geometric_median", "iterations", iterations, 1)
    checks.value("geometric_median", "eps", eps > 0, "be greater than 0", eps)

    def combine(updates: Any, size: int) -> Any:
        wide = jax.tree.map(lambda g: g.astype(accumulator(g.dtype)), updates)

        def distances(z: Any) -> jax.Array:
            squares = jax.tree.map(lambda g, c: jnp.sum(jnp.abs(g - c).reshape(size, -1) ** 2, axis=1), wide, z)
            return jnp.sqrt(sum(jax.tree.leaves(squares)))

        # From the mean a single wild example would set the scale.
        start = jax.tree.map(lambda g: per_example.smallest(g, size // 2 + 1)[-1], wide)
        least = eps * jnp.median(distances(start))

        def step(z: Any, _: None) -> tuple[Any, None]:
            # All alike: the least distance is 0, and so are all of them.
            weights = 1 / jnp.maximum(jnp.maximum(distances(z), least), jnp.finfo(least.dtype).tiny)
            weights = weights / weights.max()
            weights = weights / weights.sum()
            return jax.tree.map(lambda g: jnp.tensordot(weights.astype(g.dtype), g, axes=1), wide), None

        z = jax.lax.scan(step, start, length=iterations)[0]
        return jax.tree.map(lambda c, g: c.astype(g.dtype), z, updates)

    return per_example.aggregator("geometric_median", 1, combine, axis)
