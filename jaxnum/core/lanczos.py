"""The recurrence of MINRES, for the solver of that name and for the tangents of symmetric indefinite problems."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import trees

PyTree = Any


class Lanczos(NamedTuple):
    """What one step of preconditioned MINRES hands to the next.

    Attributes:
      v: the Lanczos vector, times gamma.
      z: M v.
      v_old: the one before.
      w: the last direction of x.
      w_old: the one before.
      gamma: sqrt(v.z).
      gamma_old: the one before.
      eta: signed norm of the residual in the metric of M.
      c, s, c_old, s_old: the last two rotations.
      size: the largest column of the tridiagonal matrix so far, below the norm of M A.
      flat: ||A r|| / (size ||r||) of the residual before the step, in the metric of M: zero where it is a null vector.
    """

    v: PyTree
    z: PyTree
    v_old: PyTree
    w: PyTree
    w_old: PyTree
    gamma: jax.Array
    gamma_old: jax.Array
    eta: jax.Array
    c: jax.Array
    s: jax.Array
    c_old: jax.Array
    s_old: jax.Array
    size: jax.Array
    flat: jax.Array


def started(r: PyTree, z: PyTree, gamma: jax.Array) -> Lanczos:
    """The state at residual r, with z = M r and gamma = sqrt(r.z)."""
    still = jax.tree.map(jnp.zeros_like, r)
    zero, one = jnp.zeros_like(gamma), jnp.ones_like(gamma)
    return Lanczos(r, z, still, still, still, gamma, one, gamma, one, zero, one, zero, zero, one)


def normal(state: Lanczos) -> PyTree:
    """The direction z / gamma that A is to be applied to."""
    return trees.scaled(_over(1, state.gamma), state.z)


def orthogonalised(state: Lanczos, p: PyTree, q: PyTree) -> tuple[PyTree, jax.Array]:
    """The next Lanczos vector from q = A p, times its gamma, and p.q."""
    delta = trees.vdot(p, q)
    v = trees.add_scaled(q, -_over(delta, state.gamma), state.v)
    return trees.add_scaled(v, -_over(state.gamma, state.gamma_old), state.v_old), delta


def advanced(
    x: PyTree, r: PyTree, state: Lanczos, p: PyTree, delta: jax.Array, v: PyTree, z: PyTree, gamma: jax.Array
) -> tuple[PyTree, PyTree, Lanczos]:
    """One rotation: the x of least residual in the larger Krylov space, and its residual by recurrence."""
    a0 = state.c * delta - state.c_old * state.s * state.gamma
    a1 = jnp.hypot(a0, gamma)
    a2 = state.s * delta + state.c_old * state.c * state.gamma
    a3 = state.s_old * state.gamma
    c, s = _over(a0, a1), _over(gamma, a1)
    w = trees.add_scaled(trees.add_scaled(p, -a3, state.w_old), -a2, state.w)
    w = trees.scaled(_over(1, a1), w)
    eta = -s * state.eta
    x = trees.add_scaled(x, c * state.eta, w)
    r = trees.combine(s * s, r, c * _over(eta, gamma), v)
    size = jnp.maximum(state.size, jnp.hypot(delta, gamma))
    return (
        x,
        r,
        Lanczos(v, z, state.v, w, state.w, gamma, state.gamma, eta, c, s, state.c, state.s, size, _over(a1, size)),
    )


def _over(a: Any, b: jax.Array) -> jax.Array:
    """The quotient a / b, 0 where b is 0: the Krylov space is then exhausted. NaN passes."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
