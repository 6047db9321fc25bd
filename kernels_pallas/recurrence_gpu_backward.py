"""Cotangents of q, k and v of all chunks at once, which Hopper's kernels of linear attention and the delta rule share.

A thread block a chunk, whose three warpgroups compute one cotangent each; `_linear_attention/gpu_backward.py` has the
mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import recurrence_gpu
from kernels_pallas.recurrence_gpu import CHUNK, READ, WRITE, entries, product, turned

# Rows and columns of a warpgroup's product: wider sums would leave a thread no registers.
_BLOCK = 64
# Value columns that shared memory holds at once.
_WIDEST = 128


def decay_cotangent(dG: jax.Array, segments: jax.Array | None) -> jax.Array:
    """From a cotangent of the sums G [B, H, N, CHUNK] to that of the log decays [B, N CHUNK, H]."""
    place = jnp.arange(CHUNK)
    adds = place[:, None] >= place[None, :]
    segments = recurrence_gpu.segments_in_chunks(segments)
    if segments is not None:
        adds = adds & (segments[..., :, None] == segments[..., None, :])
    dg = jnp.matmul(dG[..., None, :], adds.astype(dG.dtype), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(dg.reshape(*dG.shape[:2], -1), 1, 2)


# --- All chunks at once. ----------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is static about the kernel.

    Attributes:
      names: of its inputs.
      outputs: of it.
      parts: the first outputs, and `compute(plan, scratch, tile, sums)`, by which a warpgroup each leaves them in a
        tile; sums are refs for sums over channels, empty if nothing decays.
      scale: of q . k.
    """

    names: tuple[str, ...]
    outputs: tuple[str, ...]
    parts: Mapping[str, Callable]
    scale: float


class Scratch(NamedTuple):
    """Shared memory of a thread block, and its barriers.

    Attributes:
      tokens: tiles of the inputs that have one row a token.
      states: tile [K, V].
      dstates: tile [K, V].
      parts: tiles of the outputs, until then free for what leads to them.
      tokens_ready: barrier of tokens and rows.
      states_ready: barrier.
      dstates_ready: barrier.
      rows: of the tokens, or None.
    """

    tokens: dict[str, Any]
    states: Any
    dstates: Any
    parts: dict[str, Any]
    tokens_ready: Any
    states_ready: Any
    dstates_ready: Any
    rows: Any = None


_TOKENS = ("q", "k", "v", "do", "dv")
# Inputs whose last axis is that of the values.
_BY_VALUE = ("v", "do", "dv", "states", "dstates")


def chunk_gradients(
    arrays: dict[str, jax.Array], parts: Mapping[str, Callable], *, scale: float, interpret: Any = False
) -> tuple[Any, ...]:
    """The parts as far as a chunk knows them, and the cotangent of G, float32 [B, H, N, CHUNK] (None without rows).

    Args:
      arrays: q, k, v, do, states, dstates; rows, if anything decays; dv, if it is known.
      parts: what to compute, `PARTS` or others; "dv" is like v, all else like q.
      scale: of q . k.
      interpret: an interpreter's parameters.
    """
    V = arrays["v"].shape[3]
    if V > _WIDEST:
        # All but dv is a sum over value columns.
        split = [
            {name: x[..., at : at + _WIDEST] if name in _BY_VALUE else x for name, x in arrays.items()}
            for at in range(0, V, _WIDEST)
        ]
        found = [chunk_gradients(columns, parts, scale=scale, interpret=interpret) for columns in split]
        *values, dG = zip(*found, strict=True)
        dtype = arrays["q"].dtype
        joined = [
            jnp.concatenate(x, axis=3) if name == "dv" else sum(y.astype(jnp.float32) for y in x).astype(dtype)
            for name, x in zip(parts, values, strict=True)
        ]
        return *joined, None if dG[0] is None else sum(dG)
    found = _call(arrays, parts, scale, interpret)
    values = [found.pop(name) for name in parts]
    if not found:
        return *values, None
    last = jnp.sum(found["written"], axis=-1) + arrays["rows"][..., READ, -1] * jnp.sum(found["kept"], axis=-1)
    dG = found["in_q"] - found["in_k"] + found.get("in_m", 0)
    return *values, dG.at[..., -1].add(last)


