"""Linear attention forward on Hopper GPUs: a walk over chunks, see `recurrence_gpu`.

Notation, within a chunk: D_ij = exp(G_i - G_j) for j <= i of one segment, else 0; S the state before the chunk.
o_i = scale (read_i S^T q_i + sum_j D_ij (q_i . k_j) v_j), and S' = read_C S + sum_j write_j k_j v_j^T.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import recurrence_gpu
from kernels_pallas._linear_attention.config import Config, Operands
from kernels_pallas.recurrence_gpu import CHUNK, COLUMNS, READ, WRITE, Chunk, line, product, turned


def unsupported(config: Config, operands: Operands) -> str | None:
    """Why the kernel cannot do a call, or None."""
    return recurrence_gpu.unsupported(config, operands)


def forward(config: Config, operands: Operands, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, V] and final state [B, H, K, V].

    Args:
      config: static part of the call.
      operands: arrays of the call.
      interpret: an interpreter's parameters, for machines without a GPU.
    """
    with jax.enable_x64(False):
        q, k, v, state = recurrence_gpu.padded(*operands[:4])
        inputs = {"q": q, "k": k, "v": v, "state": state} | rows(operands)
        o, final = walk(inputs, ("o", "final"), scale=config.scale, interpret=interpret)
    _, T, _, V = operands.v.shape
    return o[:, :T, :, :V], final[:, :, : operands.q.shape[3], :V]


def rows(operands: Operands) -> dict[str, jax.Array]:
    """The kernels' input "rows", if anything decays or ends."""
    if operands.log_decay is None and operands.segments is None:
        return {}
    return {"rows": recurrence_gpu.decay_rows(operands.log_decay, operands.segments, operands.q.shape[:3])}


def walk(
    inputs: dict[str, jax.Array],
    outputs: tuple[str, ...],
    *,
    scale: float,
    reverse: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Walk over the chunks with the state.

    Args:
      inputs: k, v, state, rows if anything decays, and q if o is wanted.
      outputs: which of "o", "final" and "states" are wanted, in what order.
      scale: of q . k.
      reverse: go from the last chunk to the first, where a token is added with scale READ instead of WRITE. This is how
        the cotangent of the state goes, with q and o's cotangent for k and v; "states" are then those after each chunk.
      interpret: an interpreter's parameters.
    """
    moving = tuple(name for name in ("q", "k", "v", "rows") if name in inputs)
    chunks = pl.cdiv(inputs["k"].shape[1], CHUNK)
    plan = recurrence_gpu.Walk(_step, f"linear_attention_{outputs[0]}", chunks, moving, outputs, reverse, scale)
    # D times q . k; then o on its way out.
    own = {"p": recurrence_gpu.tile(1, CHUNK, CHUNK, dtype=inputs["k"].dtype)} if "o" in outputs else {}
    return recurrence_gpu.walk(plan, inputs, own, interpret)


def _step(chunk: Chunk, state: jax.Array) -> jax.Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plan, rows, v = chunk.walk, chunk.rows, chunk.tiles["v"]
    if "o" in plan.outputs:
        o = _read(chunk)
        chunk.own["p"][...] = o.astype(v.dtype)
    if rows is not None:
        weight = line(rows, READ if plan.reverse else WRITE, 0)
        v[...] = (recurrence_gpu.entries(v) * weight).astype(v.dtype)
    plgpu.commit_smem()
    if "o" in plan.outputs:
        chunk.send("o", chunk.own["p"])
    added = product((turned(chunk.tiles["k"]), v))
    if plan.reverse:
        added = added * plan.scale
    return added + (state if rows is None else state * rows[READ, CHUNK - 1])


def _read(chunk: Chunk) -> jax.Array:
    """o of a chunk [CHUNK, COLUMNS], in float32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, scale, p = chunk.rows, chunk.walk.scale, chunk.own["p"]

    def early(s: Any, o: Any) -> jax.Array:
        plgpu.wgmma(s, chunk.tiles["q"], turned(chunk.tiles["k"]))
        plgpu.wgmma(o, chunk.tiles["q"], chunk.own["state"])
        s = plgpu.wgmma_accumulator_load(s, wait_n=1)
        p[...] = (s * (recurrence_gpu.decays(rows, 0) * scale)).astype(p.dtype)
        return o[...]

    o = pl.run_scoped(early, *(plgpu.ACC((CHUNK, size), jnp.float32) for size in (CHUNK, COLUMNS)))
    plgpu.commit_smem()
    o = o * (scale if rows is None else scale * line(rows, READ, 0))
    return o + product((p, chunk.tiles["v"]))
