"""Attention backward on TPU: one Pallas Mosaic kernel for dq, dk and dv.

Grid (batch, key head, key block, query head of the group, live query block). A step recomputes a block of scores and
does all five products with it. dk and dv of the key block add up in VMEM over the two last axes. dq of all queries of
the call stays in VMEM over the three last axes, so that no partial sums of it go to memory; when these queries do not
fit, heads of a group, and then queries, are taken a chunk at a time, and dk and dv add up over the chunks. Which query
blocks are live is known before the grid starts, as in the forward kernel.

Scores lie transposed, s^T = k q^T [keys, queries]: lse and delta then run along the lanes, where they broadcast for
free, and only ds has to be turned, for dq.

Notation: p = exp(s - lse), dp = do v^T, delta = rowsum(do o) - dlse, ds = p (dp - delta).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import dispatch
from kernels_pallas._attention import dropout, masks
from kernels_pallas._attention.config import BlockSizes, Config, Operands, precision, tpu_blocks
from kernels_pallas._attention.tpu import LANES, live_blocks, power, scores, unit_of, widen

# Of dq in VMEM, which holds it twice: one block is written back while the next one is summed.
_DQ_BYTES = 4 * 2**20
# Added to the kind of a block where a query block is met for the first time: its dq starts from 0.
_FIRST = 4


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
    """Cotangents of q, k and v; that of the bias is not computed here.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      o: output of the forward pass [B, T, Hq, Dv].
      lse: log-sum-exp of the forward pass [B, Hq, T].
      o_cotangent: [B, T, Hq, Dv].
      lse_cotangent: [B, Hq, T].
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    bias = operands.bias
    if bias is not None and bias.dtype != jnp.bfloat16:
        operands = operands._replace(bias=bias.astype(jnp.float32))
    # With x64 on, Python's ints in index maps would be 64 bits wide, which the compiler does not take.
    with jax.enable_x64(False):
        return _backward(config, operands, o, lse, o_cotangent, lse_cotangent, interpret)


def _backward(config: Config, operands: Operands, o: Any, lse: Any, do: Any, dlse: Any, interpret: Any) -> tuple:
    dtype = operands.q.dtype
    T, D = operands.q.shape[1], operands.q.shape[3]
    S, k_heads, v_dim = operands.v.shape[1:]
    # A row that sees nothing has no gradient, whatever its cotangents are.
    sees = lse != -jnp.inf
    delta = jnp.swapaxes(jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1), 1, 2)
    delta = jnp.where(sees, delta - dlse, 0)
    do = jnp.where(jnp.swapaxes(sees, 1, 2)[..., None], do, 0).astype(dtype)
    plan = _plan(config, operands)
    # Weights are exp(s - lse): those of queries that see nothing, or are padding, are 0 by this, whatever the bias.
    lse = jnp.where(sees, lse, jnp.inf) * unit_of(operands.bias)
    q_block = plan.blocks.q * plan.rows
    stats = [masks.pad_axis(lse, 2, q_block, value=jnp.inf), masks.pad_axis(delta, 2, q_block)]
    stats = jnp.stack(stats, axis=2)  # [B, H, 2, T']
    inputs = _prepare(config, operands, plan, do, stats)
    call = partial(_call, config, operands, plan, inputs, interpret)
    if plan.chunks == 1:
        dq, dk, dv = call(*(x[0] for x in plan.maps), jnp.zeros(2, jnp.int32))
        dq = dq[None]
    else:

        def chunk(sums: tuple, at: tuple) -> tuple:
            dq, *shares = call(*at)
            return tuple(total + share for total, share in zip(sums, shares, strict=True)), dq

        zeros = tuple(
            jnp.zeros((*x.shape[:2], x.shape[2], x.shape[3]), jnp.float32) for x in (inputs["k"], inputs["v"])
        )
        # Tied to this call's keys: where a program holds many calls, as in a ring, zeros that wait for nothing would
        # all be there from its start.
        zeros, _ = lax.optimization_barrier((zeros, inputs["k"]))
        (dk, dv), dq = lax.scan(chunk, zeros, (*plan.maps, plan.offsets))
    dq = plan.joined(dq)[:, :, :T, :D] * config.scale
    if plan.dead is not None:
        dq = jnp.where(plan.dead[:, None, :T, None], 0, dq)
    back = lambda x: jnp.swapaxes(x, 1, 2).astype(dtype)  # noqa: E731
    return back(dq), back(dk[:, :, :S, :D]), back(dv[:, :, :S, :v_dim])


