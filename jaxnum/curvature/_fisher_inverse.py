"""The inverse of an empirical Fisher matrix, from the gradients alone: products, its diagonal, single elements."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.curvature import woodbury
from kernels_pallas import checks


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "damping"], meta_fields=["size"])
@dataclass(frozen=True)
class FisherInverse:
    """(λ I + Gᵀ G / m)^-1 = I / λ - Vᵀ V, block by block.

    Attributes:
      rows: V [blocks, m, b], the last block filled up with zeros.
      damping: λ of every block [blocks].
      size: d, the number of parameters, static.
    """

    rows: jax.Array
    damping: jax.Array
    size: int

    def product(self, x: jax.Array) -> jax.Array:
        """F^-1 x [d] for x [d]; jax.vmap for several."""
        remedy = "Use jax.vmap for several vectors."
        checks.shape("FisherInverse.product", remedy=remedy, x=(x, f"{self.size}"))
        blocks = woodbury.split(jnp.asarray(x).astype(self.rows.dtype)[None], self.rows.shape[-1])[:, 0]
        along = woodbury.product("bmk,bk->bm", self.rows, blocks)
        return self._joined(blocks / self.damping[:, None] - woodbury.product("bmk,bm->bk", self.rows, along))

    def diagonal(self) -> jax.Array:
        """The diagonal of F^-1 [d]."""
        return self._joined(1 / self.damping[:, None] - jnp.sum(jnp.square(self.rows), axis=1))

    def element(self, i: Any, j: Any) -> jax.Array:
        """F^-1[i, j] [], at the cost of m products; NaN outside the matrix, 0 between blocks."""
        remedy = "Use jax.vmap for several elements."
        checks.shape("FisherInverse.element", remedy=remedy, i=(i, ""), j=(j, ""))
        i, j = jnp.asarray(i), jnp.asarray(j)
        b = self.rows.shape[-1]
        left, right = self.rows[i // b, :, i % b], self.rows[j // b, :, j % b]
        inside = jnp.where(i == j, 1 / self.damping[i // b], 0) - jnp.sum(left * right)
        there = (i >= 0) & (i < self.size) & (j >= 0) & (j < self.size)
        return jnp.where(there, jnp.where(i // b == j // b, inside, 0), jnp.nan)

    def _joined(self, blocks: jax.Array) -> jax.Array:
        return blocks.reshape(-1)[: self.size]


def fisher_inverse(gradients: jax.Array, damping: float | jax.Array, *, block: int | None = None) -> FisherInverse:
    """The inverse of the damped empirical Fisher matrix of m gradients, ready for products and elements.

    With G [m, d] the gradients, K = m λ I + G Gᵀ and its Cholesky factor K = L Lᵀ,

        F = λ I + Gᵀ G / m,   F^-1 = I / λ - Vᵀ V,   V = λ^-1/2 L^-1 G  [m, d].

    With blocks, F is that matrix without its elements outside the diagonal blocks of size b, each inverted for itself.

    Args:
      gradients: G [m, d] floating, one gradient a row: of single examples, or of small batches.
      damping: λ > 0. In a block where K is singular to working precision it is raised to 512 eps of the mean squared
        norm of the rows (6e-5 in float32); the λ used is the result's `damping`.
      block: size b of blocks, at least 1, or None for one block.

    Returns:
      A `FisherInverse` with `product(x)`, `diagonal()` and `element(i, j)`.

    Raises:
      ShapeError: gradients are not a matrix, or have an axis of size 0; damping is not one number.
      DtypeError: gradients are not real floating-point.
      ValueError: damping or block out of range.

    Cost: 2 m² d flops and m³/3 a block, once; a product 4 m d, the diagonal 2 m d, an element 2 m. Memory: m d.

    Numerics: in float32 at least. I / λ and Vᵀ V nearly cancel along the gradients themselves: there the error is an
    eps of 1 / λ, not of the result, and more where K is close to singular. For the inverse times a gradient that is a
    row of G, `jaxnum.transforms.mfac` has a form without cancellation. A gradient that is inf or NaN makes everything
    NaN in its blocks.

    Source: E. Frantar, E. Kurtic, D. Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
    Information", NeurIPS 2021, arXiv 2107.03356, section 3.1. The paper's recursion over rows computes the same V, row
    by row: V_j = F_{j-1}^-1 g_j / sqrt(m + g_jᵀ F_{j-1}^-1 g_j); here matrix products and one triangular solve do.

    Example:
      >>> import jax.numpy as jnp
      >>> inverse = fisher_inverse(jnp.array([[2.0, 0.0], [0.0, 1.0]]), 1.0)
      >>> inverse.product(jnp.array([3.0, 3.0])).round(4).tolist()
      [1.0, 2.0]
    """
    gradients = _checked("fisher_inverse", gradients, damping)
    size = gradients.shape[1]
    whole = block is None or (isinstance(block, int) and block >= 1)
    checks.value("fisher_inverse", "block", whole, "be a Python int of at least 1, or None", block)

    return _inverse(gradients, damping, min(block or size, max(size, 1)))


def fisher_inverse_product(gradients: jax.Array, x: jax.Array, damping: float | jax.Array) -> jax.Array:
    """F^-1 x for the damped empirical Fisher matrix of m gradients, once, keeping nothing.

    F^-1 x = (x - Gᵀ K^-1 G x) / λ with K = m λ I + G Gᵀ; for many x make a `fisher_inverse`, or use `jax.vmap` over x.

    Args:
      gradients: G [m, d] floating.
      x: [d] floating.
      damping: λ > 0; see `fisher_inverse`.

    Returns:
      F^-1 x [d], float32 at least.

    Raises:
      ShapeError: as `fisher_inverse`, or x has another length than the gradients' rows.
      DtypeError: gradients or x are not real floating-point.
      ValueError: damping out of range.

    Cost: m² d and 4 m d flops and m³/3. Memory: nothing of size m d but the gradients.

    Numerics: as `fisher_inverse`.

    Source: as `fisher_inverse`; the product is Woodbury's identity as it stands.

    Example:
      >>> import jax.numpy as jnp
      >>> fisher_inverse_product(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([3.0, 3.0]), 1.0).round(4).tolist()
      [1.0, 2.0]
    """
    gradients = _checked("fisher_inverse_product", gradients, damping)
    checks.shape("fisher_inverse_product", remedy="Use jax.vmap.", gradients=(gradients, "M D"), x=(x, "D"))
    checks.dtype("fisher_inverse_product", "floating", x=x)
    return _once(gradients, jnp.asarray(x).astype(gradients.dtype), damping)


def _checked(function: str, gradients: jax.Array, damping: Any) -> jax.Array:
    checks.arrays(function, gradients=gradients)
    checks.shape(function, remedy="Stack one gradient a row.", gradients=(gradients, "M D"))
    checks.dtype(function, "floating", gradients=gradients)
    shape = jnp.shape(gradients)
    checks.value(function, "gradients", min(shape) > 0, "have no axis of size 0", shape, error=checks.ShapeError)
    checks.shape(function, remedy="One number damps all parameters.", damping=(damping, ""))
    if isinstance(damping, int | float):
        checks.value(function, "damping", damping > 0, "be greater than 0", damping)
    return jnp.asarray(gradients).astype(accumulator(gradients.dtype))


@partial(jax.jit, static_argnums=2)
def _inverse(gradients: jax.Array, damping: Any, block: int) -> FisherInverse:
    def one(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        lower, used = woodbury.factor_rows(part, damping)
        return jax.scipy.linalg.solve_triangular(lower, part, lower=True) / jnp.sqrt(used), used

    rows, used = jax.vmap(one)(woodbury.split(gradients, block))
    return FisherInverse(rows, used, gradients.shape[1])


@jax.jit
def _once(gradients: jax.Array, x: jax.Array, damping: Any) -> jax.Array:
    lower, used = woodbury.factor_rows(gradients, damping)
    along = woodbury.solve(lower, woodbury.product("md,d->m", gradients, x))
    return (x - woodbury.product("md,m->d", gradients, along)) / used
