"""LASP-2: attention over a sequence that is cut over a mesh axis, with one message of constant size."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import attention, checks, linear_attention, recurrence

_NAME, _HYBRID = "lasp2", "lasp2_hybrid_attention"
# Every floating-point dtype holds whole numbers up to 256: an id travels as its bytes.
_BYTES = 4
# What decays are multiplied by on their way, so that little of them is below the least number of float16.
_WHOLE = 64.0


def lasp2(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: Any,
    log_decay: jax.Array | None = None,
    causal: bool = True,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    wire_dtype: Any = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention inside `jax.shard_map` when the sequence is cut over a mesh axis: one all-gather of states.

    The result equals that of `kernels_pallas.linear_attention` on the whole sequence. Device t runs its own tokens
    from nothing, which gives o_t and the state M_t, and gathers all M_j with the decays d_j of whole shards. The state
    before its tokens is S_t = d_{t-1} S_{t-1} + M_{t-1}, and o_t gains scale (exp(G) q_t) S_t, with G the decay since
    the start of the shard. Neither the message nor o_t waits for the other.

    Args:
      q: queries of this device [*B, n, H, K]; float32, bfloat16, float16 or float64.
      k: its keys [*B, n, H, K] of the same dtype.
      v: its values [*B, n, H, V] of the same dtype. For a normaliser give it a column of ones.
      axis_name: mesh axis that the sequence is cut over, in order and evenly; a name or a tuple of names.
      log_decay: of its tokens, as in `linear_attention`: None, [H], [*B, n, H] or [*B, n, H, K].
      causal: False lets every token see every other, which takes neither decay nor segments.
      initial_state: [*B, H, K, V] before the first token of the whole sequence, the same on all devices.
      segment_ids: int32 [*B, n] of its tokens, as in `linear_attention`; documents may reach over devices.
      scale: of q . k; default K ** -0.5.
      chunk_size: tokens computed at once; only speed depends on it.
      wire_dtype: floating-point, of the states on their way; default that of states. A 16-bit one halves the message
        and rounds the states once. Decays and ids arrive whole: in 16 bits they take the place of several numbers.
      implementation: as in `linear_attention`.

    Returns:
      o [*B, n, H, V] in the dtype of q, and the state after the last token of this device [*B, H, K, V] (not causal:
      the state of all).

    Raises:
      ShapeError, DtypeError, ValueError, NotImplementedError: as `linear_attention`; no such axis here.

    Cost: that of `linear_attention` on n tokens, 2 n H K V flops more, and one all-gather of H K (V + 1) numbers a
      device and row at most, and 10 for segments, whatever n is; the backward pass has one reduce-scatter of as many.

    Derivatives: reverse mode, and reverse over reverse; all modes through "reference".

    Source: Sun, Lan, Zhong, Qu & Cheng, "LASP-2" (2025), alg. 1 and 2, arXiv 2502.07563. Its backward pass gathers
      once more; the transpose of the gather, a reduce-scatter, sends no more and needs no rule of its own.

    Example:
      >>> import jax, jax.numpy as jnp, kernels_pallas
      >>> from jax.sharding import AxisType, PartitionSpec
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 64, 4, 8))
      >>> mesh = jax.make_mesh((jax.device_count(),), ("sequence",), (AxisType.Auto,))
      >>> cut = PartitionSpec(None, "sequence")
      >>> run = lambda q, k, v: lasp2(q, k, v, axis_name="sequence", log_decay=jnp.full(4, -0.1))[0]
      >>> o = jax.shard_map(run, mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut)(q, k, v)
      >>> bool(jnp.allclose(o, kernels_pallas.linear_attention(q, k, v, log_decay=jnp.full(4, -0.1))[0], atol=1e-4))
      True
    """
    shards, index = _axis(_NAME, axis_name)
    if wire_dtype is not None:
        floating = jnp.issubdtype(wire_dtype, jnp.floating)
        checks.value(_NAME, "wire_dtype", floating, "be None or a floating-point dtype", wire_dtype, error=TypeError)
    if not causal:
        for argument, given in (("log_decay", log_decay), ("segment_ids", segment_ids)):
            checks.value(_NAME, argument, given is None, "be absent where `causal` is False", "both")
    o, written = linear_attention(
        q,
        k,
        v,
        log_decay=log_decay,
        segment_ids=segment_ids,
        scale=scale,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    batch, n, H = q.shape[:-3], q.shape[-3], written.shape[-3]
    K, V = written.shape[-2:]
    acc = written.dtype
    checks.shape(_NAME, initial_state=(initial_state, " ".join(map(str, written.shape))))
    checks.dtype(_NAME, [acc], initial_state=initial_state)
    start = jnp.zeros_like(written) if initial_state is None else jnp.asarray(initial_state)
    factor = K**-0.5 if scale is None else scale
    flat = lambda x, *shape: x.reshape(math.prod(batch), *shape)  # noqa: E731
    written, start = flat(written, H, K, V), jnp.broadcast_to(flat(start, H, K, V), (math.prod(batch), H, K, V))
    queries = flat(q, n, *q.shape[-2:]).astype(acc)
    queries = jnp.repeat(queries, H // queries.shape[2], axis=2)

    if not causal:
        total = start + jnp.sum(_gathered([written], axis_name, wire_dtype)[0], 0)
        o = factor * jnp.einsum("bnhk,bhkv->bnhv", queries, total, precision=jax.lax.Precision.HIGHEST)
        return o.reshape(*batch, n, H, V).astype(q.dtype), total.reshape(*batch, H, K, V)

    decay = _decays(log_decay, batch, n, H, K, acc)
    ids = None if segment_ids is None else flat(jnp.asarray(segment_ids, jnp.int32), n)
    own, passes, valid = _own_segment(ids, (math.prod(batch), n))
    decay = jnp.where(valid[:, :, None, None], decay, 0)
    since = jnp.cumsum(decay, 1)
    # Below that a decay is 0 in every dtype of states, and a sum might be too much for 16 bits.
    message = [written, *_pieces(_WHOLE * jnp.maximum(since[:, -1], -1000.0), wire_dtype)]
    if ids is not None:
        message.append(_ends(ids, valid, passes).astype(acc))
    states, *rest = _gathered(message, axis_name, wire_dtype)
    lasts = sum(rest[: len(rest) - (ids is not None)]) / _WHOLE
    kept = jnp.exp(lasts)[..., None]
    enters = jnp.ones((shards, states.shape[1]), bool)
    if ids is not None:
        enters, through = _entering(rest[-1])
        kept = kept * through[:, :, None, None, None]

    def after(state: jax.Array, shard: tuple) -> tuple[jax.Array, jax.Array]:
        written, kept, enters = shard
        before = jnp.where(enters[:, None, None, None], state, 0)
        return kept * before + written, before

    before = jax.lax.scan(after, _varying(start, states), (states, kept, enters))[1][index]
    # Padding may hold NaN, which must meet no factor that has a derivative.
    mine = jnp.where(own[:, :, None, None], queries, 0) * jnp.exp(since)
    read = factor * jnp.einsum("bnhk,bhkv->bnhv", mine, before, precision=jax.lax.Precision.HIGHEST)
    o = (o.astype(acc) + read.reshape(o.shape)).astype(q.dtype)
    keeps = jnp.where(passes[:, None, None, None], jnp.exp(since[:, -1])[..., None], 0)
    return o, (keeps * before + written).reshape(*batch, H, K, V)


def lasp2_hybrid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: Any,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention inside `jax.shard_map` when the sequence is cut over a mesh axis: one all-gather of keys.

    For the softmax layers of a model whose others are linear (LASP-2H). Every device gathers all keys and values and
    attends to them with its own queries at their places in the whole sequence. Where they do not fit into the memory of
    one device, `kernels_pallas.ring_attention` sends them around instead.

    Args:
      q: queries of this device [*B, n, Hq, D].
      k: its keys [*B, n, Hk, D] of the same dtype.
      v: its values [*B, n, Hk, Dv] of the same dtype.
      axis_name: mesh axis that the sequence is cut over, in order and evenly.
      causal: hide keys behind the query's position in the whole sequence.
      segment_ids: int32 [*B, n] of its tokens; only equal ids see each other, a negative id is padding.
      scale: of q . k; default D ** -0.5.
      implementation: as in `kernels_pallas.attention`.

    Returns:
      o [*B, n, Hq, Dv] in the dtype of q.

    Raises:
      ShapeError, DtypeError, ValueError, NotImplementedError: as `kernels_pallas.attention`; no such axis here.

    Cost: attention of n queries to all keys; one all-gather of n Hk (D + Dv) numbers a device and row, and one of the
      ids if there are any. Memory O(n W) for W devices.

    Source: Sun, Lan, Zhong, Qu & Cheng, "LASP-2" (2025), section 3.4, arXiv 2502.07563.

    Example:
      >>> import jax, jax.numpy as jnp, kernels_pallas
      >>> from jax.sharding import AxisType, PartitionSpec
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 64, 4, 8))
      >>> mesh = jax.make_mesh((jax.device_count(),), ("sequence",), (AxisType.Auto,))
      >>> cut = PartitionSpec(None, "sequence")
      >>> run = lambda q, k, v: lasp2_hybrid_attention(q, k, v, axis_name="sequence")
      >>> o = jax.shard_map(run, mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut)(q, k, v)
      >>> bool(jnp.allclose(o, kernels_pallas.attention(q, k, v, causal=True), atol=1e-5))
      True
    """
    remedy = "Every device holds as many keys as queries; the layout is [*batch, tokens, heads, head dimension]."
    sizes = checks.shape(_HYBRID, remedy=remedy, q=(q, "*B n Hq D"), k=(k, "*B n Hk D"), v=(v, "*B n Hk Dv"))
    checks.same_dtype(_HYBRID, remedy="Cast them to one dtype.", q=q, k=k, v=v)
    _, index = _axis(_HYBRID, axis_name)
    n, D = sizes["n"], sizes["D"]
    tokens = len(sizes["B"])
    both = jax.lax.all_gather(jnp.concatenate([k, v], -1), axis_name, axis=tokens, tiled=True)
    ids = None
    if segment_ids is not None:
        checks.shape(_HYBRID, segment_ids=(segment_ids, " ".join(map(str, (*sizes["B"], n)))))
        ids = (segment_ids, jax.lax.all_gather(segment_ids, axis_name, axis=tokens, tiled=True))
    return attention(
        q,
        both[..., :D],
        both[..., D:],
        causal=causal,
        q_offset=index * n if causal else 0,
        segment_ids=ids,
        scale=scale,
        implementation=implementation,
    )


# --- What travels. ----------------------------------------------------------------------------------------------------


def _axis(function: str, axis_name: Any) -> tuple[int, jax.Array]:
    try:
        return jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    except NameError:
        remedy = "Call it inside jax.shard_map over that axis."
        checks.value(function, "axis_name", False, "be an axis of the mesh around it", repr(axis_name), remedy)
        raise


def _gathered(parts: list[jax.Array], axis_name: Any, wire_dtype: Any) -> list[jax.Array]:
    """[W, B, ...] of all devices, for parts [B, ...] that travel together."""
    sent = jnp.concatenate([part.reshape(part.shape[0], -1) for part in parts], 1)
    sent = sent if wire_dtype is None else sent.astype(wire_dtype)
    arrived = jax.lax.all_gather(sent, axis_name).astype(parts[0].dtype)
    cuts = np.cumsum([math.prod(part.shape[1:]) for part in parts])[:-1]
    split = jnp.split(arrived, cuts.tolist(), axis=2)
    return [x.reshape(x.shape[0], *part.shape) for x, part in zip(split, parts, strict=True)]


def _pieces(x: jax.Array, wire_dtype: Any) -> list[jax.Array]:
    """Numbers whose sum is x, each of which a dtype holds."""
    if wire_dtype is None or jnp.finfo(wire_dtype).nmant >= jnp.finfo(x.dtype).nmant:
        return [x]
    info, pieces = jnp.finfo(wire_dtype), []
    while len(pieces) * (info.nmant + 1) <= jnp.finfo(x.dtype).nmant:
        # A compiler may leave out a cast to fewer bits and back, and this it may not.
        pieces.append(jax.lax.reduce_precision(x, info.nexp, info.nmant))
        x = x - pieces[-1]
    return pieces


def _varying(x: jax.Array, like: jax.Array) -> jax.Array:
    """The array, with the type of one that differs between the devices that another differs between."""
    missing = tuple(sorted(jax.typeof(like).mat.varying - jax.typeof(x).mat.varying, key=str))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _decays(log_decay: jax.Array | None, batch: tuple[int, ...], n: int, H: int, K: int, dtype: Any) -> jax.Array:
    """[B, n, H, 1 or K]."""
    B = math.prod(batch)
    if log_decay is None:
        return jnp.zeros((B, n, H, 1), dtype)
    log_decay = recurrence.check_log_decay(_NAME, jnp.asarray(log_decay)).astype(dtype)
    if log_decay.ndim == 1:
        return jnp.broadcast_to(log_decay[:, None], (B, n, H, 1))
    return log_decay.reshape(B, n, H, K if log_decay.ndim == len(batch) + 3 else 1)


# --- Documents that reach over devices. -------------------------------------------------------------------------------


def _own_segment(ids: jax.Array | None, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens of the first document here [B, n], whether there is no other [B], and what is not padding [B, n]."""
    if ids is None:
        return jnp.ones(shape, bool), jnp.ones(shape[:1], bool), jnp.ones(shape, bool)
    segments, valid = recurrence.canonical_segments(ids)
    return (segments == 0) & valid, segments[:, -1] == 0, valid