# --- What is done where. ----------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Blocks, chunks of queries, and which blocks of each chunk are live."""

    blocks: BlockSizes
    group: int  # query heads a key head
    heads: int  # of them a chunk
    rows: int  # query blocks a chunk
    row_chunks: int
    shared: bool  # one map for the whole batch
    hides: bool
    maps: tuple  # order, count and kinds of every chunk, flat after the first axis
    offsets: Any  # int32 [chunks, 2]: first head and first query block
    dead: Any  # bool [B?, T']: queries in blocks that are never live; None: there are none

    @property
    def chunks(self) -> int:
        return self.group // self.heads * self.row_chunks

    def joined(self, dq: jax.Array) -> jax.Array:
        """The chunks [chunks, B, Hk, heads, queries, D] as one array [B, H, T', D]."""
        B, k_heads, _, _, D = dq.shape[1:]
        dq = dq.reshape(self.group // self.heads, self.row_chunks, *dq.shape[1:])
        return dq.transpose(2, 3, 0, 4, 1, 5, 6).reshape(B, k_heads * self.group, -1, D)


def _plan(config: Config, operands: Operands) -> _Plan:
    T, H, D = operands.q.shape[1:]
    S = operands.k.shape[1]
    group = H // operands.k.shape[2]
    blocks = tpu_blocks(config, operands, backward=True)
    rows = -(-T // blocks.q)
    # Query blocks of one head that dq has room for.
    room = max(1, _DQ_BYTES // (4 * blocks.q * (D + -D % LANES)))
    heads = max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * rows <= room))
    row_chunks = -(-rows // room) if heads == 1 else 1
    rows_a_chunk = -(-rows // row_chunks)
    hides = masks.masked(config, operands) or S % blocks.kv != 0
    kinds = masks.block_kinds(config, operands, blocks.q, blocks.kv)
    xp = np if isinstance(kinds, np.ndarray) else jnp
    # Past the last query nothing is live; where nothing is hidden the map is not asked, and zeros add nothing.
    padding = ((0, 0), (0, row_chunks * rows_a_chunk - rows), (0, 0))
    kinds = xp.pad(kinds, padding, constant_values=masks.SKIP if hides else masks.FULL)
    live = kinds != masks.SKIP
    dead = None
    if hides and not (isinstance(live, np.ndarray) and live.any(axis=2)[:, :rows].all()):
        dead = jnp.repeat(~jnp.asarray(live).any(axis=2), blocks.q, axis=1)
    shape = (kinds.shape[0], row_chunks, rows_a_chunk, kinds.shape[2])
    kinds = jnp.asarray(kinds).reshape(shape).transpose(1, 0, 3, 2)  # [chunk, B?, column, row]
    live = (kinds != masks.SKIP).astype(jnp.int32)
    first = (live == 1) & (jnp.cumsum(live, axis=2) == 1)
    order, count = live_blocks(kinds.reshape(-1, *kinds.shape[2:]))
    maps = (order, count, kinds + _FIRST * first)
    head_chunks = group // heads
    maps = tuple(jnp.tile(x.reshape(row_chunks, -1), (head_chunks, 1)) for x in maps)
    at = np.mgrid[:head_chunks, :row_chunks].reshape(2, -1).T * np.array([heads, rows_a_chunk])
    offsets = jnp.asarray(at, jnp.int32)
    return _Plan(blocks, group, heads, rows_a_chunk, row_chunks, kinds.shape[1] == 1, hides, maps, offsets, dead)


def _prepare(config: Config, operands: Operands, plan: _Plan, do: jax.Array, stats: jax.Array) -> dict[str, jax.Array]:
    """Arrays as the kernel reads them, in the order of its arguments; a row runs along lanes, a column across them."""
    blocks, k_heads = plan.blocks, operands.k.shape[2]
    q_block = blocks.q * plan.rows

    def queries(x: jax.Array) -> jax.Array:  # [B, T, H, D] -> [B, Hk, G, T', D']
        x = masks.pad_axis(masks.pad_axis(jnp.swapaxes(x, 1, 2), 2, q_block), 3, LANES)
        return x.reshape(x.shape[0], k_heads, plan.group, *x.shape[2:])

    def keys(x: jax.Array) -> jax.Array:  # [B, S, Hk, D] -> [B, Hk, S', D']
        return masks.pad_axis(masks.pad_axis(jnp.swapaxes(x, 1, 2), 2, blocks.kv), 3, LANES)

    def row(x: Any, block: int) -> jax.Array:  # [..., N] -> [..., 8, N'], the same in every sublane
        x = masks.pad_axis(x, x.ndim - 1, block)
        return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], 8, x.shape[-1]))

    def column(x: Any, block: int) -> jax.Array:  # [..., N] -> [..., N', 128], the same in every lane
        x = masks.pad_axis(x, x.ndim - 1, block)
        return jnp.broadcast_to(x[..., None], (*x.shape, LANES))

    stats = masks.pad_axis(stats, 2, 8)
    inputs = {
        "q": queries(operands.q),
        "do": queries(do),
        "k": keys(operands.k),
        "v": keys(operands.v),
        "stats": stats.reshape(stats.shape[0], k_heads, plan.group, *stats.shape[2:]),
    }
    for name in ("bias", "mask"):
        x = getattr(operands, name)
        if x is None:
            continue
        x = x.astype(jnp.int32) if name == "mask" and 1 in x.shape[2:] else x
        x = x.astype(jnp.int8) if x.dtype == bool else x
        if x.shape[2] == 1:
            x = jnp.broadcast_to(x, (*x.shape[:3], operands.k.shape[1]))
            inputs[f"{name}_column"] = column(x[:, :, 0], blocks.kv)
        elif x.shape[3] == 1 and name == "mask":  # a bias [T, 1] is that of a single key
            inputs[f"{name}_row"] = row(x[..., 0], q_block)
        else:
            inputs[f"{name}_tile"] = masks.pad_axis(masks.pad_axis(x, 2, q_block), 3, blocks.kv)
    if masks.positional(config) and (operands.q_positions is not None or operands.kv_positions is not None):
        q_positions, kv_positions = (jnp.asarray(x, jnp.int32) for x in masks.positions(operands))
        inputs |= {"q_positions": row(q_positions, q_block), "kv_positions": column(kv_positions, blocks.kv)}
    if operands.q_segments is not None:
        inputs["q_segments"] = row(operands.q_segments, q_block)
        inputs["kv_segments"] = column(operands.kv_segments, blocks.kv)
    return inputs


