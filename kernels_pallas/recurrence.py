"""What the recurrent operations share: segments in one form, padding, and decays summed inside a chunk.

A recurrence over tokens that is computed chunk by chunk needs, for tokens j <= i of one chunk, the decay between them,
exp(G_i - G_j) with G the running sum of log decays. The sum is kept as a coarse part, multiples of 1/64 that float32
adds and subtracts without error, and a small rest: the difference is then right to rounding even where a decay of -1000
lies before both tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import checks

# A log decay below this is a decay of exactly 0 in every dtype; clipped there, a chunk of 256 still sums exactly.
LOWEST = -1000.0
_GRID = 64.0


def accumulator(dtype: Any) -> Any:
    """States, gates and sums are kept in float32, or in float64 when the inputs are."""
    return jnp.promote_types(dtype, jnp.float32)


def check_log_decay(function: str, log_decay: jax.Array, segment_ids: Any = None) -> jax.Array:
    """A log decay in the dtype of sums, at least `LOWEST`.

    A positive one raises where its value is known; inside a compiled program it becomes NaN, which no one can miss.

    Args:
      function: name of the public function.
      log_decay: natural logarithms of decays, <= 0, any shape; -inf is a decay of 0.
      segment_ids: integer ids of the tokens, the leading axes of log_decay, whose padding may hold anything.

    Raises:
      ValueError: a log decay above 0, outside a trace.
    """
    if not checks.traced(log_decay) and not checks.traced(segment_ids):
        # By NumPy: inside of a trace, JAX would trace this too.
        known = np.asarray(log_decay, np.float64)
        if segment_ids is not None:
            valid = np.asarray(segment_ids) >= 0
            known = known[np.broadcast_to(valid.reshape(*valid.shape, *(1,) * (known.ndim - valid.ndim)), known.shape)]
        highest = float(np.fmax.reduce(known, axis=None, initial=-np.inf))
        remedy = "Give the natural logarithm of a decay in [0, 1], as jax.nn.log_sigmoid does."
        checks.value(function, "log_decay", not highest > 0, "be <= 0", highest, remedy)
    log_decay = log_decay.astype(accumulator(log_decay.dtype))
    return jnp.where(log_decay > 0, jnp.nan, jnp.maximum(log_decay, LOWEST))


def canonical_segments(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Segments counted from 0, and which tokens are not padding.

    Segment 0 continues the initial state; a new one starts where the id differs from that of the last token that is
    not padding. Padding belongs to the segment before it, so that a state passes through it.

    Args:
      segment_ids: integer [B, T]; a negative id is padding.

    Returns:
      segments: int32 [B, T], not decreasing, starting at 0.
      valid: bool [B, T].
    """
    valid = segment_ids >= 0
    T = segment_ids.shape[1]
    if T == 0:
        return segment_ids.astype(jnp.int32), valid
    # The place of the last token that is not padding, up to and before each token.
    last = jax.lax.cummax(jnp.where(valid, jnp.arange(T, dtype=jnp.int32), -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    known = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    starts = valid & (before >= 0) & (segment_ids != known)
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32), valid


def hide_padding(valid: jax.Array | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays [B, T, ...] with zeros in the padding, whatever stood there, NaN included."""
    if valid is None:
        return arrays
    return tuple(jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, 0) for x in arrays)


def pad_tokens(x: jax.Array, multiple: int, *, last: bool = False) -> jax.Array:
    """[B, T, ...] with T rounded up to a multiple: zeros behind, or copies of the last token (of segments).

    Zero keys, values, log decays and betas leave a state as it is.
    """
    missing = -x.shape[1] % multiple
    if not missing:
        return x
    widths = ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, widths, mode="edge") if last else jnp.pad(x, widths)


def split_decay(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A log decay as a multiple of 1/64, whose sums are exact, and a rest below 1/128 in absolute value."""
    coarse = jnp.round(log_decay * _GRID) / _GRID
    return coarse, log_decay - coarse


def cumulative_decay(log_decay: jax.Array, axis: int, segments: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Inclusive running sums of a chunk's log decays, inside each segment, as (coarse, rest).

    G = coarse + rest. A difference is taken part by part, (c_i - c_j) + (r_i - r_j), and is then right to rounding.
    Sums of one segment do not depend, bit for bit, on what another holds.

    Args:
      log_decay: [..., C, ...], one chunk or a batch of them, with at least `LOWEST` in every entry.
      axis: of the tokens of a chunk.
      segments: int32 [..., C], of the shape of log_decay up to `axis`; leading axes may be 1.
    """
    axis %= log_decay.ndim
    C = log_decay.shape[axis]
    place = jnp.arange(C)
    adds = place[:, None] >= place[None, :]
    if segments is not None:
        adds = adds & (segments[..., :, None] == segments[..., None, :])
    adds = adds.astype(log_decay.dtype)
    highest = jax.lax.Precision.HIGHEST

    def running(x: jax.Array) -> jax.Array:
        flat = x.reshape(*x.shape[: axis + 1], -1)
        return jnp.matmul(adds, flat, precision=highest).reshape(x.shape)

    coarse, rest = split_decay(log_decay)
    return running(coarse), running(rest)
