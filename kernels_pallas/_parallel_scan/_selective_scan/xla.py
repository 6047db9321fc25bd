"""The selective scan in plain XLA; neither pass ever holds the states of more than a chunk of tokens.

The forward pass keeps the state before every chunk. The backward pass takes the chunks against the order, recomputes
the states of each, and with x_t = dt_t u_t, g_t = C_t dy_t + p_{t+1}, p_t = a_t g_t and w_t = g_t h_{t-1} a'_t, where
a' is the derivative of the decay a(dt A), gives
dC_t = sum_d dy_t h_t, dB_t = sum_d g_t x_t, du_t = dt_t sum_n g_t B_t, ddt_t = u_t sum_n g_t B_t + sum_n w_t A,
dA = sum_t w_t dt_t; what is left of p belongs to the initial state.

A CPU walks the tokens one by one, with the channels last and so in its vectors; an accelerator without a kernel scans
the tokens of a chunk in steps that double.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas._parallel_scan._selective_scan.config import Config, Operands, decay
from kernels_pallas._parallel_scan.doubling import doubling, times
from kernels_pallas._parallel_scan.loops import at, each, put

_HIGHEST = lax.Precision.HIGHEST


def forward(config: Config, operands: Operands, *, sequential: bool) -> tuple[jax.Array, ...]:
    """Readings [B, T, D], the final state [B, N, D], and where the config says so the states [B, K, N, D]."""
    if sequential:
        restart = () if operands.restart is None else (operands.restart,)
        return each(lambda *row: _forward_row(config, *row), *operands[:6], *restart)
    return _forward_chunks(config, operands)


def backward(
    config: Config,
    operands: Operands,
    states: jax.Array,
    y_cotangent: jax.Array,
    final_cotangent: jax.Array,
    *,
    sequential: bool,
) -> tuple[jax.Array, ...]:
    """Cotangents of u, dt, A, B, C and the initial state.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      states: [B, K, N, D], in the order of the scan.
      y_cotangent: [B, T, D].
      final_cotangent: [B, N, D].
      sequential: whether to walk the tokens one by one.
    """
    if not sequential:
        grads = _backward_chunks(config, operands, states, y_cotangent, final_cotangent)
    else:
        restart = () if operands.restart is None else (operands.restart,)
        arrays = (*operands[:5], states, y_cotangent, final_cotangent, *restart)
        grads = each(lambda *row: _backward_row(config, *row), *arrays)
    du, ddt, dA, *rest = grads
    return (du, ddt, jnp.sum(dA, axis=0, keepdims=True) if operands.A.shape[0] == 1 else dA, *rest)


# --- One token after the other. ---------------------------------------------------------------------------------------


def _forward_row(
    config: Config,
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    initial: jax.Array,
    restart: Any = None,
) -> tuple[jax.Array, ...]:
    T = u.shape[0]
    chunks = -(-T // config.chunk) if config.keeps else 1
    length = config.chunk if config.keeps else T

    def chunk(k: jax.Array, carry: tuple) -> tuple:
        h, y, states = carry

        def step(i: jax.Array, carry: tuple) -> tuple:
            h, y = carry
            t = T - 1 - i if config.reverse else i
            _, _, h = _step(config, u, dt, A, B, restart, h, t)
            return h, put(y, jnp.sum(at(C, t)[:, None].astype(h.dtype) * h, axis=0), t)

        if config.keeps:
            states = put(states, h, k)
        h, y = lax.fori_loop(k * length, jnp.minimum((k + 1) * length, T), step, (h, y))
        return h, y, states

    kept = jnp.zeros((chunks if config.keeps else 0, *initial.shape), initial.dtype)
    carry = (initial, jnp.zeros_like(dt), kept)
    final, y, kept = lax.fori_loop(0, chunks, chunk, carry) if config.keeps else chunk(jnp.int32(0), carry)
    return (y, final, kept) if config.keeps else (y, final)


def _step(
    config: Config, u: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, restart: Any, h: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state [N, D] before a token, as its decay finds it, that decay's derivative, and the state after it."""
    if restart is not None:
        h = jnp.where(at(restart, t), 0, h)
    a, slope = decay(config, at(dt, t) * A)
    x = at(dt, t) * at(u, t).astype(h.dtype)
    return h, slope, a * h + x * at(B, t)[:, None].astype(h.dtype)


