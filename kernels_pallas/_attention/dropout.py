"""Which weights dropout keeps: a hash of (seed, batch, head, query, key), so that it depends on nothing else.

Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror & Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), the
hash behind JAX's default keys: it needs no product of 32 bits, which vector units do not have. Each head of each
sequence has a key of two words. Its counter is (query, 128 a + lane) and serves four keys, 16 bits each:

    key 512 a + 128 w + lane  reads half-word w of the hash (low and high half of the first word, then of the second),

so that a tile of 512 keys is four pieces of whole lanes, side by side. A weight is kept iff its 16 bits are at least
threshold = round(65536 rate); kept weights are multiplied by 65536 / (65536 - threshold), which makes the mean exact.

All arithmetic is in int32, whose sums wrap as those of uint32 do and which every kernel language has.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LANES = 128
SPAN = 4 * LANES
_STEPS = 2**16
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threshold(rate: float) -> int:
    """The rate in steps of 2^-16, at most 65535."""
    return min(round(rate * _STEPS), _STEPS - 1)


def gain(steps: int) -> float:
    """What kept weights are multiplied by."""
    return _STEPS / (_STEPS - steps)


def hash_of(k0: Any, k1: Any, x0: Any, x1: Any) -> tuple[Any, Any]:
    """Threefry-2x32-20 of the counter (x0, x1) under the key (k0, k1); int32, scalars or arrays that broadcast."""
    keys = (k0, k1, k0 ^ k1 ^ np.int32(_PARITY))
    x0, x1 = x0 + k0, x1 + k1
    for n in range(5):
        for turn in _ROTATIONS[n % 2]:
            x0 = x0 + x1
            x1 = lax.shift_left(x1, np.int32(turn)) | lax.shift_right_logical(x1, np.int32(32 - turn))
            x1 = x0 ^ x1
        x0 = x0 + keys[(n + 1) % 3]
        x1 = x1 + keys[(n + 2) % 3] + np.int32(n + 1)
    return x0, x1


def keys_of(seed: Any, batch: int, heads: int) -> jax.Array:
    """The key of each head of each sequence, int32 [B, H, 2]: the hash of (b, h) under the seed's two words."""
    words = lax.bitcast_convert_type(seed, jnp.int32)
    b = lax.broadcasted_iota(jnp.int32, (batch, heads), 0)
    h = lax.broadcasted_iota(jnp.int32, (batch, heads), 1)
    return jnp.stack(hash_of(words[0], words[1], b, h), axis=-1)


def tile(
    k0: Any,
    k1: Any,
    row: Any,
    column: Any,
    shape: tuple[int, int],
    steps: int,
    *,
    aligned: bool,
    keys_first: bool = False,
) -> Any:
    """What is kept of a tile of weights [queries, keys], for use inside kernels.

    Args:
      k0: first word of the head's key, int32 scalar.
      k1: second word.
      row: first query of the tile.
      column: first key, a multiple of 128.
      shape: of the tile; its keys are a multiple of 128.
      steps: `threshold` of the rate.
      aligned: `column` is known to be a multiple of 512, which spares three quarters of the hashes.
      keys_first: give the transpose.

    Returns:
      Bool of that shape, or of its transpose.
    """
    queries, keys = shape
    axis = 0 if keys_first else 1  # along which keys run
    piece = (LANES, queries) if keys_first else (queries, LANES)
    rows = lax.broadcasted_iota(jnp.int32, piece, 1 - axis) + row
    lanes = lax.broadcasted_iota(jnp.int32, piece, axis)
    pieces: list[Any] = []
    for start in range(0, keys, SPAN if aligned else LANES):
        at = jnp.asarray(column, jnp.int32) + np.int32(start)
        halves = _halves(*hash_of(k0, k1, rows, lax.div(at, np.int32(SPAN)) * np.int32(LANES) + lanes))
        if aligned:
            pieces += halves[: (keys - start) // LANES]
        else:
            w = lax.rem(lax.div(at, np.int32(LANES)), np.int32(4))
            x0, x1 = (jnp.where(lax.rem(w, np.int32(2)) == 0, low, high) for low, high in (halves[:2], halves[2:]))
            pieces.append(jnp.where(w < 2, x0, x1))
    bits = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)
    return bits >= steps


def dense(keys: jax.Array, queries: int, length: int, steps: int) -> jax.Array:
    """What is kept of all weights, bool [B, H, T, S]: the definition, key by key."""
    k0, k1 = keys[..., 0][:, :, None, None], keys[..., 1][:, :, None, None]
    i = jnp.arange(queries, dtype=jnp.int32)[:, None]
    j = jnp.arange(length, dtype=jnp.int32)
    halves = _halves(*hash_of(k0, k1, i, j // SPAN * LANES + j % LANES))
    return jnp.select([j // LANES % 4 == w for w in range(4)], halves) >= steps


def _halves(x0: Any, x1: Any) -> list[Any]:
    low = np.int32(0xFFFF)
    return [half for x in (x0, x1) for half in (x & low, lax.shift_right_logical(x, np.int32(16)))]
