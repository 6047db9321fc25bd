"""Attention in plain XLA: chunked, memory linear in T and S, a backward pass by recomputation.

One row of blocks, for one head, is written once as two-dimensional arithmetic. A CPU walks the rows one after the
other (batched products are slow there, and a row ends at its last visible block); an accelerator takes all heads of a
row at once, by vmap.

Notation as in FlashAttention-2 (Dao 2023): s scores, m running maximum, l normaliser, p = exp(s - lse), delta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas._attention import dropout, masks
from kernels_pallas._attention.config import Config, Operands, accumulator, precision

# Queries and keys a tile. A CPU divides the products and the exponentials of a tile of this size over its cores, and
# the tile stays in their caches; smaller tiles run on one core, larger ones wait for memory.
_BLOCKS = (1024, 512)
# Rows of a multiple of so many queries may be cut in two; the halves of others would be small or uneven.
_HALVED = 512


def forward(config: Config, operands: Operands, *, sequential: bool) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, Hq, Dv] and log-sum-exp [B, Hq, T]; `sequential` walks heads and rows one by one."""
    dtype, T = operands.q.dtype, operands.q.shape[1]
    config, operands = _scaled(config, operands, sequential)
    blocks = _prepare(config, operands, sequential)

    def row(at: _Place, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _forward_row(config, at, i, dtype)

    if sequential:
        o, lse = _walk(blocks, row)
    else:
        o, lse = jax.lax.map(
            lambda i: _over_heads(blocks, lambda at: row(at, i)), jnp.arange(blocks.rows, dtype=jnp.int32)
        )
        o, lse = jnp.moveaxis(o, 0, 2), jnp.moveaxis(lse, 0, 2)
    B, H = o.shape[:2]
    o = o.reshape(B, H, -1, o.shape[-1])[:, :, :T]
    return jnp.swapaxes(o, 1, 2), lse.reshape(B, H, -1)[:, :, :T]


def backward(
    config: Config,
    operands: Operands,
    o: jax.Array,
    lse: jax.Array,
    o_cotangent: jax.Array,
    lse_cotangent: jax.Array,
    *,
    sequential: bool,
) -> tuple[jax.Array, ...]:
    """Cotangents of q, k and v, and of the bias where `config.bias_gradient` says so.

    With delta = rowsum(do o) - dlse: dv = p^T do, ds = p (do v^T - delta), through the cap ds (1 - (s / cap)^2),
    dbias = ds, dq = scale ds k, dk = scale ds^T q. Dropout takes entries of p and of do v^T alike. Query heads that
    share a key head, and all that shares a bias, add up in the accumulator's dtype.
    """
    acc = accumulator(operands.q.dtype)
    dtype, scale = operands.q.dtype, config.scale
    T, S = operands.q.shape[1], operands.k.shape[1]
    config, blocks = _prepare_backward(config, operands, o, lse, o_cotangent, lse_cotangent, sequential)
    k_heads = operands.k.shape[2]
    zeros = tuple(jnp.zeros(x.shape[:2] + (blocks.columns * x.shape[3], x.shape[4]), acc) for x in (blocks.k, blocks.v))
    bias: tuple = ()
    if sequential:
        if config.bias_gradient:
            zeros = (*zeros, jnp.zeros(blocks.bias.shape, acc))
        dq, (dk, dv, *bias) = _walk(blocks, partial(_backward_row, config), zeros)
    else:

        def head(at: _Place) -> tuple:
            start = tuple(jnp.zeros(z.shape[2:], acc) for z in zeros)
            (dk, dv), dq = jax.lax.scan(
                lambda sums, i: _backward_row(config, at, i, sums)[::-1],
                start,
                jnp.arange(blocks.rows, dtype=jnp.int32),
            )
            return dq, dk, dv

        dq, dk, dv = _over_heads(blocks, head)
        dk = config.scale * dk
        dk, dv = (x.reshape(x.shape[0], k_heads, -1, *x.shape[2:]).sum(2) for x in (dk, dv))
        if config.bias_gradient:
            bias = (_bias_tiles(config, blocks),)
    dq = scale * dq.reshape(*dq.shape[:2], -1, dq.shape[-1])
    if config.dropout:
        dv = dropout.gain(config.dropout) * dv
    grads = (jnp.swapaxes(x, 1, 2).astype(dtype) for x in (dq[:, :, :T], dk[:, :, :S], dv[:, :, :S]))
    return (*grads, *(_cut(x, operands.bias) for x in bias))


def bias_gradient(
    config: Config, operands: Operands, o: jax.Array, lse: jax.Array, o_cotangent: jax.Array, lse_cotangent: jax.Array
) -> jax.Array:
    """Cotangent of the bias alone, for an accelerator whose kernel gives those of q, k and v."""
    config, blocks = _prepare_backward(config, operands, o, lse, o_cotangent, lse_cotangent, sequential=False)
    return _cut(_bias_tiles(config, blocks), operands.bias)


def _prepare_backward(
    config: Config,
    operands: Operands,
    o: jax.Array,
    lse: jax.Array,
    o_cotangent: jax.Array,
    lse_cotangent: jax.Array,
    sequential: bool,
) -> tuple[Config, _Blocks]:
    acc = accumulator(operands.q.dtype)
    config, operands = _scaled(config, operands, sequential)
    sees = lse != -jnp.inf
    delta = jnp.swapaxes(jnp.sum(o_cotangent.astype(acc) * o.astype(acc), axis=-1), 1, 2)
    # A row that sees nothing has no gradient, whatever its cotangents are.
    delta = jnp.where(sees, delta - lse_cotangent, 0)
    o_cotangent = jnp.where(jnp.swapaxes(sees, 1, 2)[..., None], o_cotangent, 0)
    # Weights are exp(s - lse): those of queries that see nothing are 0 by this, whatever the bias.
    return config, _prepare(config, operands, sequential, o_cotangent, jnp.where(sees, lse, jnp.inf), delta)


def _cut(x: jax.Array, like: jax.Array) -> jax.Array:
    """Without the padding of whole blocks, in the dtype of the bias."""
    return x[:, :, : like.shape[2], : like.shape[3]].astype(like.dtype)


def _scaled(config: Config, operands: Operands, sequential: bool) -> tuple[Config, Operands]:
    """On a CPU, operands in the accumulator's dtype (it has no fast 16-bit products) and the scale taken into q."""
    if not sequential:
        return config, operands
    q, k, v = (x.astype(accumulator(x.dtype)) for x in operands[:3])
    return replace(config, scale=1.0), operands._replace(q=config.scale * q, k=k, v=v)


# --- Blocks and where they lie. ---------------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """Operands cut into blocks; heads before rows. Axes written B?, H?, T?, S? may be 1: shared."""

    q: jax.Array  # [B, H, rows, bq, D]
    k: jax.Array  # [B, Hk, columns, bk, D]
    v: jax.Array  # [B, Hk, columns, bk, Dv]
    bias: Any  # [B?, H?, T?, S]
    mask: Any  # [B?, H?, T?, S?]
    q_positions: Any  # [B?, 1, rows, bq]
    kv_positions: Any  # [B?, 1, columns, bk]
    q_segments: Any  # [B, 1, rows, bq]
    kv_segments: Any  # [B, 1, columns, bk]
    inside: Any  # [1, 1, columns, bk], False in the padding of the last block; None without padding
    # First block that a row sees, one past the run of blocks from there on that it sees whole, and one past the last
    # that it sees; int32 [B?, 1, rows], or None: nothing is hidden.
    first: Any
    whole: Any
    last: Any
    # Where it is known before the program runs that the upper half of the queries of a row ends earlier: one past the
    # last block that this half sees, int32 [B?, 1, rows]; else None.
    upper: Any
    o_cotangent: Any  # [B, H, rows, bq, Dv]; these three for the backward pass
    lse: Any  # [B, H, rows, bq]
    delta: Any  # [B, H, rows, bq]
    dropout_keys: Any  # [B, H, 2]

    @property
    def rows(self) -> int:
        return self.q.shape[2]

    @property
    def columns(self) -> int:
        return self.k.shape[2]


# What has one entry a query.
_OF_QUERIES = ("q", "q_positions", "q_segments", "o_cotangent", "lse", "delta")


class _Place(NamedTuple):
    """Blocks with the indices of one head in front, empty when vmap has taken these axes away.

    `lower`: only the lower half of a row's queries, those that come last, are looked at.
    """

    blocks: _Blocks
    q: tuple
    kv: tuple
    lower: bool = False

    @property
    def queries(self) -> tuple[int, int]:
        """The first query of a row that is looked at, and how many are."""
        bq = self.blocks.q.shape[-2]
        return (bq // 2, bq - bq // 2) if self.lower else (0, bq)

    def at(self, name: str, *index: Any) -> Any:
        """One block of the array of that name, None if it is not there."""
        x = getattr(self.blocks, name)
        if x is None:
            return None
        lead = self.kv if name in ("k", "v") else self.q
        lead = tuple(0 if size == 1 else i for i, size in zip(lead, x.shape, strict=False))
        sizes = (1,) * len(lead + index) + x.shape[len(lead + index) :]
        starts = lead + index + (0,) * (len(sizes) - len(lead + index))
        block = jax.lax.dynamic_slice(x, _index(starts), sizes).reshape(sizes[len(lead + index) :])
        return block[self.queries[0] :] if name in _OF_QUERIES else block

    def tile(self, name: str, i: Any, j: Any) -> Any:
        """The part of a bias or mask that belongs to block (i, j), [bq or 1, bk or 1]."""
        x = getattr(self.blocks, name)
        if x is None:
            return None
        starts, sizes = self._tile_of(x, i, j)
        return jax.lax.dynamic_slice(x, starts, sizes).reshape(sizes[-2:])

    def add_to_bias(self, total: jax.Array, i: Any, j: Any, share: jax.Array) -> jax.Array:
        """`total`, an array like the bias, with the share of block (i, j) added to its part."""
        starts, sizes = self._tile_of(total, i, j)
        if sizes[-2] == 1:
            share = jnp.sum(share, axis=0, keepdims=True)
        old = jax.lax.dynamic_slice(total, starts, sizes)
        return jax.lax.dynamic_update_slice(total, old + share.reshape(sizes), starts)

    def _tile_of(self, x: jax.Array, i: Any, j: Any) -> tuple[tuple, tuple]:
        """Where block (i, j) of a bias or mask starts, and its sizes; axes of 1 are shared."""
        lead = tuple(0 if size == 1 else n for n, size in zip(self.q, x.shape, strict=False))
        bq, bk = self.blocks.q.shape[-2], self.blocks.k.shape[-2]
        places = (i * bq + self.queries[0], j * bk)
        sizes = tuple(1 if size == 1 else span for size, span in zip(x.shape[-2:], (self.queries[1], bk), strict=True))
        starts = tuple(0 if size == 1 else place for size, place in zip(x.shape[-2:], places, strict=True))
        return _index(lead + starts), (1,) * len(lead) + sizes


def _index(starts: tuple) -> tuple:
    # Python's ints would become int64 beside traced int32 when x64 is on.
    return tuple(jnp.asarray(i, jnp.int32) for i in starts)


def _prepare(config: Config, operands: Operands, sequential: bool, *cotangents: jax.Array) -> _Blocks:
    T, S = operands.q.shape[1], operands.k.shape[1]
    wanted = _BLOCKS if config.blocks is None else (config.blocks.q, config.blocks.compute)
    bq, bk = (min(b, n) for b, n in zip(wanted, (T, S), strict=True))

    def heads(x: jax.Array, block: int) -> jax.Array:
        x = masks.pad_axis(jnp.swapaxes(x, 1, 2), 2, block)
        return x.reshape(*x.shape[:2], -1, block, x.shape[3])

    def line(x: Any, block: int, value: Any = 0) -> Any:
        if x is None:
            return None
        x = masks.pad_axis(jnp.asarray(x), x.ndim - 1, block, value=value)
        return x.reshape(x.shape[0], -1 if x.ndim == 3 else 1, x.shape[-1] // block, block)

    hidden = masks.masked(config, operands) or S % bk
    spans = _spans(masks.block_kinds(config, operands, bq, bk), sequential) if hidden else (None,) * 3
    upper = _upper(config, operands, bq, bk) if hidden and sequential else None
    inside = None
    if S % bk:
        inside = (jnp.arange(S + -S % bk) < S).reshape(1, 1, -1, bk)

    def tile(x: Any) -> Any:  # axes of 1 are shared
        for axis, block in ((2, bq), (3, bk)):
            x = x if x is None or x.shape[axis] == 1 else masks.pad_axis(x, axis, block)
        return x

    q_positions, kv_positions = masks.positions(operands) if masks.positional(config) else (None, None)
    back = [None] * 3
    if cotangents:
        back = [heads(cotangents[0], bq), line(cotangents[1], bq, jnp.inf), line(cotangents[2], bq)]
    return _Blocks(
        heads(operands.q, bq),
        heads(operands.k, bk),
        heads(operands.v, bk),
        tile(operands.bias),
        tile(operands.mask),
        line(q_positions, bq),
        line(kv_positions, bk),
        line(operands.q_segments, bq),
        line(operands.kv_segments, bk),
        inside,
        *spans,
        upper,
        *back,
        operands.dropout_keys,
    )


def _spans(kinds: Any, sequential: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`first`, `whole` and `last` of `_Blocks`, from the kinds of all blocks [B?, rows, columns]."""
    kinds = jnp.asarray(kinds)[:, None]
    live, full = kinds != masks.SKIP, kinds == masks.FULL
    if not sequential:  # heads taken together share the widest span
        live, full = jnp.any(live, axis=0, keepdims=True), jnp.all(full, axis=0, keepdims=True)
    columns = jnp.arange(live.shape[-1], dtype=jnp.int32)
    first = jnp.argmax(live, axis=-1).astype(jnp.int32)
    last = jnp.max(jnp.where(live, columns + 1, 0), axis=-1)
    whole = jnp.min(jnp.where((columns >= first[..., None]) & ~full, columns, columns.size), axis=-1)
    return first, whole, last


def _upper(config: Config, operands: Operands, bq: int, bk: int) -> jax.Array | None:
    """`upper` of `_Blocks`: under a causal mask, half of the work on the tiles of the diagonal would be thrown away."""
    kinds = masks.block_kinds(config, operands, bq // 2, bk) if bq % _HALVED == 0 else None
    if not isinstance(kinds, np.ndarray):
        return None
    ends = np.max(np.where(kinds != masks.SKIP, np.arange(1, kinds.shape[-1] + 1, dtype=np.int32), 0), axis=-1)
    upper, lower = ends[:, ::2], ends[:, 1::2]
    if not np.any(upper[:, : lower.shape[1]] < lower):
        return None
    return jnp.asarray(upper)[:, None]


# --- Two ways over the heads and rows. --------------------------------------------------------------------------------


def _walk(blocks: _Blocks, row: Callable, sums: tuple | None = None) -> Any:
    """`row(place, i)` for every head and row, one by one; results [B, H, rows, ...].

    With `sums`, arrays [B, Hk, ...], the row is `row(place, i, sums)` and also returns them with its share added.
    """
    B, H, rows = blocks.q.shape[:3]
    group = H // blocks.k.shape[1]

    def one(carry: Any, n: jax.Array) -> tuple[Any, Any]:
        b, h, i = n // (H * rows), n // rows % H, n % rows
        place = _Place(blocks, (b, h), (b, h // group))
        return (None, row(place, i)) if carry is None else row(place, i, carry)[::-1]

    sums, outs = jax.lax.scan(one, sums, jnp.arange(B * H * rows, dtype=jnp.int32))
    outs = jax.tree.map(lambda x: x.reshape(B, H, rows, *x.shape[1:]), outs)
    return outs if sums is None else (outs, sums)


def _over_heads(blocks: _Blocks, head: Callable[[_Place], Any]) -> Any:
    """`head(place)` for all heads at once, [B, H, ...]; axes that are shared stay so."""
    B, H = blocks.q.shape[:2]
    k_heads = blocks.k.shape[1]

    def split(x: Any) -> Any:  # [B?, H? or Hk, ...] -> [B?, Hk?, G?, ...]
        if x is None:
            return None
        if x.shape[1] == H:
            return x.reshape(x.shape[0], k_heads, -1, *x.shape[2:])
        return x[:, :, None]

    run = lambda b: head(_Place(b, (), ()))  # noqa: E731
    arrays = _Blocks(*map(split, blocks))
    for axis in (2, 1, 0):
        axes = _Blocks(*(None if x is None or x.shape[axis] == 1 else 0 for x in arrays))
        size = (B, k_heads, H // k_heads)[axis]
        run = partial(_vmapped, run, axes, size)
    out = run(arrays)
    return jax.tree.map(lambda x: x.reshape(B, H, *x.shape[3:]), out)


def _vmapped(run: Callable, axes: _Blocks, size: int, arrays: _Blocks) -> Any:
    arrays = _Blocks(*(x[0] if x is not None and axis is None else x for x, axis in zip(arrays, axes, strict=True)))
    if all(axis is None for axis in axes):  # of size 1
        return jax.tree.map(lambda x: x[None], run(arrays))
    return jax.vmap(run, in_axes=(axes,), axis_size=size)(arrays)


# --- One row of blocks of one head. -----------------------------------------------------------------------------------


def _forward_row(config: Config, at: _Place, i: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    bq, v_dim = at.queries[1], at.blocks.v.shape[-1]
    acc = accumulator(at.blocks.q.dtype)
    start = (jnp.full((bq,), -jnp.inf, acc), jnp.zeros((bq,), acc), jnp.zeros((bq, v_dim), acc))
    first, whole, upper, last = _span(at, i)
    carry = jax.lax.fori_loop(first, whole, _forward_step(config, at, i, whole=True), start)
    if at.blocks.first is not None:
        carry = jax.lax.fori_loop(whole, upper, _forward_step(config, at, i, whole=False), carry)
    if at.blocks.upper is not None:
        lower = at._replace(lower=True)
        rest = jax.lax.fori_loop(upper, last, _forward_step(config, lower, i, whole=False), _lower_half(lower, carry))
        carry = _with_lower_half(lower, carry, rest)
    m, l, o = carry
    sees = l != 0
    l = jnp.where(sees, l, 1)
    if config.dropout:
        o = dropout.gain(config.dropout) * o
    return (o / l[:, None]).astype(dtype), jnp.where(sees, m + jnp.log(l), -jnp.inf)


def _forward_step(config: Config, at: _Place, i: jax.Array, *, whole: bool) -> Callable:
    """Online softmax over one more tile: `step(j, (m, l, o))`."""
    q = at.at("q", i)  # [bq, D]

    def step(j: jax.Array, carry: tuple) -> tuple:
        m, l, o = carry
        s, seen = _scores(config, at, q, i, j, whole=whole)
        if seen is not None:
            s = jnp.where(seen, s, -jnp.inf)
        top = jnp.maximum(m, jnp.max(s, axis=1))
        # As long as a row has seen nothing its maximum is -inf, and -inf - -inf is NaN.
        safe = jnp.where(top == -jnp.inf, 0, top)
        p = jnp.exp(s - safe[:, None])
        shrink = jnp.exp(m - safe)
        v = at.at("v", j)
        l = shrink * l + jnp.sum(p, axis=1)
        if config.dropout:
            p = jnp.where(_kept(config, at, i, j), p, 0)
        return top, l, shrink[:, None] * o + _dot(p.astype(v.dtype), v, (1, 0))

    return step


def _lower_half(lower: _Place, arrays: tuple) -> tuple:
    return tuple(x[lower.queries[0] :] for x in arrays)


def _with_lower_half(lower: _Place, arrays: tuple, halves: tuple) -> tuple:
    return tuple(jnp.concatenate([x[: lower.queries[0]], half]) for x, half in zip(arrays, halves, strict=True))


def _backward_row(config: Config, at: _Place, i: jax.Array, sums: tuple) -> tuple[jax.Array, tuple]:
    acc = accumulator(at.blocks.q.dtype)
    start = jnp.zeros((at.queries[1], at.blocks.q.shape[-1]), acc)
    first, _, upper, last = _span(at, i)
    dq, *sums = jax.lax.fori_loop(first, upper, _backward_step(config, at, i), (start, *sums))
    if at.blocks.upper is not None:
        lower = at._replace(lower=True)
        (half,) = _lower_half(lower, (dq,))
        half, *sums = jax.lax.fori_loop(upper, last, _backward_step(config, lower, i), (half, *sums))
        (dq,) = _with_lower_half(lower, (dq,), (half,))
    return dq, tuple(sums)


def _backward_step(config: Config, at: _Place, i: jax.Array) -> Callable:
    """The shares of one more tile: `step(j, (dq, dk, dv, ...))`."""
    q, do, *_ = row = _row(at, i)
    bk = at.blocks.k.shape[-2]
    lead = at.kv

    def add(total: jax.Array, j: jax.Array, share: jax.Array) -> jax.Array:
        start = _index((*lead, j * bk, 0))
        shape = (1,) * len(lead) + share.shape
        old = jax.lax.dynamic_slice(total, start, shape)
        return jax.lax.dynamic_update_slice(total, old + share.reshape(shape), start)

    def step(j: jax.Array, carry: tuple) -> tuple:
        dq, dk, dv, *bias = carry
        weights, ds = _backward_tile(config, at, i, j, row)
        dv = add(dv, j, _dot(weights.astype(do.dtype), do, (0, 0)))
        bias = [at.add_to_bias(total, i, j, ds) for total in bias]
        ds = ds.astype(q.dtype)
        return dq + _dot(ds, at.at("k", j), (1, 0)), add(dk, j, _dot(ds, q, (0, 0))), dv, *bias

    return step


def _row(at: _Place, i: jax.Array) -> tuple[jax.Array, ...]:
    """What the backward pass knows of a row: q [bq, D], do [bq, Dv], lse and delta [bq, 1]."""
    return at.at("q", i), at.at("o_cotangent", i), at.at("lse", i)[:, None], at.at("delta", i)[:, None]


def _backward_tile(config: Config, at: _Place, i: jax.Array, j: jax.Array, row: tuple) -> tuple[jax.Array, jax.Array]:
    """Of one tile: the weights that dv sums, without the gain of dropout, and the cotangent of the scores."""
    q, do, lse, delta = row
    s, seen = _scores(config, at, q, i, j, whole=False)
    p = jnp.exp(s - lse)
    if seen is not None:
        p = jnp.where(seen, p, 0)
    dp = _dot(do, at.at("v", j), (1, 1))
    weights = p
    if config.dropout:
        kept = _kept(config, at, i, j)
        weights, dp = jnp.where(kept, p, 0), jnp.where(kept, dropout.gain(config.dropout) * dp, 0)
    ds = p * (dp - delta)
    if config.soft_cap is not None:
        ds = ds * (1 - jnp.square(s / config.soft_cap))
    return weights, ds


def _bias_tiles(config: Config, blocks: _Blocks) -> jax.Array:
    """The cotangent of the bias, tile by tile for all heads at once; padded to whole blocks, shared axes summed."""
    shared = tuple(axis for axis in range(3) if blocks.bias.shape[axis] == 1)
    columns = jnp.arange(blocks.columns, dtype=jnp.int32)

    def tile(i: jax.Array, j: jax.Array) -> jax.Array:
        def head(at: _Place) -> jax.Array:
            return _backward_tile(config, at, i, j, _row(at, i))[1]

        return jnp.sum(_over_heads(blocks, head), axis=shared, keepdims=True)  # [B?, H?, bq or 1, bk]

    def row(i: jax.Array) -> jax.Array:
        tiles = jnp.moveaxis(jax.lax.map(lambda j: tile(i, j), columns), 0, 3)
        return tiles.reshape(*tiles.shape[:3], -1)  # [B?, H?, bq or 1, S]

    rows = jnp.arange(blocks.rows, dtype=jnp.int32)
    if 2 in shared:
        start = jnp.zeros(blocks.bias.shape, accumulator(blocks.q.dtype))
        return jax.lax.scan(lambda total, i: (total + row(i), None), start, rows)[0]
    return jnp.moveaxis(jax.lax.map(row, rows), 0, 2).reshape(blocks.bias.shape)


def _span(at: _Place, i: jax.Array) -> tuple[Any, Any, Any, Any]:
    """`first`, `whole`, `upper` and `last` of row i; everything is whole where nothing is hidden."""
    if at.blocks.first is None:
        end = np.int32(at.blocks.k.shape[-3])
        return np.int32(0), end, end, end
    first, whole, last = (at.at(name, i) for name in ("first", "whole", "last"))
    # Blocks that both halves see whole come before any that only one of them sees.
    return first, whole, last if at.blocks.upper is None else jnp.clip(at.at("upper", i), whole, last), last


def _scores(
    config: Config, at: _Place, q: jax.Array, i: jax.Array, j: jax.Array, *, whole: bool
) -> tuple[jax.Array, Any]:
    """Scores [bq, bk] of one tile before hiding, and what of it is seen (None: all, as in `whole` tiles)."""
    s = _dot(q, at.at("k", j), (1, 1))
    if config.scale != 1:
        s = config.scale * s
    bias = at.tile("bias", i, j)
    if bias is not None:
        s = s + bias.astype(s.dtype)
    if config.soft_cap is not None:
        s = config.soft_cap * jnp.tanh(s / config.soft_cap)
    if whole:
        return s, None
    column = lambda name: None if (x := at.at(name, i)) is None else x[:, None]  # noqa: E731
    line = lambda name: None if (x := at.at(name, j)) is None else x[None]  # noqa: E731
    seen = masks.visible(
        config,
        column("q_positions"),
        line("kv_positions"),
        column("q_segments"),
        line("kv_segments"),
        at.tile("mask", i, j),
    )
    inside = line("inside")
    if inside is not None:
        seen = inside if seen is None else seen & inside
    return s, seen


def _kept(config: Config, at: _Place, i: jax.Array, j: jax.Array) -> jax.Array:
    """What dropout keeps of one tile [bq, bk]."""
    keys = at.at("dropout_keys")
    bq, bk = at.blocks.q.shape[-2], at.blocks.k.shape[-2]
    first, count = at.queries
    wide = bk + -bk % dropout.LANES
    aligned = bk % dropout.SPAN == 0 or at.blocks.columns == 1
    place = (i * bq + first, j * bk, (count, wide))
    return dropout.tile(keys[0], keys[1], *place, config.dropout, aligned=aligned)[:, :bk]


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    acc = accumulator(a.dtype)
    return jax.lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=acc)
