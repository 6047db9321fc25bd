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
        scratch_types=(_scratch(plan, D, v_dim, q.dtype),),
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


class _Scratch(NamedTuple):
    """Shared memory: tiles of the two warpgroups and of the ring, and barriers; None for what a call does without."""

    q_tiles: Any
    k_tiles: Any
    v_tiles: Any
    lse_rows: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any
    kv_positions: Any = None
    kv_segments: Any = None
    o_tiles: Any = None
    p_tiles: Any = None


def _scratch(plan: _Plan, D: int, v_dim: int, dtype: Any) -> _Scratch:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def tiles(count: int, rows: int, columns: int) -> Any:
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((count, rows, columns), dtype, transforms=transforms)

    marks = [name for name in plan.names if name.startswith("kv_")]
    scratch = {
        "q_tiles": tiles(_WARPGROUPS, _ROWS, D),
        "k_tiles": tiles(plan.stages, plan.kv, D),
        "v_tiles": tiles(plan.stages, plan.kv, v_dim),
        "lse_rows": plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=_WARPGROUPS),
        "k_ready": plgpu.Barrier(num_barriers=plan.stages),
        "v_ready": plgpu.Barrier(num_arrivals=1 + len(marks), num_barriers=plan.stages),
        "k_free": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=plan.stages),
        "v_free": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=plan.stages),
        "turn": plgpu.Barrier(num_barriers=_WARPGROUPS),
    }
    scratch |= {name: plgpu.SMEM((plan.stages, plan.kv), jnp.int32) for name in marks}
    if v_dim != D:
        scratch["o_tiles"] = tiles(_WARPGROUPS, _ROWS, v_dim)
    if plan.interpreted:
        scratch["p_tiles"] = tiles(_WARPGROUPS, _ROWS, plan.kv)
    return _Scratch(**scratch)


# --- What is seen. ----------------------------------------------------------------------------------------------------


def _visibility(config: Config, operands: Operands, kv: int) -> dict[str, jax.Array]:
    """The live blocks of each row of blocks, and what masks are built from beside the places themselves.

    Returns:
      order: int32 [B|1, rows, columns], blocks without hidden entries first, then the partial ones.
      bounds: int32 [B|1, rows, 2], how many of the first kind, and which is the last live one.
      Positions and segments, int32 [B|1, N], padded to whole blocks.
    """
    kinds = jnp.asarray(masks.block_kinds(config, operands, _ROWS * _WARPGROUPS, kv))
    whole, live = (jnp.sum(kinds >= kind, axis=2, dtype=jnp.int32) for kind in (masks.FULL, masks.PARTIAL))
    # A row that sees nothing looks at one block, so that every row has a last one.
    bounds = jnp.stack([whole, jnp.maximum(live - 1, 0)], axis=2)
    found = {"order": jnp.argsort(-kinds, axis=2, stable=True).astype(jnp.int32), "bounds": bounds}
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
    last: Callable[[], Any]  # which live block is the last one
    block: Callable[[Any], Any]  # the n-th live block


def _place(plan: _Plan, inputs: dict[str, Any]) -> _Place:
    batch, head, row = (lax.axis_index(name) for name in ("batch", "head", "row"))
    if not plan.hides:
        return _Place(batch, head, row, lambda: jnp.int32(plan.blocks), lambda: jnp.int32(plan.blocks - 1), lambda n: n)
    order, bounds = inputs["order"], inputs["bounds"]
    if plan.config.causal:
        # Late rows see most: they start first, so that short ones fill the end.
        row = order.shape[1] - 1 - row
    line = batch if order.shape[0] > 1 else 0
    counted = lambda: bounds[line, row, 0], lambda: bounds[line, row, 1]
    return _Place(batch, head, row, *counted, lambda n: order[line, row, n])


