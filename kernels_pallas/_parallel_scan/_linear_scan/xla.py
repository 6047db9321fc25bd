"""The linear scan in plain XLA.

A CPU walks the tokens in order: one loop that reads a row of each array where it lies and writes a row in place, which
beats every scheme that doubles. The row of a single sequence has one axis, which XLA's CPU compiler vectorises; with
an axis of size 1 before it, it does not always. An accelerator without a kernel takes steps that double
(Blelloch 1990).

The backward pass needs nothing but a and h. With the cotangents dh and of the final state, against the order of the
scan: g_t = dh_t + p_{t+1}, p_t = a_t g_t, db = g, da_t = g_t h_{t-1}; what is left of p belongs to the initial state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas._parallel_scan._linear_scan.config import Config, Operands
from kernels_pallas._parallel_scan.doubling import doubling, times
from kernels_pallas._parallel_scan.loops import at, each, put


def forward(config: Config, operands: Operands, *, sequential: bool) -> tuple[jax.Array, jax.Array]:
    """States [B, T, D] in the dtype of b, and the final state [B, D]; `sequential` walks the tokens one by one."""
    if sequential:
        return each(lambda *row: _forward_row(config, *row), *operands)
    a, b, initial = operands
    h = doubling(a.astype(initial.dtype), b.astype(initial.dtype), initial, reverse=config.reverse)
    return h.astype(b.dtype), h[:, 0 if config.reverse else -1]


def backward(
    config: Config,
    a: jax.Array,
    h: jax.Array,
    initial: jax.Array,
    h_cotangent: jax.Array,
    final_cotangent: jax.Array,
    *,
    sequential: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of a, b and the initial state."""
    if sequential:
        row = lambda *row: _backward_row(config, *row)  # noqa: E731
        return each(row, a, h, initial, h_cotangent, final_cotangent)
    wide, dh = a.astype(initial.dtype), h_cotangent.astype(initial.dtype)
    against = Config(not config.reverse)
    p = doubling(wide, times(wide, dh), final_cotangent, reverse=against.reverse)
    g = dh + before(against, p, final_cotangent)
    da = g * before(config, h.astype(g.dtype), initial)
    return da.astype(a.dtype), g.astype(h.dtype), p[:, -1 if config.reverse else 0]


def before(config: Config, x: jax.Array, first: jax.Array) -> jax.Array:
    """What stood one token earlier in the order of the scan: x [B, T, D] shifted by one, first [B, D] at its end."""
    if config.reverse:
        return jnp.concatenate([x[:, 1:], first[:, None]], axis=1)
    return jnp.concatenate([first[:, None], x[:, :-1]], axis=1)


# --- One token after the other. ---------------------------------------------------------------------------------------


def _forward_row(config: Config, a: jax.Array, b: jax.Array, initial: jax.Array) -> tuple[jax.Array, jax.Array]:
    T, acc = a.shape[0], initial.dtype

    def step(i: jax.Array, carry: tuple) -> tuple:
        h, out = carry
        t = T - 1 - i if config.reverse else i
        h = times(at(a, t).astype(acc), h) + at(b, t).astype(acc)
        return h, put(out, h, t)

    final, h = lax.fori_loop(0, T, step, (initial, jnp.zeros_like(b)))
    return h, final


def _backward_row(
    config: Config, a: jax.Array, h: jax.Array, initial: jax.Array, h_cotangent: jax.Array, final_cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    T, acc = a.shape[0], initial.dtype
    first, backwards = (T - 1, 1) if config.reverse else (0, -1)

    def step(i: jax.Array, carry: tuple) -> tuple:
        p, _, da, db = carry
        t = i if config.reverse else T - 1 - i
        g = at(h_cotangent, t).astype(acc) + p
        # At the first token this reads that token itself, which is put right below.
        earlier = at(h, jnp.clip(t + backwards, 0, T - 1)).astype(acc)
        return times(at(a, t).astype(acc), g), g, put(da, g * earlier, t), put(db, g, t)

    start = (final_cotangent, jnp.zeros_like(initial), jnp.zeros_like(a), jnp.zeros_like(h))
    p, g, da, db = lax.fori_loop(0, T, step, start)
    return put(da, g * initial, jnp.int32(first)), db, p
