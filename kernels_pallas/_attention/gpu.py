"""Attention forward on Hopper GPUs: a Pallas Mosaic GPU kernel.

A thread block owns 128 queries of one head: two warpgroups compute, 64 queries each, and a third moves blocks of keys
and values into a ring in shared memory. The two take turns at the tensor cores, so that one computes exponentials while
the other multiplies. Which key blocks are live comes in as arrays that are known before the grid starts, those without
hidden entries first, so that only the last few steps build masks.

Notation: s scores, m a bound of them a row, p = exp2(c s - m) with c = scale log2 e, l the sum of p, acc the output
before division. m need not be the maximum: it follows it once it has fallen behind by more than _SLACK. Until then p
stays below 2^_SLACK, nothing is rescaled, and the quotient acc / l is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat
from kernels_pallas._attention import masks
from kernels_pallas._attention.config import Config, Operands

_LOG2E = 1.4426950408889634
# Rows of a warpgroup's product.
_ROWS = 64
_WARPGROUPS = 2
# The normaliser adds up in so many columns, [rows, 8], where no thread needs another's: they are summed at the end.
_LANE_COLUMNS = 8
_SLACK = 8.0
# Finite, so that a row that has seen nothing yet is no special case: its p is exp2(-inf).
_LOWEST = float(np.finfo(np.float32).min)
# Bytes of shared memory that tiles may fill; barriers and statistics need the rest of a block's 227 KiB.
_TILE_BYTES = 224 * 1024


def unsupported(config: Config, operands: Operands) -> str | None:
    """Why the kernel cannot do a call, or None."""
    q, k, v = operands.q, operands.k, operands.v
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"its tensor cores take float16 and bfloat16, not {q.dtype.name}"
    if not all(isinstance(size, int) for size in (*q.shape, *k.shape, *v.shape)):
        return "its blocks need sizes that are known, not symbolic ones"
    for name in ("bias", "mask"):
        if getattr(operands, name) is not None:
            return f"it takes no {name}"
    if config.dropout:
        return "it has no dropout"
    if max(q.shape[3], v.shape[3]) > 256:
        return "its registers hold heads of at most 256 entries"
    return None


def forward(config: Config, operands: Operands, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, Hq, Dv] and log-sum-exp [B, Hq, T].

    Args:
      config: static part of the call.
      operands: arrays of the call.
      interpret: an interpreter's parameters, for machines without a GPU. JAX's interpreter knows no product with its
        left factor in registers, nor accumulators that outlive a product: interpreted, p passes through shared memory
        and the accumulator is added to outside. All else is the same.
    """
    with jax.enable_x64(False):
        return _forward(config, operands, interpret)


class _Plan(NamedTuple):
    """What is static about a kernel."""

    config: Config
    kv: int  # keys a block
    stages: int  # key blocks in flight, a power of two
    group: int  # query heads a key head
    names: tuple[str, ...]  # of the kernel's inputs
    hides: bool  # whether any entry is hidden
    blocks: int  # key blocks of a row when none is hidden
    length: int | None  # keys before padding; None without padding
    interpreted: bool


