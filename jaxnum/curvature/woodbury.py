"""The m x m matrix through which gradients of any length are preconditioned: Woodbury's identity for F."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# Rounding of a Gram matrix moves its eigenvalues by about an eps of its trace; what is added must stand above that.
_FLOOR = 8.0


def factor(gram: jax.Array, damping: Any, count: Any) -> tuple[jax.Array, jax.Array]:
    """Cholesky factor of K = m λ I + G Gᵀ, and the λ in it: the damping, or its floor where that is larger.

    With F = λ I + Gᵀ G / m the identities are F^-1 = (I - Gᵀ K^-1 G) / λ and F^-1 Gᵀ = m Gᵀ K^-1. Where gradients are
    alike, or fewer numbers than gradients, G Gᵀ is singular, and in finite precision K too once λ is below an eps of
    the mean squared norm of the gradients: λ is at least 8 of those.

    Args:
      gram: [m, m] floating, G Gᵀ.
      damping: λ >= 0.
      count: m of the definition of F, which may be below the number of rows where the others are 0.
    """
    floor = _FLOOR * jnp.finfo(gram.dtype).eps * jnp.trace(gram) / count
    used = jnp.maximum(jnp.asarray(damping, gram.dtype), floor).astype(gram.dtype)
    return jnp.linalg.cholesky(gram + count * used * jnp.eye(gram.shape[0], dtype=gram.dtype)), used


def solve(lower: jax.Array, b: jax.Array) -> jax.Array:
    """K^-1 b for the factor of K."""
    return jax.scipy.linalg.cho_solve((lower, True), b)
