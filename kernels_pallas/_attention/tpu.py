"""Attention forward on TPU: a Pallas Mosaic kernel.

Grid (batch, query head, query block, live key block): the key axis runs in order and carries the statistics in VMEM.
Which key blocks are live, and which of these hold hidden entries, comes in as scalars that are known before the grid
starts: a step past the last live block points at the block already there, so it moves nothing and computes nothing.

Notation: s scores in base 2 (premultiplied by log2 e, so that exp2 replaces exp; in natural units beside a bias, which
may be as large as its dtype allows), m running maximum, l normaliser,
acc the output before division. m and l are kept once a lane, [bq, 128]: a column would be relaid out at every use.
l adds up lane by lane and is summed across lanes once, at the end.

The compiler schedules the steps of a key block together, so that the matrix units work on one tile of scores while the
exponentials of another are taken. With short tiles it has to be told: the next product then stands before the softmax
of this one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import dispatch
from kernels_pallas._attention import dropout, masks
from kernels_pallas._attention.config import BlockSizes, Config, Operands, precision, tpu_blocks

LANES = 128
LOG2E = 1.4426950408889634
# Tiles this long give the compiler enough to do at a time; found by compiling.
_LONG_TILE = 1024


def forward(config: Config, operands: Operands, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, Hq, Dv] and log-sum-exp [B, Hq, T].

    Args:
      config: static part of the call.
      operands: arrays of the call.
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    bias = operands.bias
    if bias is not None and bias.dtype != jnp.bfloat16:
        operands = operands._replace(bias=bias.astype(jnp.float32))
    # With x64 on, Python's ints in index maps would be 64 bits wide, which the compiler does not take.
    with jax.enable_x64(False):
        return _forward(config, operands, interpret)


def _forward(config: Config, operands: Operands, interpret: Any) -> tuple[jax.Array, jax.Array]:
    from jax.experimental.pallas import tpu as pltpu

    B, T, H, D = operands.q.shape
    S, k_heads, v_dim = operands.v.shape[1:]
    blocks = tpu_blocks(config, operands)
    inputs, kinds = _prepare(config, operands, blocks)
    order, count = live_blocks(kinds)
    rows, columns = kinds.shape[1:]
    shared_map = kinds.shape[0] == 1
    group = H // k_heads

    def b_of(b: Any) -> Any:
        return 0 if shared_map else b

    def kv_block(b: Any, h: Any, i: Any, j: Any, order: Any, *_: Any) -> Any:
        return order[(b_of(b) * rows + i) * columns + j]

    specs = {
        "q": pl.BlockSpec((None, None, blocks.q, inputs["q"].shape[3]), lambda b, h, i, j, *_: (b, h, i, 0)),
        "k": pl.BlockSpec(
            (None, None, blocks.kv, inputs["k"].shape[3]),
            lambda b, h, i, j, *s: (b, lax.div(h, jnp.int32(group)), kv_block(b, h, i, j, *s), 0),
        ),
        "v": pl.BlockSpec(
            (None, None, blocks.kv, inputs["v"].shape[3]),
            lambda b, h, i, j, *s: (b, lax.div(h, jnp.int32(group)), kv_block(b, h, i, j, *s), 0),
        ),
    }
    for name in ("bias", "mask"):
        if name in inputs:
            specs[name] = _tile_spec(inputs[name], blocks, kv_block)
    for name in ("q_positions", "q_segments"):
        if name in inputs:
            lead = inputs[name].shape[0] > 1
            specs[name] = pl.BlockSpec(
                (None, blocks.q, LANES), lambda b, h, i, j, *_, lead=lead: (b if lead else 0, i, 0)
            )
    for name in ("kv_positions", "kv_segments"):
        if name in inputs:
            lead = inputs[name].shape[0] > 1
            specs[name] = pl.BlockSpec(
                (None, 8, blocks.kv),
                lambda b, h, i, j, *s, lead=lead: (b if lead else 0, 0, kv_block(b, h, i, j, *s)),
            )
    v_padded = inputs["v"].shape[3]
    kernel = partial(
        _kernel,
        config=config,
        blocks=blocks,
        names=tuple(inputs),
        length=S if S % blocks.kv else None,
        rows=rows,
        shared_map=shared_map,
        hides=masks.masked(config, operands) or S % blocks.kv != 0,
        single=columns == 1,
    )
    scalars = [order, count, kinds.reshape(-1)]
    if config.dropout:
        scalars.append(operands.dropout_keys.reshape(-1))
    o, lse = pl.pallas_call(
        kernel,
        out_shape=(
            dispatch.output((B, H, rows * blocks.q, v_padded), operands.q.dtype),
            dispatch.output((B, H, rows, 8, blocks.q), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, H, rows, columns),
            in_specs=[specs[name] for name in inputs],
            out_specs=(
                pl.BlockSpec((None, None, blocks.q, v_padded), lambda b, h, i, j, *_: (b, h, i, 0)),
                pl.BlockSpec((None, None, None, 8, blocks.q), lambda b, h, i, j, *_: (b, h, i, 0, 0)),
            ),
            scratch_shapes=[
                pltpu.VMEM((blocks.q, LANES), jnp.float32),
                pltpu.VMEM((blocks.q, LANES), jnp.float32),
                pltpu.VMEM((blocks.q, v_padded), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=_cost(B, H, T, S, D, v_dim, inputs),
        interpret=interpret,
        name="attention_forward",
    )(*scalars, *inputs.values())
    lse = lse[:, :, :, 0].reshape(B, H, -1)[:, :, :T]
    return jnp.swapaxes(o[:, :, :T, :v_dim], 1, 2), lse


def _prepare(config: Config, operands: Operands, blocks: BlockSizes) -> tuple[dict[str, jax.Array], Any]:
    """Arrays as the kernel reads them, in the order of its arguments, and the kinds of all blocks."""

    def heads(x: jax.Array, block: int) -> jax.Array:  # [B, N, H, D] -> [B, H, N', D']
        x = masks.pad_axis(jnp.swapaxes(x, 1, 2), 2, block)
        return masks.pad_axis(x, 3, LANES)

    def queries(x: Any) -> jax.Array:  # [B?, T] -> [B?, T', 128], the same in every lane
        x = masks.pad_axis(jnp.asarray(x, jnp.int32), 1, blocks.q, value=-1)
        return jnp.broadcast_to(x[:, :, None], (*x.shape, LANES))

    def keys(x: Any) -> jax.Array:  # [B?, S] -> [B?, 8, S'], the same in every sublane
        x = masks.pad_axis(jnp.asarray(x, jnp.int32), 1, blocks.kv, value=-1)
        return jnp.broadcast_to(x[:, None], (x.shape[0], 8, x.shape[1]))

    inputs = {
        "q": heads(operands.q, blocks.q),
        "k": heads(operands.k, blocks.kv),
        "v": heads(operands.v, blocks.kv),
    }
    for name in ("bias", "mask"):
        x = getattr(operands, name)
        if x is not None:
            if name == "mask":
                x = x.astype(jnp.int8)
            x = masks.pad_axis(x, 2, blocks.q) if x.shape[2] > 1 else x
            x = masks.pad_axis(x, 3, blocks.kv) if x.shape[3] > 1 else jnp.broadcast_to(x, (*x.shape[:3], blocks.kv))
            inputs[name] = x
    if masks.positional(config) and (operands.q_positions is not None or operands.kv_positions is not None):
        q_positions, kv_positions = masks.positions(operands)
        inputs |= {"q_positions": queries(q_positions), "kv_positions": keys(kv_positions)}
    if operands.q_segments is not None:
        inputs |= {"q_segments": queries(operands.q_segments), "kv_segments": keys(operands.kv_segments)}
    return inputs, jnp.asarray(masks.block_kinds(config, operands, blocks.q, blocks.kv))


def live_blocks(kinds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each row of blocks the live ones first, the last of them repeated, flat; and how many there are, flat."""
    live = kinds != masks.SKIP
    columns = kinds.shape[2]
    count = jnp.sum(live, axis=2, dtype=jnp.int32)
    order = jnp.argsort(~live, axis=2, stable=True).astype(jnp.int32)
    at = jnp.minimum(jnp.arange(columns, dtype=jnp.int32), jnp.maximum(count[:, :, None] - 1, 0))
    return jnp.take_along_axis(order, at, axis=2).reshape(-1), count.reshape(-1)


