"""Decode attention on TPU: a Pallas Mosaic kernel.

Grid (row, part of its cache, step): the steps run in order and carry the statistics in VMEM. A step fetches a block of
keys and values with all their heads, as they lie in memory: [keys x heads, D], head after head. One product gives the
scores of every query head with every key head, and those of foreign heads are hidden. That wastes no time: decoding
waits for memory, and what the matrix unit loads are the keys, once, however many rows of queries it multiplies them
with.

How many blocks a row needs comes in as scalars. The last axis of the grid is as long as the longest row needs, which is
known when the kernel starts, not when it is compiled; a step that its row does not need points at the block already
there, so it moves nothing and computes nothing. A cache in pages is read several pages a step, each an input of its
own, so that the pipeline fetches them at once; which page comes next is looked up in a table of scalars.

Notation: s scores in base 2 (premultiplied by log2 e, so that exp2 replaces exp), m running maximum, l normaliser, acc
the output before division. m and l are kept once a lane, [R, 128]: a column would be relaid out at every use.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import dispatch
from kernels_pallas._decode_attention.config import Config, Operands, live, merge, precision, reach
from kernels_pallas._decode_attention.tiles import LANES, Tiles, tpu_tiles

_LOG2E = 1.4426950408889634


def forward(
    config: Config, operands: Operands, *, tiles: Tiles | None = None, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, Hq, Dv] and log-sum-exp [B, Hq, T].

    Args:
      config: static part of the call.
      operands: arrays of the call.
      tiles: what a step reads; chosen by the sizes if None.
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    # With x64 on, Python's ints in index maps would be 64 bits wide, which the compiler does not take.
    with jax.enable_x64(False):
        o, lse = _parts(config, operands, tiles or tpu_tiles(operands), interpret)
        o, lse = merge(o, lse, operands.sinks)
    return jnp.swapaxes(o, 1, 2).astype(operands.q.dtype), lse


def _parts(config: Config, operands: Operands, tiles: Tiles, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """Normalised outputs [B, splits, Hq, T, Dv] and lse [B, splits, Hq, T] of the parts, float32."""
    from jax.experimental.pallas import tpu as pltpu

    B, T, H, D = operands.q.shape
    k_heads, v_dim = operands.v.shape[-2:]
    splits = config.splits or (1 if B > 1 else 2)  # a TPU has one or two cores
    q, places = _queries(operands)
    rows = q.shape[1]
    scalars = _scalars(config, operands, tiles)
    steps = jnp.maximum(-(-jnp.max(scalars["count"]) // splits), 1)
    columns = np.zeros((8, tiles.rows), np.int32)
    columns[0], columns[1] = np.divmod(np.arange(tiles.rows), k_heads)
    inputs = {"q": [q], "places": [places], "columns": [jnp.asarray(columns)]}
    whole = lambda x: pl.BlockSpec(x.shape, lambda b, i, j, *_: (0, 0))  # noqa: E731
    specs = {
        "q": [pl.BlockSpec((None, rows, D), lambda b, i, j, *_: (b, 0, 0))],
        "places": [whole(places)],
        "columns": [whole(columns)],
    }
    for name in ("k", "v", "k_scale", "v_scale"):
        if getattr(operands, name) is not None:
            inputs[name], specs[name] = _cached(operands, name, tiles, splits)
    counts = [len(x) for x in inputs.values()]
    kernel = partial(
        _kernel,
        config=config,
        tiles=tiles,
        k_heads=k_heads,
        T=T,
        names=tuple(inputs),
        counts=counts,
        scalars=len(scalars),
        splits=splits,
    )
    flat = [x for xs in inputs.values() for x in xs]
    o, lse = pl.pallas_call(
        kernel,
        out_shape=(
            dispatch.output((B, splits, rows, v_dim), jnp.float32),
            dispatch.output((B, splits, rows, LANES), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, splits, steps),
            in_specs=[spec for of in specs.values() for spec in of],
            out_specs=(
                pl.BlockSpec((None, None, rows, v_dim), lambda b, i, j, *_: (b, i, 0, 0)),
                pl.BlockSpec((None, None, rows, LANES), lambda b, i, j, *_: (b, i, 0, 0)),
            ),
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, v_dim), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(*scalars.values(), *flat)
    o = o[:, :, : H * T].reshape(B, splits, H, T, v_dim)
    return o, lse[:, :, : H * T, 0].reshape(B, splits, H, T)


# --- What the kernel reads. -------------------------------------------------------------------------------------------


def _queries(operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Queries [B, rows, D], query head by query head, T of each; and for each row its key head and its t, [rows, 128].

    Rows that fill up whole tiles are queries of zeros, and are cut off again.
    """
    B, T, H, D = operands.q.shape
    group = H // operands.k.shape[-2]
    q = jnp.swapaxes(operands.q, 1, 2).reshape(B, H * T, D)
    rows = -(-H * T // 16) * 16
    r = np.arange(rows)
    places = np.zeros((rows, LANES), np.int32)
    places[:, 0] = np.where(r < H * T, r // (group * T), 0)
    places[:, 1] = r % T
    return jnp.pad(q, ((0, 0), (0, rows - H * T), (0, 0))), jnp.asarray(places)


def _cached(operands: Operands, name: str, tiles: Tiles, splits: int) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """An array of the cache once for every tile of a step, and what each of these fetches.

    Keys and values are seen as [rows or pages, keys x heads, D], scales as [rows or pages, heads, keys].
    """
    x, paged = getattr(operands, name), operands.table is not None
    pages = x.shape[1] if paged and x.shape[0] > 1 else 0
    shared = x.shape[0] == 1
    if paged:
        x = x.reshape(-1, *x.shape[2:])
    lanes = x.ndim == 3
    if lanes:
        x, block = jnp.swapaxes(x, 1, 2), (None, x.shape[2], tiles.keys)
    else:
        block = (None, tiles.keys * x.shape[2], x.shape[3])
        x = x.reshape(x.shape[0], -1, x.shape[3])

    def place(n: int, b: Any, i: Any, j: Any, *scalars: Any) -> tuple:
        _, _, _, first, count, holder, held, *table = scalars
        begin, blocks = _part(first[b], count[b], i, splits)
        live = blocks > 0
        row = jnp.where(live, b, holder[b])
        at = jnp.where(live, begin + jnp.minimum(j, blocks - 1), held[b])
        if paged:
            places = table[0].shape[0] // operands.table.shape[0]
            return table[0][row * places + at * tiles.many + n] + row * pages, 0, 0
        row = 0 if shared else row
        return (row, 0, at) if lanes else (row, at, 0)

    return [x] * tiles.many, [pl.BlockSpec(block, partial(place, n)) for n in range(tiles.many)]


def _scalars(config: Config, operands: Operands, tiles: Tiles) -> dict[str, jax.Array]:
    """What the grid knows before it starts, int32 [B] each; and the pages of all rows, flat."""
    B = operands.q.shape[0]
    low, stop = reach(config, operands)
    first, count = live(config, operands, tiles.keys * tiles.many)
    row = jnp.arange(B, dtype=jnp.int32)
    # Where a part without blocks points at: the last block of its row, or of the last row that had one.
    holder = lax.cummax(jnp.where(count > 0, row, 0))
    held = jnp.maximum(first + count - 1, 0)[holder]
    scalars = {
        "length": operands.length,
        "low": low,
        "stop": stop,
        "first": first,
        "count": count,
        "holder": holder,
        "held": held,
    }
    if operands.table is not None:
        scalars["table"] = _pages(operands, low, stop, tiles)
    return scalars


def _pages(operands: Operands, low: jax.Array, stop: jax.Array, tiles: Tiles) -> jax.Array:
    """Which page each place of each block fetches, flat; a place without a live page fetches that of a neighbour block.

    It is there already, or will be needed next.
    """
    N, many = operands.table.shape[1], tiles.many
    place = jnp.arange(-(-N // many) * many, dtype=jnp.int32)
    begin, end = (low // tiles.keys)[:, None], (-(-stop // tiles.keys) - 1)[:, None]
    near = jnp.where(place > end, place - many * (-(-(place - end) // many)), place)
    near = jnp.where(near < begin, near + many, near)
    near = jnp.clip(near, begin, jnp.maximum(end, begin))
    table = jnp.take_along_axis(operands.table, jnp.clip(near, 0, N - 1), axis=1)
    # Entries that a row does not reach may name no page; a row without tokens fetches whatever comes first.
    return jnp.clip(table, 0, operands.k.shape[1] - 1).reshape(-1)


def _part(first: Any, count: Any, i: Any, splits: int) -> tuple[Any, Any]:
    """First block of a part of a row, and how many it has."""
    share = lax.div(count + np.int32(splits - 1), np.int32(splits))
    return first + i * share, jnp.clip(count - i * share, 0, share)


# --- The kernel. ------------------------------------------------------------------------------------------------------


def _kernel(
    *refs: Any,
    config: Config,
    tiles: Tiles,
    k_heads: int,
    T: int,
    names: tuple[str, ...],
    counts: list[int],
    scalars: int,
    splits: int,
) -> None:
    length, low, stop, first, count = (ref[pl.program_id(0)] for ref in refs[:5])
    rest = iter(refs[scalars:])
    inputs = {name: [next(rest) for _ in range(n)] for name, n in zip(names, counts, strict=True)}
    o_ref, lse_ref, m_ref, l_ref, acc_ref = rest
    j = pl.program_id(2)
    begin, blocks = _part(first, count, pl.program_id(1), splits)
    at = (begin + j) * tiles.keys * tiles.many

    @pl.when(j == 0)
    def _() -> None:
        m_ref[...] = jnp.full(m_ref.shape, -jnp.inf, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    # Whether every query sees all keys of the block.
    end = at + tiles.keys * tiles.many
    whole = (end <= stop) & (end <= length - T + 1)
    if config.left is not None:
        whole = whole & (at >= length - 1 - config.left)

    def block(hidden: bool) -> None:
        v = jnp.concatenate([ref[...] for ref in inputs["v"]], axis=0)
        if hidden:
            # What no query sees may be NaN, and 0 NaN is NaN.
            row = lax.broadcasted_iota(jnp.int32, v.shape, 0)
            inside = (row >= (low - at) * k_heads) & (row < (stop - at) * k_heads)
            v = jnp.where(inside, v.astype(jnp.float32), 0.0)
        seen = _seen(config, inputs, k_heads, T, length, at, (low, stop) if hidden else None)
        _tile(config, inputs, k_heads, v, seen, m_ref, l_ref, acc_ref)

    pl.when((j < blocks) & whole)(lambda: block(False))
    pl.when((j < blocks) & ~whole)(lambda: block(True))

    @pl.when(j == pl.num_programs(2) - 1)
    def _() -> None:
        l = l_ref[...]
        sees = l != 0
        safe = jnp.where(sees, l, 1.0)
        o_ref[...] = acc_ref[...] / safe[:, :1]
        lse_ref[...] = jnp.where(sees, (m_ref[...] + jnp.log2(safe)) / _LOG2E, -jnp.inf)


def _seen(
    config: Config, inputs: dict[str, Any], k_heads: int, T: int, length: Any, at: Any, edges: tuple | None
) -> jax.Array | None:
    """What of the scores [R, keys x heads] is seen; None for all."""
    columns, places = inputs["columns"][0], inputs["places"][0]
    head, of_row = columns[1:2], places[:, :1]
    seen = None
    if edges is not None:
        low, stop = edges
        position = columns[0:1] + at
        inside = (position >= low) & (position < stop)
        if T > 1:  # a query alone sees just what its row reaches
            own = places[:, 1:2] + (length - T)
            seen = position <= own
            if config.left is not None:
                seen = seen & (position >= own - config.left)
        head = jnp.where(inside, head, -1)
    if k_heads > 1 or edges is not None:
        same = head == of_row
        seen = same if seen is None else seen & same
    return seen


def _tile(
    config: Config, inputs: dict[str, Any], k_heads: int, v: jax.Array, seen: Any, m_ref: Any, l_ref: Any, acc_ref: Any
) -> None:
    """One step of online softmax."""
    q = inputs["q"][0][...]
    k = jnp.concatenate([ref[...] for ref in inputs["k"]], axis=0).astype(q.dtype)
    # Contracting the last axes of both needs no transpose.
    s = lax.dot_general(
        q, k, (((1,), (1,)), ((), ())), precision=precision(q.dtype), preferred_element_type=jnp.float32
    )  # [R, keys x heads]
    if "k_scale" in inputs:
        s = s * _interleaved(inputs["k_scale"], k_heads)
    if config.soft_cap is not None:
        s = config.soft_cap * jnp.tanh(s * (config.scale / config.soft_cap)) * _LOG2E
    else:
        s = s * (config.scale * _LOG2E)
    if seen is not None:
        s = jnp.where(seen, s, -jnp.inf)
    m = m_ref[...]  # [R, 128]
    top = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
    # -inf - -inf is NaN: a row that has seen nothing yet shifts by 0.
    safe = jnp.where(top == -jnp.inf, 0.0, top) if seen is not None else top
    p = jnp.exp2(s - safe[:, :1])
    shrink = jnp.exp2(m - safe)
    m_ref[...] = top
    l_ref[...] = shrink * l_ref[...] + jnp.sum(p, axis=1, keepdims=True)
    if "v_scale" in inputs:
        p = p * _interleaved(inputs["v_scale"], k_heads)
        p = p if seen is None else jnp.where(seen, p, 0.0)  # scales that are not seen may be NaN too
    weighted = lax.dot_general(
        p.astype(q.dtype),
        v.astype(q.dtype),
        (((1,), (0,)), ((), ())),
        precision=precision(q.dtype),
        preferred_element_type=jnp.float32,
    )
    acc_ref[...] = shrink[:, :1] * acc_ref[...] + weighted


def _interleaved(refs: list[Any], k_heads: int) -> jax.Array:
    """Scales [heads, keys] in the order of the keys, head after head: [1, keys x heads]."""
    pieces = []
    for ref in refs:
        scales = ref[...].astype(jnp.float32)
        if k_heads == 1:
            pieces.append(scales)
            continue
        lane = lax.broadcasted_iota(jnp.int32, (k_heads, LANES), 1)
        own = lax.rem(lane, jnp.int32(k_heads)) == lax.broadcasted_iota(jnp.int32, (k_heads, LANES), 0)
        from_key = lax.div(lane, jnp.int32(k_heads))
        for start in range(0, ref.shape[1], LANES // k_heads):
            group = scales[:, start // LANES * LANES : start // LANES * LANES + LANES]
            spread = jnp.take_along_axis(group, from_key + start % LANES, axis=1, mode="promise_in_bounds")
            pieces.append(jnp.sum(jnp.where(own, spread, 0.0), axis=0, keepdims=True))
    return jnp.concatenate(pieces, axis=1)
