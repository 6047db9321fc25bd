"""The specification: one token after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas._linear_attention.config import Config, Operands, gate


def forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, V] in the dtype of q, and the state after the last token [B, H, K, V]."""
    dtype = operands.state.dtype
    kind = gate(operands)
    q, k, v = (jnp.moveaxis(x.astype(dtype), 1, 0) for x in (operands.q, operands.k, operands.v))
    tokens: dict[str, Any] = {"q": q, "k": k, "v": v}
    if kind in ("token", "channel"):
        tokens["log_decay"] = jnp.moveaxis(operands.log_decay, 1, 0)
    if operands.segments is not None:
        segments = jnp.moveaxis(operands.segments, 1, 0)
        tokens["starts"] = segments != jnp.pad(segments[:-1], ((1, 0), (0, 0)))

    def step(state: jax.Array, token: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        log_decay = operands.log_decay if kind == "head" else token.get("log_decay")
        if log_decay is not None:
            state = state * jnp.exp(log_decay).reshape(*log_decay.shape, *(1,) * (4 - log_decay.ndim))
        if "starts" in token:
            state = jnp.where(token["starts"][:, None, None, None], 0, state)
        state = state + token["k"][..., :, None] * token["v"][..., None, :]
        o = jnp.einsum("bhk,bhkv->bhv", token["q"], state, precision=jax.lax.Precision.HIGHEST)
        return state, config.scale * o

    # A loop's carry must keep its type, with it the axes of a mesh that inputs are divided over.
    state = operands.state + jnp.zeros_like(k[0, ..., None] * v[0, ..., None, :])
    state, o = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(o, 0, 1).astype(operands.q.dtype), state
