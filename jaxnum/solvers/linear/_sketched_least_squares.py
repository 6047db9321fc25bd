"""Least squares by sketch and precondition: a QR of a few random combinations of the rows makes CG quick.

Cost: one sketch, one QR of [rows, d], and a product with A and A^T a step.
Source: Rokhlin & Tygert 2008; Avron, Maymounkov & Toledo 2010; start: Meier, Nakatsukasa, Townsend & Webb 2024.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core.problems import Linear
from jaxnum.core.solver import Solution, raise_unless_converged, solve
from jaxnum.core.status import Status
from jaxnum.solvers.linear._cg import cg
from jaxnum.solvers.linear._sketch import KINDS, sketch
from kernels_pallas import checks


def sketched_least_squares(
    key: jax.Array,
    A: jax.Array,
    b: jax.Array,
    *,
    kind: str = "srht",
    rows: int | None = None,
    rtol: Any = None,
    max_steps: int = 100,
    history: bool = False,
    on_failure: str = "raise",
) -> Solution:
    """min_x ||A x - b|| for a tall A of full column rank: sketch, factorise, then CG on B = A R^-1.

    With S A = Q R, the singular values of B lie within 1 +- sqrt(d / rows) whatever those of A (gaussian S; the others
    come close), so that with rows = 4 d the error falls by about sqrt(d / rows) = 1/2 a step, for every condition
    number. The start is R^-1 Q^T S b, whose residual is already within a small factor of the least.

    Args:
      key: a PRNG key. The solution is the same for all; the steps vary by a few.
      A: [n, d], n >= d, floating point.
      b: [n].
      kind: of `sketch`: "srht", "gaussian" or "countsketch". The last is the cheapest, and wants more rows where a few
        rows of A outweigh the rest.
      rows: Python int >= d, rows of the sketch. Default 4 d, at most n, where A itself is factorised.
      rtol: stop at ||B^T (b - A x)|| <= rtol times its value at the start. Default 1e-8 (float64), 1e-5 (float32).
      max_steps: Python int >= 0.
      history: record the residual at every step.
      on_failure: "raise" or "return"; see `jaxnum.solve`.

    Returns:
      A `Solution` with x [d]; its residual is ||B^T (b - A x)||. `breakdown`: the sketch has not full column rank
      to rounding, as when A has not; x is then not to be used.

    Raises:
      ShapeError, DtypeError: A or b do not fit. ValueError: n < d, rows outside [d, n], or an unknown kind.
      SolverError: an eager call that did not converge.

    Cost: beside the sketch, 2 rows d^2 once and 4 n d a step: less than the 2 n d^2 of a QR when d is beyond about 100
      and n many times d.

    Numerics: A^T A is not formed. The error is that of a QR, about eps kappa (1 + kappa ||r|| / (||A|| ||x||)), kappa
      the condition number of A; without the start from the sketch it would be larger.

    Derivatives: with respect to A and b, implicit; the sketch carries none.

    Source: Rokhlin & Tygert, "A fast randomized algorithm for overdetermined linear least-squares regression" (2008);
      Avron, Maymounkov & Toledo, "Blendenpik" (2010), section 3; Meier, Nakatsukasa, Townsend & Webb, "Are sketch-and-
      precondition least squares solvers numerically stable?" (2024).

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> A = jnp.vander(jnp.linspace(0.0, 1.0, 50), 2)
      >>> jaxnum.solvers.sketched_least_squares(jax.random.key(0), A, A @ jnp.ones(2)).x.round(3).tolist()
      [1.0, 1.0]
    """
    name = "sketched_least_squares"
    checks.arrays(name, A=A, b=b)
    A, b = jnp.asarray(A), jnp.asarray(b)
    checks.shape(name, A=(A, "N D"), b=(b, "N"))
    checks.dtype(name, "floating", A=A)
    checks.same_dtype(name, A=A, b=b)
    checks.choice(name, "kind", kind, KINDS)
    n, d = A.shape
    checks.value(name, "A", n >= d, "have as many rows as columns", A.shape)
    checks.value(name, "A", d >= 1, "have a column", A.shape)
    rows = min(4 * d, n) if rows is None else rows
    ok = isinstance(rows, int) and not isinstance(rows, bool) and d <= rows <= n
    checks.value(name, "rows", ok, f"be a Python int in [d, n] = [{d}, {n}]", rows)
    x0, R, full = jax.lax.stop_gradient(_sketched(key, A, b, rows, kind))
    problem = Linear(lambda z: _normal(A, R, z), _gradient(A, R, b - _product(A, x0)))
    options: dict[str, Any] = {"rtol": rtol, "max_steps": max_steps, "history": history, "on_failure": "return"}
    inner = solve(cg(), jnp.zeros_like(x0), problem, **options)
    status = jnp.where(full, inner.status, jnp.int32(Status.breakdown))
    solution = inner._replace(x=x0 + _triangular(R, inner.x), status=status)
    if on_failure == "raise":
        raise_unless_converged(name, solution)
    return solution


@partial(jax.jit, static_argnames=("rows", "kind"))
def _sketched(key: jax.Array, A: jax.Array, b: jax.Array, rows: int, kind: str) -> tuple:
    """The solution of the sketched problem, its R, and whether that has full rank; the identity where it has not."""
    whole = jnp.concatenate([A, b[:, None]], axis=1)
    # As many rows as A has are best left as they are.
    made = whole if rows == A.shape[0] else sketch(key, whole, rows, kind=kind)
    Q, R = jnp.linalg.qr(made[:, :-1])
    diagonal = jnp.abs(jnp.diagonal(R))
    full = jnp.min(diagonal) > R.shape[0] * jnp.finfo(A.dtype).eps * jnp.max(diagonal)
    R = jnp.where(full, R, jnp.eye(R.shape[0], dtype=R.dtype))
    return _triangular(R, _product(Q.T, made[:, -1])), R, full


def _normal(A: jax.Array, R: jax.Array, z: jax.Array) -> jax.Array:
    """B^T B z."""
    return _gradient(A, R, _product(A, _triangular(R, z)))


def _gradient(A: jax.Array, R: jax.Array, r: jax.Array) -> jax.Array:
    """B^T r."""
    return _triangular(R, _product(A.T, r), trans=1)


def _triangular(R: jax.Array, v: jax.Array, trans: int = 0) -> jax.Array:
    return jax.scipy.linalg.solve_triangular(R, v, trans=trans)


def _product(A: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.matmul(A, v, precision="highest")
