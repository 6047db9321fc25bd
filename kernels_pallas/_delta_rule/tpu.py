"""The delta rule forward on TPU: a Pallas Mosaic kernel.

Grid (batch, heads, step), see `recurrence_tpu`. Of a chunk, with S the state before it and D the decays inside it,

    P = q k^T * D,    M = k k^T * D below the diagonal,    A = (I + beta M)^-1,
    u = A beta (v - (k * before) S),    o = scale (P u + (q * before) S),    S <- whole S + (k * after)^T u.

A step first makes P and A of its chunks, and then takes the state from chunk to chunk, some heads side by side. A is
made by block doubling (`_inverse`): no power of M appears, which would be huge where keys are alike. Products with A
and with the state are of float32, or of up to three of bfloat16 (`fine_dot`), since what one token gets wrong the next
ones correct, wrongly; only the scores are rounded to the dtype of the inputs.
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
        for own in of_head:
            _ready(own, c, plan.chunk, kinds)

    def carry(c: Any) -> None:
        for own in of_head:
            _carry(own, c, plan.chunk, kinds, scale)

    recurrence_tpu.loop(plan.chunks, 1, ready)
    recurrence_tpu.loop(plan.chunks, 2, carry)

    if "last_state" in arrays:

        @pl.when(t == plan.steps - 1)
        def _() -> None:
            arrays["last_state"][...] = arrays["S"][...]


def _ready(arrays: dict[str, Any], c: Any, C: int, kinds: Kinds) -> None:
    """What of a chunk needs no state."""
    g, beta = recurrence_tpu.read_gates(arrays, c, kinds, C), beta_of(arrays, c)
    k = recurrence_tpu.rows(arrays["k"], c, C)
    dtype = k.dtype
    if "scores" in arrays:
        q = recurrence_tpu.rows(arrays["q"], c, C)
        arrays["scores"][c] = recurrence_tpu.scores(q, k, g, dtype).astype(dtype)
    row, column = recurrence_tpu.iotas(C)
    M = jnp.where(row > column, recurrence_tpu.scores(k, k, g, dtype), 0.0)
    arrays["inverses"][c] = _inverse(times(M, beta), dtype)
    if kinds.gate == "channel":
        arrays["before"][c], arrays["after"][c] = g.before, g.after
        arrays["whole"][c] = jnp.broadcast_to(g.whole, arrays["whole"].shape[1:])


def _carry(arrays: dict[str, Any], c: Any, C: int, kinds: Kinds, scale: float) -> None:
    """The output of a chunk, and the state behind it."""
    q, k, v = (recurrence_tpu.rows(arrays[name], c, C) for name in "qkv")
    dtype, S = q.dtype, arrays["S"][...]
    if kinds.gate == "channel":
        g = Gates(None, arrays["before"][c], arrays["after"][c], arrays["whole"][c][:1], ())
    else:
        g = recurrence_tpu.read_gates(arrays, c, kinds, C)
    if "states" in arrays:
        arrays["states"][c] = S
    _, u = corrections(k, v, S, arrays["inverses"][c], g, beta_of(arrays, c), dtype)
    if "o" in arrays:
        o = dot(arrays["scores"][c], u, "nn", dtype)
        if g.levels is None:
            # One factor a row is applied behind the product, where it rounds nothing.
            o = o + times(fine_dot(q, S, "nt", dtype), g.before)
        else:
            o = o + fine_dot(times(q, g.before), S, "nt", dtype)
        at = pl.ds(recurrence_tpu.multiple_of(c * C, C), C)
        arrays["o"][at, :] = (scale * o).astype(dtype)
    # Errors of the state come back in what later tokens correct: it is added to in full.
    if g.levels is None:
        added = fine_dot(times(u, g.after), k, "tn", dtype)
    else:
        added = fine_dot(u, times(k, g.after), "tn", dtype)
    arrays["S"][...] = times(S, g.whole) + added


def beta_of(arrays: dict[str, Any], c: Any) -> jax.Array:
    """beta of a chunk, [C, 128], lanes equal."""
    columns = jnp.transpose(arrays["lines"][c])
    return jnp.broadcast_to(columns[:, BETA : BETA + 1], (columns.shape[0], LANES))


def corrections(
    k: jax.Array, v: jax.Array, S: jax.Array, A: jax.Array, g: Gates, beta: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """The errors v - (k * before) S, and u, of a chunk; both float32 [C, V]."""
    if g.levels is None:
        seen = times(fine_dot(k, S, "nt", dtype), g.before)
    else:
        seen = fine_dot(times(k, g.before), S, "nt", dtype)
    error = v.astype(jnp.float32) - seen
    return error, fine_dot(A, times(error, beta), "nn", dtype)


def fine_dot(a: jax.Array, b: jax.Array, contract: str, dtype: Any) -> jax.Array:
    """A product of float32 matrices, in full; beside inputs of 16 bits in three products of these: to 2^-16."""
    if dtype != jnp.bfloat16:
        return dot(a, b, contract, jnp.float32)
    high = [x.astype(dtype) for x in (a, b)]
    low = [None if x.dtype == dtype else x - y.astype(jnp.float32) for x, y in zip((a, b), high, strict=True)]
    total = dot(high[0], high[1], contract, dtype)
    if low[0] is not None:
        total = total + dot(low[0], high[1], contract, dtype)
    if low[1] is not None:
        total = total + dot(high[0], low[1], contract, dtype)
    return total


def _inverse(L: jax.Array, dtype: Any) -> jax.Array:
    """(I + L)^-1 of L strictly lower triangular [C, C].

    Diagonal blocks of `_BASE` are inverted by forward substitution, all side by side. With the inverses X11 and X22 of
    two neighbouring ones, the rest of the inverse of both is -X22 L21 X11: of all pairs at once by products whose rows
    are those of the second blocks alone.
    """
    C = L.shape[0]
    X = _substituted(L)
    half = _BASE
    while half < C:
        row, column = (lax.broadcasted_iota(jnp.int32, (C // 2, C), axis) for axis in (0, 1))
        starts = range(0, C, 2 * half)
        second = lambda x: jnp.concatenate([x[i + half : i + 2 * half] for i in starts], axis=0)  # noqa: B023, E731
        between = jnp.where(column // half == 2 * (row // half), second(L), 0.0)
        T = fine_dot(between, X, "nn", dtype)
        none = jnp.zeros((half, C), jnp.float32)
        pieces = [T[i : i + half] for i in range(0, C // 2, half)]
        T = jnp.concatenate([x for piece in pieces for x in (none, piece)], axis=0)
        lower = second(X) - fine_dot(second(X), T, "nn", dtype)
        X = jnp.concatenate(
            [x for n, i in enumerate(starts) for x in (X[i : i + half], lower[n * half : (n + 1) * half])], axis=0
        )
        half *= 2
    return X


def _substituted(L: jax.Array) -> jax.Array:
    """The inverses of the diagonal blocks of I + L, L strictly lower triangular [C, C]; 0 beside the blocks."""
    C = L.shape[0]
    row, lane = (lax.broadcasted_iota(jnp.int32, (_BASE, LANES), axis) for axis in (0, 1))
    first = lane & -_BASE
    X = []
    for start in range(0, C, LANES):
        # Block by block side by side along the lanes.
        own = jnp.zeros((_BASE, LANES), jnp.float32)
        for i in range(0, LANES, _BASE):
            own = jnp.where(first == i, L[start + i : start + i + _BASE, start : start + LANES], own)
        found = jnp.where(row == lane - first, 1.0, 0.0)
        for j in range(_BASE - 1):
            # Column j of every block, in all of its lanes.
            factor = jnp.take_along_axis(own, first + j, axis=1)
            found = found - factor * found[j : j + 1]
        for i in range(0, LANES, _BASE):
            piece = [jnp.where(first == i, found, 0.0)]
            piece = [jnp.zeros((_BASE, start), jnp.float32)] * (start > 0) + piece
            piece += [jnp.zeros((_BASE, C - start - LANES), jnp.float32)] * (start + LANES < C)
            X.append(jnp.concatenate(piece, axis=1))
    return jnp.concatenate(X, axis=0)
