"""Newton-Schulz iteration: inverses, pseudo-inverses and least squares from matrix products alone.

Cost: two products of the size of A M a step, three at order 3; memory 4 arrays like A.
Source: Schulz 1933; Ben-Israel & Cohen 1966; as regression in context: Fu, Chen, Jia & Sharan 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.batched import raise_unless_all_converged, solve_batched
from jaxnum.core.problem import Problem
from jaxnum.core.solver import Defaults, Measure, Solution, Solver, raise_unless_converged, solve
from jaxnum.core.status import Status
from kernels_pallas import checks

# At 2 one error keeps the size 1 for ever, beyond it the iteration diverges.
_SAFE = 1.9
# While small singular values grow the correction need not shrink: for log2(kappa) steps, of which float64 has 53.
_PATIENCE = 55


class NewtonSchulzState(NamedTuple):
    """What the next step starts from.

    Attributes:
      correction: E M with E = I - M A, which order 2 adds to M.
      product: M A or A M, whichever is smaller.
      residual: Frobenius norm of the correction.
      scale: Frobenius norm of M.
      best: the least residual / scale so far.
      waited: steps since.
    """

    correction: jax.Array
    product: jax.Array
    residual: jax.Array
    scale: jax.Array
    best: jax.Array
    waited: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["A"], meta_fields=["symmetric"])
@dataclass(frozen=True)
class _Inverse(Problem):
    """Find the pseudo-inverse of A [n, d]; where A is symmetric, so is every iterate."""

    A: Any
    symmetric: bool = False


def newton_schulz(
    A: jax.Array,
    *,
    order: int = 2,
    symmetric: bool = False,
    rtol: Any = None,
    max_steps: int = 100,
    history: bool = False,
    on_failure: str = "raise",
) -> Solution:
    """Inverse or pseudo-inverse of A by M <- M + E M, E = I - M A (order 3: M + E M + E^2 M).

    E becomes E^2 (E^3) each step. From M = alpha A^T with alpha = 1.9 / (||A||_1 ||A||_inf), below the bound
    2 / ||A||_2^2, an error 1 - alpha sigma^2 needs about 2 log2(kappa) + log2 log2(1/rtol) steps at order 2, kappa the
    condition number of A.

    Args:
      A: [..., n, d], floating point; leading axes are a batch of separate solves.
      order: 2 or 3. Order 3 takes 0.63 of the steps with 1.5x the products a step.
      symmetric: A is symmetric, and every iterate is made so.
      rtol: stop at ||E M||_F <= rtol ||M||_F, which is the relative error of M. Default 1e-8 (float64), 1e-5 (float32).
      max_steps: Python int >= 0.
      history: record the residual at every step.
      on_failure: "raise" or "return"; see `jaxnum.solve`.

    Returns:
      A `Solution` with x [..., d, n]. `stagnated`: no better for 55 steps, as in float32 from kappa = 1e3 on.

    Raises:
      ValueError: order is neither 2 nor 3, A has no entry, or symmetric with n != d.
      ShapeError, DtypeError: A is not a real matrix.
      SolverError: an eager call that did not converge.

    Cost: two products n d min(n, d) a step.

    Numerics: the error attainable is about eps kappa. Singular values below about rtol sigma_1 count as zero. In a
      direction that A does not have, rounding doubles every step, so that M leaves the pseudo-inverse of a
      rank-deficient A again after about log2(1/eps) steps: the loop stops before.

    Derivatives: dM = -M dA M + M M^T dA^T (I - A M) + (I - M A) dA^T M^T M, any order and mode, none of it through the
      loop. It is that of the pseudo-inverse as long as the rank stays.

    Source: Schulz (1933); Ben-Israel & Cohen, "On iterative computation of generalized inverses and associated
      projections" (1966); the derivative: Golub & Pereyra (1973), equation 4.12.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> jaxnum.solvers.newton_schulz(jnp.array([[2.0, 0.0], [0.0, 4.0]])).x.round(4).tolist()
      [[0.5, 0.0], [0.0, 0.25]]
    """
    checks.arrays("newton_schulz", A=A)
    A = jnp.asarray(A)
    checks.shape("newton_schulz", A=(A, "*B N D"))
    checks.dtype("newton_schulz", "floating", A=A)
    checks.choice("newton_schulz", "order", order, (2, 3))
    checks.value("newton_schulz", "A", min(A.shape[-2:]) >= 1, "have a row and a column", A.shape)
    square = A.shape[-1] == A.shape[-2]
    checks.value("newton_schulz", "symmetric", square or not symmetric, "be False for a rectangular A", symmetric)
    solver = Solver(
        name="newton_schulz",
        init=_init,
        step=_step if order == 2 else _step_of_order_3,
        measure=_measure,
        problem=_Inverse,
        defaults=Defaults(max_steps=100),
    )
    options: dict[str, Any] = {"rtol": rtol, "max_steps": max_steps, "history": history, "on_failure": on_failure}
    if A.ndim == 2:
        solution = solve(solver, _start(A), _Inverse(A, symmetric), adjoint="none", **options)
    else:
        lanes = A.reshape(-1, *A.shape[-2:])
        flat = solve_batched(solver, jax.vmap(_start)(lanes), _Inverse(lanes, symmetric), adjoint="none", **options)
        solution = jax.tree.map(lambda leaf: leaf.reshape(*A.shape[:-2], *leaf.shape[1:]), flat)
    return solution._replace(x=_pseudo_inverse(A, jax.lax.stop_gradient(solution.x)))


def newton_schulz_regression(
    X: jax.Array,
    y: jax.Array,
    *,
    order: int = 2,
    rtol: Any = None,
    max_steps: int = 100,
    on_failure: str = "raise",
) -> Solution:
    """Least squares weights w_k = M_k X^T y, M_k the iterates of `newton_schulz` for X^T X.

    The probe of in-context regression: w_k is what k steps of the iteration make of the examples, for which
    `max_steps=k` and `on_failure="return"` are given. For the least error take `sketched_least_squares` or a QR: X^T X
    squares the condition number.

    Args:
      X: examples [..., n, d], floating point.
      y: targets [..., n].
      order: see `newton_schulz`.
      rtol: relative tolerance for M; see `newton_schulz`.
      max_steps: Python int >= 0.
      on_failure: "raise" or "return"; see `jaxnum.solve`.

    Returns:
      The `Solution` of the inverse with x = w [..., d] in its place; `nonfinite` where y makes w so.

    Raises: see `newton_schulz`; ShapeError, DtypeError: y does not fit X.

    Cost: n d^2 once and 2 d^3 a step. Steps: 4 log2 of the condition number of X.

    Source: Fu, Chen, Jia & Sharan, "Transformers learn to achieve second-order convergence rates for in-context linear
      regression" (2023), section 3.2.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> X = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
      >>> jaxnum.solvers.newton_schulz_regression(X, jnp.array([1.0, 3.0, 5.0])).x.round(2).tolist()
      [1.0, 2.0]
    """
    name = "newton_schulz_regression"
    checks.arrays(name, X=X, y=y)
    X, y = jnp.asarray(X), jnp.asarray(y)
    checks.shape(name, X=(X, "*B N D"), y=(y, "*B N"))
    checks.same_dtype(name, X=X, y=y)
    product = partial(jnp.matmul, precision="highest")
    S = product(X.mT, X)
    solution = newton_schulz(S, order=order, symmetric=True, rtol=rtol, max_steps=max_steps, on_failure="return")
    w = product(solution.x, product(X.mT, y[..., None]))[..., 0]
    # The inverse does not see y.
    lost = (solution.status == Status.converged) & ~jnp.all(jnp.isfinite(w), axis=-1)
    solution = solution._replace(x=w, status=jnp.where(lost, jnp.int32(Status.nonfinite), solution.status))
    if on_failure == "raise":
        (raise_unless_converged if X.ndim == 2 else raise_unless_all_converged)(name, solution)
    return solution


def _start(A: jax.Array) -> jax.Array:
    """alpha A^T. Divided by one norm after the other, so that their product cannot overflow."""
    one, infinity = (jnp.max(jnp.sum(jnp.abs(A), axis)) for axis in (0, 1))
    safe = lambda size: jnp.where(size > 0, size, 1)  # noqa: E731
    return A.T / safe(one) * (_SAFE / safe(infinity)).astype(A.dtype)


def _init(hyper: None, M: jax.Array, problem: _Inverse) -> NewtonSchulzState:
    return _look(M, jnp.full((), jnp.inf, precision.accumulator(M.dtype)), jnp.int32(0), problem)


def _step(hyper: None, M: jax.Array, state: NewtonSchulzState, problem: _Inverse) -> tuple:
    return _turn(M + state.correction, state, problem)


def _step_of_order_3(hyper: None, M: jax.Array, state: NewtonSchulzState, problem: _Inverse) -> tuple:
    return _turn(M + state.correction + _corrected(state.correction, state.product, problem), state, problem)


def _turn(M: jax.Array, state: NewtonSchulzState, problem: _Inverse) -> tuple[jax.Array, NewtonSchulzState]:
    M = (M + M.T) / 2 if problem.symmetric else M
    return M, _look(M, state.best, state.waited + 1, problem)


def _look(M: jax.Array, best: jax.Array, waited: jax.Array, problem: _Inverse) -> NewtonSchulzState:
    product = jnp.matmul(*((M, problem.A) if M.shape[0] <= M.shape[1] else (problem.A, M)), precision="highest")
    correction = _corrected(M, product, problem)
    residual, scale = trees.safe_norm(correction), trees.safe_norm(M)
    ratio = residual / jnp.where(scale > 0, scale, 1)
    return NewtonSchulzState(
        correction, product, residual, scale, jnp.minimum(best, ratio), jnp.where(ratio < best, 0, waited)
    )


def _corrected(N: jax.Array, product: jax.Array, problem: _Inverse) -> jax.Array:
    """(I - M A) N or N (I - A M), which are equal for every N that the iteration makes."""
    left = N.shape[0] <= N.shape[1]
    return N - jnp.matmul(*((product, N) if left else (N, product)), precision="highest")


def _measure(hyper: None, M: jax.Array, state: NewtonSchulzState, problem: _Inverse) -> Measure:
    flag = jnp.where(state.waited >= _PATIENCE, jnp.int32(Status.stagnated), jnp.int32(0))
    return Measure(state.residual, state.scale, flag)


@jax.custom_jvp
def _pseudo_inverse(A: jax.Array, M: jax.Array) -> jax.Array:
    return M


@_pseudo_inverse.defjvp
def _pseudo_inverse_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    A, M = primals
    # The recursion makes M depend on A inside the rule too: that is the second derivative.
    M, dA = _pseudo_inverse(A, M), tangents[0]
    product = partial(jnp.matmul, precision="highest")
    right = product(dA.mT, jnp.eye(A.shape[-2], dtype=A.dtype) - product(A, M))
    left = product(jnp.eye(A.shape[-1], dtype=A.dtype) - product(M, A), dA.mT)
    dM = product(product(M, M.mT), right) + product(left, product(M.mT, M)) - product(product(M, dA), M)
    return M, dM
