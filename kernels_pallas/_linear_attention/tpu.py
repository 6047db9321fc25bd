"""Linear attention forward on TPU: a Pallas Mosaic kernel.

Grid (batch, head, step), see `recurrence_tpu`. Of a chunk, with S the state before it and D the decays inside it,

    o = scale ((q k^T * D) v + (q * before) S),    S <- whole S + (k * after)^T v.

A step first makes what needs no state, for all of its chunks: the scores, and what each adds to the state. The state
then goes from chunk to chunk by one multiply-add. These are loops of some chunks at a time, which the compiler
schedules one beside the other. Products take it rounded to the dtype of the inputs; the state itself
is only added to, in float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import dispatch, recurrence_tpu
from kernels_pallas._linear_attention import limits
from kernels_pallas._linear_attention.config import Config, Operands, gate
from kernels_pallas.recurrence_tpu import LANES, Gates, Kinds, Plan, block_specs, dot, read_gates, times


def forward(config: Config, operands: Operands, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, V] and the state after the last token [B, H, K, V] in float32.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    # With x64 on, Python's ints in index maps would be 64 bits wide, which the compiler does not take.
    with jax.enable_x64(False):
        return _forward(config, operands, interpret)


def _forward(config: Config, operands: Operands, interpret: Any) -> tuple[jax.Array, jax.Array]:
    from jax.experimental.pallas import tpu as pltpu

    B, T, H, K = operands.q.shape
    V = operands.v.shape[3]
    plan = limits.forward_plan(config, operands)
    kinds = Kinds(gate(operands), operands.segments is not None)
    inputs = {name: recurrence_tpu.heads_first(getattr(operands, name), plan) for name in "qkv"}
    inputs |= {"state": recurrence_tpu.transposed(operands.state), **gate_inputs(operands, kinds, plan)}
    scalars = [operands.log_decay.astype(jnp.float32).reshape(-1)] if kinds.gate == "head" else []
    specs = block_specs(inputs, plan)
    wide_v, wide_k = inputs["state"].shape[2:]
    C, dtype = plan.chunk, operands.q.dtype
    scratch = [
        pltpu.VMEM((wide_v, wide_k), jnp.float32),
        pltpu.VMEM((plan.chunks, C, C), dtype),
        pltpu.VMEM((plan.chunks, wide_v, wide_k), jnp.float32),
    ]
    if kinds.gate == "head":
        scratch += [pltpu.VMEM((C, width), jnp.float32) for width in (C, LANES, LANES)]
    if kinds.gate == "channel":
        scratch += [pltpu.VMEM((plan.chunks, rows, wide_k), jnp.float32) for rows in (C, 8)]
    moved = sum(x.size * x.dtype.itemsize for x in inputs.values()) + inputs["v"].size * dtype.itemsize
    o, last = pl.pallas_call(
        partial(_kernel, scale=config.scale, plan=plan, kinds=kinds, names=tuple(inputs), T=T, H=H),
        out_shape=(
            dispatch.output(inputs["v"].shape, operands.v.dtype),
            dispatch.output(inputs["state"].shape, jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, H, plan.steps),
            in_specs=[specs[name] for name in inputs],
            out_specs=(specs["v"], specs["state"]),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * H * plan.length * (C * (wide_k + wide_v) + 2 * wide_k * wide_v),
            transcendentals=0,
            bytes_accessed=moved,
        ),
        interpret=interpret,
        name="linear_attention_forward",
    )(*scalars, *inputs.values())
    return recurrence_tpu.tokens_first(o, operands.v), jnp.swapaxes(last, -1, -2)[:, :, :K, :V]


# --- What a kernel reads. ---------------------------------------------------------------------------------------------


def gate_inputs(operands: Operands, kinds: Kinds, plan: Plan) -> dict[str, jax.Array]:
    """The lines of chunks, where tokens or segments have them, and the log decays of key channels."""
    arrays = {}
    if kinds.gate == "token" or kinds.segments:
        decays = operands.log_decay if kinds.gate == "token" else None
        arrays["lines"] = recurrence_tpu.token_lines(decays, operands.segments, plan)
    if kinds.gate == "channel":
        arrays["log_decay"] = recurrence_tpu.heads_first(operands.log_decay.astype(jnp.float32), plan)
    return arrays


# --- The kernel. ------------------------------------------------------------------------------------------------------


def _kernel(*refs: Any, scale: float, plan: Plan, kinds: Kinds, names: tuple[str, ...], T: int, H: int) -> None:
    decay, *refs = refs if kinds.gate == "head" else (None, *refs)
    inputs = dict(zip(names, refs, strict=False))
    o_ref, last_ref, s_ref, p_ref, added_ref, *tiles = refs[len(names) :]
    C, dtype = plan.chunk, inputs["q"].dtype
    b, h, t = (pl.program_id(axis) for axis in range(3))
    constant = decay[b * H + h] if kinds.gate == "head" else None

    @pl.when(t == 0)
    def _() -> None:
        s_ref[...] = inputs["state"][...]
        if constant is not None:
            made = recurrence_tpu.head_gates(constant, C, C)
            for tile, x in zip(tiles, made[:3], strict=True):
                tile[...] = x

    def gates(c: Any) -> Gates:
        if constant is None:
            return read_gates(inputs, c, kinds, C)
        between, before, after = (tile[...] for tile in tiles)
        if plan.length == T:
            return Gates(between, before, after, jnp.exp2(jnp.full((1, 1), constant * (C * recurrence_tpu.LOG2E))))
        # The last chunk has fewer tokens, and padding does not decay the state.
        tokens = jnp.clip(T - t * plan.tokens - c * C, 0, C)
        made = recurrence_tpu.head_gates(constant, C, tokens)
        return Gates(between, before, made.after, made.whole)

    def rows(name: str, c: Any) -> jax.Array:
        return recurrence_tpu.rows(inputs[name], c, C)

    def score(c: Any) -> None:
        q, k, g = rows("q", c), rows("k", c), gates(c)
        p_ref[c] = recurrence_tpu.scores(q, k, g, dtype).astype(dtype)
        if kinds.gate == "channel":
            before_ref, whole_ref = tiles
            before_ref[c], whole_ref[c] = g.before, jnp.broadcast_to(g.whole, whole_ref.shape[1:])
            added_ref[c] = dot(rows("v", c), times(k, g.after), "tn", dtype)

    def add(c: Any) -> None:
        added_ref[c] = dot(rows("v", c), times(rows("k", c), gates(c).after), "tn", dtype)

    def carry(c: Any) -> None:
        q, v, S = rows("q", c), rows("v", c), s_ref[...]
        if kinds.gate == "channel":
            before, whole = tiles[0][c], tiles[1][c][:1]
            read = dot(times(q, before), S, "nt", dtype)
        else:
            # One factor a row is applied behind the product, where it rounds nothing.
            before, whole = gates(c)[1:4:2]
            read = times(dot(q, S, "nt", dtype), before)
        o = dot(p_ref[c], v, "nn", dtype) + read
        o_ref[pl.ds(recurrence_tpu.multiple_of(c * C, C), C), :] = (scale * o).astype(o_ref.dtype)
        s_ref[...] = times(S, whole) + added_ref[c]

    # Each in a loop of its own: together they would hold more than the registers do.
    for part in (score, carry) if kinds.gate == "channel" else (score, add, carry):
        each = limits.unrolled(part.__name__, kinds.gate, dtype.itemsize)
        recurrence_tpu.loop(plan.chunks, each, part)

    @pl.when(t == plan.steps - 1)
    def _() -> None:
        last_ref[...] = s_ref[...]
