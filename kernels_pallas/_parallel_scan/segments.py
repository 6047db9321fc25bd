"""What segment ids mean to a recurrence: where its state starts again, and which tokens it passes over."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Marks(NamedTuple):
    """What a recurrence does at each token.

    Attributes:
      valid: bool [B, T], False at padding.
      restart: bool [B, T], True where the state is zero before the token.
    """

    valid: jax.Array
    restart: jax.Array


def marks(segment_ids: Any, *, reverse: bool) -> Marks:
    """Where the state restarts, and what is padding.

    A token restarts the state when its id differs from that of the last token before it that is not padding; before the
    first of them there is none, so that the first segment continues the initial state.

    Args:
      segment_ids: integer [B, T]; negative ids are padding.
      reverse: whether the recurrence runs from the end.
    """
    ids = jnp.flip(segment_ids, 1) if reverse else segment_ids
    valid = ids >= 0
    at = jnp.where(valid, lax.broadcasted_iota(jnp.int32, ids.shape, 1), -1)
    last = lax.cummax(at, axis=1)
    before = jnp.concatenate([jnp.full_like(last[:, :1], -1), last[:, :-1]], axis=1)
    other = ids != jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=1)
    found = Marks(valid, valid & (before >= 0) & other)
    return Marks(*(jnp.flip(x, 1) for x in found)) if reverse else found
