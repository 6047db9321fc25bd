"""What the TPU kernels of the recurrent operations share: chunks of tokens, and the decays inside one.

A kernel's grid is (batch, head, step), the last axis in order. A step holds some chunks of C tokens; what the chunks do
without the state is independent, so that the compiler schedules one beside the other. The state stays in VMEM and is
transposed, S^T [V, K] in float32: a decay of key channels then runs along the lanes.

Of each chunk a kernel knows `Gates`: the decay between its tokens, and `before`, `after` and `whole`, the decays from
its start to a token, from a token to its end, and over all of it. They hold the segments too: 0 where a token does not
belong to the segment that the state comes from, or goes to.

Decays are in base 2, so that exp2 replaces exp. Those of tokens are summed by XLA in two parts (`recurrence`), which
come in as lines of an array [8, C], along the lanes; a kernel transposes what it needs as columns. Those of key
channels are summed in the kernel by doubling (`channel_gates`): every sum has terms of one sign, and nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import recurrence
from kernels_pallas._attention.config import precision

LANES = 128
LOG2E = 1.4426950408889634
# Tokens a chunk: a whole row of lanes, and no more than whose decays sum exactly.
CHUNK, LONGEST = 128, 256
# Of the 16 MiB that a kernel may hold; the compiler needs some for itself.
VMEM_BYTES = 11 * 2**20
# What the lines of `token_lines` hold.
_COARSE, _REST, _BEFORE, _AFTER, _WHOLE, _SEGMENT, BETA = range(7)


class Plan(NamedTuple):
    """How the tokens of a call are divided.

    Attributes:
      chunk: tokens a chunk.
      chunks: a step of the grid.
      steps: of the grid.
    """

    chunk: int
    chunks: int
    steps: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.chunk * self.chunks

    @property
    def length(self) -> int:
        """Of all steps."""
        return self.tokens * self.steps


def plan(T: int, chunk: int | None, most: int, fixed: int, each: int) -> Plan | None:
    """As many chunks a step as fit, all steps alike so that little is padded; None where not even one fits.

    Args:
      T: tokens, at least 1.
      chunk: tokens a chunk that the caller asks for; taken between 128 and 256.
      most: chunks a step at most.
      fixed: bytes of VMEM that a kernel needs whatever a step holds.
      each: bytes of VMEM a token of a step.
    """
    chunk = min(max(chunk or CHUNK, CHUNK), LONGEST)
    most = min(most, (VMEM_BYTES - fixed) // (each * chunk))
    if most < 1:
        return None
    chunks = -(-T // chunk)
    steps = -(-chunks // most)
    chunks = -(-chunks // steps)
    # Loops over the chunks of a step take four or eight at a time.
    whole = chunks + -chunks % 4
    return Plan(chunk, whole if 4 < whole <= most else chunks, steps)


def loop(chunks: int, unrolled: int, body: Callable[[Any], None]) -> None:
    """`body(c)` for every chunk of a step, in order, several of them a turn: at most `unrolled`."""
    each = max(n for n in range(1, min(unrolled, chunks) + 1) if chunks % n == 0)
    if each == chunks:
        for c in range(chunks):
            body(c)
        return

    def turn(i: jax.Array, _: None) -> None:
        for c in range(each):
            body(i * each + c)

    lax.fori_loop(0, chunks // each, turn, None)


def multiple_of(x: Any, multiple: int) -> Any:
    """An index that the compiler knows to be a multiple, static or not."""
    return x if isinstance(x, int) else pl.multiple_of(x, multiple)


def up(size: int) -> int:
    """A size in whole lanes."""
    return size + -size % LANES


def pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros at the end of an axis, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def heads_first(x: jax.Array, plan: Plan) -> jax.Array:
    """[B, T, H, D] as [B, H, T', D'], with D a multiple of the lanes."""
    return pad(pad(jnp.swapaxes(x, 1, 2), 2, plan.length), 3, LANES)


def tokens_first(x: jax.Array, like: jax.Array) -> jax.Array:
    """The reverse of `heads_first`, in the shape and dtype of what went in."""
    T, D = like.shape[1], like.shape[3]
    return jnp.swapaxes(x[:, :, :T, :D], 1, 2).astype(like.dtype)


def transposed(state: jax.Array) -> jax.Array:
    """A state [..., K, V] as [..., V', K'], and the reverse, both padded to lanes."""
    return pad(pad(jnp.swapaxes(state, -1, -2), -1, LANES), -2, LANES)


# --- Decays of tokens, and segments: from XLA. ------------------------------------------------------------------------


def token_lines(
    log_decay: jax.Array | None, segments: jax.Array | None, plan: Plan, beta: jax.Array | None = None
) -> jax.Array:
    """The lines of every chunk, float32 [B, H, chunks, 8, C]; H is 1 where there are segments alone.

    Args:
      log_decay: [B, T, H], or None.
      segments: int32 [B, T], or None.
      plan: of the tokens.
      beta: [B, T, H], one line more, or None.
    """
    C = plan.chunk

    def cut(x: jax.Array) -> jax.Array:  # [B, T, H] -> [B, N, C, H]
        x = recurrence.pad_tokens(x.astype(jnp.float32), plan.length)
        return x.reshape(x.shape[0], -1, C, x.shape[2])

    if segments is not None:
        segments = recurrence.pad_tokens(segments, plan.length, last=True)
        segments = segments.reshape(segments.shape[0], -1, C)
        carried = jnp.pad(segments[:, :-1, -1], ((0, 0), (1, 0)))[..., None]
        first, last = segments == carried, segments == segments[:, :, -1:]
    if log_decay is not None:
        log_decay = jnp.maximum(log_decay.astype(jnp.float32) * LOG2E, recurrence.LOWEST)
        coarse, rest = recurrence.cumulative_decay(cut(log_decay), 2, segments)
    elif beta is not None:
        coarse = rest = jnp.zeros_like(cut(beta))
    else:
        coarse = rest = jnp.zeros((*segments.shape, 1), jnp.float32)
    total = coarse[:, :, -1:], rest[:, :, -1:]
    before = jnp.exp2(coarse + rest)
    whole = jnp.broadcast_to(jnp.exp2(total[0] + total[1]), before.shape)
    # A token of another segment than the last may lie below the total; it is hidden before the exponential.
    after = jnp.minimum((total[0] - coarse) + (total[1] - rest), 0)
    within = jnp.zeros_like(before)
    if segments is None:
        after = jnp.exp2(after)
    else:
        before = jnp.where(first[..., None], before, 0)
        whole = jnp.where(first[:, :, -1:, None], whole, 0)
        after = jnp.where(last[..., None], jnp.exp2(after), 0)
        within = within + (segments - segments[:, :, :1])[..., None]
    last_lines = [jnp.zeros_like(rest) if beta is None else cut(beta), jnp.zeros_like(rest)]
    lines = jnp.stack([coarse, rest, before, after, whole, within, *last_lines], axis=2)
    return jnp.transpose(lines, (0, 4, 1, 2, 3))  # [B, N, 8, C, H] -> [B, H, N, 8, C]


# --- What a kernel reads. ---------------------------------------------------------------------------------------------


class Kinds(NamedTuple):
    """What decays: "none", "head", "token" or "channel"; and whether there are segments."""

    gate: str
    segments: bool


def block_specs(
    inputs: dict[str, Any], plan: Plan, *, heads: int | None = None, reverse: bool = False
) -> dict[str, pl.BlockSpec]:
    """Where a step finds its block of each array: of a state the same at every step, of others the step's chunks.

    Args:
      inputs: arrays [B, H, T', D] of tokens, `state` and what ends so [B, H, V, K], others [B, H?, chunks, ., .].
      plan: of the tokens.
      heads: a step, along an axis of the block; None for one, without the axis.
      reverse: the grid goes from the last step to the first.
    """
    at = lambda t: plan.steps - 1 - t if reverse else t  # noqa: E731
    specs = {}
    for name, x in inputs.items():
        if name.endswith("state"):
            specs[name] = pl.BlockSpec((None, heads, *x.shape[2:]), lambda b, h, t, *_: (b, h, 0, 0))
        elif x.ndim == 4:
            specs[name] = pl.BlockSpec((None, heads, plan.tokens, x.shape[3]), lambda b, h, t, *_: (b, h, at(t), 0))
        else:
            index = lambda b, h, t, *_, own=x.shape[1] > 1: (b, h if own else 0, at(t), 0, 0)  # noqa: E731
            specs[name] = pl.BlockSpec((None, heads, plan.chunks, *x.shape[3:]), index)
    return specs


def rows(ref: Any, c: Any, C: int) -> jax.Array:
    """The rows of chunk c of a step."""
    return ref[pl.ds(multiple_of(c * C, C), C), :]


def read_gates(inputs: dict[str, Any], c: Any, kinds: Kinds, C: int) -> Gates:
    """The gates of chunk c of a step; those of a constant decay are made elsewhere."""
    lines = inputs["lines"][c] if "lines" in inputs else None
    if kinds.gate == "channel":
        return channel_gates(rows(inputs["log_decay"], c, C), lines if kinds.segments else None)
    if kinds.gate == "none" and not kinds.segments:
        return no_gates(C)
    return token_gates(lines, decays=kinds.gate == "token", segments=kinds.segments)


def line(lines: Any, c: Any, which: int) -> jax.Array:
    """One of the lines of chunk c of a step, [1, C]."""
    return lines[c][which : which + 1]


def row_gates(inputs: dict[str, Any], c: Any, kinds: Kinds) -> Gates:
    """`Gates` of tokens along the lanes, [1, C] and [1, 1], without those between tokens."""
    if kinds.gate == "none" and not kinds.segments:
        return Gates(None)
    before, after, whole = (line(inputs["lines"], c, which) for which in (_BEFORE, _AFTER, _WHOLE))
    return Gates(None, before, after, whole[:, :1])


# --- What a chunk knows, inside a kernel. -----------------------------------------------------------------------------


class Gates(NamedTuple):
    """Decays of one chunk; None where there is none.

    Attributes:
      between: float32 [C, C], from token j to token i, 0 where j > i or the segments differ.
      before: [C, 128], from the start of the chunk to a token, its own decay included, lanes equal; or [C, K].
      after: [C, 128] or [C, K], from a token to the end of the chunk.
      whole: [1, 1] or [1, K], over the chunk.
      levels: of key channels, `channel_gates`; `between` then holds segments alone.
    """

    between: jax.Array | None
    before: jax.Array | None = None
    after: jax.Array | None = None
    whole: jax.Array | None = None
    levels: tuple[jax.Array, ...] | None = None


def iotas(C: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of every entry of [C, C]."""
    return lax.broadcasted_iota(jnp.int32, (C, C), 0), lax.broadcasted_iota(jnp.int32, (C, C), 1)


def no_gates(C: int) -> Gates:
    """Neither decay nor segments."""
    row, column = iotas(C)
    return Gates(jnp.where(row >= column, 1.0, 0.0))


def head_gates(log_decay: jax.Array, C: int, tokens: Any) -> Gates:
    """A decay that is constant over the tokens: log_decay a scalar, of which `tokens` of the chunk are not padding."""
    row, column = iotas(C)
    log_decay = log_decay * LOG2E
    place = lax.broadcasted_iota(jnp.int32, (C, LANES), 0)
    # Products with a count, not sums: a decay of -1000 is as exact as another.
    steps = lambda count: jnp.exp2(log_decay * count.astype(jnp.float32))  # noqa: E731
    between = jnp.exp2(jnp.where(row >= column, log_decay * (row - column).astype(jnp.float32), -jnp.inf))
    after = steps(jnp.maximum(tokens - 1 - place, 0))
    return Gates(between, steps(place + 1), after, steps(jnp.full((1, 1), tokens, jnp.int32)))


def token_gates(lines: jax.Array, *, decays: bool, segments: bool) -> Gates:
    """The gates of a chunk from its lines [8, C]."""
    C = lines.shape[1]
    row, column = iotas(C)
    keep = row >= column
    if segments:
        keep = keep & (as_column(lines, _SEGMENT, C) == lines[_SEGMENT : _SEGMENT + 1])
    if decays:
        parts = [as_column(lines, at, C) - lines[at : at + 1] for at in (_COARSE, _REST)]
        between = jnp.exp2(jnp.where(keep, parts[0] + parts[1], -jnp.inf))
    else:
        between = jnp.where(keep, 1.0, 0.0)
    return Gates(between, as_column(lines, _BEFORE), as_column(lines, _AFTER), lines[_WHOLE : _WHOLE + 1, :1])


def as_column(lines: jax.Array, which: int, wide: int = LANES) -> jax.Array:
    """One of the lines of a chunk as a column [C, wide], lanes equal.

    A whole matrix is transposed, which costs a TPU less than to spread a column over the lanes.
    """
    return jnp.transpose(jnp.broadcast_to(lines[which : which + 1], (wide, lines.shape[1])))


def times(x: jax.Array, decay: jax.Array | None) -> jax.Array:
    """Rows x decayed: by one factor a row, whose lanes are equal, or by one an entry."""
    if decay is None:
        return x
    if decay.shape[1] not in (1, x.shape[1]):
        decay = jnp.concatenate([decay] * (x.shape[1] // decay.shape[1]), axis=1)
    return x * decay


def scores(q: jax.Array, k: jax.Array, gates: Gates, dtype: Any) -> jax.Array:
    """float32 [C, C]: q_i . k_j with the decay between the two, 0 where j > i."""
    if gates.levels is None:
        return dot(q, k, "nt", dtype) * gates.between
    C = q.shape[0]
    row, column = iotas(C)
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    # A token sees itself undecayed.
    total = jnp.where(row == column, jnp.sum(q * k, axis=1, keepdims=True), 0.0)
    for level, decay in enumerate(gates.levels):
        product = dot(q * decay, k * decay, "nt", dtype)
        total = jnp.where(across(row, column, level), product, total)
    return total if gates.between is None else total * gates.between


def scores_cotangents(
    q: jax.Array, k: jax.Array, cotangent: jax.Array, gates: Gates, dtype: Any
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Cotangents of q and k, and of the exponents of every level, by the cotangent [C, C] of `scores`."""
    if gates.levels is None:
        cotangent = cotangent * gates.between
        return dot(cotangent, k, "nn", dtype), dot(cotangent, q, "tn", dtype), []
    C = q.shape[0]
    row, column = iotas(C)
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    if gates.between is not None:
        cotangent = cotangent * gates.between
    own = jnp.sum(jnp.where(row == column, cotangent, 0.0), axis=1, keepdims=True)
    dq, dk, exponents = own * k, own * q, []
    for level, decay in enumerate(gates.levels):
        of_level = jnp.where(across(row, column, level), cotangent, 0.0)
        # Rows of the second halves of blocks alone, and of the first halves alone.
        to_q = dot(of_level, k * decay, "nn", dtype) * decay
        to_k = dot(of_level, q * decay, "tn", dtype) * decay
        dq, dk = dq + to_q, dk + to_k
        exponents.append(q * to_q + k * to_k)
    return dq, dk, exponents


# --- Decays of key channels: summed in the kernel. --------------------------------------------------------------------


def across(row: jax.Array, column: jax.Array, level: int) -> jax.Array:
    """Entries whose row is in the second, and whose column is in the first half of the same block of 2^(level + 1)."""
    half = 1 << level
    return (((row ^ column) & -half) == half) & ((row & half) != 0)


def _partner(x: jax.Array, second: jax.Array, half: int) -> jax.Array:
    """Rows of the other half of a block, row i +- half at row i."""
    from jax.experimental.pallas import tpu as pltpu

    C = x.shape[0]
    return jnp.where(second, pltpu.roll(x, half, 0), pltpu.roll(x, C - half, 0))


def _halves(shape: tuple[int, ...]) -> list[tuple[int, jax.Array]]:
    """Of every level the length of half a block, and which rows are in second halves."""
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    return [(1 << level, (row & (1 << level)) != 0) for level in range(shape[0].bit_length() - 1)]


def channel_gates(log_decay: jax.Array, lines: jax.Array | None) -> Gates:
    """The gates of a chunk from its log decays [C, K], and from its lines [8, C] where there are segments.

    Two tokens j < i meet at the one level at which they lie in the two halves of a block. There the decay between them
    is that from the middle to i times that from j to the middle: both at most 1, and the scores are a product.
    """
    log_decay = jnp.maximum(log_decay * LOG2E, recurrence.LOWEST)
    # Sums from the start of a block to a token, from behind a token to the end, and over the block.
    start, end, block = log_decay, jnp.zeros_like(log_decay), log_decay
    levels = []
    for half, second in _halves(log_decay.shape):
        levels.append(jnp.exp2(jnp.where(second, start, end)))
        other = _partner(block, second, half)
        start = jnp.where(second, start + other, start)
        end = jnp.where(second, end, end + other)
        block = block + other
    before, after, whole = jnp.exp2(start), jnp.exp2(end), jnp.exp2(block[:1])
    if lines is None:
        return Gates(None, before, after, whole, tuple(levels))
    masks = token_gates(lines, decays=False, segments=True)
    before, after = times(before, masks.before), times(after, masks.after)
    return Gates(masks.between, before, after, whole * masks.whole, tuple(levels))


def channel_cotangent(levels: list[jax.Array], start: jax.Array, end: jax.Array, block: jax.Array) -> jax.Array:
    """The cotangent [C, K] of log decays, by those of the sums that `channel_gates` makes of them: the way back.

    Args:
      levels: of the exponents of every level, [C, K] each.
      start: of the sums from the start of the chunk to a token.
      end: of the sums from behind a token to the end of the chunk.
      block: of the sum over the chunk, [1, K].
    """
    row = lax.broadcasted_iota(jnp.int32, start.shape, 0)
    block = jnp.where(row == 0, block, 0.0)
    for (half, second), level in zip(reversed(_halves(start.shape)), reversed(levels), strict=True):
        other = jnp.where(second, start, end) + block
        start = start + jnp.where(second, level, 0.0)
        end = end + jnp.where(second, 0.0, level)
        block = block + _partner(other, second, half)
    return start + block


# --- The way back from decays of tokens. ------------------------------------------------------------------------------


def cotangent_lines(between: jax.Array, before: jax.Array, after: jax.Array, whole: jax.Array) -> jax.Array:
    """What `of_tokens` needs of a chunk, lines [8, C]: cotangents of exponents, not yet summed.

    Args:
      between: of the decay between two tokens, [C, C], 0 where j >= i.
      before: of `Gates.before`, [C, .].
      after: of `Gates.after`, [C, .].
      whole: of `Gates.whole`, [., .].
    """
    C = between.shape[0]
    whole = jnp.sum(jnp.sum(whole, axis=1, keepdims=True), axis=0, keepdims=True)
    lines = [sums_along_lanes(between) - jnp.sum(between, axis=0, keepdims=True)]
    lines += [sums_along_lanes(before), sums_along_lanes(after), jnp.broadcast_to(whole, (1, C))]
    return jnp.concatenate([*lines, jnp.zeros((4, C), jnp.float32)], axis=0)


def of_tokens(lines: jax.Array, segments: jax.Array | None, plan: Plan, T: int) -> jax.Array:
    """The cotangent [B, T, H] of log decays of tokens, from the four lines that a kernel gives of a chunk.

    A decay between tokens j < i holds the log decays of the tokens after j, up to i. Its exponent's cotangent stands
    at i, and reversed at j: a sum from a token to the end of its segment. Those of `before` are such sums too; those of
    `after` run from the start of the chunk to before a token; that of `whole` is for every token.
    """
    C = plan.chunk
    between, before, after, whole = (lines[:, :, :, at] for at in range(4))  # [B, H, N, C]
    from_here = jnp.arange(C)[:, None] >= jnp.arange(C)[None, :]  # [i, l]: token l is in a sum that ends at i
    if segments is not None:
        segments = recurrence.pad_tokens(segments, plan.length, last=True)
        segments = segments.reshape(segments.shape[0], 1, -1, C)
        from_here = from_here & (segments[..., :, None] == segments[..., None, :])
    highest = lax.Precision.HIGHEST
    earlier = (jnp.arange(C)[:, None] < jnp.arange(C)[None, :]).astype(jnp.float32)  # [j, l]
    ends = jnp.broadcast_to(from_here, (*between.shape[:1], 1, between.shape[2], C, C)).astype(jnp.float32)
    total = jnp.einsum("bhni,bgnil->bhnl", between + before, ends, precision=highest)
    total = total + jnp.einsum("bhnj,jl->bhnl", after, earlier, precision=highest) + whole
    return jnp.swapaxes(total.reshape(*total.shape[:2], -1)[:, :, :T], 1, 2)


# --- Products. --------------------------------------------------------------------------------------------------------


def dot(a: jax.Array, b: jax.Array, contract: str, dtype: Any) -> jax.Array:
    """A product of operands rounded to `dtype`, summed in float32.

    Args:
      a: a matrix.
      b: a matrix.
      contract: "nn" for a b, "nt" for a b^T, "tn" for a^T b.
      dtype: of the operands; float32 ones are multiplied in full precision.
    """
    axes = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[contract]
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (axes, ((), ())),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )


def sums_along_lanes(x: jax.Array) -> jax.Array:
    """Sums of the rows of x [C, D], as a row [1, C]: of the columns of x transposed, cheaper than to turn a column."""
    return jnp.sum(jnp.transpose(x), axis=0, keepdims=True)
