"""From what a user gives to one form: checks, groups of heads, direction, padding, the prefix and the normaliser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import checks
from kernels_pallas._linear_attention.config import Config, Operands
from kernels_pallas.recurrence import accumulator, canonical_segments, check_log_decay, hide_padding

NAME = "linear_attention"
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
_LAYOUT = "The layout is [*batch, tokens, heads, head dimension]."
_SMALLEST, _LARGEST = 16, 256
# A normaliser closer to 0 than this counts as this.
_SMALL = 1e-6

Finish = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def prepare(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    prefix_length: int | jax.Array | None = None,
    normalize: bool = False,
    reverse: bool = False,
    chunk_size: int | None = None,
) -> tuple[Config, Operands, Finish]:
    """Check the arguments; give the static part, the arrays of the recurrence, and what makes results of its results.

    The last takes o and the state of `Operands` to those of the user.
    """
    checks.arrays(NAME, q=q, k=k, v=v)
    checks.dtype(NAME, DTYPES, q=q)
    checks.same_dtype(NAME, remedy="Cast them to one dtype.", q=q, k=k, v=v)
    sizes = checks.shape(NAME, remedy=_LAYOUT, q=(q, "*B T Hq K"), k=(k, "*B T Hk K"), v=(v, "*B T Hv V"))
    batch, T, K, V = sizes["B"], sizes["T"], sizes["K"], sizes["V"]
    H = heads_of(NAME, sizes)
    chunk = check_chunk_size(NAME, chunk_size)
    normalize, reverse = checks.flag(NAME, "normalize", normalize), checks.flag(NAME, "reverse", reverse)
    narrow = jnp.result_type(q)
    dtype = accumulator(jnp.result_type(q))
    B = math.prod(batch)
    lead = " ".join(map(str, batch))

    q, k, v = (grouped(jnp.asarray(x).reshape(B, T, *x.shape[-2:]), H) for x in (q, k, v))
    if normalize:
        if narrow == jnp.float16:
            # What is divided may be more than float16 holds, though the quotient is not.
            q, k, v = (x.astype(dtype) for x in (q, k, v))
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    state = check_state(NAME, initial_state, f"{lead} {H} {K} {V + normalize}", dtype)
    state = jnp.zeros((B, H, K, V + normalize), dtype) if state is None else state.reshape(B, *state.shape[-3:])
    segments = valid = None
    if segment_ids is not None:
        checks.shape(NAME, remedy="One id a token.", segment_ids=(segment_ids, f"{lead} {T}"))
        checks.dtype(NAME, "integer", segment_ids=segment_ids)
        segments = jnp.asarray(segment_ids).reshape(B, T)
    if log_decay is not None:
        log_decay = _check_decay(log_decay, segment_ids, batch, T, H, K).astype(dtype)
    scale, q = check_scale(NAME, scale, K, q)

    if reverse:
        q, k, v = (jnp.flip(x, 1) for x in (q, k, v))
        segments = None if segments is None else jnp.flip(segments, 1)
        log_decay = jnp.flip(log_decay, 1) if log_decay is not None and log_decay.ndim > 2 else log_decay
    if segments is not None:
        segments, valid = canonical_segments(segments)
        q, k, v = hide_padding(valid, q, k, v)
        if log_decay is not None:
            [log_decay] = hide_padding(valid, _by_token(log_decay, T))
    operands = Operands(q, k, v, state, log_decay, segments)
    if prefix_length is not None:
        for argument, given in (("segment_ids", segment_ids is not None), ("reverse", reverse)):
            what = "be absent where `prefix_length` is given"
            checks.value(NAME, argument, not given, what, "both", "Call it once for each document.")
        operands = _read_prefix(operands, _check_prefix(prefix_length, batch, T))

    def finish(o: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        if valid is not None:
            [o] = hide_padding(valid, o)
        if reverse:
            o = jnp.flip(o, 1)
        if normalize:
            o = divide(o, dtype).astype(narrow)
        return o.reshape(*batch, *o.shape[1:]), state.reshape(*batch, *state.shape[1:])

    return Config(scale, chunk), operands, finish


def divide(o: jax.Array, dtype: Any) -> jax.Array:
    """The last column of an output divides the others."""
    values, normaliser = o[..., :-1].astype(dtype), o[..., -1:].astype(dtype)
    return (values / jnp.where(jnp.abs(normaliser) < _SMALL, _SMALL, normaliser)).astype(o.dtype)


# --- Checks. ----------------------------------------------------------------------------------------------------------


def check_chunk_size(function: str, chunk_size: int | None) -> int | None:
    """A power of two between 16 and 256, or None."""
    ok = chunk_size is None or (isinstance(chunk_size, (int, np.integer)) and not isinstance(chunk_size, bool))
    ok = ok and (chunk_size is None or (_SMALLEST <= chunk_size <= _LARGEST and not chunk_size & (chunk_size - 1)))
    checks.value(function, "chunk_size", bool(ok), f"be a power of two from {_SMALLEST} to {_LARGEST}", chunk_size)
    return None if chunk_size is None else int(chunk_size)


def check_state(function: str, state: jax.Array | None, spec: str, dtype: Any) -> jax.Array | None:
    """A state of this shape, in the dtype of sums."""
    if state is None:
        return None
    checks.shape(function, remedy="States are [*batch, heads, key size, value size].", initial_state=(state, spec))
    checks.dtype(function, [dtype], remedy="States are kept in the dtype of sums.", initial_state=state)
    return jnp.asarray(state)


def check_scale(function: str, scale: float | jax.Array | None, K: int, q: jax.Array) -> tuple[float, jax.Array]:
    """A static scale, and q, which takes a traced one."""
    if scale is None:
        return max(K, 1) ** -0.5, q
    known = isinstance(scale, (int, float)) or jnp.issubdtype(getattr(scale, "dtype", jnp.bool_), jnp.floating)
    known = known or jnp.issubdtype(getattr(scale, "dtype", jnp.bool_), jnp.integer)
    checks.value(function, "scale", known, "be a real number", scale, error=TypeError)
    checks.shape(function, scale=(scale, ""))
    if checks.traced(scale):
        return 1.0, (q * scale).astype(q.dtype)
    number = float(scale)
    checks.value(function, "scale", math.isfinite(number), "be a finite number", number)
    return number, q


def heads_of(function: str, sizes: dict[str, Any]) -> int:
    """The heads of the state, which those of each argument divide."""
    H = max(sizes["Hq"], sizes["Hk"], sizes["Hv"])
    for argument in "qkv":
        heads = sizes[f"H{argument}"]
        checks.value(
            function,
            argument,
            heads > 0 and H % heads == 0,
            f"have a number of heads that divides {H}, the largest of `q`, `k` and `v`",
            heads,
            "Heads share those of another argument in equal groups.",
            checks.ShapeError,
        )
    return H


def grouped(x: jax.Array, H: int) -> jax.Array:
    """[..., H / group, D] -> [..., H, D]: head h reads head h // group."""
    return x if x.shape[-2] == H else jnp.repeat(x, H // x.shape[-2], axis=-2)


def _check_decay(
    log_decay: jax.Array, segment_ids: jax.Array | None, batch: tuple[int, ...], T: int, H: int, K: int
) -> jax.Array:
    """[B, H], [B, T, H] or [B, T, H, K]."""
    checks.dtype(NAME, "floating", log_decay=log_decay)
    got = tuple(jnp.shape(log_decay))
    wanted = {(H,): (), (*batch, T, H): (T,), (*batch, T, H, K): (T,)}
    checks.value(
        NAME,
        "log_decay",
        got in wanted,
        "have shape " + " or ".join(map(str, wanted)),
        got,
        "Give one a head, one a token and head, or one a token, head and key channel.",
        checks.ShapeError,
    )
    B = math.prod(batch)
    log_decay = check_log_decay(NAME, jnp.asarray(log_decay), None if got == (H,) else segment_ids)
    if got == (H,):
        return jnp.broadcast_to(log_decay, (B, H))
    return log_decay.reshape(B, T, *got[len(batch) + 1 :])


def _check_prefix(prefix_length: int | jax.Array, batch: tuple[int, ...], T: int) -> jax.Array:
    """int32 [B], between 0 and T where that is known."""
    checks.dtype(NAME, "integer", prefix_length=prefix_length)
    shape = jnp.shape(prefix_length)
    if shape != ():
        checks.shape(
            NAME, remedy="One for all, or one a row.", prefix_length=(prefix_length, " ".join(map(str, batch)))
        )
    if not checks.traced(prefix_length):
        low, high = int(np.min(prefix_length, initial=T)), int(np.max(prefix_length, initial=0))
        ok = low >= 0 and high <= T
        checks.value(NAME, "prefix_length", ok, f"be from 0 to the number of tokens, {T}", high if high > T else low)
    return jnp.broadcast_to(jnp.asarray(prefix_length, jnp.int32), batch).reshape(math.prod(batch))


# --- Prefix. ----------------------------------------------------------------------------------------------------------


def _by_token(log_decay: jax.Array, T: int) -> jax.Array:
    """A decay that is constant over the tokens, for each of them."""
    if log_decay.ndim > 2:
        return log_decay
    return jnp.broadcast_to(log_decay[:, None], (log_decay.shape[0], T, log_decay.shape[1]))


def _read_prefix(operands: Operands, length: jax.Array) -> Operands:
    """The prefix goes into the state before the first token, and its tokens no longer write.

    The decay from a token of the prefix to its end is a sum that starts at the end, so that what counts is not the
    difference of large sums.
    """
    k, v, log_decay, state = operands.k, operands.v, operands.log_decay, operands.state
    T = k.shape[1]
    if T == 0:
        return operands
    inside = jnp.arange(T) < length[:, None]
    inside_of = lambda x: inside.reshape(*inside.shape, *(1,) * (x.ndim - 2))  # noqa: E731
    written = jnp.where(inside_of(k), k, 0).astype(state.dtype)
    if log_decay is not None:
        log_decay = _by_token(log_decay, T)
        of_prefix = jnp.where(inside_of(log_decay), log_decay, 0)
        log_decay = jnp.where(inside_of(log_decay), 0, log_decay)
        # Of the tokens behind each token, and of all.
        to_end = jax.lax.cumsum(of_prefix, axis=1, reverse=True)
        behind = jnp.pad(to_end[:, 1:], ((0, 0), (0, 1), *((0, 0),) * (to_end.ndim - 2)))
        per_head = log_decay.ndim == 3
        weights, keep = jnp.exp(behind), jnp.exp(to_end[:, 0])[..., None]
        weights, keep = (weights[..., None], keep[..., None]) if per_head else (weights, keep)
        written, state = written * weights, state * keep
    read = jnp.einsum("bthk,bthv->bhkv", written, v.astype(state.dtype), precision=jax.lax.Precision.HIGHEST)
    k = jnp.where(inside_of(k), 0, k)
    return operands._replace(k=k, state=state + read, log_decay=log_decay)
