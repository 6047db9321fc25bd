"""Linear attention backward on Hopper GPUs: Pallas Mosaic GPU kernels.

Two walks over the chunks, the forward pass's own, leave the states before the chunks and the cotangents of those after
them in the GPU's memory. A third kernel then takes all chunks at once: a thread block a chunk, whose three warpgroups
compute dq, dk and dv.

Notation, within a chunk: s_ij = q_i . k_j, D, READ and WRITE as in the forward pass, S the state before the chunk, dS
the cotangent of the one after it, ds_ij = scale D_ij do_i . v_j; a trailing T is a transpose.
dq = ds k + scale READ do S^T, dk = ds^T q + WRITE v dS^T, dv = (scale D s)^T do + WRITE k dS.
The cotangent of G_i is what row i of s ds holds below the diagonal less what column i does, and q_i and -k_i times the
second parts of dq_i and dk_i; the last token's has the sum of the latter too, and READ <S, dS>.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat
from kernels_pallas._linear_attention import gpu
from kernels_pallas._linear_attention.config import Config, Operands
from kernels_pallas._linear_attention.gpu import CHUNK, READ, WRITE

# Rows and columns of a warpgroup's product: wider sums would leave a thread no registers.
_BLOCK = 64
# Value columns that shared memory holds at once.
_WIDEST = 128


def unsupported_backward(config: Config, operands: Operands) -> str | None:
    """Why these kernels cannot do a call, or None."""
    return gpu.unsupported(config, operands)


def backward(
    config: Config, operands: Operands, o_cotangent: jax.Array, state_cotangent: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, ...]:
    """Cotangents of q, k, v, state and, if given, log_decay.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      o_cotangent: cotangent of o [B, T, H, V].
      state_cotangent: cotangent of the final state [B, H, K, V].
      interpret: an interpreter's parameters, for machines without a GPU.
    """
    with jax.enable_x64(False):
        q, k, v, state = gpu.padded(*operands[:4])
        _, _, do, dstate = gpu.padded(q, k, o_cotangent.astype(q.dtype), state_cotangent)
        rows = gpu.decay_rows(operands, q.shape[2])
        shared = {} if rows is None else {"rows": rows}
        walk = partial(gpu.scan, scale=config.scale, interpret=interpret)
        (states,) = walk({"k": k, "v": v, "state": state} | shared, ("states",))
        dstate, dstates = walk({"k": q, "v": do, "state": dstate} | shared, ("final", "states"), reverse=True)
        arrays = {"q": q, "k": k, "v": v, "do": do, "states": states, "dstates": dstates} | shared
        dq, dk, dv, dG = chunk_gradients(arrays, scale=config.scale, interpret=interpret)
        _, T, _, K = operands.q.shape
        V = operands.v.shape[3]
        found = dq[:, :T, :, :K], dk[:, :T, :, :K], dv[:, :T, :, :V], dstate[:, :, :K, :V]
        if operands.log_decay is None:
            return found
        dg = decay_cotangent(dG, operands.segments)[:, :T]
        return *found, jnp.sum(dg, axis=1) if operands.log_decay.ndim == 2 else dg


def decay_cotangent(dG: jax.Array, segments: jax.Array | None) -> jax.Array:
    """From a cotangent of the sums G [B, H, N, CHUNK] to that of the log decays [B, N CHUNK, H]."""
    place = jnp.arange(CHUNK)
    adds = place[:, None] >= place[None, :]
    segments = gpu.segments_in_chunks(segments)
    if segments is not None:
        adds = adds & (segments[..., :, None] == segments[..., None, :])
    dg = jnp.matmul(dG[..., None, :], adds.astype(dG.dtype), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(dg.reshape(*dG.shape[:2], -1), 1, 2)


class _Plan(NamedTuple):
    """What is static about the kernel."""

    names: tuple[str, ...]  # of its inputs
    outputs: tuple[str, ...]
    scale: float


def chunk_gradients(arrays: dict[str, jax.Array], *, scale: float, interpret: Any = False) -> tuple[Any, ...]:
    """dq, dk, dv as far as a chunk knows them, and the cotangent of G, float32 [B, H, N, CHUNK] (None without rows).

    Args:
      arrays: q, k, v, do, states, dstates and, if anything decays, rows.
      scale: of q . k.
      interpret: an interpreter's parameters.
    """
    V = arrays["v"].shape[3]
    if V > _WIDEST:
        # All but dv is a sum over value columns.
        split = [
            {name: x[..., at : at + _WIDEST] if name in _BY_COLUMN else x for name, x in arrays.items()}
            for at in range(0, V, _WIDEST)
        ]
        parts = [chunk_gradients(part, scale=scale, interpret=interpret) for part in split]
        dq, dk, dv, dG = zip(*parts, strict=True)
        dq, dk = (sum(x.astype(jnp.float32) for x in xs).astype(arrays["q"].dtype) for xs in (dq, dk))
        return dq, dk, jnp.concatenate(dv, axis=3), None if dG[0] is None else sum(dG)
    dq, dk, dv, *sums = _call(arrays, scale, interpret)
    if not sums:
        return dq, dk, dv, None
    in_q, in_k, written, kept = sums
    last = jnp.sum(written, axis=-1) + arrays["rows"][..., READ, -1] * jnp.sum(kept, axis=-1)
    return dq, dk, dv, (in_q - in_k).at[..., -1].add(last)


# A warpgroup computes each.
_PARTS = ("dq", "dk", "dv")
_BY_COLUMN = ("v", "do", "states", "dstates")


def _call(arrays: dict[str, jax.Array], scale: float, interpret: Any) -> list[jax.Array]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, v, states = arrays["q"], arrays["v"], arrays["states"]
    B, H, N, K, V = states.shape
    outputs = {"dq": q, "dk": q, "dv": v}
    if "rows" in arrays:
        a_token, a_channel = (jax.ShapeDtypeStruct((B, H, N, size), jnp.float32) for size in (CHUNK, K))
        outputs |= {"in_q": a_token, "in_k": a_token, "written": a_token, "kept": a_channel}
    plan = _Plan(tuple(arrays), tuple(outputs), scale)
    return plgpu.kernel(
        partial(_kernel, plan),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()),
        scratch_types=(_scratch(plan, K, V, q.dtype),),
        grid=(N, H, B),
        grid_names=("chunk", "head", "batch"),
        num_threads=len(_PARTS),
        thread_name="warpgroup",
        kernel_name="linear_attention_gradients",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )(*arrays.values())


class _Scratch(NamedTuple):
    """Shared memory of a thread block, and its barriers."""

    q: Any
    k: Any
    v: Any
    do: Any
    states: Any
    dstates: Any
    # A warpgroup's own: first D times products of the tokens, then its output.
    dq: Any
    dk: Any
    dv: Any
    tokens_ready: Any
    states_ready: Any
    dstates_ready: Any
    rows: Any = None


def _scratch(plan: _Plan, K: int, V: int, dtype: Any) -> _Scratch:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tile = partial(gpu.tile, dtype=dtype)
    by_token = {name: tile(CHUNK, V if name in ("v", "do", "dv") else K) for name in ("q", "k", "v", "do", *_PARTS)}
    return _Scratch(
        **by_token,
        states=tile(K, V),
        dstates=tile(K, V),
        tokens_ready=plgpu.Barrier(num_arrivals=5 if "rows" in plan.names else 4),
        states_ready=plgpu.Barrier(),
        dstates_ready=plgpu.Barrier(),
        rows=plgpu.SMEM((4, CHUNK), jnp.float32) if "rows" in plan.names else None,
    )


def _kernel(plan: _Plan, *refs: Any) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs = dict(zip(plan.names, refs, strict=False))
    *outs, scratch = refs[len(plan.names) :]
    outputs = dict(zip(plan.outputs, outs, strict=True))
    batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    span, line = (batch, pl.ds(chunk * CHUNK, CHUNK), head), (batch, head, chunk)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _() -> None:
        for name in ("q", "k", "v", "do"):
            plgpu.copy_gmem_to_smem(inputs[name].at[span], getattr(scratch, name), scratch.tokens_ready)
        if "rows" in inputs:
            plgpu.copy_gmem_to_smem(inputs["rows"].at[line], scratch.rows, scratch.tokens_ready)
        plgpu.copy_gmem_to_smem(inputs["states"].at[line], scratch.states, scratch.states_ready)
        plgpu.copy_gmem_to_smem(inputs["dstates"].at[line], scratch.dstates, scratch.dstates_ready)

    sums = {name: ref.at[line] for name, ref in outputs.items() if name not in _PARTS}
    for index, (name, compute) in enumerate(zip(_PARTS, (_dq, _dk, _dv), strict=True)):

        @pl.when(warpgroup == index)
        def _(name: str = name, compute: Any = compute) -> None:
            plgpu.barrier_wait(scratch.tokens_ready)
            stage = getattr(scratch, name)
            compute(plan, scratch, stage, sums)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stage, outputs[name].at[span])
            plgpu.wait_smem_to_gmem(0)


def _dq(plan: _Plan, scratch: _Scratch, stage: Any, sums: dict[str, Any]) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    ds, total = _slopes(plan, scratch, 0, stage)
    plgpu.barrier_wait(scratch.states_ready)
    weight = _weight(scratch, READ) * plan.scale
    for columns in _blocks(scratch.q.shape[1]):
        carried = gpu.product(scratch.do, scratch.states.at[columns].transpose((1, 0))) * weight
        if sums:
            total += jnp.sum(carried * _entries(scratch.q.at[:, columns]), axis=1)
        stage[:, columns] = (carried + gpu.product(ds, scratch.k.at[:, columns])).astype(stage.dtype)
    if sums:
        sums["in_q"][...] = total


def _dk(plan: _Plan, scratch: _Scratch, stage: Any, sums: dict[str, Any]) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    ds, total = _slopes(plan, scratch, 1, stage)
    plgpu.barrier_wait(scratch.dstates_ready)
    weight = _weight(scratch, WRITE)
    written = None
    for columns in _blocks(scratch.k.shape[1]):
        carried = gpu.product(scratch.v, scratch.dstates.at[columns].transpose((1, 0))) * weight
        if sums:
            part = jnp.sum(carried * _entries(scratch.k.at[:, columns]), axis=1)
            written = part if written is None else written + part
        stage[:, columns] = (carried + gpu.product(ds, scratch.q.at[:, columns])).astype(stage.dtype)
    if sums:
        sums["in_k"][...] = total + written
        sums["written"][...] = written


def _dv(plan: _Plan, scratch: _Scratch, stage: Any, sums: dict[str, Any]) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    s = stage.at[:, pl.ds(0, CHUNK)]
    s[...] = (gpu.product(scratch.k, scratch.q.transpose((1, 0))) * _decays(plan, scratch, 1)).astype(s.dtype)
    plgpu.commit_smem()
    plgpu.barrier_wait(scratch.dstates_ready)
    weight = _weight(scratch, WRITE)
    for columns in _blocks(scratch.v.shape[1]):
        carried = gpu.product(scratch.k, scratch.dstates.at[:, columns]) * weight
        stage[:, columns] = (carried + gpu.product(s, scratch.do.at[:, columns])).astype(stage.dtype)
    if sums:
        plgpu.barrier_wait(scratch.states_ready)
        K, V = scratch.states.shape
        for channels in _blocks(K):
            parts = [
                _entries(scratch.states.at[channels, columns]) * _entries(scratch.dstates.at[channels, columns])
                for columns in _blocks(V)
            ]
            sums["kept"].at[channels][...] = jnp.sum(sum(parts[1:], parts[0]), axis=1)


def _slopes(plan: _Plan, scratch: _Scratch, axis: int, stage: Any) -> tuple[Any, Any]:
    """ds with its readers along `axis`, left in shared memory, and the sums of s ds off the diagonal, if wanted."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    pairs = [(scratch.q, scratch.k), (scratch.do, scratch.v)]
    if axis == 1:
        pairs = [(key, query) for query, key in pairs]
    ds = stage.at[:, pl.ds(0, CHUNK)]
    slopes = gpu.product(pairs[1][0], pairs[1][1].transpose((1, 0))) * _decays(plan, scratch, axis)
    ds[...] = slopes.astype(ds.dtype)
    plgpu.commit_smem()
    if scratch.rows is None:
        return ds, None
    s = gpu.product(pairs[0][0], pairs[0][1].transpose((1, 0)))
    return ds, jnp.sum(jnp.where(gpu.later(axis), s * slopes, 0.0), axis=1)


def _decays(plan: _Plan, scratch: _Scratch, axis: int) -> jax.Array:
    return gpu.decays(scratch.rows, axis) * plan.scale


def _weight(scratch: _Scratch, which: int) -> Any:
    """READ or WRITE of the tokens that are the rows of a product."""
    return 1.0 if scratch.rows is None else gpu.line(scratch.rows, which, 0, (CHUNK, _BLOCK))


def _blocks(size: int) -> list[Any]:
    """The columns of a product each, the first last: there, until the end, are the products of the tokens."""
    return [pl.ds(start, _BLOCK) for start in reversed(range(0, size, _BLOCK))]


def _entries(tile: Any) -> jax.Array:
    """A tile in registers, where a product of its shape would be, in float32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return compat.gpu_load(tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
