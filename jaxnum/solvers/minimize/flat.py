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


def gradient(problem: Any, z: jax.Array, tree: Callable[[jax.Array], PyTree]) -> jax.Array:
    """The gradient of the problem's function at the tree of z.  [d]"""
    return flatten(problem.root(tree(z)))[0].astype(z.dtype)


def value(problem: Any, tree: Callable[[jax.Array], PyTree]) -> Callable[[jax.Array], jax.Array]:
    """The problem's function of the vector."""
    return lambda z: problem.value(tree(z))


def armijo(fn: Callable[[jax.Array], jax.Array], z: jax.Array, step: jax.Array, slope: jax.Array) -> jax.Array:
    """The first t of 1, 1/2, 1/4, ... with f(z + t step) <= f(z) + 1e-4 t slope up to rounding, or 0.  []

    Near a minimum differences of f are rounding long before the gradient is: eight roundings of f are forgiven.
    It is a piecewise constant function of everything, so that nothing is differentiated.

    Args:
      fn: function of a vector; what it captures must carry no derivative.
      z: [d] where to start.
      step: [d] the full step.
      slope: [] gradient . step, negative.
    """
    z, step, slope = jax.lax.stop_gradient((z, step, slope))
    start = fn(z)
    forgiven = 8 * jnp.finfo(start.dtype).eps * jnp.abs(start)

    def refused(carry: tuple) -> jax.Array:
        t, halvings = carry
        return ~(fn(z + t * step) <= start + 1e-4 * t * slope + forgiven) & (halvings < _HALVINGS)

    def halve(carry: tuple) -> tuple:
        t, halvings = carry
        return jnp.where(halvings + 1 == _HALVINGS, 0, t / 2), halvings + 1

    return jax.lax.while_loop(refused, halve, (jnp.ones((), z.dtype), jnp.int32(0)))[0]


_HALVINGS = 40
