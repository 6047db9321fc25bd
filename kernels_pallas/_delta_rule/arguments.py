"""From what a user gives to one form: checks, groups of heads, norms, padding, and several updates a token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import checks
from kernels_pallas._delta_rule.config import Config, Operands
from kernels_pallas._linear_attention import check_chunk_size, check_scale, check_state, grouped
from kernels_pallas.recurrence import accumulator, canonical_segments, check_log_decay, hide_padding

NAME = "delta_rule"
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
# Under the root of the norm of a key or query: the derivative at 0 is then finite.
_NORM_EPS = 1e-6

Finish = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def prepare(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    l2norm: bool = False,
    updates_per_token: int = 1,
    chunk_size: int | None = None,
) -> tuple[Config, Operands, Finish]:
    """Check the arguments; give the static part, the arrays of the recurrence, and what makes results of its results.

    The last takes o and the state of `Operands` to those of the user.
    """
    checks.arrays(NAME, q=q, k=k, v=v, beta=beta)
    n = check_updates(NAME, updates_per_token)
    check_floating(NAME, q, k, v, beta, log_decay)
    sizes = checks.shape(NAME, remedy="The layout is [*batch, tokens, heads, head dimension].", q=(q, "*B T H K"))
    batch, T, H, K = sizes["B"], sizes["T"], sizes["H"], sizes["K"]
    remedy = "`k`, `v` and `beta` have updates_per_token entries for each token of `q`, those of one token together."
    V, HV = check_updates_of_heads(NAME, remedy, (*batch, T * n), H, K, k, v, beta)
    chunk = check_chunk_size(NAME, chunk_size)
    l2norm = checks.flag(NAME, "l2norm", l2norm)
    dtype = accumulator(jnp.result_type(q))
    B = math.prod(batch)
    q, k, v, beta = (jnp.asarray(x).reshape(B, *x.shape[len(batch) :]) for x in (q, k, v, beta))
    beta = beta.astype(dtype)
    of_batch = " ".join(map(str, batch))
    state = check_state(NAME, initial_state, f"{of_batch} {HV} {K} {V}", dtype)
    state = jnp.zeros((B, HV, K, V), dtype) if state is None else state.reshape(B, HV, K, V)
    if segment_ids is not None:
        checks.shape(NAME, remedy="One id a token.", segment_ids=(segment_ids, f"{of_batch} {T}"))
        checks.dtype(NAME, "integer", segment_ids=segment_ids)
    if log_decay is not None:
        log_decay = check_decay(NAME, log_decay, (*batch, T, HV), K, dtype, segment_ids)
        log_decay = log_decay.reshape(B, T, HV, *log_decay.shape[len(batch) + 2 :])
    segments = valid = None
    if segment_ids is not None:
        segments, valid = canonical_segments(jnp.asarray(segment_ids).reshape(B, T))
        of_updates = jnp.repeat(valid, n, axis=1)
        [q] = hide_padding(valid, q)
        k, v, beta = hide_padding(of_updates, k, v, beta)
        segments = jnp.repeat(segments, n, axis=1)
        if log_decay is not None:
            [log_decay] = hide_padding(valid, log_decay)
    if l2norm:
        q, k = normalized(q), normalized(k)
    scale, q = check_scale(NAME, scale, K, q)
    q, k = (grouped(x, HV) for x in (q, k))
    # A token reads after its last update, and its state decays before its first.
    q = _spread(q, n, n - 1)
    log_decay = None if log_decay is None else _spread(log_decay, n, 0)

    def finish(o: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        o = o.reshape(B, T, n, HV, V)[:, :, -1]
        if valid is not None:
            [o] = hide_padding(valid, o)
        return o.reshape(*batch, T, HV, V), state.reshape(*batch, HV, K, V)

    return Config(scale, chunk), Operands(q, k, v, beta, state, log_decay, segments), finish


def normalized(x: jax.Array) -> jax.Array:
    """x / sqrt(sum x^2 + 1e-6) along the last axis, computed in the dtype of sums."""
    wide = x.astype(accumulator(x.dtype))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + _NORM_EPS)).astype(x.dtype)


def _spread(x: jax.Array, n: int, place: int) -> jax.Array:
    """[B, T, ...] -> [B, T n, ...]: each entry at its place among n, zeros at the others."""
    if n == 1:
        return x
    widths = ((0, 0), (0, 0), (place, n - 1 - place), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x[:, :, None], widths).reshape(x.shape[0], n * x.shape[1], *x.shape[2:])


# --- Checks. ----------------------------------------------------------------------------------------------------------


def check_updates(function: str, n: int) -> int:
    """A number of updates a token, at least 1."""
    ok = isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 1
    checks.value(function, "updates_per_token", ok, "be an int of at least 1", n)
    return int(n)


def check_floating(
    function: str, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None
) -> None:
    """Dtypes of what has any of its own."""
    checks.dtype(function, _DTYPES, q=q)
    checks.same_dtype(function, remedy="Cast them to one dtype.", q=q, k=k, v=v)
    checks.dtype(function, "floating", beta=beta, log_decay=log_decay)


def check_updates_of_heads(
    function: str, remedy: str, lead: tuple[int, ...], H: int, K: int, k: jax.Array, v: jax.Array, beta: jax.Array
) -> tuple[int, int]:
    """V and HV, where k is [lead, H, K], v [lead, HV, V], beta [lead, HV], and H divides HV."""
    of = " ".join(map(str, lead))
    sizes = checks.shape(function, remedy=remedy, k=(k, f"{of} {H} {K}"), v=(v, f"{of} HV V"), beta=(beta, f"{of} HV"))
    HV = sizes["HV"]
    check_heads(function, H, HV)
    return sizes["V"], HV


def check_heads(function: str, H: int, HV: int) -> None:
    """Check that H heads of q and k can be shared by HV of v."""
    ok = HV % H == 0 if H else HV == 0
    wanted = f"have a number of heads that is a multiple of that of `q` and `k`, {H}"
    checks.value(function, "v", ok, wanted, HV, "Heads of v share those of q and k in equal groups.", checks.ShapeError)


def check_decay(
    function: str, log_decay: jax.Array, lead: tuple[int, ...], K: int, dtype: Any, segment_ids: Any = None
) -> jax.Array:
    """A log decay [*lead] or [*lead, K] in the dtype of the state."""
    got = tuple(jnp.shape(log_decay))
    remedy = "Give one a token and head of v, or one a token, head of v and key channel."
    wanted = f"have shape {lead} or {(*lead, K)}"
    checks.value(function, "log_decay", got in (lead, (*lead, K)), wanted, got, remedy, checks.ShapeError)
    return check_log_decay(function, jnp.asarray(log_decay), segment_ids).astype(dtype)
