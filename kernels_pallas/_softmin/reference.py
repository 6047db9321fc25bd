"""The specification: the matrix of costs, and its log-sum-exp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas._softmin.config import Config, Operands


def forward(config: Config, operands: Operands) -> jax.Array:
    """The log-sum-exps [B, n], in the dtype of v."""
    dtype = operands.v.dtype
    difference = operands.x[:, :, None].astype(dtype) - operands.y[:, None].astype(dtype)
    if config.kind == "cityblock":
        # The product has derivative 0 at 0.
        cost = jnp.sum(difference * jnp.sign(difference), axis=-1)
    else:
        cost = jnp.sum(difference * difference, axis=-1)
    if config.kind == "euclidean":
        # The derivative of a square root at 0 is infinite; that of the distance of a point from itself is taken as 0.
        apart = cost > 0
        cost = jnp.where(apart, jnp.sqrt(jnp.where(apart, cost, 1)), 0)
    exponents = operands.v[:, None] - cost / operands.epsilon[:, None, None]
    top = jax.lax.stop_gradient(jnp.max(exponents, axis=-1, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0)
    total = jnp.sum(jnp.exp(exponents - top[:, :, None]), axis=-1)
    empty = total == 0
    return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + top)
