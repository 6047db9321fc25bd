"""Attention backward on Hopper GPUs: two Pallas Mosaic GPU kernels, one for dq, one for dk and dv.

Both walk the live blocks of their row (dq: of keys; dkv: of queries, for every query head that shares the key head),
those without hidden entries first, so that only the last few steps build masks. Which blocks are live comes in as
arrays that are known before the grid starts. One warpgroup moves blocks into a ring of buffers, the others compute.

Notation: s scores, p = exp(s - lse), delta = rowsum(do o) - dlse, ds = p (do v^T - delta); a trailing T is a transpose.
Exponentials are in base 2, with lse premultiplied by log2 e. The lse of a row that sees nothing, or that only pads, is
+inf here: its p is 0 without a mask, and with do = 0 and delta = 0 nothing comes back from it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat
from kernels_pallas._attention import masks
from kernels_pallas._attention.config import Config, Operands

_LOG2E = 1.4426950408889634
# Rows of a warpgroup's product, and of its accumulators.
_ROWS = 64
_WARPGROUPS = 2
_BLOCK = _ROWS * _WARPGROUPS
# Shared memory of a block, less what the compiler adds.
_SHARED = 226 * 1024
# Heads up to this width have dk and dv in registers together; up to twice that, one after the other.
_WIDE = 128


def unsupported_backward(config: Config, operands: Operands) -> str | None:
    """Why these kernels cannot do a call, or None."""
    q, k, v = operands[:3]
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"its products take float16 or bfloat16, not {q.dtype.name}"
    if not all(isinstance(size, int) for size in (*q.shape, *k.shape, *v.shape)):
        return "its blocks need sizes that are known, not symbolic ones"
    for name in ("bias", "mask"):
        if getattr(operands, name) is not None:
            return f"its backward pass takes no {name}"
    if config.dropout:
        return "its backward pass has no dropout"
    if max(q.shape[3], v.shape[3]) > 2 * _WIDE:
        return f"its backward pass holds heads of at most {2 * _WIDE} entries"
    return None


def backward(
    config: Config,
    operands: Operands,
    o: jax.Array,
    lse: jax.Array,
    o_cotangent: jax.Array,
    lse_cotangent: jax.Array,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of q, k and v.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      o: output of the forward pass [B, T, Hq, Dv].
      lse: its log-sum-exp [B, Hq, T].
      o_cotangent: cotangent of o.
      lse_cotangent: cotangent of lse.
      interpret: an interpreter's parameters, for machines without a GPU.

    Returns:
      dq, dk, dv, shaped like q, k, v and in their dtype.
    """
    with jax.enable_x64(False):
        return _backward(config, operands, o, lse, o_cotangent, lse_cotangent, interpret)


def _backward(
    config: Config, operands: Operands, o: Any, lse: Any, o_cotangent: Any, lse_cotangent: Any, interpret: Any
) -> tuple:
    sees = lse != -jnp.inf
    delta = jnp.swapaxes(jnp.sum(o_cotangent.astype(jnp.float32) * o.astype(jnp.float32), axis=-1), 1, 2)
    delta = jnp.where(sees, delta - lse_cotangent, 0)
    do = jnp.where(jnp.swapaxes(sees, 1, 2)[..., None], o_cotangent, 0)

    def rows(x: jax.Array) -> jax.Array:  # [B, N, H, D] -> [B, N', H, D']
        return masks.pad_axis(masks.pad_axis(x, 1, _BLOCK), 3, 64)

    arrays = {
        "q": rows(operands.q),
        "k": rows(operands.k),
        "v": rows(operands.v),
        "do": rows(do.astype(operands.q.dtype)),
        "lse": masks.pad_axis(jnp.where(sees, lse * _LOG2E, jnp.inf), 2, _BLOCK, value=jnp.inf),
        "delta": masks.pad_axis(delta, 2, _BLOCK),
    }
    inputs = arrays | _hidden(config, operands)
    T, S, D = operands.q.shape[1], operands.k.shape[1], operands.q.shape[3]
    (dq,) = _call(config, operands, inputs, ("dq",), interpret)
    if max(arrays["k"].shape[3], arrays["v"].shape[3]) > _WIDE:
        (dk,), (dv,) = (_call(config, operands, inputs, (wanted,), interpret) for wanted in ("dk", "dv"))
    else:
        dk, dv = _call(config, operands, inputs, ("dk", "dv"), interpret)
    return dq[:, :T, :, :D], dk[:, :S, :, :D], dv[:, :S, :, : operands.v.shape[3]]


