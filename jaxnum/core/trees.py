"""Vector arithmetic on pytrees, accumulated in float32 at least and safe under explicit sharding."""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator

PyTree = Any


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """Real part of the inner product sum conj(a) b over all leaves.

    Written as a product and a sum, not `jnp.vdot`: the latter raises ShardingTypeError on explicitly sharded
    operands.
    """
    leaves = [
        jnp.sum(jnp.real(jnp.conj(x) * y), dtype=accumulator(jnp.real(x).dtype))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return reduce(jnp.add, leaves)


def inner(a: PyTree, b: PyTree) -> jax.Array:
    """The inner product sum conj(a) b over all leaves; complex where a leaf is."""
    leaves = [
        jnp.sum(jnp.conj(x) * y, dtype=accumulator(jnp.result_type(x, y)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return reduce(jnp.add, leaves)


def norm(a: PyTree) -> jax.Array:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(vdot(a, a))


def safe_norm(a: PyTree) -> jax.Array:
    """The same where squares would overflow or vanish (in float32 below 1e-19), at the price of one more pass."""
    largest = reduce(
        jnp.maximum, [jnp.max(jnp.abs(x), initial=0).astype(accumulator(jnp.real(x).dtype)) for x in jax.tree.leaves(a)]
    )
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return unit * norm(jax.tree.map(lambda x: x / unit.astype(x.dtype), a))


def add(a: PyTree, b: PyTree) -> PyTree:
    """Leafwise a + b."""
    return jax.tree.map(jnp.add, a, b)


def sub(a: PyTree, b: PyTree) -> PyTree:
    """Leafwise a - b."""
    return jax.tree.map(jnp.subtract, a, b)


def add_scaled(a: PyTree, scale: jax.Array, b: PyTree) -> PyTree:
    """Leafwise a + scale b in each leaf's own dtype."""
    return jax.tree.map(lambda x, y: x + scale.astype(x.dtype) * y, a, b)


def combine(s: jax.Array, a: PyTree, t: jax.Array, b: PyTree) -> PyTree:
    """Leafwise s a + t b in the dtype of a's leaves."""
    return jax.tree.map(lambda x, y: s.astype(x.dtype) * x + t.astype(x.dtype) * y, a, b)


def scaled(scale: jax.Array, a: PyTree) -> PyTree:
    """Leafwise scale a in each leaf's own dtype."""
    return jax.tree.map(lambda x: scale.astype(x.dtype) * x, a)


def where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Leafwise choice by one scalar condition; typed PRNG keys included."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def explicitly_sharded(a: PyTree) -> bool:
    """Whether a leaf's type names a mesh axis, so that operands of other types must be resharded by hand."""
    shardings = [getattr(jax.typeof(x), "sharding", None) for x in jax.tree.leaves(a)]
    return any(s is not None and any(axis is not None for axis in s.spec) for s in shardings)


def size(a: PyTree) -> int:
    """Number of entries over all leaves."""
    return sum(jnp.size(x) for x in jax.tree.leaves(a))


def strong(a: PyTree) -> PyTree:
    """Leaves as arrays without weak types, so that a loop's carry keeps its dtype."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.result_type(x)), a)