def _seen(
    plan: _Plan, inputs: dict[str, Any], at: _Place, q_start: Any, marks: dict[str, Any]
) -> Callable[[Any], jax.Array]:
    """What of the n-th tile [rows, kv] is seen; what belongs to the queries is read once.

    Args:
      plan: of the kernel.
      inputs: refs in the GPU's memory.
      at: where the thread block is.
      q_start: first of the rows.
      marks: positions and segments of the keys in flight, in shared memory.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape = (_ROWS, plan.kv)

    def counted(axis: int, start: Any) -> jax.Array:
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        places = plgpu.broadcasted_iota(jnp.int32, shape[axis : axis + 1], 0, layout=layout)
        return lax.broadcast_in_dim(places + start, shape, (axis,))

    def of_queries(name: str) -> jax.Array:
        ref = inputs[name]
        span = ref.at[at.batch if ref.shape[0] > 1 else 0, pl.ds(q_start, _ROWS)]
        return compat.gpu_load(span, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def of_keys(name: str, n: Any) -> jax.Array:
        x = compat.gpu_load(marks[name].at[_slot(plan, n)], layout=plgpu.Layout.WGMMA.reduce(0))
        return lax.broadcast_in_dim(x, shape, (1,))

    queries = {name: of_queries(name) for name in ("q_positions", "q_segments") if name in inputs}

    def seen(n: Any) -> jax.Array:
        found = None
        if "q_positions" in queries:
            found = masks.visible(plan.config, _across(queries["q_positions"], shape), of_keys("kv_positions", n))
        elif masks.positional(plan.config):
            found = masks.visible(plan.config, counted(0, q_start), counted(1, at.block(n) * plan.kv))
        if "q_segments" in queries:
            same = _across(queries["q_segments"], shape) == of_keys("kv_segments", n)
            found = same if found is None else found & same
        elif plan.length is not None:
            inside = counted(1, at.block(n) * plan.kv) < plan.length
            found = inside if found is None else found & inside
        return found

    return seen


# --- The kernel. ------------------------------------------------------------------------------------------------------


def _kernel(plan: _Plan, *refs: Any) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs = dict(zip(plan.names, refs, strict=False))
    o_ref, lse_ref, scratch = refs[len(plan.names) :]
    at = _place(plan, inputs)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < _WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        _compute(plan, inputs, at, warpgroup, o_ref, lse_ref, scratch)

    @pl.when(warpgroup == _WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        _produce(plan, inputs, at, scratch)


def _produce(plan: _Plan, inputs: dict[str, Any], at: _Place, scratch: _Scratch) -> None:
    """Send the blocks of keys and values, each as soon as the ring has room."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    head = lax.div(at.head, jnp.int32(plan.group))

    def step(n: Any, _: None) -> None:
        slot = _slot(plan, n)
        source = (at.batch, pl.ds(at.block(n) * plan.kv, plan.kv), head)
        for name in ("k", "v"):
            tiles, ready, free = (getattr(scratch, f"{name}_{part}") for part in ("tiles", "ready", "free"))
            pl.when(n >= plan.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            plgpu.copy_gmem_to_smem(inputs[name].at[source], tiles.at[slot], ready.at[slot])
        # Where keys stand and to what they belong comes with their values, which are kept until the block is done with.
        for name in ("kv_positions", "kv_segments"):
            if name in inputs:
                marks = inputs[name]
                line = at.batch if marks.shape[0] > 1 else 0
                held = getattr(scratch, name).at[slot]
                plgpu.copy_gmem_to_smem(marks.at[line, source[1]], held, scratch.v_ready.at[slot])

    lax.fori_loop(jnp.int32(0), at.last() + 1, step, None)


def _slot(plan: _Plan, n: Any) -> Any:
    return lax.bitwise_and(n, jnp.int32(plan.stages - 1))


def _compute(
    plan: _Plan,
    inputs: dict[str, Any],
    at: _Place,
    warpgroup: Any,
    o_ref: Any,
    lse_ref: Any,
    scratch: _Scratch,
) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q_tiles, k_tiles, v_tiles, lse_rows, *barriers = scratch[:10]
    q_ready, k_ready, v_ready, k_free, v_free, turn = barriers
    o_tiles, p_tiles = scratch.o_tiles, scratch.p_tiles
    marks = {"kv_positions": scratch.kv_positions, "kv_segments": scratch.kv_segments}
    start = at.row * (_ROWS * _WARPGROUPS) + warpgroup * _ROWS
    span = pl.ds(start, _ROWS)
    plgpu.copy_gmem_to_smem(inputs["q"].at[at.batch, span, at.head], q_tiles.at[warpgroup], q_ready.at[warpgroup])
    plgpu.barrier_wait(q_ready.at[warpgroup])
    # Then the accumulator leaves few registers for addresses; computing them anew takes some twenty instructions.
    wide = min(q_tiles.shape[2], v_tiles.shape[2]) > 128

    def hand_on(own: Any) -> None:
        plgpu.barrier_arrive(turn.at[1 - own])

    def weights(n: Any, state: tuple, masked: bool) -> tuple:
        s, acc, m, l = state
        if masked:
            plgpu.barrier_wait(v_ready.at[_slot(plan, n)])
        s, factor = _capped(plan.config, s)
        if masked:
            s = jnp.where(seen(n), s, -jnp.inf)
        acc, m, l = _follow(plan, jnp.max(s, axis=1) * factor, acc, m, l)
        p = jnp.exp2(s * factor - _across(m, s.shape))
        for first in range(0, plan.kv, _LANE_COLUMNS):
            l += lax.slice(p, (0, first), (_ROWS, first + _LANE_COLUMNS))
        if not masked:
            plgpu.barrier_wait(v_ready.at[_slot(plan, n)])
        return p.astype(v_tiles.dtype), acc, m, l

    def step(n: Any, state: tuple, *, masked: bool) -> tuple:
        p, acc, m, l = weights(n, state, masked)
        own = _fresh(warpgroup) if wide else warpgroup
        slot, following = _slot(plan, n), _slot(plan, n + 1)
        plgpu.barrier_wait(k_ready.at[following])
        plgpu.barrier_wait(turn.at[own])
        pair = q_tiles.at[own], k_tiles.at[following].transpose((1, 0))
        acc, s = _products(plan, acc, (p, v_tiles.at[slot]), pair, lambda: hand_on(own), p_tiles, warpgroup)
        plgpu.barrier_arrive(v_free.at[slot])
        plgpu.barrier_arrive(k_free.at[following])
        return s, acc, m, l

    plgpu.barrier_wait(k_ready.at[0])
    # The first warpgroup has the tensor cores first; each hands them on once its products are under way.
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_wait(turn.at[1]))
    pair = q_tiles.at[warpgroup], k_tiles.at[0].transpose((1, 0))
    _, s = _products(plan, None, None, pair, lambda: hand_on(warpgroup), p_tiles, warpgroup)
    plgpu.barrier_arrive(k_free.at[0])
    lowest = plgpu.layout_cast(jnp.full((_ROWS,), _LOWEST, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    state = s, _zeros(v_tiles.shape[2]), lowest, _zeros(_LANE_COLUMNS)
    whole = jnp.minimum(at.whole(), at.last())
    state = lax.fori_loop(jnp.int32(0), whole, partial(step, masked=False), state)
    seen = _seen(plan, inputs, at, start, marks) if plan.hides else None
    if plan.hides:
        whole = jnp.minimum(at.whole(), at.last())
        state = lax.fori_loop(whole, at.last(), partial(step, masked=True), state)
    p, acc, m, l = weights(at.last(), state, plan.hides)
    slot = _slot(plan, at.last())
    plgpu.barrier_wait(turn.at[warpgroup])
    acc, _ = _products(plan, acc, (p, v_tiles.at[slot]), None, lambda: None, p_tiles, warpgroup)
    pl.when(warpgroup == 0)(lambda: hand_on(warpgroup))
    o = (q_tiles if o_tiles is None else o_tiles).at[warpgroup]
    _finish(acc, m, jnp.sum(l, axis=1), o, lse_rows.at[warpgroup])
    plgpu.copy_smem_to_gmem(o, o_ref.at[at.batch, span, at.head])
    plgpu.copy_smem_to_gmem(lse_rows.at[warpgroup], lse_ref.at[at.batch, at.head, span])
    plgpu.wait_smem_to_gmem(0)


def _finish(acc: jax.Array, m: jax.Array, l: jax.Array, o: Any, lse: Any) -> None:
    """Leave the output and the log-sum-exp in shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    sees = l != 0
    total = jnp.where(sees, l, 1.0)
    o[...] = (acc * _across(1.0 / total, acc.shape)).astype(o.dtype)
    lse[...] = jnp.where(sees, (m + jnp.log2(total)) / _LOG2E, -jnp.inf)
    plgpu.commit_smem()


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


def _zeros(columns: int) -> jax.Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.layout_cast(jnp.zeros((_ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)


def _products(
    plan: _Plan, acc: Any, weighted: Any, scored: Any, then: Callable[[], None], p_tiles: Any, warpgroup: Any
) -> tuple[Any, Any]:
    """acc + p v and q k^T, started one after the other; either may be left out.

    Args:
      plan: of the kernel.
      acc: what p v is added to.
      weighted: p in registers and v in shared memory.
      scored: q and k^T in shared memory.
      then: runs while the products do.
      p_tiles: interpreted, where p is put.
      warpgroup: index of this one.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if plan.interpreted:
        return _interpreted_products(plan, acc, weighted, scored, then, p_tiles, warpgroup)
    pairs = [pair for pair in (weighted, scored) if pair is not None]
    sums = [x for x, pair in ((acc, weighted), (_zeros(plan.kv), scored)) if pair is not None]

    def run(accumulators: Any) -> None:
        for accumulator, pair in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, *pair)
        then()

    sums = pl.run_state(run)([plgpu.ACC.init(x) for x in sums])
    return (None if weighted is None else sums[0]), (None if scored is None else sums[-1])


def _interpreted_products(
    plan: _Plan, acc: Any, weighted: Any, scored: Any, then: Callable[[], None], p_tiles: Any, warpgroup: Any
) -> tuple[Any, Any]:
    """The same for JAX's interpreter: p through shared memory, accumulators that last for a product."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if weighted is not None:
        p, v = weighted
        p_tiles.at[warpgroup][...] = p
        plgpu.commit_smem()
        weighted = p_tiles.at[warpgroup], v

    def product(pair: tuple, columns: int) -> jax.Array:
        def run(accumulator: Any) -> jax.Array:
            plgpu.wgmma(accumulator, *pair)
            return accumulator[...]

        return pl.run_scoped(run, plgpu.ACC((_ROWS, columns), jnp.float32))

    acc = None if weighted is None else acc + product(weighted, acc.shape[1])
    s = None if scored is None else product(scored, plan.kv)
    then()
    return acc, s
