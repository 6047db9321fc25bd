"""The linear system of a Newton step for entropic transport, row potentials eliminated, and its two solvers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_CG_STEPS = 2000


class System(NamedTuple):
    """(I - A^T A + shift I) w = q in variables scaled by sqrt(d), A = diag(rows) P diag(cols).

    Attributes:
      plan: the plan P [n, m], one of `plans`.
      rows: sqrt(tau_a / P 1) [n].
      cols: 1 / sqrt(d) [m], d the Jacobian's diagonal in g.
      null: unit vector along which I - A^T A vanishes in the balanced case, else zero.
      shift: real scalar > 0.
      tolerance: of the conjugate gradients, relative.
    """

    plan: Any
    rows: jax.Array
    cols: jax.Array
    null: jax.Array
    shift: jax.Array
    tolerance: jax.Array


def apply(system: System, w: jax.Array) -> jax.Array:
    """(I - A^T A + shift I) w."""
    image = system.rows**2 * system.plan.apply(system.cols * w)
    return (1 + system.shift) * w - system.cols * system.plan.apply_transpose(image)


def cholesky(system: System, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The solution for right-hand side q, by factorisation of a stored plan's system, and 0 iterations."""
    A = system.rows[:, None] * system.plan.P * system.cols
    S = (1 + system.shift) * jnp.eye(q.size, dtype=q.dtype) - jnp.matmul(A.T, A, precision=jax.lax.Precision.HIGHEST)
    # What is added has no part in q, so it changes nothing but the factorisation.
    S = S + system.null[:, None] * system.null
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(S), q), jnp.int32(0)


def conjugate_gradients(system: System, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The solution for right-hand side q to the system's tolerance, Jacobi-preconditioned, and the iterations."""
    diagonal = jnp.maximum(1 - system.plan.squares(system.rows**2) * system.cols**2, 0) + system.shift

    def unfinished(carry: tuple) -> jax.Array:
        _, _, _, rz, k = carry
        return (rz > goal) & (k < _CG_STEPS)

    def step(carry: tuple) -> tuple:
        w, r, p, rz, k = carry
        image = apply(system, p)
        alpha = rz / jnp.sum(p * image)
        w, r = w + alpha * p, r - alpha * image
        z = r / diagonal
        new = jnp.sum(r * z)
        return w, r, z + new / rz * p, new, k + 1

    z = q / diagonal
    rz = jnp.sum(q * z)
    goal = system.tolerance**2 * rz
    w, *_, k = jax.lax.while_loop(unfinished, step, (jnp.zeros_like(q), q, z, rz, jnp.int32(0)))
    return w, k
