"""The delta rule backward on Hopper GPUs: Pallas Mosaic GPU kernels.

A walk over the chunks, the forward pass's own, leaves the states before the chunks, r and u in the GPU's memory; one
back leaves the cotangents of the states after them and of v. What remains of q, k and the decays takes all chunks at
once: linear attention's kernel, for which u are the values, with what comes through M in place of dv.

Notation as in the forward pass, dX the cotangent of X, S the state before the chunk, dS that of the one after it; a
trailing T is a transpose. du = (scale D s)^T do + WRITE k dS, and back = A^T du with A = (I + diag(b) M)^{-1}, the
cotangent of b e: dv = b back, db_i = back_i . r_i, and dS before the chunk is
READ_C dS + scale (READ q)^T do - (READ k)^T dv. With X_ij = -D_ij dv_i . u_j for j < i, the part of dk that comes
through e is (X + X^T) k - READ dv S^T.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import recurrence_gpu
from kernels_pallas import recurrence_gpu_backward as chunks
from kernels_pallas._delta_rule import gpu
from kernels_pallas._delta_rule.config import Config, Operands
from kernels_pallas.recurrence_gpu import (
    BETA,
    CHUNK,
    COLUMNS,
    READ,
    WRITE,
    Chunk,
    decays,
    entries,
    line,
    product,
    store_split,
    turned,
)


def unsupported_backward(config: Config, operands: Operands) -> str | None:
    """Why these kernels cannot do a call, or None."""
    return recurrence_gpu.unsupported(config, operands)


def backward(
    config: Config, operands: Operands, o_cotangent: jax.Array, state_cotangent: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, ...]:
    """Cotangents of q, k, v, beta, state and, if given, log_decay.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      o_cotangent: cotangent of o [B, T, H, V].
      state_cotangent: cotangent of the final state [B, H, K, V].
      interpret: an interpreter's parameters, for machines without a GPU.
    """
    with jax.enable_x64(False):
        inputs = gpu.prepared(operands)
        dtype, pairs, rows = operands.q.dtype, inputs.pop("pairs"), inputs["rows"]
        q, k = inputs.pop("q"), inputs["k"]
        _, _, do, dstate = recurrence_gpu.padded(q, k, o_cotangent.astype(dtype), state_cotangent)
        walk = partial(gpu.walk, scale=config.scale, interpret=interpret)
        beta = rows[..., BETA, :]
        inverse = gpu.split(gpu.inverted(pairs * beta[..., None, :]), dtype)
        states, u, r = walk(gpu.step, inputs | {"inverse": inverse}, ("states", "u", "r"))
        inverse = gpu.split(gpu.inverted(beta[..., None] * pairs), dtype)
        inputs = {"q": q, "k": k, "v": do, "r": r, "state": dstate, "inverse": inverse, "rows": rows}
        dstate, dstates, dv, dbeta = walk(_step_back, inputs, ("final", "states", "dv", "dbeta"), reverse=True)
        arrays = {"q": q, "k": k, "v": u, "do": do, "dv": dv, "states": states, "dstates": dstates, "rows": rows}
        dq, dk, dm, dG = chunks.chunk_gradients(arrays, _PARTS, scale=config.scale, interpret=interpret)
        dk = (dk.astype(jnp.float32) + dm.astype(jnp.float32)).astype(dtype)
        _, T, H, K = operands.q.shape
        V = operands.v.shape[3]
        dbeta = jnp.moveaxis(jnp.sum(dbeta, axis=3).reshape(-1, H, dbeta.shape[2] * CHUNK), 1, 2)[:, :T]
        found = dq[:, :T, :, :K], dk[:, :T, :, :K], dv[:, :T, :, :V], dbeta, dstate[:, :, :K, :V]
        if operands.log_decay is None:
            return found
        return *found, chunks.decay_cotangent(dG, operands.segments)[:, :T]


# --- The walk back. ---------------------------------------------------------------------------------------------------


def _step_back(chunk: Chunk, dstate: jax.Array) -> jax.Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, own, tiles, scale = chunk.rows, chunk.own, chunk.tiles, chunk.walk.scale
    do, inverse, high, low, p = tiles["v"], tiles["inverse"], own["high"], own["low"], own["p"]
    du = _written(chunk)
    du = du * line(rows, WRITE, 0) + product((p, do))
    store_split(du, high, low)
    plgpu.commit_smem()
    back = product(*((turned(inverse.at[at]), x) for at, x in ((0, high), (0, low), (1, high))))
    chunk.put("dbeta", jnp.sum(back * entries(tiles["r"]), axis=1))
    dv = back * line(rows, BETA, 0)
    p[...] = dv.astype(p.dtype)
    read = line(rows, READ, 0)
    store_split(-dv * read, high, low)
    do[...] = (entries(do) * read).astype(do.dtype)
    plgpu.commit_smem()
    chunk.send("dv", p)
    dstate = dstate * rows[READ, CHUNK - 1] + product((turned(tiles["k"]), high), (turned(tiles["k"]), low))
    return dstate + product((turned(tiles["q"]), do)) * scale


def _written(chunk: Chunk) -> jax.Array:
    """k dS; leaves scale D s, transposed, in shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    own, tiles = chunk.own, chunk.tiles

    def run(s: Any, du: Any) -> jax.Array:
        plgpu.wgmma(s, tiles["k"], turned(tiles["q"]))
        plgpu.wgmma(du, tiles["k"], own["state"])
        plgpu.wgmma(du, tiles["k"], own["state_low"])
        s = plgpu.wgmma_accumulator_load(s, wait_n=2)
        own["p"][...] = (s * (decays(chunk.rows, 1) * chunk.walk.scale)).astype(own["p"].dtype)
        return du[...]

    du = pl.run_scoped(run, *(plgpu.ACC((CHUNK, COLUMNS), jnp.float32),) * 2)
    plgpu.commit_smem()
    return du


# --- All chunks at once. ----------------------------------------------------------------------------------------------


def _dm(plan: chunks.Plan, scratch: chunks.Scratch, tile: Any, sums: dict[str, Any]) -> None:
    """What of dk comes through M and e."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    k, u, dv = (scratch.tokens[name] for name in ("k", "v", "dv"))

    def half(axis: int) -> jax.Array:
        """-X, with its readers along `axis`."""
        x = product((u, turned(dv)) if axis else (dv, turned(u))) * decays(scratch.rows, axis)
        return jnp.where(recurrence_gpu.later(axis), x, 0.0)

    lower, upper = half(0), half(1)
    both = tile.at[:, pl.ds(0, CHUNK)]
    both[...] = (-(lower + upper)).astype(both.dtype)
    plgpu.commit_smem()
    total = jnp.sum(product((k, turned(k))) * (upper - lower), axis=1)
    plgpu.barrier_wait(scratch.states_ready)
    for columns in chunks.blocks(k.shape[1]):
        carried = product((dv, turned(scratch.states.at[columns]))) * -chunks.weight(scratch, READ)
        total += jnp.sum(carried * entries(k.at[:, columns]), axis=1)
        tile[:, columns] = (carried + product((both, k.at[:, columns]))).astype(tile.dtype)
    sums["in_m"][...] = total
    plgpu.barrier_wait(scratch.dstates_ready)
    chunks.keep(scratch, sums["kept"])


_PARTS = MappingProxyType({"dq": chunks.PARTS["dq"], "dk": chunks.PARTS["dk"], "dm": _dm})