def _forward(config: Config, operands: Operands, interpret: Any) -> tuple[jax.Array, jax.Array]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # Tiles in shared memory are of 8 rows and 64 columns; TMA itself cuts off and fills up what is left of a block.
    q, k, v = (masks.pad_axis(masks.pad_axis(x, 1, 8), 3, 64) for x in operands[:3])
    if config.scale <= 0:
        # The maximum of c s is c times the maximum of s for positive c only.
        q = q * jnp.asarray(np.sign(config.scale), q.dtype)
        config = replace(config, scale=abs(config.scale) or 1.0)
    B, T, H, D = q.shape
    S, k_heads, v_dim = operands.k.shape[1], k.shape[2], v.shape[3]
    kv, stages = _ring(D, v_dim)
    rows = -(-T // (_ROWS * _WARPGROUPS))
    hides = masks.masked(config, operands) or S % kv != 0
    inputs = {"q": q, "k": k, "v": v} | (_visibility(config, operands, kv) if hides else {})
    length = S if S % kv else None
    plan = _Plan(config, kv, stages, H // k_heads, tuple(inputs), hides, -(-S // kv), length, bool(interpret))
    o, lse = plgpu.kernel(
        partial(_kernel, plan),
        out_type=(
            jax.ShapeDtypeStruct((B, T, H, v_dim), q.dtype),
            jax.ShapeDtypeStruct((B, H, rows * _ROWS * _WARPGROUPS), jnp.float32),
        ),
        scratch_types=_scratch(plan, D, v_dim, q.dtype),
        grid=(H, rows, B),
        grid_names=("head", "row", "batch"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )(*inputs.values())
    T = operands.q.shape[1]
    return o[:, :T, :, : operands.v.shape[3]], lse[:, :, :T]


def _ring(D: int, v_dim: int) -> tuple[int, int]:
    """Keys a block and blocks in flight: what shared memory holds, and registers beside the accumulator."""
    own = _WARPGROUPS * _ROWS * (D + (v_dim if v_dim != D else 0))
    sizes = ((128, 4), (128, 2), (64, 4), (64, 2))
    for kv, stages in sizes if v_dim <= 128 else sizes[2:]:
        if 2 * (own + stages * kv * (D + v_dim)) <= _TILE_BYTES:
            break
    return kv, stages


def _scratch(plan: _Plan, D: int, v_dim: int, dtype: Any) -> dict[str, Any]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def tiles(count: int, rows: int, columns: int) -> Any:
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((count, rows, columns), dtype, transforms=transforms)

    scratch = {
        "q_tiles": tiles(_WARPGROUPS, _ROWS, D),
        "k_tiles": tiles(plan.stages, plan.kv, D),
        "v_tiles": tiles(plan.stages, plan.kv, v_dim),
        "lse_rows": plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=_WARPGROUPS),
        "k_ready": plgpu.Barrier(num_barriers=plan.stages),
        "v_ready": plgpu.Barrier(num_barriers=plan.stages),
        "k_free": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=plan.stages),
        "v_free": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=plan.stages),
        "turn": plgpu.Barrier(num_barriers=_WARPGROUPS),
    }
    if v_dim != D:
        scratch["o_tiles"] = tiles(_WARPGROUPS, _ROWS, v_dim)
    if plan.interpreted:
        scratch["p_tiles"] = tiles(_WARPGROUPS, _ROWS, plan.kv)
    return scratch


# --- What is seen. ----------------------------------------------------------------------------------------------------


def _visibility(config: Config, operands: Operands, kv: int) -> dict[str, jax.Array]:
    """The live blocks of each row of blocks, and what masks are built from beside the places themselves.

    Returns:
      order: int32 [B|1, rows, columns], blocks without hidden entries first, then the partial ones.
      counts: int32 [B|1, rows, 2], how many of each.
      Positions and segments, int32 [B|1, N], padded to whole blocks.
    """
    kinds = jnp.asarray(masks.block_kinds(config, operands, _ROWS * _WARPGROUPS, kv))
    rank = jnp.where(kinds == masks.FULL, 0, jnp.where(kinds == masks.PARTIAL, 1, 2))
    counts = [jnp.sum(kinds == kind, axis=2, dtype=jnp.int32) for kind in (masks.FULL, masks.PARTIAL)]
    found = {"order": jnp.argsort(rank, axis=2, stable=True).astype(jnp.int32), "counts": jnp.stack(counts, axis=2)}
    places = {}
    if masks.positional(config) and (operands.q_positions is not None or operands.kv_positions is not None):
        places["q_positions"], places["kv_positions"] = masks.positions(operands)
    if operands.q_segments is not None:
        # Padding is told apart once, -2 among queries and -1 among keys: then equality alone decides.
        places["q_segments"] = jnp.where(operands.q_segments < 0, -2, operands.q_segments)
        places["kv_segments"] = jnp.maximum(operands.kv_segments, -1)
    for name, x in places.items():
        block = kv if name.startswith("kv") else _ROWS * _WARPGROUPS
        found[name] = masks.pad_axis(jnp.asarray(x, jnp.int32), 1, block, value=-1)
    return found


class _Place(NamedTuple):
    """Where a thread block is in the grid, and what its row of blocks holds."""

    batch: Any
    head: Any
    row: Any
    # Read where they are needed: kept, they would take registers that the loops lack.
    whole: Callable[[], Any]  # how many blocks have no hidden entries
    partial: Callable[[], Any]  # and how many of the others are live
    block: Callable[[Any], Any]  # the n-th live block


def _place(plan: _Plan, inputs: dict[str, Any]) -> _Place:
    batch, head, row = (lax.axis_index(name) for name in ("batch", "head", "row"))
    if not plan.hides:
        return _Place(batch, head, row, lambda: jnp.int32(plan.blocks), lambda: jnp.int32(0), lambda n: n)
    order, counts = inputs["order"], inputs["counts"]
    line = batch if order.shape[0] > 1 else 0
    counted = [lambda kind=kind: counts[line, row, kind] for kind in range(2)]
    return _Place(batch, head, row, *counted, lambda n: order[line, row, n])