# --- The call. --------------------------------------------------------------------------------------------------------


def _call(
    config: Config,
    operands: Operands,
    plan: _Plan,
    inputs: dict[str, jax.Array],
    interpret: Any,
    order: jax.Array,
    count: jax.Array,
    kinds: jax.Array,
    offset: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One chunk: dq [B, Hk, heads, queries, D] in float32, and its share of dk and dv [B, Hk, S', D]."""
    from jax.experimental.pallas import tpu as pltpu

    blocks, rows = plan.blocks, plan.rows
    B, k_heads, S, D = inputs["k"].shape
    v_dim = inputs["v"].shape[3]
    columns = S // blocks.kv
    scalars = [order, count, kinds, offset]
    if config.dropout:
        scalars.append(operands.dropout_keys.reshape(-1))
    whole = plan.chunks == 1
    dtype = operands.q.dtype if whole else jnp.float32
    key_block = lambda width: pl.BlockSpec((None, None, blocks.kv, width), lambda b, h, j, g, p, *_: (b, h, j, 0))  # noqa: E731
    moved = sum(x.size * x.dtype.itemsize for x in inputs.values())
    moved += sum(inputs[name].size // plan.chunks * 4 for name in ("q", "k", "v"))
    pairs = B * k_heads * plan.heads * rows * blocks.q * S
    return pl.pallas_call(
        partial(
            _kernel,
            config=config,
            plan=plan,
            names=tuple(inputs),
            length=operands.k.shape[1] if operands.k.shape[1] % blocks.kv else None,
        ),
        out_shape=(
            dispatch.output((B, k_heads, plan.heads, rows * blocks.q, D), jnp.float32),
            dispatch.output((B, k_heads, S, D), dtype),
            dispatch.output((B, k_heads, S, v_dim), dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, k_heads, columns, plan.heads, rows),
            in_specs=_specs(plan, inputs, columns),
            out_specs=(
                pl.BlockSpec((None, None, plan.heads, rows * blocks.q, D), lambda b, h, *_: (b, h, 0, 0, 0)),
                key_block(D),
                key_block(v_dim),
            ),
            scratch_shapes=[pltpu.VMEM((blocks.kv, D), jnp.float32), pltpu.VMEM((blocks.kv, v_dim), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (3 * D + 2 * v_dim), transcendentals=pairs, bytes_accessed=moved
        ),
        interpret=interpret,
        name="attention_backward",
    )(*scalars, *inputs.values())


def _specs(plan: _Plan, inputs: dict[str, jax.Array], columns: int) -> list[pl.BlockSpec]:
    """Where a step (b, h, j, g, p) finds its block of each input."""
    blocks = plan.blocks

    def row(b: Any, j: Any, p: Any, order: Any, offset: Any) -> Any:
        return offset[1] + order[((0 if plan.shared else b) * columns + j) * plan.rows + p]

    def queries(x: jax.Array, block: tuple, at_row: int) -> pl.BlockSpec:  # [B, Hk, G, ...], blocked along one axis
        def index(b: Any, h: Any, j: Any, g: Any, p: Any, order: Any, count: Any, kinds: Any, offset: Any, *_: Any):
            at = [b, h, offset[0] + g, 0, 0]
            at[at_row] = row(b, j, p, order, offset)
            return tuple(at)

        return pl.BlockSpec((None, None, None, *block), index)

    def side(x: jax.Array, block: tuple, along: tuple) -> pl.BlockSpec:  # [B?, ...]; along: which index of each axis
        def index(b: Any, h: Any, j: Any, g: Any, p: Any, order: Any, count: Any, kinds: Any, offset: Any, *_: Any):
            head = h * plan.group + offset[0] + g
            places = {"head": head, "row": row(b, j, p, order, offset), "column": j, "": 0}
            return (b if x.shape[0] > 1 else 0, *(places[name] for name in along))

        return pl.BlockSpec(block, index)

    specs = []
    for name, x in inputs.items():
        heads = "head" if x.ndim > 3 and x.shape[1] > 1 else ""
        if name in ("q", "do"):
            specs.append(queries(x, (blocks.q, x.shape[4]), 3))
        elif name == "stats":
            specs.append(queries(x, (8, blocks.q), 4))
        elif name in ("k", "v"):
            specs.append(pl.BlockSpec((None, None, blocks.kv, x.shape[3]), lambda b, h, j, g, p, *_: (b, h, j, 0)))
        elif name.endswith("_tile"):
            specs.append(side(x, (None, None, blocks.q, blocks.kv), (heads, "row", "column")))
        elif name.endswith("_row"):
            specs.append(side(x, (None, None, 8, blocks.q), (heads, "", "row")))
        elif name.endswith("_column"):
            specs.append(side(x, (None, None, blocks.kv, LANES), (heads, "column", "")))
        elif name.startswith("q_"):
            specs.append(side(x, (None, 8, blocks.q), ("", "row")))
        else:
            specs.append(side(x, (None, blocks.kv, LANES), ("column", "")))
    return specs


# --- The kernel. ------------------------------------------------------------------------------------------------------


def _kernel(
    order: Any,
    count: Any,
    kinds: Any,
    offset: Any,
    *refs: Any,
    config: Config,
    plan: _Plan,
    names: tuple[str, ...],
    length: int | None,
) -> None:
    keys, *refs = refs if config.dropout else (None, *refs)
    inputs = dict(zip(names, refs, strict=False))
    dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs[len(names) :]
    b, h, j, g, p = (pl.program_id(axis) for axis in range(5))
    columns = pl.num_programs(2)
    line = (0 if plan.shared else b) * columns + j
    row = order[line * plan.rows + p]
    live = p < count[line]
    code = kinds[line * plan.rows + row]
    kind, first = lax.rem(code, jnp.int32(_FIRST)), code >= _FIRST
    place = _Place(j, h * plan.group + offset[0] + g, offset[1] + row, keys, b, pl.num_programs(1) * plan.group)
    blocks = plan.blocks
    tile = _tile_queries(blocks)
    tiles = blocks.q // tile
    together = 2 if tiles % 2 == 0 else 1

    def step(n: Any, hidden: bool) -> None:
        at = [pl.multiple_of(n + k * tile, tile) if tiles > together else k * tile for k in range(together)]
        following = _products(inputs, at[0], tile)
        for k in range(together):
            now = following
            # Before the exponentials of this tile, so that the matrix units have work meanwhile.
            following = _products(inputs, at[k + 1], tile) if k + 1 < together else None
            start = (g == 0) & (p == 0) & (n == 0) if k == 0 else None
            weights, ds = _weights(config, inputs, place, now, at[k], tile, blocks, length if hidden else None, hidden)
            _sum(inputs, weights, ds, at[k], tile, row * blocks.q, g, first, start, (dq_ref, dk_sum, dv_sum))

    def block(hidden: bool) -> None:
        if tiles == together:
            step(0, hidden)
        else:
            lax.fori_loop(0, tiles // together, lambda n, _: (step(n * (together * tile), hidden), 0)[1], 0)

    if plan.hides:
        pl.when(live & (kind == masks.PARTIAL))(lambda: block(True))
        pl.when(live & (kind == masks.FULL))(lambda: block(False))
    else:
        block(False)

    @pl.when((g == pl.num_programs(3) - 1) & (p == plan.rows - 1))
    def _() -> None:
        gain = dropout.gain(config.dropout) if config.dropout else 1.0
        dk, dv = dk_sum[...] * config.scale, dv_sum[...] * gain
        if plan.hides:  # a key block that no query sees has summed nothing
            dk, dv = (jnp.where(count[line] > 0, x, 0.0) for x in (dk, dv))
        dk_ref[...] = dk.astype(dk_ref.dtype)
        dv_ref[...] = dv.astype(dv_ref.dtype)


class _Place(NamedTuple):
    """Where a block of scores lies."""

    column: Any
    head: Any
    row: Any
    keys: Any  # of dropout, in scalar memory
    batch: Any
    heads: Any


def _tile_queries(blocks: BlockSizes) -> int:
    """Queries of one step of the arithmetic; its keys are the whole block."""
    return math.gcd(blocks.q, blocks.compute)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _products(inputs: dict[str, Any], at: Any, tile: int) -> tuple[jax.Array, jax.Array]:
    """k q^T and v do^T, [bk, tile]."""
    span = pl.ds(at, tile)
    s = _dot(inputs["k"][...], inputs["q"][span, :], (1, 1))
    return s, _dot(inputs["v"][...], inputs["do"][span, :], (1, 1))


def _weights(
    config: Config,
    inputs: dict[str, Any],
    place: _Place,
    products: tuple,
    at: Any,
    tile: int,
    blocks: BlockSizes,
    length: int | None,
    hidden: bool,
) -> tuple[jax.Array, jax.Array]:
    """The weights that dv sums, without the gain of dropout, and the cotangent of the scores, [bk, tile]."""
    span = pl.ds(at, tile)
    bias = None
    if "bias_tile" in inputs:
        bias = inputs["bias_tile"][span, :].astype(jnp.float32).T
    elif "bias_column" in inputs:
        bias = widen(inputs["bias_column"][...].astype(jnp.float32), tile)
    unit = unit_of(bias)
    s, dp = products
    s = scores(config, s, bias)
    p = power(s - inputs["stats"][0:1, span], unit)
    if hidden:
        p = jnp.where(_seen(config, inputs, place, at, tile, blocks, length), p, 0.0)
    weights = p
    if config.dropout:
        kept = _kept(config, place, at, (blocks.kv, tile), blocks)
        weights = jnp.where(kept, p, 0.0)
        dp = jnp.where(kept, dropout.gain(config.dropout) * dp, 0.0)
    ds = p * (dp - inputs["stats"][1:2, span])
    if config.soft_cap is not None:
        ds = ds * (1 - jnp.square(s * (1 / (config.soft_cap * unit))))
    return weights, ds


def _sum(
    inputs: dict[str, Any],
    weights: jax.Array,
    ds: jax.Array,
    at: Any,
    tile: int,
    row: Any,
    g: Any,
    first: Any,
    start: Any,
    refs: tuple,
) -> None:
    """Add a tile's share to dq, dk and dv. Sums that begin select 0, so that nothing has to be cleared before."""
    dq_ref, dk_sum, dv_sum = refs
    q, do = inputs["q"][pl.ds(at, tile), :], inputs["do"][pl.ds(at, tile), :]
    ds, weights = ds.astype(q.dtype), weights.astype(q.dtype)
    for ref, share in ((dv_sum, _dot(weights, do, (1, 0))), (dk_sum, _dot(ds, q, (1, 0)))):
        before = ref[...] if start is None else jnp.where(start, 0.0, ref[...])
        ref[...] = before + share
    span = pl.ds(pl.multiple_of(row + at, tile), tile)
    dq = _dot(ds, inputs["k"][...], (0, 0))
    dq_ref[g, span, :] = jnp.where(first, 0.0, dq_ref[g, span, :]) + dq


def _seen(
    config: Config, inputs: dict[str, Any], place: _Place, at: Any, tile: int, blocks: BlockSizes, length: int | None
) -> jax.Array:
    """What of a tile [bk, tile] is seen."""
    shape = (blocks.kv, tile)
    columns = lax.broadcasted_iota(jnp.int32, shape, 0) + place.column * blocks.kv

    def row(name: str) -> Any:
        return inputs[name][:1, pl.ds(at, tile)] if name in inputs else None

    def column(name: str) -> Any:
        return widen(inputs[name][...], tile) if name in inputs else None

    q_positions, kv_positions = row("q_positions"), column("kv_positions")
    if q_positions is None and masks.positional(config):
        q_positions = lax.broadcasted_iota(jnp.int32, shape, 1) + (place.row * blocks.q + at)
        kv_positions = columns
    mask = None
    if "mask_tile" in inputs:
        mask = inputs["mask_tile"][pl.ds(at, tile), :].astype(jnp.float32).T != 0
    elif "mask_row" in inputs or "mask_column" in inputs:
        mask = (row("mask_row") if "mask_row" in inputs else column("mask_column")) != 0
    seen = masks.visible(config, q_positions, kv_positions, row("q_segments"), column("kv_segments"), mask)
    if length is not None:
        inside = columns < length
        seen = inside if seen is None else seen & inside
    return jnp.broadcast_to(seen, shape)


def _kept(config: Config, place: _Place, at: Any, shape: tuple[int, int], blocks: BlockSizes) -> jax.Array:
    """What dropout keeps of a tile [bk, tile]."""
    key = 2 * (place.batch * place.heads + place.head)
    return dropout.tile(
        place.keys[key],
        place.keys[key + 1],
        place.row * blocks.q + at,
        place.column * blocks.kv,
        shape[::-1],
        config.dropout,
        aligned=blocks.kv % dropout.SPAN == 0,
        keys_first=True,
    )
