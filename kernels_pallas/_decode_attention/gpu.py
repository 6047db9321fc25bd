"""Decode attention on Hopper GPUs: a Pallas Mosaic GPU kernel.

A thread block owns one part of the cache of one row and key head, for up to 64 rows of queries: the query heads of the
group times their tokens. One warpgroup moves blocks of keys and values into a ring in shared memory, by TMA from where
they lie, page by page where the cache is in pages; the other computes. Decoding waits for memory, so that what counts
is how many blocks are under way, and that all multiprocessors have a part.

Notation: s scores, m running maximum, p = exp2(c s - m) with c = scale log2 e, l the sum of p, acc the output before
division.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat
from kernels_pallas._decode_attention.config import Config, Operands, live, merge, reach, visible
from kernels_pallas._decode_attention.tiles import GPU_KEYS, GPU_ROWS, gpu_splits, gpu_stages

_LOG2E = 1.4426950408889634
# Finite, so that a row that has seen nothing yet is no special case: its p is exp2(-inf).
_LOWEST = float(np.finfo(np.float32).min)
# Columns of the output that are added up at once.
_COLUMNS = 128


def forward(config: Config, operands: Operands, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, Hq, Dv] and log-sum-exp [B, Hq, T].

    Args:
      config: static part of the call.
      operands: arrays of the call.
      interpret: an interpreter's parameters, for machines without a GPU.
    """
    with jax.enable_x64(False):
        o, lse = _parts(config, operands, interpret)
        o, lse = merge(o, lse, operands.sinks)
    return jnp.swapaxes(o, 1, 2).astype(operands.q.dtype), lse


class _Plan(NamedTuple):
    """What is static about a kernel."""

    config: Config
    splits: int
    stages: int  # blocks in flight, a power of two
    piece: int  # keys that lie together: a page, or a block
    paged: bool
    T: int