def _seen(plan: _Plan, inputs: dict[str, Any], at: _Place, q_start: Any) -> Callable[[Any], jax.Array]:
    """What of a tile [rows, kv] is seen, by where its keys start; what belongs to the queries is read once."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape = (_ROWS, plan.kv)

    def counted(axis: int, start: Any) -> jax.Array:
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) + start

    def given(name: str, axis: int, start: Any) -> jax.Array:
        ref = inputs[name]
        span = ref.at[at.batch if ref.shape[0] > 1 else 0, pl.ds(start, shape[axis])]
        return compat.gpu_load(span, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)

    queries = {name: given(name, 0, q_start) for name in ("q_positions", "q_segments") if name in inputs}

    def seen(kv_start: Any) -> jax.Array:
        found = None
        if masks.positional(plan.config) and queries.get("q_positions") is not None:
            q = _across(queries["q_positions"], shape)
            kv = lax.broadcast_in_dim(given("kv_positions", 1, kv_start), shape, (1,))
            found = masks.visible(plan.config, q, kv)
        elif masks.positional(plan.config):
            found = masks.visible(plan.config, counted(0, q_start), counted(1, kv_start))
        if "q_segments" in queries:
            kv = lax.broadcast_in_dim(given("kv_segments", 1, kv_start), shape, (1,))
            same = _across(queries["q_segments"], shape) == kv
            found = same if found is None else found & same
        elif plan.length is not None:
            inside = counted(1, kv_start) < plan.length
            found = inside if found is None else found & inside
        return found

    return seen


# --- The kernel. ------------------------------------------------------------------------------------------------------


def _kernel(plan: _Plan, *refs: Any, **scratch: Any) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs = dict(zip(plan.names, refs, strict=False))
    o_ref, lse_ref = refs[len(plan.names) :]
    at = _place(plan, inputs)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < _WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        _compute(plan, inputs, at, warpgroup, o_ref, lse_ref, **scratch)

    @pl.when(warpgroup == _WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        _produce(plan, inputs, at, **scratch)


def _produce(plan: _Plan, inputs: dict[str, Any], at: _Place, **scratch: Any) -> None:
    """Send the blocks of keys and values, each as soon as the ring has room."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    head = lax.div(at.head, jnp.int32(plan.group))

    def step(n: Any, _: None) -> None:
        slot = _slot(plan, n)
        source = (at.batch, pl.ds(at.block(n) * plan.kv, plan.kv), head)
        for name in ("k", "v"):
            pl.when(n >= plan.stages)(lambda name=name: plgpu.barrier_wait(scratch[f"{name}_free"].at[slot]))
            tile, ready = scratch[f"{name}_tiles"].at[slot], scratch[f"{name}_ready"].at[slot]
            plgpu.copy_gmem_to_smem(inputs[name].at[source], tile, ready)

    lax.fori_loop(jnp.int32(0), at.whole() + at.partial(), step, None)


def _slot(plan: _Plan, n: Any) -> Any:
    return lax.bitwise_and(n, jnp.int32(plan.stages - 1))


