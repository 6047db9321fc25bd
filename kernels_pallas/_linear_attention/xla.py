"""Chunk by chunk in plain JAX: linear time and memory, what CPUs and GPUs before Hopper run.

Inside a chunk the output is a masked product, (q k^T * D) v, between chunks a state is carried. On a CPU heads are gone
through inside a chunk, since plain 2-D products are fast there and batched ones are not; elsewhere all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas._linear_attention.config import Config, Operands, gate
from kernels_pallas.recurrence import cumulative_decay, pad_tokens

_CHUNK = 64
# Of a forward pass on a CPU, which arithmetic bounds: shorter chunks need less. A backward pass keeps a state a chunk.
_CHUNK_FORWARD = 32
# Tokens of a sub-block: decays that differ by channel are exponentiated pair by pair inside one.
_SUB = 16


class Lane(NamedTuple):
    """One head of one row of the batch, or all heads, whose axis comes before the last; None for what was not given.

    Attributes:
      q: [..., C, K].
      k: [..., C, K].
      v: [..., C, V].
      log_decay: [..., C] or [..., C, K].
      segments: int32 [..., C].
      before: int32 [...], the segment that the state before the chunk belongs to.
      count: int32 [...], tokens of the chunk that are not padding at the end of the sequence.
    """

    q: Any
    k: Any
    v: Any
    log_decay: Any
    segments: Any
    before: Any
    count: Any


class Constant(NamedTuple):
    """What a decay that is the same for all tokens of a head makes of any chunk.

    Attributes:
      log_decay: [].
      pairs: [C, C], the factor of token j in the output of token i, 0 where j > i.
      read: [C, 1], the factor of the state before the chunk.
    """

    log_decay: Any
    pairs: Any
    read: Any


class Layout(NamedTuple):
    """How heads are gone through.

    Attributes:
      lanes: runs a function of one lane over all of them: rows, or rows times heads.
      heads: runs a function of one head over those of a lane.
      inward: from the arrays of a chunk to what has the heads first, in the dtype of sums.
      outward: from an array with the heads first to one with the tokens first, in a dtype.
    """

    lanes: Callable
    heads: Callable
    inward: Callable
    outward: Callable


def _layout(operands: Operands, sequential: bool) -> Layout:
    dtype, H = operands.state.dtype, operands.q.shape[2]
    if not sequential:
        return Layout(
            lambda run, *arguments: jax.vmap(run)(*arguments),
            lambda run, *arguments: run(*arguments),
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            lambda x, to: x.astype(to),
        )

    def inward(x: jax.Array) -> jax.Array:
        # Ids and counts are those of a row.
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.swapaxes(x, 0, 1).astype(dtype) if floating else jnp.broadcast_to(x, (H, *x.shape))

    return Layout(
        lambda run, *arguments: jax.lax.map(lambda x: run(*x), arguments),
        _over_heads,
        inward,
        lambda x, to: jnp.swapaxes(x, 0, 1).astype(to),
    )


def _over_heads(run: Callable, *arguments: Any) -> Any:
    """Heads one after the other, some to a round of the loop: XLA for CPUs runs what does not depend side by side."""
    H = jax.tree.leaves(arguments)[0].shape[0]
    together = next(n for n in (4, 3, 2, 1) if H % n == 0)

    def some(arguments: Any) -> Any:
        results = [run(*jax.tree.map(lambda x, i=i: x[i], arguments)) for i in range(together)]
        return jax.tree.map(lambda *x: jnp.stack(x), *results)

    if together == H:
        return some(arguments)
    rounds = jax.tree.map(lambda x: x.reshape(H // together, together, *x.shape[1:]), arguments)
    return jax.tree.map(lambda x: x.reshape(H, *x.shape[2:]), jax.lax.map(some, rounds))


def forward(config: Config, operands: Operands, *, sequential: bool) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, V] in the dtype of q, and the state after the last token [B, H, K, V]."""
    layout = _layout(operands, sequential)
    run = partial(_lane_forward, layout, config, _precision(operands), operands.q.dtype)
    C = chunk_size(config, operands.q.shape[1], _CHUNK_FORWARD if sequential else _CHUNK)
    lanes, constant, state = _lanes(C, operands, sequential)
    o, last = layout.lanes(run, lanes, constant, state)
    return _tokens(o, operands, operands.q.dtype, sequential), last.reshape(operands.state.shape)


