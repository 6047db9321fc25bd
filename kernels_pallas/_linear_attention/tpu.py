"""Linear attention forward on TPU: a Pallas Mosaic kernel.

Grid (batch, head, step), see `recurrence_tpu`. Of a chunk, with S the state before it and D the decays inside it,

    o = scale ((q k^T * D) v + (q * before) S),    S <- whole S + (k * after)^T v.

A step first makes what needs no state, for all of its chunks: the scores, and what each adds to the state. The state
then goes from chunk to chunk by one multiply-add. Products take it rounded to the dtype of the inputs; the state itself
is only added to, in float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import dispatch, recurrence_tpu
from kernels_pallas._linear_attention import limits
from kernels_pallas._linear_attention.config import Config, Operands, gate
from kernels_pallas.recurrence_tpu import LANES, Gates, Plan, dot, times


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


class Kinds(NamedTuple):
    """What decays: "none", "head", "token" or "channel"; and whether there are segments."""

    gate: str
    segments: bool


def gate_inputs(operands: Any, kinds: Kinds, plan: Plan) -> dict[str, jax.Array]:
    """The lines of chunks, where tokens or segments have them, and the log decays of key channels."""
    arrays = {}
    if kinds.gate == "token" or kinds.segments:
        decays = operands.log_decay if kinds.gate == "token" else None
        arrays["lines"] = recurrence_tpu.token_lines(decays, operands.segments, plan)
    if kinds.gate == "channel":
        arrays["log_decay"] = recurrence_tpu.heads_first(operands.log_decay.astype(jnp.float32), plan)
    return arrays


def block_specs(inputs: dict[str, jax.Array], plan: Plan, *, reverse: bool = False) -> dict[str, pl.BlockSpec]:
    """Where a step finds its block of each array: of a state the same at every step, of others the step's chunks.

    Args:
      inputs: arrays [B, H, T', D] of tokens, `state` and what ends so [B, H, V, K], others [B, H?, chunks, ., .].
      plan: of the tokens.
      reverse: the grid goes from the last step to the first.
    """
    at = lambda t: plan.steps - 1 - t if reverse else t  # noqa: E731
    specs = {}
    for name, x in inputs.items():
        if name.endswith("state"):
            specs[name] = pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, t, *_: (b, h, 0, 0))
        elif x.ndim == 4:
            specs[name] = pl.BlockSpec((None, None, plan.tokens, x.shape[3]), lambda b, h, t, *_: (b, h, at(t), 0))
        else:
            index = lambda b, h, t, *_, own=x.shape[1] > 1: (b, h if own else 0, at(t), 0, 0)  # noqa: E731
            specs[name] = pl.BlockSpec((None, None, plan.chunks, *x.shape[3:]), index)
    return specs


def read_gates(inputs: dict[str, Any], c: int, kinds: Kinds, C: int) -> Gates:
    """The gates of chunk c of a step; those of a constant decay are made elsewhere."""
    lines = inputs["lines"][c] if "lines" in inputs else None
    if kinds.gate == "channel":
        return recurrence_tpu.channel_gates(inputs["log_decay"][pl.ds(c * C, C), :], lines)
    if lines is None:
        return recurrence_tpu.no_gates(C)
    return recurrence_tpu.token_gates(lines, decays=kinds.gate == "token", segments=kinds.segments)


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

    def gates(c: int) -> Gates:
        if constant is None:
            return read_gates(inputs, c, kinds, C)
        between, before, after = (tile[...] for tile in tiles)
        if plan.length == T:
            return Gates(between, before, after, jnp.exp2(jnp.full((1, 1), constant * (C * recurrence_tpu.LOG2E))))
        # The last chunk has fewer tokens, and padding does not decay the state.
        tokens = jnp.clip(T - t * plan.tokens - c * C, 0, C)
        made = recurrence_tpu.head_gates(constant, C, tokens)
        return Gates(between, before, made.after, made.whole)

    kept = []
    for c in range(plan.chunks):
        span, g = pl.ds(c * C, C), gates(c)
        q, k, v = (inputs[name][span, :] for name in "qkv")
        p_ref[c] = recurrence_tpu.scores(q, k, g, dtype).astype(dtype)
        added_ref[c] = dot(v, times(k, g.after), "tn", dtype)
        kept.append(g)
    for c in range(plan.chunks):
        span = pl.ds(c * C, C)
        q, v = (inputs[name][span, :] for name in "qv")
        S = s_ref[...]
        o = dot(p_ref[c], v, "nn", dtype) + read(q, S, kept[c], dtype)
        o_ref[span, :] = (scale * o).astype(o_ref.dtype)
        s_ref[...] = times(S, kept[c].whole) + added_ref[c]

    @pl.when(t == plan.steps - 1)
    def _() -> None:
        last_ref[...] = s_ref[...]


def read(q: jax.Array, S: jax.Array, gates: Gates, dtype: Any) -> jax.Array:
    """(q * before) S^T; one factor a row is applied behind the product, where it rounds nothing."""
    if gates.levels is None:
        return times(dot(q, S, "nt", dtype), gates.before)
    return dot(times(q, gates.before), S, "nt", dtype)
