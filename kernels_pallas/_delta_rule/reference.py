"""The delta rule as its definition says: token by token, any mode of differentiation, any dtype. The specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas._delta_rule.config import Config, Operands


def forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, V] in the dtype of q, and the state [B, H, K, V] after the last token.

    S~ = diag(e^{g_t}) S_{t-1}; u_t = beta_t (v_t - S~^T k_t); S_t = S~ + k_t u_t^T; o_t = scale S_t^T q_t.
    A segment that is not the first starts from S = 0.
    """
    q, k, v, beta, state, log_decay, segments = operands
    acc = state.dtype
    q, k, v = (x.astype(acc) for x in (q, k, v))
    if log_decay is None:
        log_decay = jnp.zeros(beta.shape, acc)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    if segments is None:
        stays = jnp.ones(q.shape[:2], bool)
    else:
        stays = segments == jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))

    def token(S: jax.Array, at: tuple) -> tuple[jax.Array, jax.Array]:
        q, k, v, beta, g, stays = at
        # By selection: what is not finite stays in its document.
        S = step(jnp.where(stays[:, None, None, None], S, 0), k, v, beta, jnp.exp(g))
        return S, config.scale * read(S, q)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, beta, log_decay, stays))
    # A loop's carry must keep its type, with it the axes of a mesh that inputs are divided over.
    state = state + jnp.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None])
    state, o = jax.lax.scan(token, state, tokens)
    return jnp.moveaxis(o, 0, 1).astype(operands.q.dtype), state


def step(S: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, decay: jax.Array) -> jax.Array:
    """The state [..., K, V] after one token: k [..., K], v [..., V], beta [...], decay [..., 1 or K]."""
    S = decay[..., None] * S
    u = beta[..., None] * (v - read(S, k))
    return S + k[..., :, None] * u[..., None, :]


def read(S: jax.Array, x: jax.Array) -> jax.Array:
    """S^T x, [..., V], of a state [..., K, V] and a key or query [..., K]."""
    return jnp.einsum("...kv,...k->...v", S, x, precision=jax.lax.Precision.HIGHEST)
