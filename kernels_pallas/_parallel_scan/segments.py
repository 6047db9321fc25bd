"""What segment ids mean to a scan: where its state starts again, and which tokens it passes over."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.recurrence import canonical_segments


class Marks(NamedTuple):
    """What a scan does at each token.

    Attributes:
      valid: bool [B, T], False at padding.
      restart: bool [B, T], True where the state is zero before the token.
    """

    valid: jax.Array
    restart: jax.Array


def marks(segment_ids: Any, *, reverse: bool) -> Marks:
    """Where the state restarts, and what is padding.

    Args:
      segment_ids: integer [B, T]; negative ids are padding.
      reverse: whether the scan runs from the end.
    """
    ids = jnp.flip(segment_ids, 1) if reverse else segment_ids
    segments, valid = canonical_segments(ids)
    found = Marks(valid, segments != jnp.concatenate([segments[:, :1], segments[:, :-1]], axis=1))
    return Marks(*(jnp.flip(x, 1) for x in found)) if reverse else found
