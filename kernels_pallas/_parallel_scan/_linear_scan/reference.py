"""The linear scan as its definition says: step by step, any mode of differentiation, any dtype. The specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas._parallel_scan._linear_scan.config import Config, Operands


def forward(config: Config, operands: Operands, restart: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """States [B, T, D] in the dtype of b, and the final state [B, D] in that of the accumulator.

    h_t = a_t h_{t-1} + b_t, where h_{t-1} is zero if t restarts.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      restart: bool [B, T], or None for nowhere.
    """
    a, b, initial = operands

    def step(h: jax.Array, at: tuple) -> tuple[jax.Array, jax.Array]:
        a, b, restart = at
        if restart is not None:
            h = jnp.where(restart[:, None], 0, h)
        h = a.astype(h.dtype) * h + b.astype(h.dtype)
        return h, h.astype(b.dtype)

    by_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (a, b, restart))
    # A loop's carry must keep its type, with it the axes of a mesh that inputs are divided over.
    initial = initial + jnp.zeros_like(jnp.sum(b, 1), initial.dtype)
    final, h = lax.scan(step, initial, by_time, reverse=config.reverse)
    return jnp.swapaxes(h, 0, 1), final
