"""The delta rule forward on TPU: a Pallas Mosaic kernel.

Grid (batch, heads, step), see `recurrence_tpu`. Of a chunk, with S the state before it and D the decays inside it,

    P = q k^T * D,    M = k k^T * D below the diagonal,    A = (I + M beta)^-1,    y = A (v - (k * before) S),
    o = scale (P beta y + (q * before) S),    S <- whole S + (k * after)^T beta y.

beta y are the corrections of the values. A step first makes P beta and A of its chunks (`_ready`), and then takes the
state from chunk to chunk (`_carry`) in transposed products, S^T, y^T and o^T: beta and the gates of tokens run along
the lanes everywhere, where a factor of each is free, and no product's left side has to be turned. Several heads go side
by side, one's products filling the time that another's take.

A is made by substitution in small blocks, and by block doubling from these on (`_inverses`): no power of M appears,
which would be huge where keys are alike. Products with A and with the state are of float32, or of up to three of
bfloat16 (`fine_dot`), since what one token gets wrong the next ones correct, wrongly; only the scores are rounded to
the dtype of the inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import dispatch, recurrence_tpu
from kernels_pallas._delta_rule import limits
from kernels_pallas._delta_rule.config import Config, Operands, gate
from kernels_pallas.recurrence_tpu import BETA, LANES, Gates, Kinds, Plan, dot, times

# Tokens of the diagonal blocks that are inverted by substitution.
_BASE = 16


def forward(config: Config, operands: Operands, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, V] and the state after the last token [B, H, K, V] in float32.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    # With x64 on, Python's ints in index maps would be 64 bits wide, which the compiler does not take.
    with jax.enable_x64(False):
        plan, heads = limits.forward_plan(config, operands)  # pyright: ignore[reportGeneralTypeIssues]
        kinds = Kinds(gate(operands), operands.segments is not None)
        inputs = prepare(operands, kinds, plan)
        inputs["state"] = recurrence_tpu.transposed(operands.state)
        outputs = {
            "o": dispatch.output(inputs["v"].shape, operands.v.dtype),
            "last_state": dispatch.output(inputs["state"].shape, jnp.float32),
        }
        o, last = sweep(inputs, outputs, config, kinds, plan, heads, interpret)
        K, V = operands.state.shape[2:]
        return recurrence_tpu.tokens_first(o, operands.v), jnp.swapaxes(last, -1, -2)[:, :, :K, :V]


def prepare(operands: Operands, kinds: Kinds, plan: Plan) -> dict[str, jax.Array]:
    """q, k, v and gates as the kernels read them."""
    inputs = {name: recurrence_tpu.heads_first(getattr(operands, name), plan) for name in "qkv"}
    decays = operands.log_decay if kinds.gate == "token" else None
    inputs["lines"] = recurrence_tpu.token_lines(decays, operands.segments, plan, operands.beta)
    if kinds.gate == "channel":
        inputs["log_decay"] = recurrence_tpu.heads_first(operands.log_decay.astype(jnp.float32), plan)
    return inputs


def sweep(
    inputs: dict[str, jax.Array],
    outputs: dict[str, Any],
    config: Config,
    kinds: Kinds,
    plan: Plan,
    heads: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Go over the chunks forward.

    Args:
      inputs: as of `prepare`, and `state`.
      outputs: of "o" and "last_state" for the forward pass, of "inverses" (A of every chunk) and "states" (S^T before
        every chunk) for the backward pass.
      config: static part of the call.
      kinds: of gates.
      plan: of the tokens.
      heads: a step.
      interpret: an interpreter's parameters.
    """
    from jax.experimental.pallas import tpu as pltpu

    B, H, wide_v, wide_k = inputs["state"].shape
    C, dtype = plan.chunk, inputs["q"].dtype
    specs = recurrence_tpu.block_specs(inputs | outputs, plan, heads=heads)
    scratch = {"S": ((heads, wide_v, wide_k), jnp.float32)}
    if "inverses" not in outputs:
        scratch["inverses"] = ((heads, plan.chunks, C, C), jnp.float32)
    if "o" in outputs:
        scratch["scores"] = ((heads, plan.chunks, C, C), dtype)
    if kinds.gate == "channel":
        scratch |= {name: ((heads, plan.chunks, C, wide_k), jnp.float32) for name in ("before", "after")}
        scratch["whole"] = ((heads, plan.chunks, 8, wide_k), jnp.float32)
    return pl.pallas_call(
        partial(_kernel, scale=config.scale, plan=plan, kinds=kinds, names=(*inputs, *outputs, *scratch), heads=heads),
        out_shape=tuple(outputs.values()),
        grid=(B, H // heads, plan.steps),
        in_specs=[specs[name] for name in inputs],
        out_specs=tuple(specs[name] for name in outputs),
        scratch_shapes=[pltpu.VMEM(*of) for of in scratch.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * H * plan.length * (C * (2 * wide_k + 2 * wide_v + C) + 3 * wide_k * wide_v),
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs.values(), *outputs.values())),
        ),
        interpret=interpret,
        name="delta_rule_forward" if "o" in outputs else "delta_rule_states",
    )(*inputs.values())