def backward(
    config: Config, operands: Operands, o_cotangent: jax.Array, state_cotangent: jax.Array, *, sequential: bool
) -> tuple[jax.Array, ...]:
    """Cotangents of q, k, v and the state, and of log_decay where there is one, in the dtypes of the operands.

    States at the ends of chunks are computed again, and the chunks are walked from the last to the first.
    """
    layout = _layout(operands, sequential)
    run = partial(_lane_backward, layout, config, _precision(operands), operands)
    C = chunk_size(config, operands.q.shape[1], _CHUNK)
    o_cotangent = _chunked(C, o_cotangent, sequential)
    state_cotangent = state_cotangent if sequential else _flat(state_cotangent)
    arguments = (*_lanes(C, operands, sequential), o_cotangent, state_cotangent)
    lanes, constant, state = layout.lanes(run, *arguments)
    q, k, v = (
        _tokens(grad, operands, like.dtype, sequential)
        for grad, like in ((lanes.q, operands.q), (lanes.k, operands.k), (lanes.v, operands.v))
    )
    grads = (q, k, v, state.reshape(operands.state.shape))
    if gate(operands) == "none":
        return grads
    if gate(operands) == "head":
        return (*grads, constant.reshape(operands.log_decay.shape))
    return (*grads, _tokens(lanes.log_decay, operands, operands.log_decay.dtype, sequential))


# --- Lanes, cut into chunks. ------------------------------------------------------------------------------------------
# A row and all its heads on CPUs, where copies of whole arrays with the heads first would cost as much as their
# arithmetic; elsewhere a row and a head.


def _precision(operands: Operands) -> jax.lax.Precision:
    wide = operands.q.dtype.itemsize >= 4
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


def chunk_size(config: Config, T: int, default: int) -> int:
    """Tokens a chunk: as asked for, else the default, but no longer than the sequence needs."""
    if config.chunk is not None:
        return config.chunk
    return min(default, max(_SUB, 1 << max(T - 1, 0).bit_length()))


def _lanes(C: int, operands: Operands, sequential: bool) -> tuple[Lane, jax.Array | None, jax.Array]:
    """The chunks of each lane, its constant decays, and its states."""
    q, k, v = (_chunked(C, x, sequential) for x in (operands.q, operands.k, operands.v))
    log_decay = segments = before = None
    if gate(operands) in ("token", "channel"):
        log_decay = _chunked(C, operands.log_decay, sequential)
    B, T, H = operands.q.shape[:3]
    if operands.segments is not None:
        segments = pad_tokens(operands.segments, C, last=True).reshape(B, -1, C)
        # The state before the first chunk belongs to segment 0.
        before = jnp.pad(segments[:, :-1, -1], ((0, 0), (1, 0)))
    count = jnp.broadcast_to(jnp.clip(T - C * jnp.arange(q.shape[1]), 0, C), (B, q.shape[1]))
    constant = operands.log_decay if gate(operands) == "head" else None
    if sequential:
        return Lane(q, k, v, log_decay, segments, before, count), constant, operands.state
    of_heads = lambda x: None if x is None else jnp.repeat(x, H, axis=0)  # noqa: E731
    lanes = Lane(q, k, v, log_decay, of_heads(segments), of_heads(before), of_heads(count))
    return lanes, None if constant is None else constant.reshape(-1), _flat(operands.state)


