"""The selective scan as its definition says: step by step, any mode of differentiation. The specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas._parallel_scan._selective_scan.config import Config, Operands, decay


def forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Readings y [B, T, D] before skip and gate, and the final state [B, N, D], in the accumulator's dtype.

    h_t = a_t h_{t-1} + dt_t u_t B_t with a_t = exp(dt_t A), or 2 exp(dt_t A) - 1; y_t = sum_n C_tn h_tn.
    h_{t-1} is zero if t restarts.
    """

    def step(h: jax.Array, now: tuple) -> tuple[jax.Array, jax.Array]:
        u, dt, B, C, restart = now
        if restart is not None:
            h = jnp.where(restart[:, None, None], 0, h)
        u, B, C = (x.astype(h.dtype) for x in (u, B, C))
        a, _ = decay(config, dt[:, None] * operands.A)
        h = a * h + (dt * u)[:, None] * B[:, :, None]
        return h, jnp.sum(C[:, :, None] * h, axis=1)

    arrays = (operands.u, operands.dt, operands.B, operands.C, operands.restart)
    by_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), arrays)
    # A loop's carry must keep its type, with it the axes of a mesh that inputs are divided over.
    initial = operands.initial + jnp.zeros_like(jnp.sum(operands.dt, 1), operands.initial.dtype)[:, None]
    final, y = lax.scan(step, initial, by_time, reverse=config.reverse)
    return jnp.swapaxes(y, 0, 1), final
