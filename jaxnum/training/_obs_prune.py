"""Optimal brain surgeon: weights pruned by what they cost in a quadratic model, and the others moved to make up."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.curvature import fisher_inverse, woodbury
from kernels_pallas import checks


class Pruned(NamedTuple):
    """What `obs_prune` returns."""

    weights: jax.Array  # [d], 0 where pruned
    kept: jax.Array  # [d] bool


def obs_prune(
    weights: jax.Array,
    gradients: jax.Array,
    count: int | jax.Array,
    damping: float | jax.Array = 1e-5,
    *,
    block: int | None = None,
    correction: str = "joint",
) -> Pruned:
    """Set the least important weights to zero and correct the others, by the empirical Fisher matrix.

    With F = λ I + Gᵀ G / m for the curvature of the loss at a minimum w, removing weight p alone and correcting the
    others at best costs w_p² / (2 [F^-1]_pp). The `count` weights S of least cost go. The others, R, move by

        δ_R = F_RR^-1 F_RS w_S = G_Rᵀ (m λ I + G_R G_Rᵀ)^-1 G_S w_S   with correction="joint",
        δ = -sum_{p in S} (w_p / [F^-1]_pp) F^-1 e_p   with "single", and then w_S = 0.

    "joint" is the minimiser of δᵀ F δ with δ_S = -w_S; "single", of the paper and its released code, adds up what each
    removal would ask for alone, and overshoots where pruned weights stand in for one another.

    Args:
      weights: w [d] floating; `jax.flatten_util.ravel_pytree` makes it from a tree.
      gradients: G [m, d] floating, one gradient a row, at w.
      count: number of weights to prune, 0 to d; a weight that is 0 already counts and costs nothing, so that pruning
        in stages keeps what went before.
      damping: λ > 0; see `jaxnum.curvature.fisher_inverse`.
      block: size of diagonal blocks of F, or None for one.
      correction: "joint", "single", or "none" to prune without moving the others.

    Returns:
      `Pruned(weights, kept)`; weights have the dtype of `weights`.

    Raises:
      ShapeError: weights are no vector or the gradients' rows have another length.
      DtypeError: not real floating-point.
      ValueError: an option out of range.

    Cost: that of `fisher_inverse` and a sort; "joint" a second Gram matrix.

    Numerics: in float32 at least; "joint" has no cancellation. Ties go by position. [F^-1]_pp is known to some eps / λ,
    and at least 1 / F_pp: weights are told apart where λ is well above eps F_pp. A NaN among the gradients makes all
    corrected weights of its block NaN.

    Source: B. Hassibi, D. Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS 1992;
    E. Frantar, E. Kurtic, D. Alistarh, arXiv 2107.03356, section 4.1. The joint correction without F_RR is ours: the
    push-through identity F_RR^-1 G_Rᵀ = m G_Rᵀ K_R^-1.

    Example:
      >>> import jax.numpy as jnp
      >>> w, g = jnp.array([0.5, 2.0]), jnp.array([[1.0, 1.0], [1.0, 1.0]])
      >>> obs_prune(w, g, 1, 1e-4).weights.round(3).tolist()
      [0.0, 2.5]
    """
    checks.choice("obs_prune", "correction", correction, ("joint", "single", "none"))
    checks.arrays("obs_prune", weights=weights, gradients=gradients)
    checks.shape("obs_prune", weights=(weights, "D"), gradients=(gradients, "M D"))
    checks.dtype("obs_prune", "floating", weights=weights, gradients=gradients)
    size = weights.shape[0]
    if not checks.traced(count):
        whole = jnp.ndim(count) == 0 and float(count).is_integer()
        checks.value("obs_prune", "count", whole, "be an integer", count)
        checks.value("obs_prune", "count", 0 <= float(count) <= size, f"be in 0 to {size}", count)
    checks.number("obs_prune", "damping", lambda damping: damping > 0, "be greater than 0", damping)
    whole = block is None or (isinstance(block, int) and block >= 1)
    checks.value("obs_prune", "block", whole, "be a Python int of at least 1, or None", block)
    wide = accumulator(jnp.result_type(weights, gradients))
    w, rows = jnp.asarray(weights).astype(wide), jnp.asarray(gradients).astype(wide)
    pruned, kept = _prune(w, rows, count, damping, block, correction)
    return Pruned(pruned.astype(weights.dtype), kept)


@partial(jax.jit, static_argnums=(4, 5))
def _prune(
    w: jax.Array, rows: jax.Array, count: Any, damping: Any, block: int | None, correction: str
) -> tuple[jax.Array, jax.Array]:
    inverse = fisher_inverse(rows, damping, block=block)
    diagonal = inverse.diagonal()
    # Cancellation may leave less than 1 / F_pp, which no diagonal element of F^-1 is below, or even a negative number.
    used = jnp.repeat(inverse.damping, inverse.rows.shape[-1])[: w.size]
    least = 1 / (used + jnp.mean(jnp.square(rows), axis=0))
    diagonal = jnp.maximum(diagonal, least)
    # The root of the cost, so that small weights do not tie with 0.
    order = jnp.argsort(jnp.abs(w) / jnp.sqrt(diagonal), stable=True)
    kept = jnp.zeros(w.size, jnp.int32).at[order].set(jnp.arange(w.size, dtype=jnp.int32)) >= count
    if correction == "single":
        w = w - inverse.product(jnp.where(kept, 0, w / diagonal))
    elif correction == "joint":
        w = w + _joint(w, rows, kept, damping, inverse.rows.shape[-1])
    return jnp.where(kept, w, 0), kept


def _joint(w: jax.Array, rows: jax.Array, kept: jax.Array, damping: Any, block: int) -> jax.Array:
    """G_Rᵀ (m λ I + G_R G_Rᵀ)^-1 G_S w_S in every block, [d]."""

    def one(rows: jax.Array, w: jax.Array, kept: jax.Array) -> jax.Array:
        staying = jnp.where(kept, rows, 0)
        lower, _ = woodbury.factor_rows(staying, damping)
        lost = woodbury.product("mk,k->m", rows, jnp.where(kept, 0, w))
        return woodbury.product("mk,m->k", staying, woodbury.solve(lower, lost))

    columns = (woodbury.split(x[None], block)[:, 0] for x in (w, kept))
    return jax.vmap(one)(woodbury.split(rows, block), *columns).reshape(-1)[: w.size]
