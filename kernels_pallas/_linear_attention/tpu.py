"""Linear attention forward on TPU: a Pallas Mosaic kernel.

Grid (batch, head, step), see `recurrence_tpu`. Of a chunk, with S the state before it and D the decays inside it,

    o = scale ((q k^T * D) v + (q * before) S),    S <- whole S + (k * after)^T v.

The products with the state take it rounded to the dtype of the inputs; the state itself is only added to, in float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import dispatch, recurrence_tpu
from kernels_pallas._linear_attention.config import Config, Operands, gate
from kernels_pallas.recurrence_tpu import Gates, Plan, dot, times


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
    kind = gate(operands)
    plan = tiles(config, operands)
    inputs = {
        "q": recurrence_tpu.heads_first(operands.q, plan),
        "k": recurrence_tpu.heads_first(operands.k, plan),
        "v": recurrence_tpu.heads_first(operands.v, plan),
        "state": recurrence_tpu.transposed(operands.state),
    }
    wide = {name: x.shape[3] for name, x in inputs.items()}
    tokens = lambda width: pl.BlockSpec((None, None, plan.tokens, width), lambda b, h, t, *_: (b, h, t, 0))  # noqa: E731
    state = pl.BlockSpec((None, None, wide["v"], wide["k"]), lambda b, h, t, *_: (b, h, 0, 0))
    specs = {"q": tokens(wide["q"]), "k": tokens(wide["k"]), "v": tokens(wide["v"]), "state": state}
    scalars = []
    if kind == "head":
        scalars = [operands.log_decay.astype(jnp.float32).reshape(-1)]
    if kind == "token" or operands.segments is not None:
        lines = recurrence_tpu.token_lines(operands.log_decay, operands.segments, plan)
        inputs["lines"], each = lines, lines.shape[1] > 1
        specs["lines"] = pl.BlockSpec(
            (None, None, plan.chunks, *lines.shape[3:]), lambda b, h, t, *_: (b, h if each else 0, t, 0, 0)
        )
    o, last = pl.pallas_call(
        partial(_kernel, config=config, plan=plan, kind=kind, names=tuple(inputs), T=T, H=H, segments=operands.segments is not None),
        out_shape=(
            dispatch.output(inputs["v"].shape, operands.v.dtype),
            dispatch.output(inputs["state"].shape, jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, H, plan.steps),
            in_specs=[specs[name] for name in inputs],
            out_specs=(tokens(wide["v"]), state),
            scratch_shapes=[pltpu.VMEM((wide["v"], wide["k"]), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="linear_attention_forward",
    )(*scalars, *inputs.values())
    return recurrence_tpu.tokens_first(o, operands.v), jnp.swapaxes(last, -1, -2)[:, :, :K, :V]


def tiles(config, operands):
    import os
    C = int(os.environ.get("LC","128")); n=int(os.environ.get("LN","8"))
    return recurrence_tpu.plan(operands.q.shape[1], C, n)


def _kernel(*refs: Any, config, plan, kind, names, T, H, segments) -> None:
    decay, *refs = refs if kind == "head" else (None, *refs)
    inputs = dict(zip(names, refs, strict=False))
    o_ref, last_ref, s_ref = refs[len(names):]
    C = plan.chunk
    b, h, t = (pl.program_id(axis) for axis in range(3))

    @pl.when(t == 0)
    def _() -> None:
        s_ref[...] = inputs["state"][...]

    shared = None
    if kind == "none" and not segments:
        shared = recurrence_tpu.no_gates(C)
    elif kind == "head" and plan.length == T:
        shared = recurrence_tpu.head_gates(decay[b * H + h], C, C)
    dtype = inputs["q"].dtype
    S = s_ref[...]
    for c in range(plan.chunks):
        span = pl.ds(c*C, C)
        q, k, v = (inputs[name][span, :] for name in "qkv")
        if shared is not None:
            g = shared
        elif kind == "head":
            g = recurrence_tpu.head_gates(decay[b * H + h], C, jnp.clip(T - t*plan.tokens - c*C, 0, C))
        else:
            g = recurrence_tpu.token_gates(inputs["lines"][c], decays=kind != "none", segments=segments)
        p = dot(q, k, "nt", dtype) * g.between
        o = dot(p, v, "nn", dtype) + dot(times(q, g.before), S, "nt", dtype)
        o_ref[span, :] = (config.scale * o).astype(o_ref.dtype)
        S = times(S, g.whole) + dot(v, times(k, g.after), "tn", dtype)
    s_ref[...] = S

    @pl.when(t == plan.steps - 1)
    def _() -> None:
        last_ref[...] = S