def _kernel(*refs: Any, scale: float, plan: Plan, kinds: Kinds, names: tuple[str, ...], heads: int) -> None:
    arrays = dict(zip(names, refs, strict=True))
    of_head = [{name: ref.at[h] for name, ref in arrays.items()} for h in range(heads)]
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _() -> None:
        arrays["S"][...] = arrays["state"][...]

    def ready(c: Any) -> None:
        _ready(of_head, c, plan.chunk, kinds)

    def carry(c: Any) -> None:
        _carry(of_head, c, plan.chunk, kinds, scale)

    recurrence_tpu.loop(plan.chunks, 1, ready)
    recurrence_tpu.loop(plan.chunks, 1, carry)

    if "last_state" in arrays:

        @pl.when(t == plan.steps - 1)
        def _() -> None:
            arrays["last_state"][...] = arrays["S"][...]


def _ready(of_head: list[dict[str, Any]], c: Any, C: int, kinds: Kinds) -> None:
    """What of a chunk needs no state."""
    matrices = []
    for arrays in of_head:
        g, beta = recurrence_tpu.read_gates(arrays, c, kinds, C), recurrence_tpu.line(arrays["lines"], c, BETA)
        k = recurrence_tpu.rows(arrays["k"], c, C)
        dtype = k.dtype
        if "scores" in arrays:
            q = recurrence_tpu.rows(arrays["q"], c, C)
            arrays["scores"][c] = (recurrence_tpu.scores(q, k, g, dtype) * beta).astype(dtype)
        row, column = recurrence_tpu.iotas(C)
        matrices.append(jnp.where(row > column, recurrence_tpu.scores(k, k, g, dtype), 0.0) * beta)
        if kinds.gate == "channel":
            arrays["before"][c], arrays["after"][c] = g.before, g.after
            arrays["whole"][c] = jnp.broadcast_to(g.whole, arrays["whole"].shape[1:])
    for arrays, A in zip(of_head, _inverses(matrices, dtype), strict=True):
        arrays["inverses"][c] = A


def _carry(of_head: list[dict[str, Any]], c: Any, C: int, kinds: Kinds, scale: float) -> None:
    """The output of a chunk, and the state behind it: transposed, so that gates of tokens run along the lanes."""
    n = range(len(of_head))
    q, k, v = ([recurrence_tpu.rows(arrays[name], c, C) for arrays in of_head] for name in "qkv")
    dtype, S = q[0].dtype, [arrays["S"][...] for arrays in of_head]
    beta = [recurrence_tpu.line(arrays["lines"], c, BETA) for arrays in of_head]
    if "states" in of_head[0]:
        for i in n:
            of_head[i]["states"][c] = S[i]
    if kinds.gate == "channel":
        g = [Gates(None, x["before"][c], x["after"][c], x["whole"][c][:1]) for x in of_head]
        reads = lambda x: [fine_dot(S[i], times(x[i], g[i].before), "nt", dtype) for i in n]  # noqa: E731
    else:
        g = [recurrence_tpu.row_gates(arrays, c, kinds) for arrays in of_head]
        reads = lambda x: [times(fine_dot(S[i], x[i], "nt", dtype), g[i].before) for i in n]  # noqa: E731
    error = [jnp.transpose(v[i]).astype(jnp.float32) - seen for i, seen in enumerate(reads(k))]
    y = [fine_dot(error[i], of_head[i]["inverses"][c], "nt", dtype) for i in n]
    if "o" in of_head[0]:
        o = [x + dot(y[i], of_head[i]["scores"][c], "nt", dtype) for i, x in enumerate(reads(q))]
        at = pl.ds(recurrence_tpu.multiple_of(c * C, C), C)
        for i in n:
            of_head[i]["o"][at, :] = jnp.transpose((scale * o[i]).astype(dtype))
    # Errors of the state come back in what later tokens correct: it is added to in full.
    if kinds.gate == "channel":
        added = [fine_dot(y[i] * beta[i], times(k[i], g[i].after), "nn", dtype) for i in n]
    else:
        added = [fine_dot(times(y[i] * beta[i], g[i].after), k[i], "nn", dtype) for i in n]
    for i in n:
        of_head[i]["S"][...] = times(S[i], g[i].whole) + added[i]


def fine_dot(a: jax.Array, b: jax.Array, contract: str, dtype: Any) -> jax.Array:
    """A product of float32 matrices, in full; beside inputs of 16 bits in three products of these: to 2^-16.

    Args:
      a: a matrix.
      b: a matrix.
      contract: as of `dot`.
      dtype: of the inputs.
    """
    if dtype != jnp.bfloat16:
        return dot(a, b, contract, jnp.float32)
    (a, *a_low), (b, *b_low) = (_parts(x, dtype) for x in (a, b))
    pairs = [(a, b), *((low, b) for low in a_low), *((a, low) for low in b_low)]
    # The sum over the products is one over a longer axis: a matrix unit that is large enough adds, too.
    axes = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}[contract]
    longer = [jnp.concatenate(xs, axis=axis) for xs, axis in zip(zip(*pairs, strict=True), axes, strict=True)]
    return dot(*longer, contract, dtype)