def _compute(
    plan: _Plan,
    inputs: dict[str, Any],
    at: _Place,
    warpgroup: Any,
    o_ref: Any,
    lse_ref: Any,
    *,
    q_tiles: Any,
    k_tiles: Any,
    v_tiles: Any,
    lse_rows: Any,
    q_ready: Any,
    k_ready: Any,
    v_ready: Any,
    k_free: Any,
    v_free: Any,
    turn: Any,
    o_tiles: Any = None,
    p_tiles: Any = None,
) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    start = at.row * (_ROWS * _WARPGROUPS) + warpgroup * _ROWS
    span = pl.ds(start, _ROWS)
    plgpu.copy_gmem_to_smem(inputs["q"].at[at.batch, span, at.head], q_tiles.at[warpgroup], q_ready.at[warpgroup])
    plgpu.barrier_wait(q_ready.at[warpgroup])
    # The first warpgroup has the tensor cores first; each hands them on once its products are under way.
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_wait(turn.at[1]))

    # Then the accumulator leaves few registers.
    wide = min(q_tiles.shape[2], v_tiles.shape[2]) > 128

    def step(n: Any, state: tuple, *, masked: bool) -> tuple:
        slot, own = _slot(plan, n), _fresh(warpgroup) if wide else warpgroup
        plgpu.barrier_wait(k_ready.at[slot])

        def scores(accumulator: Any) -> jax.Array:
            plgpu.wgmma(accumulator, q_tiles.at[own], k_tiles.at[slot].transpose((1, 0)))
            plgpu.barrier_arrive(turn.at[1 - own])
            return accumulator[...]

        s = pl.run_scoped(scores, plgpu.ACC((_ROWS, plan.kv), jnp.float32))
        plgpu.barrier_arrive(k_free.at[slot])
        s, factor = _capped(plan.config, s)
        if masked:
            s = jnp.where(seen(at.block(n) * plan.kv), s, -jnp.inf)
        acc, m, l = _follow(plan, jnp.max(s, axis=1) * factor, *state)
        p = jnp.exp2(s * factor - _across(m, s.shape))
        for first in range(0, plan.kv, _LANE_COLUMNS):
            l += lax.slice(p, (0, first), (_ROWS, first + _LANE_COLUMNS))
        p = p.astype(v_tiles.dtype)
        plgpu.barrier_wait(v_ready.at[slot])
        plgpu.barrier_wait(turn.at[own])
        acc = _add_product(acc, p, v_tiles.at[slot], None if p_tiles is None else p_tiles.at[warpgroup])
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, m, l

    def zeros(columns: int) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros((_ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)

    lowest = plgpu.layout_cast(jnp.full((_ROWS,), _LOWEST, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    state = zeros(v_tiles.shape[2]), lowest, zeros(_LANE_COLUMNS)
    state = lax.fori_loop(jnp.int32(0), at.whole(), partial(step, masked=False), state)
    if plan.hides:
        seen = _seen(plan, inputs, at, start)
        whole = at.whole()
        state = lax.fori_loop(whole, whole + at.partial(), partial(step, masked=True), state)
    acc, m, l = state
    l = jnp.sum(l, axis=1)
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive(turn.at[1]))

    sees = l > 0
    total = jnp.where(sees, l, 1.0)
    share = jnp.where(sees, 1.0 / total, 0.0)
    o = (q_tiles if o_tiles is None else o_tiles).at[warpgroup]
    o[...] = (acc * _across(share, acc.shape)).astype(o.dtype)
    lse_rows.at[warpgroup][...] = jnp.where(sees, (m + jnp.log2(total)) / _LOG2E, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o, o_ref.at[at.batch, span, at.head])
    plgpu.copy_smem_to_gmem(lse_rows.at[warpgroup], lse_ref.at[at.batch, at.head, span])
    plgpu.wait_smem_to_gmem(0)


def _capped(config: Config, s: jax.Array) -> tuple[jax.Array, float]:
    """Scores before their factor in the exponent of base 2, and the factor."""
    if config.soft_cap is None:
        return s, config.scale * _LOG2E
    # tanh by exp2: the hardware's own tanh is good to eleven bits only, and is multiplied by the cap.
    t = 1.0 - 2.0 / (1.0 + jnp.exp2(s * (2 * _LOG2E * config.scale / config.soft_cap)))
    return t, config.soft_cap * _LOG2E


def _follow(plan: _Plan, top: jax.Array, acc: jax.Array, m: jax.Array, l: jax.Array) -> tuple:
    """Let m follow the maximum where it has fallen behind, and rescale what was added up under the old one."""

    def follow() -> tuple:
        new = jnp.where(top - m > _SLACK, top, m)
        shrink = jnp.exp2(m - new)
        return acc * _across(shrink, acc.shape), new, l * _across(shrink, l.shape)

    if plan.interpreted:
        return follow()
    # Each warp decides for its own rows.
    return lax.cond(compat.gpu_any_lane(top - m, _SLACK), follow, lambda: (acc, m, l))


def _fresh(x: Any) -> Any:
    """x as if it were another number, so that no address that follows from it is kept across steps in a register."""
    return lax.optimization_barrier(x)


def _across(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number a row [rows] to [rows, columns]."""
    return lax.broadcast_in_dim(x, shape, (0,))


def _add_product(acc: jax.Array, p: jax.Array, v: Any, p_tile: Any) -> jax.Array:
    """acc + p v, p in registers; interpreted, through shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if p_tile is None:
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, p, v))(plgpu.ACC.init(acc))
    p_tile[...] = p
    plgpu.commit_smem()

    def run(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, p_tile, v)
        return accumulator[...]

    return acc + pl.run_scoped(run, plgpu.ACC(acc.shape, jnp.float32))
