"""Learning rate and momentum from the ends of a spectrum that stochastic Lanczos quadrature has found."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.curvature import SpectralDensity
from kernels_pallas import checks


class HeavyBall(NamedTuple):
    """What `slq_learning_rate` returns, [] each."""

    learning_rate: jax.Array
    momentum: jax.Array  # in [0, 1)
    largest: jax.Array  # eigenvalue λ_1, before the safety factor
    smallest: jax.Array  # eigenvalue λ_k that momentum is tuned to


def slq_learning_rate(
    density: SpectralDensity,
    *,
    safety: float | jax.Array = 1.1,
    floor: float | jax.Array | None = None,
    min_weight: float | jax.Array = 0.0,
) -> HeavyBall:
    """The learning rate and momentum that are best for the spectrum of a Hessian or Gauss-Newton matrix.

    The heavy ball x' = x - lr g + momentum (x - x_before) on a quadratic with eigenvalues in [λ_k, λ_1] contracts
    fastest, by (√κ - 1) / (√κ + 1) a step with κ = λ_1 / λ_k, at

        lr = (2 / (√λ_1 + √λ_k))²,  momentum = ((√λ_1 - √λ_k) / (√λ_1 + √λ_k))².

    λ_1 is the largest node of the quadrature times `safety`, λ_k the smallest node that counts. Take the Gauss-Newton
    matrix: momentum says nothing about negative curvature, which is left out.

    Args:
      density: as of `jaxnum.curvature.spectral_density`, of a few probes and 20 to 60 steps.
      safety: at least 1. Lanczos comes to λ_1 from below, and with λ_1 taken too small by a share of 1 / κ the heavy
        ball diverges.
      floor: in [0, 1): nodes up to floor * λ_1 are the null space or the bulk, not to be tuned to. Default:
        rounding. Larger, it trades speed in flat directions for less momentum.
      min_weight: in [0, 1): of a node's share of the spectrum, below which λ_k is not taken from it.

    Returns:
      A `HeavyBall`; NaN where no node is positive.

    Raises:
      ValueError: a single number out of range, unless traced.

    Cost: nothing beside the quadrature. Every epoch is often enough: the spectrum changes slowly.

    Numerics: in the dtype of the nodes. NaN in a node stays NaN. The spectrum of a batch is that of `batch_eigenvalue`:
      rates of different batch sizes differ by it.

    Source: D. Granziol, S. Zohren, S. Roberts, 2022, arXiv 2006.09092, section 6; B. T. Polyak, "Some methods of
      speeding up the convergence of iteration methods", 1964. Safety, floor and least weight are ours.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxnum.curvature import hessian_product, spectral_density
      >>> loss = lambda x: 0.5 * jnp.sum(jnp.array([1.0, 4.0, 16.0]) * x**2)
      >>> x = jnp.ones(3)
      >>> optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0, momentum=0.0)
      >>> state = optimiser.init(x)
      >>> for epoch in range(2):
      ...     rule = spectral_density(hessian_product(loss, x), x, jax.random.key(epoch), num_probes=2, num_steps=3)
      ...     ball = slq_learning_rate(rule, safety=1.0)
      ...     state.hyperparams.update(learning_rate=ball.learning_rate, momentum=ball.momentum)
      ...     updates, state = optimiser.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{ball.learning_rate:.3f} {ball.momentum:.3f}")
      0.160 0.360
    """
    checks.number("slq_learning_rate", "safety", lambda safety: safety >= 1, "be at least 1", safety)
    for name, given in (("floor", floor), ("min_weight", min_weight)):
        checks.number("slq_learning_rate", name, lambda share: 0 <= share < 1, "be in [0, 1)", given)
    nodes, weights = density.nodes, density.weights
    if floor is None:
        floor = 8 * float(jnp.finfo(nodes.dtype).eps) * jnp.sqrt(density.size)
    # Not `weights > 0`: NaN is to show.
    largest = jnp.max(jnp.where(weights <= 0, -jnp.inf, nodes))
    largest = jnp.where(largest <= 0, jnp.nan, largest)
    counts = (nodes > floor * largest) & (weights > min_weight)
    # Where nothing else counts, the largest.
    smallest = jnp.minimum(jnp.min(jnp.where(counts, nodes, jnp.inf)), largest)
    top, bottom = jnp.sqrt(safety * largest), jnp.sqrt(smallest)
    return HeavyBall((2 / (top + bottom)) ** 2, ((top - bottom) / (top + bottom)) ** 2, largest, smallest)
