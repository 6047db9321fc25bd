"""Linear attention backward on TPU: two Pallas Mosaic kernels.

The first goes forward and writes the state before every chunk, S. The second goes back over the chunks with the
cotangent of the state in VMEM, dS. With P = scale (q k^T * D) and A = scale (do v^T * D), of a chunk

    dq = A k + scale before * (do S^T),    dk = A^T q + after * (v dS^T),    dv = P^T do + (k * after) dS,
    dS <- whole dS + (scale q * before)^T do.

Where a decay is a token's, the kernel gives four lines of a chunk: by the exponents of the decays between tokens, those
of `before`, those of `after`, and that of `whole`. The gradient of a log decay is made of them by sums that lie inside
the chunk and cancel nothing but what cancels between the tokens themselves. That of a decay of key channels is summed
in the kernel, back through the sums of `recurrence_tpu.channel_gates`.
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
from kernels_pallas._linear_attention.tpu import gate_inputs
from kernels_pallas.recurrence_tpu import Kinds, Plan, block_specs, dot, read_gates, times


def backward(
    config: Config, operands: Operands, o_cotangent: jax.Array, state_cotangent: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, ...]:
    """Cotangents of q, k, v, the initial state and, where there is one, log_decay.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      o_cotangent: [B, T, H, V].
      state_cotangent: of the state after the last token, [B, H, K, V].
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    # With x64 on, Python's ints in index maps would be 64 bits wide, which the compiler does not take.
    with jax.enable_x64(False):
        if gate(operands) != "head":
            return _backward(config, operands, o_cotangent, state_cotangent, interpret)
        spread = jnp.broadcast_to(operands.log_decay[:, None], operands.q.shape[:3])
        *others, of_tokens = _backward(
            config, operands._replace(log_decay=spread), o_cotangent, state_cotangent, interpret
        )
        return *others, jnp.sum(of_tokens, axis=1)