def _call(
    arrays: dict[str, jax.Array], parts: Mapping[str, Callable], scale: float, interpret: Any
) -> dict[str, jax.Array]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    B, H, N, K, V = arrays["states"].shape
    dtype = arrays["q"].dtype
    outputs: dict[str, Any] = {name: arrays["v" if name == "dv" else "q"] for name in parts}
    if "rows" in arrays:
        by_token, by_channel = (jax.ShapeDtypeStruct((B, H, N, size), jnp.float32) for size in (CHUNK, K))
        outputs |= {"in_q": by_token, "in_k": by_token, "written": by_token, "kept": by_channel}
        outputs |= {"in_m": by_token} if "dm" in parts else {}
    tokens = {
        name: recurrence_gpu.tile(CHUNK, arrays[name].shape[3], dtype=dtype) for name in _TOKENS if name in arrays
    }
    scratch = Scratch(
        tokens,
        recurrence_gpu.tile(K, V, dtype=dtype),
        recurrence_gpu.tile(K, V, dtype=dtype),
        {name: recurrence_gpu.tile(CHUNK, outputs[name].shape[3], dtype=dtype) for name in parts},
        plgpu.Barrier(num_arrivals=len(tokens) + ("rows" in arrays)),
        plgpu.Barrier(),
        plgpu.Barrier(),
        plgpu.SMEM(arrays["rows"].shape[3:], jnp.float32) if "rows" in arrays else None,
    )
    plan = Plan(tuple(arrays), tuple(outputs), parts, scale)
    found = plgpu.kernel(
        partial(_kernel, plan),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()),
        scratch_types=(scratch,),
        grid=(N, H, B),
        grid_names=("chunk", "head", "batch"),
        num_threads=len(parts),
        thread_name="warpgroup",
        kernel_name="_".join(("chunk", *parts)),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )(*arrays.values())
    return dict(zip(outputs, found, strict=True))


def _kernel(plan: Plan, *refs: Any) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs = dict(zip(plan.names, refs, strict=False))
    *outs, scratch = refs[len(plan.names) :]
    outputs = dict(zip(plan.outputs, outs, strict=True))
    batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    span, at = (batch, pl.ds(chunk * CHUNK, CHUNK), head), (batch, head, chunk)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _() -> None:
        for name, tile in scratch.tokens.items():
            plgpu.copy_gmem_to_smem(inputs[name].at[span], tile, scratch.tokens_ready)
        if "rows" in inputs:
            plgpu.copy_gmem_to_smem(inputs["rows"].at[at], scratch.rows, scratch.tokens_ready)
        plgpu.copy_gmem_to_smem(inputs["states"].at[at], scratch.states, scratch.states_ready)
        plgpu.copy_gmem_to_smem(inputs["dstates"].at[at], scratch.dstates, scratch.dstates_ready)

    sums = {name: ref.at[at] for name, ref in outputs.items() if name not in plan.parts}
    for index, name in enumerate(plan.parts):

        @pl.when(warpgroup == index)
        def _(name: str = name) -> None:
            plgpu.barrier_wait(scratch.tokens_ready)
            tile = scratch.parts[name]
            plan.parts[name](plan, scratch, tile, sums)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, outputs[name].at[span])
            plgpu.wait_smem_to_gmem(0)


def _dq(plan: Plan, scratch: Scratch, tile: Any, sums: dict[str, Any]) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, k, do = (scratch.tokens[name] for name in ("q", "k", "do"))
    ds, total = _slopes(plan, scratch, 0, tile)
    plgpu.barrier_wait(scratch.states_ready)
    for columns in blocks(q.shape[1]):
        carried = product((do, turned(scratch.states.at[columns]))) * (weight(scratch, READ) * plan.scale)
        if sums:
            total += jnp.sum(carried * entries(q.at[:, columns]), axis=1)
        tile[:, columns] = (carried + product((ds, k.at[:, columns]))).astype(tile.dtype)
    if sums:
        sums["in_q"][...] = total