def _ends(ids: jax.Array, valid: jax.Array, passes: jax.Array) -> jax.Array:
    """[B, 10]: first and last id in bytes, whether there is any, and whether there is but one document."""
    n = ids.shape[1]
    place = jnp.arange(n)
    first = jnp.min(jnp.where(valid, place, n - 1), 1)
    last = jnp.max(jnp.where(valid, place, 0), 1)
    pieces = []
    for at in (first, last):
        chosen = jnp.take_along_axis(ids, at[:, None], 1)[:, 0]
        pieces += [(chosen >> 8 * byte) & 255 for byte in range(_BYTES)]
    return jnp.stack([*pieces, jnp.any(valid, 1), passes], 1)


def _entering(ends: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether the state before a shard belongs to its first document, and whether it goes through [W, B] each."""
    first, last = ends[..., :_BYTES], ends[..., _BYTES : 2 * _BYTES]
    some, passes = ends[..., -2] > 0, ends[..., -1] > 0

    def step(carry: tuple, shard: tuple) -> tuple[tuple, jax.Array]:
        known, before = carry
        first, last, some = shard
        enters = ~known | ~some | jnp.all(first == before, -1)
        return (known | some, jnp.where(some[:, None], last, before)), enters

    start = (jnp.zeros_like(some[0]), jnp.zeros_like(first[0]))
    return jax.lax.scan(step, start, (first, last, some))[1], passes
