"""A smooth function of a tree as a function of one vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from jaxnum.core import trees

PyTree = Any


def flatten(x: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """The vector of all entries, and what makes a tree like x of such a vector.

    Explicitly sharded leaves are gathered: coordinates are chosen and changed by number.
    """
    if not trees.explicitly_sharded(x):
        return ravel_pytree(x)
    shardings = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, x)
    gathered = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, PartitionSpec(*[None] * leaf.ndim)), x)
    vector, unravel = ravel_pytree(gathered)

    def tree(z: jax.Array) -> PyTree:
        return jax.tree.map(lambda leaf, s: jax.sharding.reshard(leaf, s), unravel(z), shardings)

    return vector, tree


def gradient(problem: Any, z: jax.Array, tree: Callable[[jax.Array], PyTree], image: Any = None) -> jax.Array:
    """The gradient of the problem's function at the tree of z, from A z where that is known.  [d]"""
    if image is None:
        return flatten(problem.gradient(tree(z)))[0].astype(z.dtype)
    return jnp.matmul(jax.grad(problem.outer)(image), problem.A, precision="highest")


def backward(problem: Any, z: jax.Array, steps: jax.Array, tree: Callable[[jax.Array], PyTree]) -> jax.Array:
    """The problem's resolvent at the tree of z.  [d]"""
    return flatten(problem.backward(tree(z), tree(steps)))[0].astype(z.dtype)


def penalty(problem: Any, z: jax.Array, tree: Callable[[jax.Array], PyTree]) -> jax.Array:
    """The values h_i(z_i) of the problem's penalty.  [d]"""
    return flatten(problem.penalty(tree(z)))[0].astype(z.dtype)


def residual(problem: Any, z: jax.Array, g: jax.Array, tree: Callable[[jax.Array], PyTree]) -> jax.Array:
    """The norm of the gradient g, or of the natural residual z - resolvent(z - g, 1).  []"""
    root = g if problem.resolvent is None else z - backward(problem, z - g, jnp.ones_like(z), tree)
    return jnp.sqrt(jnp.sum(root**2))


def value(problem: Any, tree: Callable[[jax.Array], PyTree]) -> Callable[[jax.Array], jax.Array]:
    """The problem's function of the vector."""
    return lambda z: problem.value(tree(z))


def armijo(value: Callable[[jax.Array], jax.Array], slope: jax.Array) -> jax.Array:
    """The first t of 1, 1/2, 1/4, ... with value(t) <= value(0) + 1e-4 t slope up to rounding, or 0.  []

    Near a minimum differences of f are rounding long before the gradient is: eight roundings of f are forgiven.

    Args:
      value: function of t; what it captures must carry no derivative, since t is piecewise constant.
      slope: [] its derivative at 0, negative.
    """
    slope = jax.lax.stop_gradient(slope)
    start = value(jnp.zeros_like(slope))
    forgiven = 8 * jnp.finfo(start.dtype).eps * jnp.abs(start)

    def refused(carry: tuple) -> jax.Array:
        t, halvings = carry
        return ~(value(t) <= start + 1e-4 * t * slope + forgiven) & (halvings < _HALVINGS)

    def halve(carry: tuple) -> tuple:
        t, halvings = carry
        return jnp.where(halvings + 1 == _HALVINGS, 0, t / 2), halvings + 1

    return jax.lax.while_loop(refused, halve, (jnp.ones_like(slope), jnp.int32(0)))[0]


_HALVINGS = 40


def truncated(matvec: Any, rhs: jax.Array, share: jax.Array, limit: jax.Array) -> jax.Array:
    """Conjugate gradients from zero to a residual of share |rhs|, or to a direction that does not curve upwards."""

    def unfinished(carry: tuple) -> jax.Array:
        _, _, _, rr, k, flat_direction = carry
        return (rr > share**2 * jnp.sum(rhs**2)) & (k < limit) & ~flat_direction

    def step(carry: tuple) -> tuple:
        d, r, p, rr, k, _ = carry
        q = matvec(p)
        pq = jnp.sum(p * q)
        # Also where it is NaN, which is the gradient's own to report.
        flat_direction = ~(pq > 0)
        alpha = jnp.where(flat_direction, 0, rr / jnp.where(flat_direction, 1, pq))
        r = r - alpha * q
        new = jnp.sum(r**2)
        d = jnp.where(flat_direction & (k == 0), rhs, d + alpha * p)
        return d, r, r + new / rr * p, new, k + 1, flat_direction

    zero = jnp.zeros_like(rhs)
    start = (zero, rhs, rhs, jnp.sum(rhs**2), jnp.int32(0), jnp.bool_(False))
    return jax.lax.while_loop(unfinished, step, start)[0]