def _backward(config: Config, operands: Operands, do: Any, dstate: Any, interpret: Any) -> tuple[jax.Array, ...]:
    from jax.experimental.pallas import tpu as pltpu

    B, _, H, K = operands.q.shape
    V = operands.v.shape[3]
    plan = limits.backward_plan(config, operands)
    kinds = Kinds(gate(operands), operands.segments is not None)
    inputs = {name: recurrence_tpu.heads_first(getattr(operands, name), plan) for name in "qkv"}
    inputs |= gate_inputs(operands, kinds, plan)
    states = _states(plan, kinds, inputs, recurrence_tpu.transposed(operands.state), interpret)
    inputs |= {
        "do": recurrence_tpu.heads_first(do.astype(operands.q.dtype), plan),
        "states": states,
        "dstate": recurrence_tpu.transposed(dstate.astype(jnp.float32)),
    }
    outputs = {
        "dq": dispatch.output(inputs["q"].shape, operands.q.dtype),
        "dk": dispatch.output(inputs["k"].shape, operands.k.dtype),
        "dv": dispatch.output(inputs["v"].shape, operands.v.dtype),
        "initial_state": dispatch.output(inputs["dstate"].shape, jnp.float32),
    }
    if kinds.gate == "token":
        outputs["dlines"] = dispatch.output(inputs["lines"].shape, jnp.float32)
    if kinds.gate == "channel":
        outputs["dlog_decay"] = dispatch.output(inputs["log_decay"].shape, jnp.float32)
    specs = block_specs(inputs | outputs, plan, reverse=True)
    wide_v, wide_k = inputs["dstate"].shape[2:]
    moved = sum(x.size * x.dtype.itemsize for x in inputs.values()) + 3 * inputs["q"].size * operands.q.dtype.itemsize
    results = pl.pallas_call(
        partial(_kernel, scale=config.scale, plan=plan, kinds=kinds, names=(*inputs, *outputs)),
        out_shape=tuple(outputs.values()),
        grid=(B, H, plan.steps),
        in_specs=[specs[name] for name in inputs],
        out_specs=tuple(specs[name] for name in outputs),
        scratch_shapes=[pltpu.VMEM((wide_v, wide_k), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * H * plan.length * (plan.chunk * (3 * wide_k + 2 * wide_v) + 4 * wide_k * wide_v),
            transcendentals=0,
            bytes_accessed=moved,
        ),
        interpret=interpret,
        name="linear_attention_backward",
    )(*inputs.values())
    results = dict(zip(outputs, results, strict=True))
    cotangents = [recurrence_tpu.tokens_first(results[f"d{name}"], getattr(operands, name)) for name in "qkv"]
    cotangents.append(jnp.swapaxes(results["initial_state"], -1, -2)[:, :, :K, :V])
    if kinds.gate == "token":
        cotangents.append(recurrence_tpu.of_tokens(results["dlines"], operands.segments, plan, operands.q.shape[1]))
    if kinds.gate == "channel":
        cotangents.append(recurrence_tpu.tokens_first(results["dlog_decay"], operands.log_decay))
    return tuple(cotangents)


# --- The state before every chunk. ------------------------------------------------------------------------------------


def _states(plan: Plan, kinds: Kinds, arrays: dict[str, jax.Array], state: jax.Array, interpret: Any) -> jax.Array:
    """S^T before every chunk, float32 [B, H, chunks, V, K]."""
    from jax.experimental.pallas import tpu as pltpu

    inputs = {name: x for name, x in arrays.items() if name != "q"} | {"state": state}
    B, H = state.shape[:2]
    out = dispatch.output((B, H, plan.chunks * plan.steps, *state.shape[2:]), jnp.float32)
    specs = block_specs(inputs | {"states": out}, plan)
    return pl.pallas_call(
        partial(_states_kernel, plan=plan, kinds=kinds, names=(*inputs, "states")),
        out_shape=out,
        grid=(B, H, plan.steps),
        in_specs=[specs[name] for name in inputs],
        out_specs=specs["states"],
        scratch_shapes=[pltpu.VMEM(state.shape[2:], jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="linear_attention_states",
    )(*inputs.values())


def _states_kernel(*refs: Any, plan: Plan, kinds: Kinds, names: tuple[str, ...]) -> None:
    *refs, s_ref = refs
    arrays = dict(zip(names, refs, strict=True))
    C, dtype = plan.chunk, arrays["k"].dtype

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        s_ref[...] = arrays["state"][...]

    for c in range(plan.chunks):
        span, g = pl.ds(c * C, C), read_gates(arrays, c, kinds, C)
        added = dot(arrays["v"][span, :], times(arrays["k"][span, :], g.after), "tn", dtype)
        S = s_ref[...]
        arrays["states"][c] = S
        s_ref[...] = times(S, g.whole) + added


# --- The way back. ----------------------------------------------------------------------------------------------------


def _kernel(*refs: Any, scale: float, plan: Plan, kinds: Kinds, names: tuple[str, ...]) -> None:
    *refs, ds_ref = refs
    arrays = dict(zip(names, refs, strict=True))
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _() -> None:
        ds_ref[...] = arrays["dstate"][...]

    for c in reversed(range(plan.chunks)):
        _chunk(arrays, ds_ref, c, scale, plan.chunk, kinds)

    @pl.when(t == plan.steps - 1)
    def _() -> None:
        arrays["initial_state"][...] = ds_ref[...]


def _chunk(arrays: dict[str, Any], ds_ref: Any, c: int, scale: float, C: int, kinds: Kinds) -> None:
    span, g = pl.ds(c * C, C), read_gates(arrays, c, kinds, C)
    q, k, v, do = (arrays[name][span, :] for name in ("q", "k", "v", "do"))
    dtype = q.dtype
    S, dS = arrays["states"][c], ds_ref[...]

    p = scale * recurrence_tpu.scores(q, k, g, dtype)
    row, column = recurrence_tpu.iotas(C)
    dp = jnp.where(row >= column, dot(do, v, "nt", dtype), 0.0)
    dq, dk, levels = recurrence_tpu.scores_cotangents(q, k, scale * dp, g, dtype)
    to_before = scale * times(dot(do, S, "nn", dtype), g.before)
    to_after = times(dot(v, dS, "nn", dtype), g.after)
    arrays["dq"][span, :] = (dq + to_before).astype(dtype)
    arrays["dk"][span, :] = (dk + to_after).astype(dtype)
    dv = dot(p, do, "tn", dtype) + dot(times(k, g.after), dS, "nt", dtype)
    arrays["dv"][span, :] = dv.astype(dtype)
    kept = times(dS, g.whole)
    ds_ref[...] = kept + scale * dot(do, times(q, g.before), "tn", dtype)

    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    if kinds.gate == "token":
        # What a token has to do with itself does not decay.
        m = jnp.where(row > column, dp * p, 0.0)
        arrays["dlines"][c] = recurrence_tpu.cotangent_lines(m, q * to_before, k * to_after, kept * S)
    if kinds.gate == "channel":
        whole = jnp.sum(kept * S, axis=0, keepdims=True)
        arrays["dlog_decay"][span, :] = recurrence_tpu.channel_cotangent(levels, q * to_before, k * to_after, whole)
