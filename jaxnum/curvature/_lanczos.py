"""Lanczos tridiagonalisation with full re-orthogonalisation, which notices when the Krylov space is exhausted."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.functions import Function
from jaxnum.curvature import operators
from kernels_pallas import checks

PyTree = Any


class Lanczos(NamedTuple):
    """What `lanczos` returns. The first `rank` entries of the arrays over m are meant, in ascending order of value.

    Attributes:
      values: [m], Ritz values, 0 where not active.
      weights: [m] >= 0, squared first components of the eigenvectors of T: with a unit v0, v0ᵀ f(A) v0 is
        sum_i weights_i f(values_i). They sum to 1, and are 0 where not active.
      residuals: [m], |A u_i - values_i u_i| of the Ritz vectors u_i, up to rounding.
      active: [m] bool, which entries are meant.
      rank: [] int32, the dimension of the Krylov space, at most m.
      basis: tree like v0 with a leading axis m, orthonormal in its first `rank` members, then zero.
      coefficients: [m, m], column i gives the Ritz vector u_i in the basis.
    """

    values: jax.Array
    weights: jax.Array
    residuals: jax.Array
    active: jax.Array
    rank: jax.Array
    basis: PyTree
    coefficients: jax.Array

    def vector(self, index: int | jax.Array) -> PyTree:
        """The Ritz vector u_index, a tree like v0 of unit norm."""
        return _combined(self.coefficients[:, index], self.basis)


def lanczos(op: Any, v0: PyTree, num_steps: int, *, tol: float | jax.Array | None = None) -> Lanczos:
    """Ritz values and vectors of a symmetric operator from the Krylov space of v0.

    With q_1 = v0 / |v0|: alpha_j = q_j.A q_j, r = A q_j - alpha_j q_j - beta_(j-1) q_(j-1), orthogonalised again,
    twice, against all q so far; beta_j = |r|, q_(j+1) = r / beta_j. T, tridiagonal with alpha and beta, is A in this
    basis. Where beta_j is rounding, the Krylov space is invariant: the Ritz values are eigenvalues, no further step is
    taken, and `rank` says so. That is the normal case of low-rank operators (Gauss-Newton and Fisher matrices of small
    batches), where an unguarded recursion divides rounding by rounding.

    Args:
      op: linear symmetric function v -> A v on trees like v0, as of `hessian_product`, or an array [n, n]. Arrays that
        it captures are hoisted, and equal programs share one compilation.
      v0: pytree of floating-point arrays, the starting vector; only its direction matters. A zero gives rank 0.
      num_steps: m, Python int >= 1. More than the number of unknowns is cut short by the guard.
      tol: real scalar >= 0: beta_j <= tol max_i (|alpha_i| + beta_i) ends the space. Default 8 sqrt(n) roundings of
        the coarsest dtype of v0.

    Returns:
      A `Lanczos`. Its leaves are in float32 at least.

    Raises:
      TypeError: op is neither a function nor an array.
      ValueError: num_steps or tol is out of range.
      ShapeError, TreeError, DtypeError: v0 is not of floating-point arrays, or op(v0) is not a tree like it.

    Cost: at most m products, 4 m² n operations of orthogonalisation, memory m trees like v0.

    Numerics: reductions and basis in float32 at least; op sees the dtypes of v0. Without full re-orthogonalisation
      float32 gives ghost copies of the largest eigenvalues. NaN in the operator ends as NaN in the values.

    Derivatives: none in reverse mode, which refuses the loop.

    Source: Lanczos (1950); Golub & Van Loan, "Matrix computations", section 10.1; the guard is ours.

    Example:
      >>> import jax.numpy as jnp
      >>> result = lanczos(2 * jnp.eye(8), jnp.arange(8.0), 6)
      >>> print(int(result.rank), f"{result.values[0]:.4f}")
      1 2.0000
    """
    ok = isinstance(num_steps, int) and not isinstance(num_steps, bool) and num_steps >= 1
    checks.value("lanczos", "num_steps", ok, "be a Python int >= 1", num_steps, "It fixes the shape of the basis.")
    v0 = trees.strong(jax.tree.map(jnp.asarray, v0))
    checks.value("lanczos", "v0", trees.size(v0) > 0, "have at least one entry", trees.size(v0))
    if tol is None:
        tol = default_tol(v0)
    elif not checks.traced(tol):
        checks.value("lanczos", "tol", 0 <= float(tol) < 1, "be in [0, 1)", tol)
    return krylov(operators.operator("lanczos", op, v0, "v0"), v0, jnp.asarray(tol), num_steps)


def default_tol(v0: PyTree) -> float:
    """What a beta of pure rounding may be, relative to the operator: 8 eps sqrt(n)."""
    return 2 * precision.attainable(v0) * max(1, trees.size(v0)) ** 0.5


class _Carry(NamedTuple):
    q: PyTree
    basis: PyTree
    alpha: jax.Array
    beta: jax.Array
    rank: jax.Array
    going: jax.Array


@partial(jax.jit, static_argnames="num_steps")
def krylov(op: Function, v0: PyTree, tol: jax.Array, num_steps: int) -> Lanczos:
    """`lanczos` after its checks."""
    index = jnp.arange(num_steps, dtype=jnp.int32)

    def put(old: jax.Array, new: jax.Array, j: jax.Array) -> jax.Array:
        # A choice, not a scatter: scatters refuse explicitly sharded operands.
        return jnp.where((index == j).reshape((num_steps,) + (1,) * (old.ndim - 1)), new, old)

    def step(c: _Carry) -> _Carry:
        j = c.rank
        basis = jax.tree.map(lambda old, new: put(old, new, j), c.basis, c.q)
        r = operators.apply(op, c.q, v0)
        alpha = put(c.alpha, trees.vdot(c.q, r), j)
        for _ in range(2):
            r = trees.sub(r, _combined(jax.vmap(lambda q, r=r: trees.vdot(q, r))(basis), basis))
        length = trees.safe_norm(r)
        beta = put(c.beta, length, j)
        # Not `>`: NaN goes on to the end and shows in the values.
        going = ~(length <= tol.astype(length.dtype) * jnp.max(jnp.abs(alpha) + beta))
        q = jax.tree.map(lambda leaf: leaf / jnp.where(going, length, 1).astype(leaf.dtype), r)
        return _Carry(q, basis, alpha, beta, j + 1, going)

    start = operators.wide(v0)
    # By its largest entry first: a square may overflow or underflow.
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(start)]))
    unit = jax.tree.map(lambda leaf: leaf / jnp.where(largest == 0, 1, largest).astype(leaf.dtype), start)
    length = trees.norm(unit)
    unit = jax.tree.map(lambda leaf: leaf / jnp.where(length == 0, 1, length).astype(leaf.dtype), unit)
    empty = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf)] * num_steps), unit)
    zeros = jnp.zeros((num_steps,), length.dtype)
    first = _Carry(unit, empty, zeros, zeros, jnp.int32(0), length != 0)
    last = jax.lax.while_loop(lambda c: c.going & (c.rank < num_steps), step, first)
    return _ritz(last, index)


def _combined(weights: jax.Array, basis: PyTree) -> PyTree:
    return jax.tree.map(lambda q: jnp.tensordot(weights.astype(q.dtype), q, 1, precision="highest"), basis)


def _ritz(c: _Carry, index: jax.Array) -> Lanczos:
    """Eigenvalues and eigenvectors of T; what lies beyond the rank is moved above the spectrum and then cut off."""
    active = index < c.rank
    inner = index[:-1] + 1 < c.rank
    beta = jnp.where(inner, c.beta[:-1], 0)
    size = jnp.max(jnp.abs(c.alpha)) + 2 * jnp.max(jnp.abs(c.beta))
    bound = jnp.where(size == 0, 1, 2 * size)
    T = jnp.diag(jnp.where(active, c.alpha, 2 * bound)) + jnp.diag(beta, 1) + jnp.diag(beta, -1)
    values, vectors = jnp.linalg.eigh(T)
    vectors = jnp.where(active, vectors, 0)
    rest = jnp.sum(jnp.where(index == c.rank - 1, c.beta, 0))
    bottom = jnp.sum(jnp.where((index == c.rank - 1)[:, None], vectors, 0), axis=0)
    return Lanczos(
        values=jnp.where(active, values, 0),
        weights=vectors[0] ** 2,
        residuals=jnp.abs(rest * bottom),
        active=active,
        rank=c.rank,
        basis=c.basis,
        coefficients=vectors,
    )
