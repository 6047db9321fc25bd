"""Lengths of right-hand sides and residuals whose squares may vanish: in float32 they do below 1e-19."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core import trees
from jaxnum.core.status import Status

PyTree = Any


def scale(b: PyTree) -> jax.Array:
    """||b||, which is zero for b = 0 alone."""
    norm = trees.norm(b)
    some = jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(b)])
    return jnp.where((norm == 0) & jnp.any(some), jnp.finfo(norm.dtype).tiny, norm)


def residual(rr: jax.Array, scale: jax.Array, mark: jax.Array) -> tuple[jax.Array, jax.Array]:
    """||r|| from r.r and the mark; where r.r may have vanished, the largest ||r|| of which it could, and stagnation.

    A tolerance above that is met; below it, a zero says nothing.
    """
    limits = jnp.finfo(rr.dtype)
    largest = float(limits.tiny) ** 0.5
    hidden = (rr == 0) & (scale > 0) & (scale < largest / limits.eps)
    mark = jnp.where(hidden & (mark <= 0), jnp.int32(Status.stagnated), mark)
    return jnp.where(hidden, jnp.asarray(largest, rr.dtype), jnp.sqrt(rr)), mark