def _tile_spec(x: jax.Array, blocks: BlockSizes, kv_block: Any) -> pl.BlockSpec:
    """Blocks of a bias or a mask [B?, H?, T?, S]; axes of 1 are shared."""
    lead, heads, rows, columns = (size > 1 for size in x.shape)
    long = x.shape[3] > blocks.kv

    def index(b: Any, h: Any, i: Any, j: Any, *scalars: Any) -> tuple:
        column = kv_block(b, h, i, j, *scalars) if long else 0
        return b if lead else 0, h if heads else 0, i if rows else 0, column

    return pl.BlockSpec((None, None, blocks.q if rows else 1, blocks.kv), index)


def _cost(B: int, H: int, T: int, S: int, D: int, v_dim: int, inputs: dict[str, jax.Array]) -> pl.CostEstimate:
    moved = sum(x.size * x.dtype.itemsize for x in inputs.values())
    moved += B * H * T * (v_dim * inputs["q"].dtype.itemsize + 4)
    return pl.CostEstimate(flops=2 * B * H * T * S * (D + v_dim), transcendentals=B * H * T * S, bytes_accessed=moved)


def _kernel(
    order: Any,
    count: Any,
    kinds: Any,
    *refs: Any,
    config: Config,
    blocks: BlockSizes,
    names: tuple[str, ...],
    length: int | None,
    rows: int,
    shared_map: bool,
    hides: bool,
    single: bool,
) -> None:
    keys, *refs = refs if config.dropout else (None, *refs)
    inputs = dict(zip(names, refs, strict=False))
    o_ref, lse_ref, m_ref, l_ref, acc_ref = refs[len(names) :]
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    columns = pl.num_programs(3)
    line = (0 if shared_map else b) * rows + i
    column = order[line * columns + j]
    live = j < count[line]
    kind = kinds[line * columns + column]
    # A single block that hides nothing needs no statistics of blocks before it.
    fresh = single and not hides

    if not fresh:

        @pl.when(j == 0)
        def _() -> None:
            m_ref[...] = jnp.full(m_ref.shape, -jnp.inf, jnp.float32)
            l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
            acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def block(hidden: bool) -> None:
        starts = range(0, blocks.kv, blocks.compute)
        ahead = blocks.compute < _LONG_TILE
        product = partial(_product, inputs, blocks.compute)
        following = product(0) if ahead else None
        for at in starts:
            now = following if ahead else product(at)
            if ahead and at + blocks.compute < blocks.kv:
                following = product(at + blocks.compute)
            seen = _seen(config, inputs, at, i, column, blocks, length) if hidden else None
            kept = None
            if config.dropout:
                place = 2 * (b * pl.num_programs(1) + h)
                kept = dropout.tile(
                    keys[place],
                    keys[place + 1],
                    i * blocks.q,
                    column * blocks.kv + at,
                    (blocks.q, blocks.compute),
                    config.dropout,
                    aligned=blocks.compute % dropout.SPAN == 0,
                )
            _tile(config, inputs, now, at, seen, kept, (m_ref, l_ref, acc_ref), fresh=fresh and at == 0)

    if hides:
        pl.when(live & (kind == masks.PARTIAL))(lambda: block(True))
        pl.when(live & (kind == masks.FULL))(lambda: block(False))
    else:
        block(False)

    @pl.when(j == columns - 1)
    def _() -> None:
        empty = hides or "bias" in inputs  # rows that see nothing are possible
        total = jnp.broadcast_to(jnp.sum(l_ref[...], axis=1, keepdims=True), l_ref.shape)  # [bq, 128]
        sees = total != 0
        inverse = jnp.where(sees, 1 / jnp.where(sees, total, 1), 0) if empty else 1 / total
        if config.dropout:
            inverse = inverse * dropout.gain(config.dropout)
        o_ref[...] = (acc_ref[...] * widen(inverse, acc_ref.shape[1])).astype(o_ref.dtype)
        m, total = _along_lanes(m_ref[...]), _along_lanes(total)  # [1, bq]
        sees = total != 0
        lse = m / unit_of(inputs.get("bias")) + jnp.log2(jnp.where(sees, total, 1)) / LOG2E
        lse_ref[...] = jnp.broadcast_to(jnp.where(sees, lse, -jnp.inf), lse_ref.shape)


