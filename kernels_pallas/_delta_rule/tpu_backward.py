"""The delta rule backward on TPU: two Pallas Mosaic kernels.

The first goes forward (`tpu.sweep`) and writes of every chunk the state before it, S, and its UT transform, A. The
second goes back over the chunks with the cotangent of the state in VMEM, dS, several heads side by side. In the
notation of `tpu`, with y = A (v - (k * before) S) and u = beta y, the scale in q and P, and products with D understood,
of a chunk

    du = P^T do + (k * after) dS,    dv = A^T beta du,    dL = -dv y^T below the diagonal, the cotangent of L = M beta,
    dq = before * (do S^T) + (do u^T) k,
    dk = -before * (dv S^T) + after * (u dS^T) + (do u^T)^T q + (dL beta) k + (dL beta)^T k,
    dbeta = rows of du * y + columns of dL * M,    dS <- whole dS + (q * before)^T do - (k * before)^T dv.

What becomes of the cotangents of decays is said in `linear_attention`'s backward kernels, which do the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import dispatch, recurrence_tpu
from kernels_pallas._delta_rule import limits
from kernels_pallas._delta_rule.config import Config, Operands, gate
from kernels_pallas._delta_rule.tpu import fine_dot, prepare, sweep
from kernels_pallas.recurrence_tpu import BETA, Kinds, Plan, dot, times

# The line of a chunk's cotangents that holds those of beta, behind the four of decays.
_BETA = 4


def backward(
    config: Config, operands: Operands, o_cotangent: jax.Array, state_cotangent: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, ...]:
    """Cotangents of q, k, v, beta, the initial state and, where there is one, log_decay.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      o_cotangent: [B, T, H, V].
      state_cotangent: of the state after the last token, [B, H, K, V].
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    # With x64 on, Python's ints in index maps would be 64 bits wide, which the compiler does not take.
    with jax.enable_x64(False):
        return _backward(config, operands, o_cotangent, state_cotangent, interpret)