def _backward_row(
    config: Config,
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    states: jax.Array,
    dy: jax.Array,
    dfinal: jax.Array,
    restart: Any = None,
) -> tuple[jax.Array, ...]:
    T, length = u.shape[0], config.chunk
    chunks, acc = states.shape[0], dfinal.dtype

    def token(i: jax.Array) -> jax.Array:
        return T - 1 - i if config.reverse else i

    def chunk(j: jax.Array, carry: tuple) -> tuple:
        k = chunks - 1 - j
        start, stop = k * length, jnp.minimum((k + 1) * length, T)

        def recompute(i: jax.Array, carry: tuple) -> tuple:
            h, before = carry
            found, _, h = _step(config, u, dt, A, B, restart, h, token(i))
            return h, put(before, found, i - start)

        room = jnp.zeros((length, *A.shape), acc)
        _, before = lax.fori_loop(start, stop, recompute, (at(states, k), room))

        def step(i: jax.Array, carry: tuple) -> tuple:
            p, dA, du, ddt, dB, dC = carry
            i = stop - 1 - (i - start)
            t = token(i)
            d, v, b, dy_t = at(dt, t), at(u, t).astype(acc), at(B, t)[:, None].astype(acc), at(dy, t)
            h = at(before, i - start)
            a, slope = decay(config, d * A)
            x = d * v
            g = p + at(C, t)[:, None].astype(acc) * dy_t
            w = g * h * slope
            total = jnp.sum(g * b, axis=0)
            p = a * g
            if restart is not None:
                p = jnp.where(at(restart, t), 0, p)
            return (
                p,
                dA + w * d,
                put(du, d * total, t),
                put(ddt, v * total + jnp.sum(w * A, axis=0), t),
                put(dB, jnp.dot(g, x, precision=_HIGHEST), t),
                put(dC, jnp.dot(a * h + x * b, dy_t, precision=_HIGHEST), t),
            )

        return lax.fori_loop(start, stop, step, carry)

    zeros = jnp.zeros_like
    p, dA, du, ddt, dB, dC = lax.fori_loop(0, chunks, chunk, (dfinal, zeros(A), *map(zeros, (u, dt, B, C))))
    return du, ddt, dA, dB, dC, p


# --- Steps that double, a chunk at a time. ----------------------------------------------------------------------------


def _split(config: Config, x: jax.Array) -> jax.Array:
    """[B, T, ...] in the order of the scan as [K, B, chunk, ...]; zeros behind the end leave the state alone."""
    x = jnp.flip(x, 1) if config.reverse else x
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % config.chunk), *((0, 0),) * (x.ndim - 2)))
    return jnp.swapaxes(x.reshape(x.shape[0], -1, config.chunk, *x.shape[2:]), 0, 1)


def _join(config: Config, x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_split`."""
    x = jnp.swapaxes(x, 0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
    return jnp.flip(x, 1) if config.reverse else x


def _parts(config: Config, operands: Operands) -> tuple:
    """What the chunks are made of, in the accumulator's dtype; restarts as a factor of the decay."""
    acc = operands.initial.dtype
    u, dt, B, C = (_split(config, x.astype(acc)) for x in (operands.u, operands.dt, operands.B, operands.C))
    return u, dt, B, C, None if operands.restart is None else _split(config, operands.restart)


def _within(
    config: Config, A: jax.Array, dt: jax.Array, x: jax.Array, B: jax.Array, restart: Any, h: jax.Array
) -> tuple:
    """Of a chunk [B, chunk, N, D]: decays, their derivatives, states before each token, and states after it."""
    a, slope = decay(config, dt[:, :, None] * A[:, None])
    if restart is not None:
        a, slope = (jnp.where(restart[:, :, None, None], 0, x) for x in (a, slope))
    after = doubling(a, x[:, :, None] * B[..., None], h, reverse=False)
    return a, slope, jnp.concatenate([h[:, None], after[:, :-1]], axis=1), after


def _forward_chunks(config: Config, operands: Operands) -> tuple[jax.Array, ...]:
    def chunk(h: jax.Array, now: tuple) -> tuple:
        u, dt, B, C, restart = now
        *_, after = _within(config, operands.A, dt, dt * u, B, restart, h)
        y = jnp.einsum("btn,btnd->btd", C, after, precision=_HIGHEST)
        return after[:, -1], (y, h) if config.keeps else (y,)

    final, (y, *states) = lax.scan(chunk, operands.initial, _parts(config, operands))
    y = _join(config, y, operands.u.shape[1])
    return y, final, *(jnp.swapaxes(x, 0, 1) for x in states)


def _backward_chunks(
    config: Config, operands: Operands, states: jax.Array, dy: jax.Array, dfinal: jax.Array
) -> tuple[jax.Array, ...]:
    A = operands.A

    def chunk(carry: tuple, now: tuple) -> tuple:
        p, dA = carry
        (u, dt, B, C, restart), h, dy = now
        x = dt * u
        a, slope, before, after = _within(config, A, dt, x, B, restart, h)
        read = C[..., None] * dy[:, :, None]
        ps = doubling(a, times(a, read), p, reverse=True)
        g = read + jnp.concatenate([ps[:, 1:], p[:, None]], axis=1)
        # Before a restart may stand anything, and what it does to w must not pass.
        w = jnp.where(slope == 0, 0, g * before * slope)
        total = jnp.einsum("btnd,btn->btd", g, B, precision=_HIGHEST)
        found = (
            dt * total,
            u * total + jnp.sum(w * A[:, None], axis=2),
            jnp.einsum("btnd,btd->btn", g, x, precision=_HIGHEST),
            jnp.einsum("btnd,btd->btn", after, dy, precision=_HIGHEST),
        )
        return (ps[:, 0], dA + jnp.einsum("btnd,btd->bnd", w, dt, precision=_HIGHEST)), found

    start = (dfinal, jnp.zeros_like(dfinal))
    rows = (_parts(config, operands), jnp.swapaxes(states, 0, 1), _split(config, dy))
    (p, dA), found = lax.scan(chunk, start, rows, reverse=True)
    like = (operands.u, operands.dt, operands.B, operands.C)
    du, ddt, dB, dC = (_join(config, x, o.shape[1]).astype(o.dtype) for x, o in zip(found, like, strict=True))
    return du, ddt, dA, dB, dC, p