def _parts(x: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    """A matrix rounded to bfloat16 and, if that is not all of it, what is left."""
    if x.dtype == dtype:
        return (x,)
    high = x.astype(dtype)
    return high, (x - high.astype(jnp.float32)).astype(dtype)


def _inverses(matrices: list[jax.Array], dtype: Any) -> list[jax.Array]:
    """(I + L)^-1 of every L strictly lower triangular [C, C].

    Diagonal blocks of `_BASE` are inverted by forward substitution, all side by side. With the inverses X11 and X22 of
    two neighbouring ones, the rest of the inverse of both is -X22 L21 X11: of all pairs at once by products whose rows
    are those of the second blocks alone.
    """
    C = matrices[0].shape[0]
    found = _substituted(matrices)
    half = _BASE
    while half < C:
        row, column = (lax.broadcasted_iota(jnp.int32, (C // 2, C), axis) for axis in (0, 1))
        across = (column & -half) == 2 * (row & -half)
        between = [jnp.where(across, _second(L, half), 0.0) for L in matrices]
        corner = [_half_dot(L, _first(X, half), half, 0, dtype) for L, X in zip(between, found, strict=True)]
        corner = [_half_dot(_second(X, half), T, half, 1, dtype) for X, T in zip(found, corner, strict=True)]
        found = [_joined(_first(X, half), _second(X, half) - T, half) for X, T in zip(found, corner, strict=True)]
        half *= 2
    return found


def _half_dot(a: jax.Array, b: jax.Array, half: int, which: int, dtype: Any) -> jax.Array:
    """The product of a [C / 2, C] and b [C / 2, C], whose rows stand for one half of every block of a's columns.

    Args:
      a: 0 in the columns of the other halves, where it has room for what rounding to 16 bits leaves.
      b: the rows of one half of every block.
      half: the length of half a block.
      which: the half, 0 for the first, 1 for the second.
      dtype: of the inputs of the kernel.
    """
    from jax.experimental.pallas import tpu as pltpu

    if dtype != jnp.bfloat16:
        return dot(a, _joined(b, b, half), "nn", jnp.float32)
    high, low = (x.astype(jnp.float32) for x in _parts(a, dtype))
    shift = half if which == 0 else a.shape[1] - half
    both = (high + pltpu.roll(low, shift, 1)).astype(dtype)
    left = jnp.concatenate([both, high.astype(dtype)], axis=1)
    right = jnp.concatenate([_joined(x, x, half) for x in _parts(b, dtype)], axis=0)
    return dot(left, right, "nn", dtype)


def _first(x: jax.Array, half: int) -> jax.Array:
    """The rows of the first half of every block."""
    return jnp.concatenate([x[i : i + half] for i in range(0, x.shape[0], 2 * half)], axis=0)


def _second(x: jax.Array, half: int) -> jax.Array:
    """The rows of the second half of every block."""
    return jnp.concatenate([x[i : i + half] for i in range(half, x.shape[0], 2 * half)], axis=0)


def _joined(first: jax.Array, second: jax.Array, half: int) -> jax.Array:
    """The rows of both halves of every block."""
    at = range(0, first.shape[0], half)
    return jnp.concatenate([x[i : i + half] for i in at for x in (first, second)], axis=0)


def _substituted(matrices: list[jax.Array]) -> list[jax.Array]:
    """The inverses of the diagonal blocks of every I + L, L strictly lower triangular [C, C]; 0 beside the blocks."""
    C = matrices[0].shape[0]
    row, lane = (lax.broadcasted_iota(jnp.int32, (_BASE, LANES), axis) for axis in (0, 1))
    first = lane & -_BASE
    starts = range(0, C, LANES)
    # Block by block side by side along the lanes.
    own = [jnp.zeros((_BASE, LANES), jnp.float32) for _ in matrices for _ in starts]
    for i in range(0, LANES, _BASE):
        pieces = [L[at + i : at + i + _BASE, at : at + LANES] for L in matrices for at in starts]
        own = [jnp.where(first == i, piece, x) for piece, x in zip(pieces, own, strict=True)]
    found = [jnp.where(row == lane - first, 1.0, 0.0) for _ in own]
    for j in range(_BASE - 1):
        # Rows of eight that lie before row j + 1 are done.
        done = (j + 1) // 8 * 8
        # Column j of every block, in all of its lanes.
        factors = [jnp.take_along_axis(x[done:], first[done:] + j, axis=1) for x in own]
        later = [x[done:] - factor * x[j : j + 1] for x, factor in zip(found, factors, strict=True)]
        found = [jnp.concatenate([x[:done], y], axis=0) if done else y for x, y in zip(found, later, strict=True)]
    rows = []
    for n, x in enumerate(found):
        part = jnp.concatenate([jnp.where(first == i, x, 0.0) for i in range(0, LANES, _BASE)], axis=0)
        none = jnp.zeros_like(part)
        rows.append(jnp.concatenate([part if n % len(starts) == i else none for i in range(len(starts))], axis=1))
    return [jnp.concatenate(rows[i : i + len(starts)], axis=0) for i in range(0, len(rows), len(starts))]
