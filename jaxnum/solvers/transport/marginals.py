"""What the solvers of entropic optimal transport share: whether a problem is feasible, and how wrong potentials are."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.status import Status
from jaxnum.core.transport import Transport

Pair = tuple[jax.Array, jax.Array]


def infeasible(problem: Transport) -> jax.Array:
    """`Status.infeasible` for weights that no plan can have and scalars out of their ranges, else 0."""
    epsilon, tau_a, tau_b = problem.scalars
    mass_a, mass_b = problem.masses
    # Normalised weights sum to 1 up to the rounding of each of them, so the slack is that of their own dtype.
    rounding = precision.attainable(problem.a) * 4 * (problem.a.size + problem.b.size) ** 0.5
    good = (mass_a > 0) & (mass_b > 0) & jnp.isfinite(mass_a) & jnp.isfinite(mass_b)
    good &= ~problem.balanced | (jnp.abs(mass_a - mass_b) <= rounding * mass_a)
    good &= (epsilon > 0) & (tau_a > 0) & (tau_a <= 1) & (tau_b > 0) & (tau_b <= 1)
    return jnp.where(good, jnp.int32(0), jnp.int32(Status.infeasible))


def tied(problem: Transport, x: Pair) -> Transport:
    """The problem with weights of which XLA believes that they change with x.

    Otherwise it computes masks and logarithms of the weights before the loop, each a kernel to compile and one more
    array to read.
    """
    a, b = jax.lax.optimization_barrier((problem.a, problem.b, x))[:2]
    return replace(problem, a=a, b=b)


def laid(lse: jax.Array, weights: jax.Array) -> jax.Array:
    """Log-sum-exps with the sharding of the weights, where shardings are explicit."""
    if trees.explicitly_sharded((lse, weights)):
        return jax.sharding.reshard(lse, jax.typeof(weights).sharding)
    return lse


def error(x: Pair, rows: jax.Array, cols: jax.Array, problem: Transport) -> jax.Array:
    """What a solve is judged by: ||P 1 - a||_1 + ||P^T 1 - b||_1, or unbalanced the next change of the log scalings.

    From the row log-sum-exps at g and the column log-sum-exps at f.
    """
    problem = tied(problem, x)
    epsilon, tau_a, tau_b = problem.scalars
    wrong_a, next_a = _errors(x[0], epsilon, rows, problem.a, tau_a)
    wrong_b, next_b = _errors(x[1], epsilon, cols, problem.b, tau_b)
    return jnp.where(problem.balanced, wrong_a + wrong_b, jnp.maximum(next_a, next_b))


def scale(problem: Transport) -> jax.Array:
    """What `error` is relative to: the mass that is moved, or 1 where log scalings are compared."""
    mass = problem.masses[0]
    return jnp.where(problem.balanced & (mass > 0), mass, 1)


def _errors(
    potential: jax.Array, epsilon: jax.Array, lse: jax.Array, weights: jax.Array, tau: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """L1 error of a marginal, and the sup-norm of the next change of its log scaling."""
    held = weights > 0
    u = jnp.where(held, potential, 0).astype(lse.dtype) / epsilon
    wrong = jnp.where(held, jnp.abs(jnp.exp(u + lse) - weights.astype(lse.dtype)), 0)
    logs = jnp.log(jnp.where(held, weights, 1)).astype(lse.dtype)
    change = jnp.where(held, jnp.abs(tau * (logs - lse) - u), 0)
    return jnp.sum(wrong), jnp.max(change)
