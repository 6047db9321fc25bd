"""Decode attention as its definition says: dense, any mode of differentiation, any dtype. The specification."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas._decode_attention.config import Config, Operands, accumulator, reach, visible


def forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, Hq, Dv] in the dtype of q, and log-sum-exp [B, Hq, T] in float32 at least.

    s_tj = cap tanh(scale q_t . k_j / cap), hidden entries -inf; lse_t = log (exp sink + sum_j exp s_tj);
    o_t = sum_j exp(s_tj - lse_t) v_j.
    A query that sees nothing, with no sink, has o = 0 and lse = -inf.
    """
    q, acc = operands.q, accumulator(operands.q.dtype)
    B, T, H, D = q.shape
    k, v = (_dense(operands, x, scale) for x, scale in ((operands.k, operands.k_scale), (operands.v, operands.v_scale)))
    S, k_heads = k.shape[1:3]
    low, stop = (x[:, None] for x in reach(config, operands))
    j = jnp.arange(S, dtype=jnp.int32)
    reached = (low <= j) & (j < stop)  # [B, S]
    # What no query sees may be NaN, and 0 NaN is NaN.
    k, v = (jnp.where(reached[:, :, None, None], x, 0) for x in (k, v))
    grouped = q.astype(acc).reshape(B, T, k_heads, H // k_heads, D)
    s = config.scale * jnp.einsum("bthgd,bshd->bhgts", grouped, k, precision=jax.lax.Precision.HIGHEST)
    if config.soft_cap is not None:
        s = config.soft_cap * jnp.tanh(s / config.soft_cap)
    places = operands.length[:, None] - T + jnp.arange(T, dtype=jnp.int32)
    seen = visible(config, j, places[:, :, None]) & reached[:, None]  # [B, T, S]
    s = jnp.where(seen[:, None, None], s, -jnp.inf)
    top = jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf)
    sink = None
    if operands.sinks is not None:
        sink = operands.sinks.astype(acc).reshape(-1, k_heads, H // k_heads, 1, 1)
        top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    p = jnp.exp(s - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - top)
    sees = total != 0
    safe = jnp.where(sees, total, 1)
    lse = jnp.where(sees, top + jnp.log(safe), -jnp.inf).reshape(B, H, T)
    o = jnp.einsum("bhgts,bshd->bthgd", p / safe, v, precision=jax.lax.Precision.HIGHEST)
    # Already 0 where nothing is seen; said once more so that no cotangent, NaN included, comes back from there.
    some = jnp.any(seen, axis=2)[:, :, None, None]
    o = jnp.where(some, o.reshape(B, T, H, v.shape[3]), 0)
    return o.astype(q.dtype), lse


def _dense(operands: Operands, x: jax.Array, scale: Any) -> jax.Array:
    """Keys or values [B, S, Hk, D] of each row in the accumulator's dtype, scales and pages resolved."""
    x = x.astype(accumulator(operands.q.dtype))
    if scale is not None:
        x = x * scale.astype(x.dtype)[..., None]
    B = operands.q.shape[0]
    if operands.table is None:
        return jnp.broadcast_to(x, (B, *x.shape[1:]))
    # Entries that a row does not reach may name no page.
    table = jnp.clip(operands.table, 0, x.shape[1] - 1)
    rows = jnp.arange(B)[:, None] if x.shape[0] > 1 else 0
    return x[rows, table].reshape(B, -1, *x.shape[3:])