def _hidden(config: Config, operands: Operands) -> dict[str, jax.Array]:
    """What masks are built from beside the places themselves, int32 [B?, N']."""
    found = {}
    if masks.positional(config) and (operands.q_positions is not None or operands.kv_positions is not None):
        found["q_positions"], found["kv_positions"] = masks.positions(operands)
    if operands.q_segments is not None:
        found["q_segments"], found["kv_segments"] = operands.q_segments, operands.kv_segments
    return {name: masks.pad_axis(jnp.asarray(x, jnp.int32), 1, _BLOCK, value=-1) for name, x in found.items()}


class _Plan(NamedTuple):
    """What is static about a kernel."""

    config: Config
    wanted: tuple[str, ...]  # of dq, dk, dv
    names: tuple[str, ...]  # of the kernel's inputs
    step: int  # rows of a block of the ring: keys for dq, queries for dk and dv
    group: int  # query heads a key head
    length: int | None  # keys before padding; None without padding
    stages: int  # blocks of the ring

    @property
    def shape(self) -> tuple[int, int]:
        """Of a tile of scores."""
        return _ROWS, self.step


def _plan(config: Config, operands: Operands, inputs: dict[str, jax.Array], wanted: tuple[str, ...]) -> _Plan:
    widths = [inputs[name].shape[3] for name in ("q", "v")]
    S = operands.k.shape[1]
    # What masks and the cap need beside the accumulators leaves the registers of a thread no room for wide tiles.
    heavy = config.soft_cap is not None or any(name.startswith("kv_") for name in inputs)
    narrow = max(widths) > _WIDE or (heavy and "dq" not in wanted and sum(widths) > 192)
    roomy = wanted == ("dq",) and sum(widths) <= 2 * _WIDE and not heavy
    step = 32 if narrow else 128 if roomy else 64
    # The ring gets what the others leave, two blocks at least: each is given back a step late.
    kept = _BLOCK * (sum(widths) + len(wanted) * step) * 2
    return _Plan(
        config,
        wanted,
        (*inputs, "order", "counts"),
        step,
        operands.q.shape[2] // operands.k.shape[2],
        S if S % _BLOCK else None,
        min(4, (_SHARED - kept) // (step * (2 * sum(widths) + 8))),
    )


def _live(kinds: Any) -> tuple[jax.Array, jax.Array]:
    """For each row of blocks the full ones first, then the partial ones [B?, rows, columns]; the two counts [.., 2]."""
    kinds = jnp.asarray(kinds)
    rank = jnp.where(kinds == masks.FULL, 0, jnp.where(kinds == masks.PARTIAL, 1, 2))
    order = jnp.argsort(rank, axis=2, stable=True).astype(jnp.int32)
    counts = [jnp.sum(kinds == kind, axis=2, dtype=jnp.int32) for kind in (masks.FULL, masks.PARTIAL)]
    return order, jnp.stack(counts, axis=2)


def _call(
    config: Config, operands: Operands, inputs: dict[str, jax.Array], wanted: tuple[str, ...], interpret: Any
) -> tuple[jax.Array, ...]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plan = _plan(config, operands, inputs, wanted)
    by_query = wanted == ("dq",)
    if by_query:
        kinds = masks.block_kinds(config, operands, _BLOCK, plan.step)
    else:
        kinds = masks.block_kinds(config, operands, plan.step, _BLOCK).swapaxes(1, 2)
    order, counts = _live(kinds)
    likes = [inputs[name[1:]] for name in wanted]
    batch, rows, heads, _ = likes[0].shape
    return plgpu.kernel(
        partial(_dq_kernel if by_query else _dkv_kernel, plan),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes),
        scratch_types=(_scratch(plan, inputs),),
        grid=(heads, rows // _BLOCK, batch),
        grid_names=("head", "row", "batch"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=f"attention_{'_'.join(wanted)}",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )(*inputs.values(), order, counts)


class _Scratch(NamedTuple):
    """Shared memory of a thread block and its barriers.

    `own` is what each warpgroup keeps (q and do, or k and v), `moving` the ring of the others. lse and delta belong to
    the queries, and so to either.
    """

    own_qk: Any
    own_ov: Any
    moving_qk: Any
    moving_ov: Any
    lse: Any
    delta: Any
    p: Any  # weights on their way to a product, each warpgroup's own; None if no product takes them
    ds: Any  # cotangents of the scores, likewise
    ready: Any  # a warpgroup's own blocks have come
    full: Any  # a block of the ring has come
    consumed: Any  # and may be overwritten


def _scratch(plan: _Plan, inputs: dict[str, jax.Array]) -> _Scratch:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    D, v_dim, dtype = inputs["q"].shape[3], inputs["v"].shape[3], inputs["q"].dtype
    own, moving = (_WARPGROUPS, _ROWS), (plan.stages, plan.step)
    by_query = plan.wanted == ("dq",)
    # Both operands of a product must be swizzled alike, and the narrowest has `step` columns.
    columns = min(plan.step, 64)
    tile = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))

    def tiles(lead: tuple[int, int], width: int) -> Any:
        return plgpu.SMEM((*lead, width), dtype, transforms=tile)

    lines = plgpu.SMEM(own if by_query else moving, jnp.float32)
    return _Scratch(
        tiles(own, D),
        tiles(own, v_dim),
        tiles(moving, D),
        tiles(moving, v_dim),
        lines,
        lines,
        tiles(own, plan.step) if "dv" in plan.wanted else None,
        tiles(own, plan.step) if plan.wanted != ("dv",) else None,
        plgpu.Barrier(num_arrivals=4 if by_query else 2, num_barriers=_WARPGROUPS),
        plgpu.Barrier(num_arrivals=2 if by_query else 4, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=plan.stages),
    )