def _parts(config: Config, operands: Operands, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """Normalised outputs [B, splits, Hq, T, Dv] and lse [B, splits, Hq, T] of the parts, float32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, k, v, paged = operands.q, operands.k, operands.v, operands.table is not None
    B, T, H, D = q.shape
    k_heads, v_dim = v.shape[-2:]
    group = H // k_heads
    q = jnp.swapaxes(q, 1, 2).reshape(B, k_heads, group * T, D)  # rows: query head by query head, T of each
    if config.scale <= 0:
        # The maximum of c s is c times the maximum of s for positive c only.
        q = q * jnp.asarray(np.sign(config.scale), q.dtype)
        config = Config(config.left, config.soft_cap, abs(config.scale) or 1.0, config.splits)
    rows = -(-group * T // GPU_ROWS)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows * GPU_ROWS - group * T), (0, 0)))
    splits = config.splits or gpu_splits(operands)
    piece = min(k.shape[2], GPU_KEYS) if paged else GPU_KEYS
    plan = _Plan(config, splits, gpu_stages(operands), piece, paged, T)
    first, count = live(config, operands, GPU_KEYS)
    inputs = {
        "q": q,
        "k": k.reshape(-1, *k.shape[-3:]),
        "v": v.reshape(-1, *v.shape[-3:]),
        "spans": jnp.stack([first, count, *reach(config, operands), operands.length], axis=1),
        "turns": jnp.asarray(np.arange(rows * GPU_ROWS, dtype=np.int32) % T),
    }
    if paged:
        # Entries that a row does not reach may name no page; a block may reach beyond the table.
        spare = -operands.table.shape[1] % (GPU_KEYS // piece)
        inputs["table"] = jnp.pad(jnp.clip(operands.table, 0, k.shape[1] - 1), ((0, 0), (0, spare)))
    batch = lambda x, pages: 0 if x.shape[0] == 1 else pages  # noqa: E731
    strides = (batch(k, k.shape[1] if paged else 1), batch(v, v.shape[1] if paged else 1))
    o, lse = plgpu.kernel(
        partial(_kernel, plan, tuple(inputs), strides),
        out_type=(
            jax.ShapeDtypeStruct((B, splits, k_heads, rows * GPU_ROWS, v_dim), jnp.float32),
            jax.ShapeDtypeStruct((B, splits, k_heads, rows * GPU_ROWS), jnp.float32),
        ),
        scratch_types=_memory(plan, D, v_dim, q.dtype),
        grid=(splits * rows, k_heads, B),
        grid_names=("part", "head", "batch"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="decode_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )(*inputs.values())
    o = o[:, :, :, : group * T].reshape(B, splits, H, T, v_dim)
    return o, lse[:, :, :, : group * T].reshape(B, splits, H, T)


class _Memory(NamedTuple):
    """Shared memory of a thread block, and the barriers that say what is in it."""

    q: Any
    k: Any  # a ring of blocks
    v: Any
    p: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any


def _memory(plan: _Plan, D: int, v_dim: int, dtype: Any) -> _Memory:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def tile(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    def ready() -> Any:
        return plgpu.Barrier(num_arrivals=GPU_KEYS // plan.piece, num_barriers=plan.stages)

    return _Memory(
        tile(GPU_ROWS, D),
        tile(plan.stages, GPU_KEYS, D),
        tile(plan.stages, GPU_KEYS, v_dim),
        tile(GPU_ROWS, GPU_KEYS),
        plgpu.Barrier(),
        ready(),
        ready(),
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=plan.stages),
    )


class _Place(NamedTuple):
    """Where a thread block is in the grid, and its part of the cache."""

    batch: Any
    head: Any
    part: Any
    rows: Any  # of the queries
    start: Any  # first block
    blocks: Any
    low: Any
    stop: Any
    length: Any


def _place(plan: _Plan, spans: Any) -> _Place:
    batch, head, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
    row, part = lax.div(part, jnp.int32(plan.splits)), lax.rem(part, jnp.int32(plan.splits))
    first, count, low, stop, length = (spans[batch, n] for n in range(5))
    share = lax.div(count + (plan.splits - 1), jnp.int32(plan.splits))
    blocks = jnp.maximum(jnp.minimum(count - part * share, share), 0)
    rows = pl.ds(row * GPU_ROWS, GPU_ROWS)
    return _Place(batch, head, part, rows, first + part * share, blocks, low, stop, length)


def _kernel(plan: _Plan, names: tuple[str, ...], strides: tuple[int, int], *refs: Any) -> None:
    inputs = dict(zip(names, refs, strict=False))
    o_ref, lse_ref, *memory = refs[len(names) :]
    memory = _Memory(*memory)
    at = _place(plan, inputs["spans"])
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == 0)(lambda: _compute(plan, inputs, at, o_ref, lse_ref, memory))
    pl.when(warpgroup == 1)(lambda: _produce(plan, inputs, strides, at, memory))


def _produce(plan: _Plan, inputs: dict[str, Any], strides: tuple[int, int], at: _Place, memory: _Memory) -> None:
    """Send the blocks of keys and values, each as soon as the ring has room."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def step(n: Any, _: None) -> None:
        slot = _slot(plan, n)
        rings = (memory.k, memory.k_ready, memory.k_free), (memory.v, memory.v_ready, memory.v_free)
        for name, stride, (ring, ready, free) in zip("kv", strides, rings, strict=True):
            pl.when(n >= plan.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            for i in range(GPU_KEYS // plan.piece):
                key = (at.start + n) * GPU_KEYS + i * plan.piece
                if plan.paged:
                    page = jnp.int32(inputs["k"].shape[1])
                    lead, place = inputs["table"][at.batch, lax.div(key, page)], lax.rem(key, page)
                else:
                    lead, place = 0, key
                source = inputs[name].at[lead + at.batch * stride, pl.ds(place, plan.piece), at.head]
                tile = ring.at[slot, pl.ds(i * plan.piece, plan.piece)]
                plgpu.copy_gmem_to_smem(source, tile, ready.at[slot])

    lax.fori_loop(jnp.int32(0), at.blocks, step, None)


def _slot(plan: _Plan, n: Any) -> Any:
    return lax.bitwise_and(n, jnp.int32(plan.stages - 1))


def _compute(plan: _Plan, inputs: dict[str, Any], at: _Place, o_ref: Any, lse_ref: Any, memory: _Memory) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wgmma_rows = plgpu.Layout.WGMMA.reduce(1)
    plgpu.copy_gmem_to_smem(inputs["q"].at[at.batch, at.head, at.rows], memory.q, memory.q_ready)
    own_place = at.length - plan.T
    if plan.T > 1:
        own_place += compat.gpu_load(inputs["turns"].at[at.rows], layout=wgmma_rows, optimized=False)
    plgpu.barrier_wait(memory.q_ready)

    def product(a: Any, b: Any, columns: int) -> jax.Array:
        def run(accumulator: Any) -> jax.Array:
            plgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        return pl.run_scoped(run, plgpu.ACC((GPU_ROWS, columns), jnp.float32))

    def step(n: Any, state: tuple) -> tuple:
        acc, m, l = state
        slot, start = _slot(plan, n), (at.start + n) * GPU_KEYS
        plgpu.barrier_wait(memory.k_ready.at[slot])
        s = product(memory.q, memory.k.at[slot].transpose((1, 0)), GPU_KEYS)
        plgpu.barrier_arrive(memory.k_free.at[slot])
        s, factor = _capped(plan.config, s)
        place = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA) + start
        own = own_place if plan.T == 1 else _across(own_place, s.shape)
        seen = visible(plan.config, place, own) & (place < at.stop)
        s = jnp.where(seen, s, -jnp.inf)
        top = jnp.maximum(m, jnp.max(s, axis=1) * factor)
        p = jnp.exp2(s * factor - _across(top, s.shape))
        shrink = jnp.exp2(m - top)
        l = l * shrink + jnp.sum(p, axis=1)
        memory.p[...] = p.astype(memory.p.dtype)
        plgpu.barrier_wait(memory.v_ready.at[slot])

        @pl.when((start < at.low) | (start + GPU_KEYS > at.stop))
        def _() -> None:
            # What no query sees may be NaN, and 0 NaN is NaN.
            for first in range(0, memory.v.shape[2], 64):
                part = memory.v.at[slot, :, pl.ds(first, 64)]
                v = compat.gpu_load(part, layout=plgpu.Layout.WGMMA)
                key = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=plgpu.Layout.WGMMA) + start
                part[...] = jnp.where((key >= at.low) & (key < at.stop), v, jnp.zeros_like(v))

        plgpu.commit_smem()
        acc = [
            x * _across(shrink, x.shape) + product(memory.p, memory.v.at[slot, :, columns], x.shape[1])
            for x, columns in zip(acc, pieces, strict=True)
        ]
        plgpu.barrier_arrive(memory.v_free.at[slot])
        return acc, top, l

    # A product of all columns beside their sum would leave no registers.
    v_dim = memory.v.shape[2]
    pieces = [pl.ds(first, min(_COLUMNS, v_dim - first)) for first in range(0, v_dim, _COLUMNS)]
    zeros = [plgpu.layout_cast(jnp.zeros((GPU_ROWS, piece.size), jnp.float32), plgpu.Layout.WGMMA) for piece in pieces]
    line = lambda x: plgpu.layout_cast(jnp.full((GPU_ROWS,), x, jnp.float32), wgmma_rows)  # noqa: E731
    acc, m, l = lax.fori_loop(jnp.int32(0), at.blocks, step, (zeros, line(_LOWEST), line(0.0)))
    sees = l > 0
    total = jnp.where(sees, l, 1.0)
    out = at.batch, at.part, at.head, at.rows
    for x, columns in zip(acc, pieces, strict=True):
        o_ref.at[*out, columns][...] = x * _across(1.0 / total, x.shape)
    lse_ref.at[out][...] = jnp.where(sees, (m + jnp.log2(total)) / _LOG2E, -jnp.inf)


def _capped(config: Config, s: jax.Array) -> tuple[jax.Array, float]:
    """Scores before their factor in the exponent of base 2, and the factor."""
    if config.soft_cap is None:
        return s, config.scale * _LOG2E
    # tanh by exp2: the hardware's own tanh is good to eleven bits only, and is multiplied by the cap.
    t = 1.0 - 2.0 / (1.0 + jnp.exp2(s * (2 * _LOG2E * config.scale / config.soft_cap)))
    return t, config.soft_cap * _LOG2E


def _across(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number a row [rows] to [rows, columns]."""
    return lax.broadcast_in_dim(x, shape, (0,))