def _backward(config: Config, operands: Operands, do: Any, dstate: Any, interpret: Any) -> tuple[jax.Array, ...]:
    plan, heads = limits.backward_plan(config, operands)  # pyright: ignore[reportGeneralTypeIssues]
    kinds = Kinds(gate(operands), operands.segments is not None)
    inputs = prepare(operands, kinds, plan)
    B, H, length, _ = inputs["q"].shape
    state = recurrence_tpu.transposed(operands.state)
    lead = (B, H, length // plan.chunk)
    kept = {
        "inverses": dispatch.output((*lead, plan.chunk, plan.chunk), jnp.float32),
        "states": dispatch.output((*lead, *state.shape[2:]), jnp.float32),
    }
    forward_heads = limits.states_heads(operands, plan, heads)
    arrays = sweep(inputs | {"state": state}, kept, config, kinds, plan, forward_heads, interpret)
    inputs |= dict(zip(kept, arrays, strict=True))
    inputs |= {
        "do": recurrence_tpu.heads_first(do.astype(operands.q.dtype), plan),
        "dstate": recurrence_tpu.transposed(dstate.astype(jnp.float32)),
    }
    results = _call(inputs, config, kinds, plan, heads, interpret)
    T = operands.q.shape[1]
    K, V = operands.state.shape[2:]
    dlines = results["dlines"]
    dbeta = dlines[:, :, :, _BETA].reshape(B, H, -1)[:, :, :T]
    cotangents = [recurrence_tpu.tokens_first(results[f"d{name}"], getattr(operands, name)) for name in "qkv"]
    cotangents.append(jnp.swapaxes(dbeta, 1, 2))
    cotangents.append(jnp.swapaxes(results["initial_state"], -1, -2)[:, :, :K, :V])
    if kinds.gate == "token":
        cotangents.append(recurrence_tpu.of_tokens(dlines, operands.segments, plan, T))
    if kinds.gate == "channel":
        cotangents.append(recurrence_tpu.tokens_first(results["dlog_decay"], operands.log_decay))
    return tuple(cotangents)


def _call(
    inputs: dict[str, jax.Array], config: Config, kinds: Kinds, plan: Plan, heads: int, interpret: Any
) -> dict[str, jax.Array]:
    """Go over the chunks backward."""
    from jax.experimental.pallas import tpu as pltpu

    B, H, wide_v, wide_k = inputs["dstate"].shape
    outputs = {f"d{name}": dispatch.output(inputs[name].shape, inputs[name].dtype) for name in ("q", "k", "v", "lines")}
    outputs["initial_state"] = dispatch.output(inputs["dstate"].shape, jnp.float32)
    if kinds.gate == "channel":
        outputs["dlog_decay"] = dispatch.output(inputs["log_decay"].shape, jnp.float32)
    specs = recurrence_tpu.block_specs(inputs | outputs, plan, heads=heads, reverse=True)
    results = pl.pallas_call(
        partial(_kernel, scale=config.scale, plan=plan, kinds=kinds, names=(*inputs, *outputs, "dS"), heads=heads),
        out_shape=tuple(outputs.values()),
        grid=(B, H // heads, plan.steps),
        in_specs=[specs[name] for name in inputs],
        out_specs=tuple(specs[name] for name in outputs),
        scratch_shapes=[pltpu.VMEM((heads, wide_v, wide_k), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * H * plan.length * (plan.chunk * (6 * wide_k + 4 * wide_v) + 7 * wide_k * wide_v),
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs.values(), *outputs.values())),
        ),
        interpret=interpret,
        name="delta_rule_backward",
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _kernel(*refs: Any, scale: float, plan: Plan, kinds: Kinds, names: tuple[str, ...], heads: int) -> None:
    arrays = dict(zip(names, refs, strict=True))
    of_head = [{name: ref.at[h] for name, ref in arrays.items()} for h in range(heads)]
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _() -> None:
        arrays["dS"][...] = arrays["dstate"][...]

    def back(c: Any) -> None:
        _chunk(of_head, plan.chunks - 1 - c, plan.chunk, kinds, scale)

    recurrence_tpu.loop(plan.chunks, 1, back)

    @pl.when(t == plan.steps - 1)
    def _() -> None:
        arrays["initial_state"][...] = arrays["dS"][...]


def _chunk(of_head: list[dict[str, Any]], c: Any, C: int, kinds: Kinds, scale: float) -> None:
    """The cotangents of a chunk, and that of the state before it."""
    n = range(len(of_head))
    g = [recurrence_tpu.read_gates(arrays, c, kinds, C) for arrays in of_head]
    beta = [recurrence_tpu.as_column(arrays["lines"][c], BETA) for arrays in of_head]
    q, k, v, do = ([recurrence_tpu.rows(x[name], c, C) for x in of_head] for name in ("q", "k", "v", "do"))
    dtype, channels = q[0].dtype, kinds.gate == "channel"
    S, A, dS = [x["states"][c] for x in of_head], [x["inverses"][c] for x in of_head], [x["dS"][...] for x in of_head]
    row, column = recurrence_tpu.iotas(C)
    below = lambda x: jnp.where(row > column, x, 0.0)  # noqa: E731

    def decayed(x: list, decay: list, states: list) -> list[jax.Array]:
        # One factor a row is applied behind the product, where it rounds nothing.
        if channels:
            return [fine_dot(times(x[i], decay[i]), states[i], "nt", dtype) for i in n]
        return [times(fine_dot(x[i], states[i], "nt", dtype), decay[i]) for i in n]

    before, after = [x.before for x in g], [x.after for x in g]
    P = [scale * recurrence_tpu.scores(q[i], k[i], g[i], dtype) for i in n]
    M = [below(recurrence_tpu.scores(k[i], k[i], g[i], dtype)) for i in n]
    error = [v[i].astype(jnp.float32) - x for i, x in enumerate(decayed(k, before, S))]
    y = [fine_dot(A[i], error[i], "nn", dtype) for i in n]
    du = [dot(P[i], do[i], "tn", dtype) + x for i, x in enumerate(decayed(k, after, dS))]
    u = [times(y[i], beta[i]) for i in n]
    dv = [fine_dot(A[i], times(du[i], beta[i]), "tn", dtype) for i in n]
    dP = [jnp.where(row >= column, dot(do[i], u[i], "nt", dtype), 0.0) for i in n]
    dL = [-below(fine_dot(dv[i], y[i], "nt", dtype)) for i in n]
    dM = [dL[i] * recurrence_tpu.line(of_head[i]["lines"], c, BETA) for i in n]

    of_q = [recurrence_tpu.scores_cotangents(q[i], k[i], scale * dP[i], g[i], dtype) for i in n]
    of_k = [recurrence_tpu.scores_cotangents(k[i], k[i], dM[i], g[i], dtype) for i in n]
    q_before = [scale * times(dot(do[i], S[i], "nn", dtype), before[i]) for i in n]
    k_before = [-times(fine_dot(dv[i], S[i], "nn", dtype), before[i]) for i in n]
    k_after = [times(fine_dot(u[i], dS[i], "nn", dtype), after[i]) for i in n]
    if channels:
        seen = [fine_dot(dv[i], times(k[i], before[i]), "tn", dtype) for i in n]
    else:
        seen = [fine_dot(times(dv[i], before[i]), k[i], "tn", dtype) for i in n]
    kept = [times(dS[i], g[i].whole) for i in n]
    at = pl.ds(recurrence_tpu.multiple_of(c * C, C), C)
    for i, arrays in enumerate(of_head):
        read = scale * dot(do[i], times(q[i], before[i]), "tn", dtype)
        arrays["dS"][...] = kept[i] + read - seen[i]
        arrays["dq"][at, :] = (of_q[i][0] + q_before[i]).astype(dtype)
        arrays["dk"][at, :] = (of_q[i][1] + of_k[i][0] + of_k[i][1] + k_before[i] + k_after[i]).astype(dtype)
        arrays["dv"][at, :] = dv[i].astype(dtype)
        wide_q, wide_k = q[i].astype(jnp.float32), k[i].astype(jnp.float32)
        to_before, to_after = wide_q * q_before[i] + wide_k * k_before[i], wide_k * k_after[i]
        # What a token has to do with itself does not decay.
        between = below(dP[i] * P[i]) + dM[i] * M[i] if kinds.gate == "token" else jnp.zeros((C, C), jnp.float32)
        lines = recurrence_tpu.cotangent_lines(between, to_before, to_after, kept[i] * S[i])
        dbeta = recurrence_tpu.sums_along_lanes(du[i] * y[i]) + jnp.sum(dL[i] * M[i], axis=0, keepdims=True)
        arrays["dlines"][c] = jnp.concatenate([lines[:_BETA], dbeta, lines[_BETA + 1 :]], axis=0)
        if channels:
            both = [x + y for x, y in zip(of_q[i][2], of_k[i][2], strict=True)]
            whole = jnp.sum(kept[i] * S[i], axis=0, keepdims=True)
            arrays["dlog_decay"][at, :] = recurrence_tpu.channel_cotangent(both, to_before, to_after, whole)
