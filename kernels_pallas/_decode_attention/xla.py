"""Decode attention in plain XLA: for each row and key head, online softmax over the blocks that the row needs.

One part of the cache of one key head is written once as two-dimensional arithmetic, for it is read in place: the loop
runs from the first live block to the last, so that its cost depends on the length and not on the capacity. A CPU walks
rows and heads one after the other; an accelerator takes all of them, and the parts, at once, by vmap.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas._decode_attention.config import (
    Config,
    Operands,
    accumulator,
    capacity,
    live,
    merge,
    precision,
    reach,
    visible,
)

# Keys a block, about.
_BLOCK = 512


def forward(config: Config, operands: Operands, *, sequential: bool) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, Hq, Dv] and log-sum-exp [B, Hq, T]; `sequential` walks rows and heads one by one."""
    q, sinks = operands.q, operands.sinks
    B, T, H, D = q.shape
    k_heads, v_dim = operands.v.shape[-2:]
    grouped = jnp.swapaxes(q, 1, 2).reshape(B, k_heads, -1, D)  # rows: query head by query head, T of each
    block = _block(operands)
    first, count = live(config, operands, block)
    splits = 1 if sequential else (config.splits or 1)
    share = -(-count // splits)

    def part(b: Any, h: Any, i: Any) -> tuple[jax.Array, jax.Array]:
        start = first[b] + i * share[b]
        end = jnp.minimum(start + share[b], first[b] + count[b])
        return _part(config, operands, grouped[b, h], b, h, start, end, block, widen=sequential)

    rows, heads, parts = (jnp.arange(n, dtype=jnp.int32) for n in (B, k_heads, splits))
    if sequential:
        walk = jnp.arange(B * k_heads, dtype=jnp.int32)
        o, lse = jax.lax.map(lambda n: part(n // k_heads, n % k_heads, 0), walk)
    else:
        over_heads = jax.vmap(part, in_axes=(None, 0, None))
        over_parts = jax.vmap(over_heads, in_axes=(None, None, 0))
        o, lse = jax.vmap(over_parts, in_axes=(0, None, None))(rows, heads, parts)
    o, lse = merge(o.reshape(B, splits, H, T, v_dim), lse.reshape(B, splits, H, T), sinks)
    return jnp.swapaxes(o, 1, 2).astype(q.dtype), lse


def _block(operands: Operands) -> int:
    """Keys a block: whole pages of a cache in pages."""
    if operands.table is None:
        return min(_BLOCK, operands.k.shape[1])
    N, page = operands.table.shape[1], operands.k.shape[2]
    return page * min(max(_BLOCK // page, 1), N)


def _part(
    config: Config, operands: Operands, q: jax.Array, b: Any, h: Any, start: Any, end: Any, block: int, *, widen: bool
) -> tuple[jax.Array, jax.Array]:
    """Normalised output [R, Dv] and lse [R] of the queries [R, D] of one key head, over blocks start <= j < end."""
    acc = accumulator(q.dtype)
    # A CPU has no fast 16-bit products.
    dtype = acc if widen else q.dtype
    q = q.astype(dtype)
    T = operands.q.shape[1]
    R, v_dim = q.shape[0], operands.v.shape[-1]
    places = operands.length[b] - T + jnp.arange(R, dtype=jnp.int32) % T
    low, stop = (x[b] for x in reach(config, operands))
    dot = partial(jnp.matmul, precision=precision(dtype), preferred_element_type=acc)

    def step(j: jax.Array, carry: tuple) -> tuple:
        m, l, o = carry
        # A block that would leave the cache starts earlier instead, and hides what the last one has seen.
        at = jnp.minimum(j * block, capacity(operands) - block)
        k, k_scale = _read(operands, operands.k, operands.k_scale, b, h, at, block)
        v, v_scale = _read(operands, operands.v, operands.v_scale, b, h, at, block)
        positions = at + jnp.arange(block, dtype=jnp.int32)
        reached = (positions >= jnp.maximum(low, j * block)) & (positions < stop)
        # What no query sees may be NaN, and 0 NaN is NaN.
        v = jnp.where(reached[:, None], v, 0).astype(dtype)
        s = dot(q, k.astype(dtype).T)  # [R, block]
        if k_scale is not None:
            s = s * k_scale.astype(acc)
        s = config.scale * s
        if config.soft_cap is not None:
            s = config.soft_cap * jnp.tanh(s / config.soft_cap)
        s = jnp.where(visible(config, positions, places[:, None]) & reached, s, -jnp.inf)
        top = jnp.maximum(m, jnp.max(s, axis=1))
        # As long as a query has seen nothing its maximum is -inf, and -inf - -inf is NaN.
        safe = jnp.where(top == -jnp.inf, 0, top)
        p = jnp.exp(s - safe[:, None])
        shrink = jnp.exp(m - safe)
        l = shrink * l + jnp.sum(p, axis=1)
        if v_scale is not None:
            p = p * jnp.where(reached, v_scale, 0).astype(acc)
        return top, l, shrink[:, None] * o + dot(p.astype(dtype), v)

    zero = (jnp.full((R,), -jnp.inf, acc), jnp.zeros((R,), acc), jnp.zeros((R, v_dim), acc))
    m, l, o = jax.lax.fori_loop(start, end, step, zero)
    sees = l != 0
    l = jnp.where(sees, l, 1)
    return o / l[:, None], jnp.where(sees, m + jnp.log(l), -jnp.inf)


def _read(operands: Operands, x: jax.Array, scale: Any, b: Any, h: Any, at: Any, block: int) -> tuple[jax.Array, Any]:
    """Keys or values [block, D] of one head from position `at` on, and their scales [block] or None."""

    def take(y: jax.Array) -> jax.Array:
        g = b if y.shape[0] > 1 else 0
        if operands.table is not None:
            page = y.shape[2]
            pages = jax.lax.dynamic_slice(operands.table, _index(b, at // page), (1, block // page))[0]
            # Entries that a row does not reach may name no page.
            return y[g, jnp.clip(pages, 0, y.shape[1] - 1), :, h]
        rest = y.shape[3:]
        return jax.lax.dynamic_slice(y, _index(g, at, h, *(0,) * len(rest)), (1, block, 1, *rest))

    return take(x).reshape(block, x.shape[-1]), None if scale is None else take(scale).reshape(block)


def _index(*starts: Any) -> tuple:
    # Python's ints would become int64 beside traced int32 when x64 is on.
    return tuple(jnp.asarray(i, jnp.int32) for i in starts)