def _product(inputs: dict[str, Any], compute: int, at: int) -> jax.Array:
    """q k^T [bq, compute]; contracting the last axes of both needs no transpose."""
    q, k = inputs["q"][...], inputs["k"][pl.ds(at, compute), :]
    dimensions = (((1,), (1,)), ((), ()))
    return lax.dot_general(q, k, dimensions, precision=precision(q.dtype), preferred_element_type=jnp.float32)


def scores(config: Config, s: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Scores of the product q k^T before hiding, times `unit_of(bias)`."""
    unit = unit_of(bias)
    if bias is None and config.soft_cap is None:
        return s * (config.scale * unit)
    s = config.scale * s
    if bias is not None:
        s = s + bias.astype(jnp.float32)
    if config.soft_cap is not None:
        s = config.soft_cap * jnp.tanh(s / config.soft_cap)
    return s * unit if unit != 1 else s


def power(x: jax.Array, unit: float) -> jax.Array:
    """exp of what was multiplied by `unit`."""
    return jnp.exp2(x if unit != 1 else x * LOG2E)


def _tile(
    config: Config, inputs: dict[str, Any], s: jax.Array, at: int, seen: Any, kept: Any, refs: tuple, *, fresh: bool
) -> None:
    """One step of online softmax with the keys of one product; `fresh`: nothing has been summed yet."""
    m_ref, l_ref, acc_ref = refs
    compute = s.shape[1]
    span = pl.ds(at, compute)
    bias = inputs["bias"][:, span] if "bias" in inputs else None
    unit = unit_of(bias)
    s = scores(config, s, bias)
    if seen is not None:
        s = jnp.where(seen, s, -jnp.inf)
    top = jnp.max(s, axis=1, keepdims=True)
    top = jnp.broadcast_to(top, m_ref.shape) if fresh else jnp.maximum(m_ref[...], top)  # [bq, 128]
    # -inf - -inf is NaN: a row that has seen nothing yet shifts by 0. A bias may hold -inf too.
    safe = jnp.where(top == -jnp.inf, 0.0, top) if seen is not None or bias is not None else top
    p = power(s - widen(safe, compute), unit)
    total = sum((p[:, lane : lane + LANES] for lane in range(LANES, compute, LANES)), p[:, :LANES])
    if kept is not None:
        p = jnp.where(kept, p, 0)
    v = inputs["v"][span, :]
    weighted = lax.dot_general(
        p.astype(v.dtype),
        v,
        (((1,), (0,)), ((), ())),
        precision=precision(v.dtype),
        preferred_element_type=jnp.float32,
    )
    if not fresh:
        shrink = power(m_ref[...] - safe, unit)
        total = shrink * l_ref[...] + total
        weighted = widen(shrink, acc_ref.shape[1]) * acc_ref[...] + weighted
    m_ref[...] = top
    l_ref[...] = total
    acc_ref[...] = weighted


def _along_lanes(x: jax.Array) -> jax.Array:
    """[bq, 128], whose lanes are equal, as [1, bq]: the diagonal of each square, cheaper than its transpose."""
    square = (LANES, LANES)
    diagonal = lax.broadcasted_iota(jnp.int32, square, 0) == lax.broadcasted_iota(jnp.int32, square, 1)
    squares = (x[at : at + LANES] for at in range(0, x.shape[0], LANES))
    return jnp.concatenate([jnp.sum(jnp.where(diagonal, x, 0.0), axis=0, keepdims=True) for x in squares], axis=1)


def unit_of(bias: Any) -> float:
    """What scores are multiplied by: log2 e, or 1 beside a bias, which the factor could overflow."""
    return LOG2E if bias is None else 1.0


def widen(x: jax.Array, width: int) -> jax.Array:
    """Repeat [bq, 128], whose lanes are equal, to [bq, width]."""
    return x if width == LANES else jnp.concatenate([x] * (width // LANES), axis=1)


def _seen(
    config: Config, inputs: dict[str, Any], at: int, i: Any, column: Any, blocks: BlockSizes, length: int | None
) -> jax.Array:
    """What of a tile [bq, compute] is seen."""
    shape = (blocks.q, blocks.compute)
    span = pl.ds(at, blocks.compute)
    columns = lax.broadcasted_iota(jnp.int32, shape, 1) + (column * blocks.kv + at)

    def across(name: str) -> Any:
        return widen(inputs[name][...], blocks.compute) if name in inputs else None

    def down(name: str) -> Any:
        return inputs[name][:1, span] if name in inputs else None

    q_positions, kv_positions = across("q_positions"), down("kv_positions")
    if q_positions is None and masks.positional(config):
        q_positions = lax.broadcasted_iota(jnp.int32, shape, 0) + i * blocks.q
        kv_positions = columns
    mask = inputs["mask"][:, span].astype(jnp.int32) != 0 if "mask" in inputs else None
    seen = masks.visible(config, q_positions, kv_positions, across("q_segments"), down("kv_segments"), mask)
    if length is not None:
        inside = columns < length
        seen = inside if seen is None else seen & inside
    return jnp.broadcast_to(seen, shape)
