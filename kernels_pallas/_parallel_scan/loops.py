"""Loops over the tokens of one sequence that read and write arrays where they lie; for CPUs."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax


def each(row: Callable, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """A function of one sequence, for all of a batch.

    The rows of a single sequence have no axis of size 1, with which XLA's CPU compiler at times gives up vectors.

    Args:
      row: `row(*arrays)` without the batch, a tuple of arrays.
      *arrays: with the batch first, or 1 where the batch shares.
    """
    if max(x.shape[0] for x in arrays) == 1:
        return tuple(x[None] for x in row(*(x[0] for x in arrays)))
    shared = [x.shape[0] == 1 for x in arrays]
    given = (x[0] if s else x for x, s in zip(arrays, shared, strict=True))
    return jax.vmap(row, in_axes=[None if s else 0 for s in shared])(*given)


def at(x: jax.Array, t: jax.Array) -> jax.Array:
    """Row t."""
    return lax.dynamic_index_in_dim(x, t, 0, keepdims=False)


def put(x: jax.Array, row: jax.Array, t: jax.Array) -> jax.Array:
    """x with row t replaced, in its own dtype."""
    return lax.dynamic_update_index_in_dim(x, row.astype(x.dtype), t, 0)