def _chunked(C: int, x: jax.Array, sequential: bool) -> jax.Array:
    """[B, T, H, ...] -> [B, N, C, H, ...], or [B * H, N, C, ...] where lanes are heads."""
    x = pad_tokens(x, C)
    B, T, H = x.shape[:3]
    if sequential:
        return x.reshape(B, T // C, C, H, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(B * H, T // C, C, *x.shape[3:])


def _tokens(x: jax.Array, operands: Operands, dtype: Any, sequential: bool) -> jax.Array:
    """[B, N, C, H, ...] or [B * H, N, C, ...] -> [B, T, H, ...]."""
    B, T, H = operands.q.shape[:3]
    N, C = x.shape[1:3]
    if sequential:
        return x.reshape(B, N * C, *x.shape[3:])[:, :T].astype(dtype)
    return jnp.moveaxis(x.reshape(B, H, N * C, *x.shape[3:])[:, :, :T], 1, 2).astype(dtype)


def _flat(state: jax.Array) -> jax.Array:
    return state.reshape(-1, *state.shape[2:])


def _lane_forward(
    layout: Layout,
    config: Config,
    precision: Any,
    dtype: Any,
    lane: Lane,
    constant: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    factors = _factors(layout, constant, lane.q.shape[1])
    run = partial(_chunk, config, precision)

    def step(state: jax.Array, chunk: Lane) -> tuple[jax.Array, jax.Array]:
        o, state = layout.heads(run, jax.tree.map(layout.inward, chunk), factors, state)
        return state, layout.outward(o, dtype)

    state, o = jax.lax.scan(step, state, lane)
    return o, state


def _factors(layout: Layout, constant: jax.Array | None, C: int) -> Constant | None:
    return None if constant is None else layout.heads(lambda g: _constant_factors(g, C), constant)


def _lane_backward(
    layout: Layout,
    config: Config,
    precision: Any,
    operands: Operands,
    lane: Lane,
    constant: jax.Array | None,
    state: jax.Array,
    o_cotangent: jax.Array,
    state_cotangent: jax.Array,
) -> tuple[Lane, jax.Array | None, jax.Array]:
    factors, pull_factors = jax.vjp(lambda g: _factors(layout, g, lane.q.shape[1]), constant)
    decayed = gate(operands) in ("token", "channel")
    dtypes = Lane(*(x.dtype for x in operands[:3]), operands.log_decay.dtype if decayed else None, None, None, None)

    def again(state: jax.Array, chunk: Lane) -> tuple[jax.Array, jax.Array]:
        run = partial(_next_state, precision)
        return layout.heads(run, jax.tree.map(layout.inward, chunk), factors, state), state

    _, states = jax.lax.scan(again, state, lane)

    def back(
        chunk: Lane, factors: Constant | None, state: jax.Array, o_cotangent: jax.Array, state_cotangent: jax.Array
    ) -> tuple:
        integers = {"segments": chunk.segments, "before": chunk.before, "count": chunk.count}

        def run(floating: Lane, factors: Constant | None, state: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _chunk(config, precision, floating._replace(**integers), factors, state)

        floating = chunk._replace(**dict.fromkeys(integers))
        return jax.vjp(run, floating, factors, state)[1]((o_cotangent, state_cotangent))

    def step(carry: tuple, x: tuple) -> tuple[tuple, Lane]:
        state_cotangent, total = carry
        chunk, state, o_cotangent = x
        given = (jax.tree.map(layout.inward, chunk), factors, state, layout.inward(o_cotangent), state_cotangent)
        grads, of_factors, state_cotangent = layout.heads(back, *given)
        return (state_cotangent, jax.tree.map(jnp.add, total, of_factors)), jax.tree.map(layout.outward, grads, dtypes)

    start = (state_cotangent, jax.tree.map(jnp.zeros_like, factors))
    (state, total), grads = jax.lax.scan(step, start, (lane, states, o_cotangent), reverse=True)
    return grads, pull_factors(total)[0], state


# --- One chunk. -------------------------------------------------------------------------------------------------------


class Decays(NamedTuple):
    """What the decays of one chunk do; None where there are none, or where they differ by channel.

    Attributes:
      pairs: [C, C], the factor of token j in the output of token i, 0 where j > i or in another segment; None for 1.
      read: [C, 1] or [C, K], the factor of the state before the chunk.
      write: [C, 1] or [C, K], the factor of a token in the state after the chunk.
      keep: [] or [K, 1], the factor of the state before the chunk in the state after it.
    """

    pairs: Any
    read: Any
    write: Any
    keep: Any


def _chunk(
    config: Config, precision: Any, chunk: Lane, constant: Constant | None, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Output [C, V] and the state after the chunk [K, V]."""
    dot = partial(jnp.matmul, precision=precision)
    decays, sums = _decays(chunk, constant)
    if sums is None:
        scores = dot(chunk.q, chunk.k.T) * decays.pairs
    else:
        scores = _channel_scores(dot, chunk, sums)
    o = dot(scores, chunk.v) + dot(chunk.q * decays.read, state)
    return config.scale * o, decays.keep * state + dot((chunk.k * decays.write).T, chunk.v)


def _next_state(precision: Any, chunk: Lane, constant: Constant | None, state: jax.Array) -> jax.Array:
    decays, _ = _decays(chunk, constant, pairs=False)
    return decays.keep * state + jnp.matmul((chunk.k * decays.write).T, chunk.v, precision=precision)


def _decays(
    chunk: Lane, constant: Constant | None, *, pairs: bool = True
) -> tuple[Decays, tuple[jax.Array, jax.Array] | None]:
    """The factors of a chunk, and, for decays that differ by channel, the running sums that pairs are made from."""
    C, dtype = chunk.q.shape[0], chunk.q.dtype
    place = jnp.arange(C)
    visible = place[:, None] >= place[None, :]
    one = jnp.ones((), dtype)
    if chunk.segments is None:
        reads = writes = keeps = one
    else:
        visible = visible & (chunk.segments[:, None] == chunk.segments[None, :])
        reads = (chunk.segments == chunk.before).astype(dtype)[:, None]
        writes = (chunk.segments == chunk.segments[-1]).astype(dtype)[:, None]
        keeps = (chunk.segments[-1] == chunk.before).astype(dtype)
    if constant is not None:
        # The padding at the end does not decay the state; beyond the last token the exponent would change its sign.
        ahead = jnp.maximum(chunk.count - 1 - place, 0)[:, None]
        write, keep = (jnp.exp(constant.log_decay * n) for n in (ahead, chunk.count))
        return Decays(constant.pairs, constant.read, write, keep), None
    if chunk.log_decay is None:
        return Decays(visible.astype(dtype), reads, writes, keeps), None
    coarse, rest = cumulative_decay(chunk.log_decay, 0, chunk.segments)
    # What lies before the first token of a segment is not summed, so every exponent that counts is at most 0.
    read = jnp.exp(coarse + rest)
    behind = (coarse[-1] - coarse) + (rest[-1] - rest)
    if chunk.segments is not None:
        last = (chunk.segments == chunk.segments[-1]).reshape(C, *(1,) * (behind.ndim - 1))
        behind = jnp.where(last, behind, 0)
    write = jnp.exp(behind)
    keep = jnp.exp(coarse[-1] + rest[-1])
    if chunk.log_decay.ndim == 2:
        return Decays(None, read * reads, write * writes, (keep * keeps)[:, None]), (coarse, rest)
    between = None
    if pairs:
        # A token's decay to itself is 1 whatever its gate, and has no derivative.
        earlier = visible & (place[:, None] > place[None, :])
        gap = (coarse[:, None] - coarse[None, :]) + (rest[:, None] - rest[None, :])
        between = jnp.where(earlier, jnp.exp(jnp.where(earlier, gap, 0)), jnp.eye(C, dtype=dtype))
    return Decays(between, read[:, None] * reads, write[:, None] * writes, keep * keeps), None


def _constant_factors(log_decay: jax.Array | None, C: int) -> Constant | None:
    if log_decay is None:
        return None
    place = jnp.arange(C)
    gap = place[:, None] - place[None, :]
    pairs = jnp.where(gap >= 0, jnp.exp(log_decay * jnp.maximum(gap, 0)), 0)
    return Constant(log_decay, pairs, jnp.exp(log_decay * (place[:, None] + 1)))


def _channel_scores(dot: Callable, chunk: Lane, sums: tuple[jax.Array, jax.Array]) -> jax.Array:
    """[C, C]: sum_c q_ic k_jc exp(G_ic - G_jc) for j <= i in one segment, else 0.

    Between sub-blocks the exponent is split at the first token of the block of i, so that both parts are at most 0 and
    a product does the sum; inside a sub-block every pair has its exponential.
    """
    coarse, rest = sums
    C, K = chunk.q.shape
    size = min(_SUB, C)
    place = jnp.arange(size)
    segments = jnp.zeros(C, jnp.int32) if chunk.segments is None else chunk.segments
    rows = []
    for start in range(0, C, size):
        here, past = slice(start, start + size), slice(0, start)
        q = chunk.q[here]
        earlier = (place[:, None] > place[None, :]) & (segments[here][:, None] == segments[here][None, :])
        gap = coarse[here][:, None] - coarse[here][None, :] + (rest[here][:, None] - rest[here][None, :])
        gap = jnp.where(earlier[..., None], gap, -jnp.inf)
        inside = jnp.sum(q[:, None] * chunk.k[here][None, :] * jnp.exp(gap), -1)
        # A token's decay to itself is 1 whatever its gate, and has no derivative.
        inside = inside + jnp.diag(jnp.sum(q * chunk.k[here], -1))
        first = segments[start]
        down = jnp.where(
            (segments[here] == first)[:, None], (coarse[here] - coarse[start]) + (rest[here] - rest[start]), -jnp.inf
        )
        up = jnp.where(
            (segments[past] == first)[:, None], (coarse[start] - coarse[past]) + (rest[start] - rest[past]), -jnp.inf
        )
        before = dot(q * jnp.exp(down), (chunk.k[past] * jnp.exp(up)).T)
        rows.append(jnp.concatenate([before, inside, jnp.zeros((size, C - start - size), q.dtype)], 1))
    return jnp.concatenate(rows)
