"""Attention as its definition says: dense, any mode of differentiation, any floating dtype. The specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas._attention import dropout, masks
from kernels_pallas._attention.config import Config, Operands, accumulator


def forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, Hq, Dv] in the dtype of q, and log-sum-exp [B, Hq, T] in float32 at least.

    s = cap tanh((scale q k^T + bias) / cap), hidden entries -inf; lse = log sum_j exp s_j;
    o = sum_j exp(s_j - lse) v_j, where dropout takes some of the weights and multiplies the others by its gain.
    A row that sees nothing has o = 0 and lse = -inf.
    """
    s = scores(config, operands)  # [B, Hq, T, S]
    seen = dense_mask(config, operands)
    if seen is not None:
        s = jnp.where(seen, s, -jnp.inf)
    top = jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    p = jnp.exp(s - top)
    total = jnp.sum(p, axis=-1)
    sees = total != 0
    safe = jnp.where(sees, total, 1)
    lse = jnp.where(sees, top[..., 0] + jnp.log(safe), -jnp.inf)
    p = p / safe[..., None]
    B, H, T, S = s.shape
    if config.dropout:
        p = jnp.where(dropout.dense(operands.dropout_keys, T, S, config.dropout), dropout.gain(config.dropout) * p, 0)
    k_heads, v_dim = operands.v.shape[2:]
    grouped = p.reshape(B, k_heads, H // k_heads, T, S)
    v = operands.v.astype(s.dtype)
    o = jnp.einsum("bhgts,bshd->bthgd", grouped, v, precision=jax.lax.Precision.HIGHEST)
    # Already 0 where nothing is seen; said once more so that no cotangent, NaN included, comes back from there.
    o = jnp.where(jnp.swapaxes(sees, 1, 2)[..., None], o.reshape(B, T, H, v_dim), 0)
    return o.astype(operands.q.dtype), lse


def scores(config: Config, operands: Operands) -> jax.Array:
    """The scores [B, Hq, T, S] before hiding: scaled products, plus bias, capped."""
    q, k = (x.astype(accumulator(x.dtype)) for x in (operands.q, operands.k))
    B, T, H, D = q.shape
    S, k_heads = k.shape[1:3]
    grouped = q.reshape(B, T, k_heads, H // k_heads, D)
    s = jnp.einsum("bthgd,bshd->bhgts", grouped, k, precision=jax.lax.Precision.HIGHEST)
    s = config.scale * s.reshape(B, H, T, S)
    if operands.bias is not None:
        s = s + operands.bias.astype(s.dtype)
    if config.soft_cap is not None:
        s = config.soft_cap * jnp.tanh(s / config.soft_cap)
    return s


def dense_mask(config: Config, operands: Operands) -> jax.Array | None:
    """Which keys each query sees, broadcastable to [B, Hq, T, S]; None when all."""
    q, kv = masks.positions(operands)
    segments = (None, None)
    if operands.q_segments is not None:
        segments = (operands.q_segments[:, None, :, None], operands.kv_segments[:, None, None, :])
    return masks.visible(config, q[:, None, :, None], kv[:, None, None, :], *segments, operands.mask)