# --- dq. --------------------------------------------------------------------------------------------------------------


def _dq_kernel(plan: _Plan, *refs: Any) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs = dict(zip(plan.names, refs, strict=False))
    at = _place(plan, inputs)
    warpgroup = lax.axis_index("warpgroup")
    dq, scratch = refs[len(plan.names) :]

    @pl.when(warpgroup < _WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        _dq_compute(plan, inputs, at, warpgroup, dq, scratch)

    @pl.when(warpgroup == _WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        kv_head = lax.div(at.head, jnp.int32(plan.group))

        def source(name: str, start: Any) -> Any:
            return inputs[name].at[at.batch, pl.ds(start, plan.step), kv_head]

        def send(n: Any, slot: Any) -> None:
            start = at.block(n) * plan.step
            plgpu.copy_gmem_to_smem(source("k", start), scratch.moving_qk.at[slot], scratch.full.at[slot])
            plgpu.copy_gmem_to_smem(source("v", start), scratch.moving_ov.at[slot], scratch.full.at[slot])

        _produce(plan, at.whole + at.partial, send, scratch.consumed)


def _dq_compute(
    plan: _Plan, inputs: dict[str, Any], at: _Place, warpgroup: Any, dq_ref: Any, scratch: _Scratch
) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, do = scratch.own_qk.at[warpgroup], scratch.own_ov.at[warpgroup]
    span, barrier = _span(at, warpgroup), scratch.ready.at[warpgroup]
    plgpu.copy_gmem_to_smem(inputs["q"].at[at.batch, span, at.head], q, barrier)
    plgpu.copy_gmem_to_smem(inputs["do"].at[at.batch, span, at.head], do, barrier)
    plgpu.copy_gmem_to_smem(inputs["lse"].at[at.batch, at.head, span], scratch.lse.at[warpgroup], barrier)
    plgpu.copy_gmem_to_smem(inputs["delta"].at[at.batch, at.head, span], scratch.delta.at[warpgroup], barrier)
    plgpu.barrier_wait(barrier)
    by_row = plgpu.Layout.WGMMA.reduce(1)
    lse = compat.gpu_load(scratch.lse.at[warpgroup], layout=by_row)
    delta = compat.gpu_load(scratch.delta.at[warpgroup], layout=by_row)

    def accumulate(dq: Any) -> Any:
        def step(n: Any, _: None, *, masked: bool) -> None:
            slot = lax.rem(n, jnp.int32(plan.stages))
            k, v = scratch.moving_qk.at[slot], scratch.moving_ov.at[slot]
            plgpu.barrier_wait(scratch.full.at[slot])
            own = _fresh(warpgroup)

            def tile(s: Any, dp: Any) -> None:
                plgpu.wgmma(s, scratch.own_qk.at[own], k.transpose((1, 0)))
                plgpu.wgmma(dp, scratch.own_ov.at[own], v.transpose((1, 0)))
                s = plgpu.wgmma_accumulator_load(s, wait_n=1)
                _release(plan, n, scratch.consumed)
                seen = _seen(plan, inputs, at, 0, _start(at, own), at.block(n) * plan.step) if masked else None
                _, sloped = _weights(plan, s, _spread(lse, plan.shape, 0), seen)
                scratch.ds.at[own][...] = (sloped * (dp[...] - _spread(delta, plan.shape, 0))).astype(q.dtype)

            pl.run_scoped(tile, *(plgpu.ACC(plan.shape, jnp.float32),) * 2)
            plgpu.commit_smem()
            plgpu.wgmma(dq, scratch.ds.at[own], k)

        _steps(at.whole, at.partial, step)
        return dq[...]

    dq = pl.run_scoped(accumulate, plgpu.ACC(q.shape, jnp.float32))
    own = _fresh(warpgroup)
    q = scratch.own_qk.at[own]
    q[...] = (dq * plan.config.scale).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, dq_ref.at[at.batch, _span(at, own), at.head])
    plgpu.wait_smem_to_gmem(0)


# --- dk and dv. -------------------------------------------------------------------------------------------------------


def _dkv_kernel(plan: _Plan, *refs: Any) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs = dict(zip(plan.names, refs, strict=False))
    at = _place(plan, inputs)
    warpgroup = lax.axis_index("warpgroup")
    *outs, scratch = refs[len(plan.names) :]
    outputs = dict(zip(plan.wanted, outs, strict=True))

    @pl.when(warpgroup < _WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        _dkv_compute(plan, inputs, at, warpgroup, outputs, scratch)

    @pl.when(warpgroup == _WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")

        def send(n: Any, slot: Any) -> None:
            head, block = _shared_step(plan, at, n)
            span = pl.ds(block * plan.step, plan.step)
            barrier = scratch.full.at[slot]
            plgpu.copy_gmem_to_smem(inputs["q"].at[at.batch, span, head], scratch.moving_qk.at[slot], barrier)
            plgpu.copy_gmem_to_smem(inputs["do"].at[at.batch, span, head], scratch.moving_ov.at[slot], barrier)
            plgpu.copy_gmem_to_smem(inputs["lse"].at[at.batch, head, span], scratch.lse.at[slot], barrier)
            plgpu.copy_gmem_to_smem(inputs["delta"].at[at.batch, head, span], scratch.delta.at[slot], barrier)

        _produce(plan, (at.whole + at.partial) * plan.group, send, scratch.consumed)


def _shared_step(plan: _Plan, at: _Place, n: Any) -> tuple[Any, Any]:
    """Query head and query block of step n: all full blocks of all heads of the group, then all partial ones."""
    full = at.whole * plan.group
    early = n < full
    count = jnp.where(early, at.whole, at.partial)
    m = jnp.where(early, n, n - full)
    member = lax.div(m, count)
    block = at.block(jnp.where(early, 0, at.whole) + m - member * count)
    return at.head * plan.group + member, block


def _dkv_compute(
    plan: _Plan, inputs: dict[str, Any], at: _Place, warpgroup: Any, outputs: dict[str, Any], scratch: _Scratch
) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    k, v = scratch.own_qk.at[warpgroup], scratch.own_ov.at[warpgroup]
    span, barrier = _span(at, warpgroup), scratch.ready.at[warpgroup]
    plgpu.copy_gmem_to_smem(inputs["k"].at[at.batch, span, at.head], k, barrier)
    plgpu.copy_gmem_to_smem(inputs["v"].at[at.batch, span, at.head], v, barrier)
    plgpu.barrier_wait(barrier)
    by_column = plgpu.Layout.WGMMA.reduce(0)

    def accumulate(*sums: Any) -> Any:
        total = dict(zip(plan.wanted, sums, strict=True))

        def step(n: Any, _: None, *, masked: bool) -> None:
            slot = lax.rem(n, jnp.int32(plan.stages))
            q, do = scratch.moving_qk.at[slot], scratch.moving_ov.at[slot]
            plgpu.barrier_wait(scratch.full.at[slot])
            own = _fresh(warpgroup)

            def tile(sT: Any, dpT: Any = None) -> None:
                plgpu.wgmma(sT, scratch.own_qk.at[own], q.transpose((1, 0)))
                if dpT is not None:
                    plgpu.wgmma(dpT, scratch.own_ov.at[own], do.transpose((1, 0)))
                sT = plgpu.wgmma_accumulator_load(sT, wait_n=0 if dpT is None else 1)
                _release(plan, n, scratch.consumed)
                seen = None
                if masked:
                    seen = _seen(plan, inputs, at, 1, _shared_step(plan, at, n)[1] * plan.step, _start(at, own))
                lse = compat.gpu_load(scratch.lse.at[slot], layout=by_column)
                pT, sloped = _weights(plan, sT, _spread(lse, plan.shape, 1), seen)
                if "dv" in total:
                    scratch.p.at[own][...] = pT.astype(q.dtype)
                if dpT is not None:
                    dpT = dpT[...]
                    delta = compat.gpu_load(scratch.delta.at[slot], layout=by_column)
                    scratch.ds.at[own][...] = (sloped * (dpT - _spread(delta, plan.shape, 1))).astype(q.dtype)

            pl.run_scoped(tile, *(plgpu.ACC(plan.shape, jnp.float32),) * (2 if "dk" in total else 1))
            plgpu.commit_smem()
            if "dv" in total:
                plgpu.wgmma(total["dv"], scratch.p.at[own], do)
            if "dk" in total:
                plgpu.wgmma(total["dk"], scratch.ds.at[own], q)

        _steps(at.whole * plan.group, at.partial * plan.group, step)
        return tuple(acc[...] for acc in sums)

    widths = {"dk": k.shape, "dv": v.shape}
    sums = pl.run_scoped(accumulate, *(plgpu.ACC(widths[name], jnp.float32) for name in plan.wanted))
    own = _fresh(warpgroup)
    for name, x in zip(plan.wanted, sums, strict=True):
        stage = (scratch.own_qk if name == "dk" else scratch.own_ov).at[own]
        stage[...] = (x * (plan.config.scale if name == "dk" else 1.0)).astype(stage.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stage, outputs[name].at[at.batch, _span(at, own), at.head])
    plgpu.wait_smem_to_gmem(0)


# --- What both share. -------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a thread block is in the grid, and what its row of blocks holds."""

    batch: Any
    head: Any
    row: Any
    whole: Any  # live blocks without hidden entries
    partial: Any  # the other live blocks
    order: Any  # ref [B?, rows, columns]
    line: Any  # index of the batch in `order`

    def block(self, n: Any) -> Any:
        """The n-th live block."""
        return self.order[self.line, self.row, n]


def _place(plan: _Plan, inputs: dict[str, Any]) -> _Place:
    batch, head, row = (lax.axis_index(name) for name in ("batch", "head", "row"))
    order, counts = inputs["order"], inputs["counts"]
    if plan.wanted == ("dq",):
        # Under a causal mask the last queries see most: who starts late should have little to do. For keys it is the
        # other way round.
        row = order.shape[1] - 1 - row
    line = batch if order.shape[0] > 1 else 0
    return _Place(batch, head, row, counts[line, row, 0], counts[line, row, 1], order, line)


def _start(at: _Place, warpgroup: Any) -> Any:
    """First of the rows that a warpgroup computes."""
    return at.row * _BLOCK + warpgroup * _ROWS


def _span(at: _Place, warpgroup: Any) -> Any:
    return pl.ds(_start(at, warpgroup), _ROWS)


def _fresh(x: Any) -> Any:
    """x as if it were another number, so that the compiler keeps no address that follows from it across steps.

    It would hold some forty of them in registers, which the accumulators need.
    """
    return lax.optimization_barrier(x)


def _produce(plan: _Plan, count: Any, send: Any, consumed: Any) -> None:
    """Send every block, each as soon as the ring has room."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def step(n: Any, _: None) -> None:
        slot = lax.rem(n, jnp.int32(plan.stages))
        pl.when(n >= plan.stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
        send(n, slot)

    lax.fori_loop(jnp.int32(0), count, step, None)


def _steps(whole: Any, partial_: Any, step: Any) -> None:
    """All steps in order, those without hidden entries in a loop of their own.

    The second loop is there even if nothing is ever hidden: the assembler ends each trip of the last loop with a wait
    for all products, and this keeps that wait out of the loop that does the work.
    """
    lax.fori_loop(jnp.int32(0), whole, partial(step, masked=False), None)
    lax.fori_loop(whole, whole + partial_, partial(step, masked=True), None)


def _release(plan: _Plan, n: Any, consumed: Any) -> None:
    """Give back the block of the step before, whose last products, started there, are known to be done by now."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    last = lax.rem(n + (plan.stages - 1), jnp.int32(plan.stages))
    pl.when(n > 0)(lambda: plgpu.barrier_arrive(consumed.at[last]))


def _spread(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, (axis,))


def _weights(plan: _Plan, s: jax.Array, lse: jax.Array, seen: Any) -> tuple[jax.Array, jax.Array]:
    """p, and p times the derivative of the capped scores by the scores."""
    cap, scale = plan.config.soft_cap, plan.config.scale
    if cap is None:
        p = jnp.exp2(s * (scale * _LOG2E) - lse)
        p = p if seen is None else jnp.where(seen, p, 0.0)
        return p, p
    # tanh by exp2: the hardware's own tanh is good to eleven bits only, and is multiplied by the cap.
    t = 1.0 - 2.0 / (1.0 + jnp.exp2(s * (2 * _LOG2E * scale / cap)))
    p = jnp.exp2(t * (cap * _LOG2E) - lse)
    p = p if seen is None else jnp.where(seen, p, 0.0)
    return p, p * (1.0 - t * t)


def _seen(plan: _Plan, inputs: dict[str, Any], at: _Place, q_axis: int, q_start: Any, kv_start: Any) -> Any:
    """What of a tile is seen, None if all; queries run along `q_axis` of it, keys along the other axis."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def places(axis: int, start: Any) -> jax.Array:
        return plgpu.broadcasted_iota(jnp.int32, plan.shape, axis, layout=plgpu.Layout.WGMMA) + start

    def given(name: str, axis: int, start: Any) -> Any:
        if name not in inputs:
            return None
        ref = inputs[name]
        line = at.batch if ref.shape[0] > 1 else 0
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        x = compat.gpu_load(ref.at[line, pl.ds(start, plan.shape[axis])], layout=layout, optimized=False)
        return _spread(x, plan.shape, axis)

    kv_axis = 1 - q_axis
    q_positions, kv_positions = given("q_positions", q_axis, q_start), given("kv_positions", kv_axis, kv_start)
    if q_positions is None and masks.positional(plan.config):
        q_positions, kv_positions = places(q_axis, q_start), places(kv_axis, kv_start)
    segments = given("q_segments", q_axis, q_start), given("kv_segments", kv_axis, kv_start)
    seen = masks.visible(plan.config, q_positions, kv_positions, *segments)
    if plan.length is not None:
        inside = places(kv_axis, kv_start) < plan.length
        seen = inside if seen is None else seen & inside
    return seen