def _dk(plan: Plan, scratch: Scratch, tile: Any, sums: dict[str, Any]) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, k, v = (scratch.tokens[name] for name in ("q", "k", "v"))
    ds, total = _slopes(plan, scratch, 1, tile)
    plgpu.barrier_wait(scratch.dstates_ready)
    written = []
    for columns in blocks(k.shape[1]):
        carried = product((v, turned(scratch.dstates.at[columns]))) * weight(scratch, WRITE)
        if sums:
            written.append(jnp.sum(carried * entries(k.at[:, columns]), axis=1))
        tile[:, columns] = (carried + product((ds, q.at[:, columns]))).astype(tile.dtype)
    if sums:
        all_written = sum(written[1:], written[0])
        sums["in_k"][...] = total + all_written
        sums["written"][...] = all_written


def _dv(plan: Plan, scratch: Scratch, tile: Any, sums: dict[str, Any]) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, k, do = (scratch.tokens[name] for name in ("q", "k", "do"))
    s = tile.at[:, pl.ds(0, CHUNK)]
    s[...] = (product((k, turned(q))) * (recurrence_gpu.decays(scratch.rows, 1) * plan.scale)).astype(s.dtype)
    plgpu.commit_smem()
    plgpu.barrier_wait(scratch.dstates_ready)
    for columns in blocks(do.shape[1]):
        carried = product((k, scratch.dstates.at[:, columns])) * weight(scratch, WRITE)
        tile[:, columns] = (carried + product((s, do.at[:, columns]))).astype(tile.dtype)
    if sums:
        plgpu.barrier_wait(scratch.states_ready)
        keep(scratch, sums["kept"])


# A warpgroup computes each.
PARTS = MappingProxyType({"dq": _dq, "dk": _dk, "dv": _dv})


def _slopes(plan: Plan, scratch: Scratch, axis: int, tile: Any) -> tuple[Any, Any]:
    """ds with its readers along `axis`, left in shared memory, and the sums of s ds off the diagonal, if wanted."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, k, v, do = (scratch.tokens[name] for name in ("q", "k", "v", "do"))
    ds = tile.at[:, pl.ds(0, CHUNK)]
    slopes = product((v, turned(do)) if axis else (do, turned(v)))
    slopes = slopes * (recurrence_gpu.decays(scratch.rows, axis) * plan.scale)
    ds[...] = slopes.astype(ds.dtype)
    plgpu.commit_smem()
    if scratch.rows is None:
        return ds, None
    s = product((k, turned(q)) if axis else (q, turned(k)))
    return ds, jnp.sum(jnp.where(recurrence_gpu.later(axis), s * slopes, 0.0), axis=1)


def keep(scratch: Scratch, kept: Any) -> None:
    """The part of <S, dS> of each key channel."""
    for channels in blocks(scratch.states.shape[0]):
        pairs = [[x.at[channels, columns] for x in scratch[1:3]] for columns in blocks(scratch.states.shape[1])]
        products = [entries(x) * entries(y) for x, y in pairs]
        kept.at[channels][...] = jnp.sum(sum(products[1:], products[0]), axis=1)


def weight(scratch: Scratch, which: int) -> Any:
    """READ or WRITE of the tokens that are the rows of a product."""
    return 1.0 if scratch.rows is None else recurrence_gpu.line(scratch.rows, which, 0, (CHUNK, _BLOCK))


def blocks(size: int) -> list[Any]:
    """The columns of a product each, the first last: there, until the end, are the products of the tokens."""
    return [pl.ds(start, _BLOCK) for start in reversed(range(0, size, _BLOCK))]
