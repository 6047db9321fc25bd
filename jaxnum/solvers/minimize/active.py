"""Newton steps on the coordinates that are at no kink and no bound, once it is clear which these are.

A coordinate is active where the resolvent at z - t g does not move with its argument: soft thresholding to zero, a
bound. Near a solution whose gradients lie inside the subdifferentials, the steps of block coordinate descent leave the
active set as it is; the problem on the others is then smooth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.curvature import hessian_product
from jaxnum.solvers.minimize import flat

# A Newton step must halve the residual; else descent goes on. The next one starts from what the last one reached, so
# that infinitely many of them converge, and finitely many leave the rest to descent.
_SHARE = 0.5


class Active(NamedTuple):
    """What has been seen of the active set.

    Attributes:
      free: [d] bool, the coordinates that are not in it.
      waited: [] int32, steps for which it has stayed the same.
      best: [] the residual after the last Newton step that was taken, else infinite.
    """

    free: jax.Array
    waited: jax.Array
    best: jax.Array


def start(size: int, dtype: Any) -> Active:
    """Nothing seen yet."""
    return Active(jnp.zeros((size,), bool), jnp.int32(0), jnp.full((), jnp.inf, dtype))


def seen(active: Active, free: jax.Array, residual: jax.Array, tried: jax.Array, taken: jax.Array) -> Active:
    """After a step: `tried` where it was a Newton step, `taken` where it was not refused."""
    same = jnp.all(free == active.free) & ~(tried & ~taken)
    best = jnp.where(tried & taken, residual, active.best)
    return Active(free, jnp.where(same, active.waited + 1, 0), best)


def better(active: Active, before: jax.Array, after: jax.Array) -> jax.Array:
    """Whether a Newton step that leads from one residual to another is taken.  [] bool"""
    return after <= _SHARE * jnp.minimum(before, active.best)


def linearized(problem: Any, z: jax.Array, g: jax.Array, steps: jax.Array, tree: Any) -> tuple[jax.Array, jax.Array]:
    """The resolvent p at z - steps g and its slope there, from 0 (active) to 1.  [d], [d]"""
    along = lambda v: flat.backward(problem, v, steps, tree)  # noqa: E731
    return jax.jvp(along, (z - steps * g,), (jnp.ones_like(z),))


def newton(problem: Any, z: jax.Array, g: jax.Array, steps: jax.Array, tree: Any, wanted: jax.Array) -> jax.Array:
    """Where the Newton step of the equation z = resolvent(z - t g) leads, projected onto where h is finite.  [d]

    With R = z - p and the slopes D of the resolvent, (I - D) d + D t H d = -R: an active coordinate goes to p, and the
    free ones solve H_FF d_F + (1 / D - 1) d_F / t = -R_F / D t - H_FA d_A by conjugate gradients, to a share of the
    residual itself, which makes the end quadratic. Where it is not `wanted`, no step of theirs is computed.
    """
    p, slope = linearized(problem, z, g, steps, tree)
    free, R = slope > 0, z - p
    weight = 1 / jnp.where(free, slope * steps, 1)
    product = hessian_product(flat.value(problem, tree), z)
    step = jnp.where(free, 0, -R)
    rhs = jnp.where(free, -R * weight - product(step), 0)

    def matvec(v: jax.Array) -> jax.Array:
        inside = jnp.where(free, v, 0)
        return jnp.where(free, product(inside) + (1 - slope) * weight * inside, v)

    # Where nothing is wanted the right-hand side is 0, which ends the loop before it begins.
    rhs = jnp.where(wanted, rhs, 0)
    share = jax.lax.stop_gradient(jnp.minimum(0.1, jnp.sqrt(jnp.sum(R**2))))

    def solve(matvec: Any, rhs: jax.Array) -> jax.Array:
        return flat.truncated(matvec, rhs, share, jnp.int32(2 * z.size))

    step = step + jnp.where(free, jax.lax.custom_linear_solve(matvec, rhs, solve, symmetric=True), 0)
    moved = jnp.where(free, z + step, p)
    return flat.backward(problem, moved, jnp.zeros_like(z), tree)
