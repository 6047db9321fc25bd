"""MINRES: scipy's iterates, indefinite and singular systems, the derivative of an indefinite system."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg as spla

import jaxnum
from jaxnum import Linear, Status
from jaxnum.core.loops import begin
from jaxnum.solvers import minres
from tests.tolerances import tolerance


def indefinite(n, kappa, seed=0):
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    d = np.geomspace(1, kappa, n) * np.where(np.arange(n) % 3 == 0, -1, 1)
    A = Q * d @ Q.T
    return (A + A.T) / 2


def solved(A, b, **options):
    return jaxnum.linear_solve(A, b, solver=minres(), symmetric="indefinite", **options)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_iterates_equal_scipy(preconditioned, x64):
    A, b = indefinite(60, 20), np.random.default_rng(1).normal(size=60)
    M = np.diag(1 + np.random.default_rng(2).uniform(size=60)) if preconditioned else None
    seen = []
    spla.minres(A, b, rtol=1e-15, maxiter=20, M=M, callback=lambda x: seen.append(x.copy()))
    problem = Linear(jnp.asarray(A), jnp.asarray(b), None if M is None else jnp.asarray(M), symmetric="indefinite")
    solver, x = minres(), jnp.zeros(60)

    def body(pair, _):
        pair = solver.step(None, *pair, problem)
        return pair, (pair[0], pair[1].r)

    xs, rs = jax.lax.scan(body, (x, begin(solver, x, problem)), None, length=20)[1]
    np.testing.assert_allclose(xs, np.stack(seen), atol=1e-8)
    np.testing.assert_allclose(rs, b - xs @ A, atol=tolerance("float64", 60, condition=1e3))


def test_solution_and_status(float_dtype):
    A, b = indefinite(50, 10), np.ones(50)
    rtol = 1e-10 if float_dtype == "float64" else 1e-5
    solution = solved(jnp.asarray(A, float_dtype), jnp.asarray(b, float_dtype), rtol=rtol)
    np.testing.assert_allclose(solution.x, np.linalg.solve(A, b), atol=20 * rtol)
    assert solution.x.dtype == float_dtype
    # The projection of a preconditioner that is not positive cannot be a metric.
    bad = solved(
        jnp.asarray(A, float_dtype),
        jnp.ones(50, float_dtype),
        preconditioner=jnp.asarray(-np.eye(50), float_dtype),
        on_failure="return",
    )
    assert int(bad.status) == Status.breakdown


def test_singular_systems(x64):
    """Consistent: the least-norm solution without a null space; inconsistent: a status, not an answer."""
    A = indefinite(30, 5)
    d, Q = np.linalg.eigh(A)
    d[7] = 0
    A = Q * d @ Q.T
    A = jnp.asarray((A + A.T) / 2)
    b = A @ np.random.default_rng(3).normal(size=30)
    basis = jnp.asarray(Q[:, 7][None])
    want = np.linalg.pinv(A, rcond=1e-10) @ b
    for null_space in (None, basis):
        np.testing.assert_allclose(solved(A, b, null_space=null_space, rtol=1e-11).x, want, atol=1e-9)
        wrong = solved(A, b + basis[0], null_space=null_space, rtol=1e-11, on_failure="return", max_steps=500)
        known = (Status.infeasible,) if null_space is not None else (Status.infeasible, Status.stagnated)
        assert int(wrong.status) in known


def test_an_infeasible_system_ends_at_its_least_squares_solution(float_dtype):
    """Not a step later, which would go along a null vector without bound."""
    for A, residual in ((np.diag([1.0, 2.0, 0.0, 3.0, 4.0]), 1.0), (np.zeros((5, 5)), 5**0.5)):
        solution = solved(jnp.asarray(A, float_dtype), jnp.ones(5, float_dtype), on_failure="return")
        assert int(solution.status) == Status.infeasible
        np.testing.assert_allclose(solution.residual, residual, rtol=tolerance(float_dtype, 5))
        np.testing.assert_allclose(A @ A @ solution.x, A @ np.ones(5), atol=tolerance(float_dtype, 5, condition=100))


@pytest.mark.parametrize("n", [40, 300])
def test_gradient_of_an_indefinite_system(n, x64):
    """Below 256 unknowns the tangent is solved by LU, above by MINRES."""
    A, b = jnp.asarray(indefinite(n, 10)), jnp.asarray(np.random.default_rng(5).normal(size=n))
    loss = lambda x: jnp.sum(jnp.sin(x))  # noqa: E731
    ours = jax.grad(lambda A, b: loss(solved(A, b, rtol=1e-12).x), (0, 1))(A, b)
    dense = jax.grad(lambda A, b: loss(jnp.linalg.solve(A, b)), (0, 1))(A, b)
    for got, want in zip(ours, dense, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance("float64", n, condition=1e4))


def test_hermitian_system(x64):
    rng = np.random.default_rng(6)
    G = rng.normal(size=(8, 8)) + 1j * rng.normal(size=(8, 8))
    A, b = jnp.asarray(G + G.conj().T), jnp.asarray(rng.normal(size=8) + 1j * rng.normal(size=8))
    np.testing.assert_allclose(solved(A, b, rtol=1e-12).x, jnp.linalg.solve(A, b), atol=1e-10)


def test_symmetric_must_be_known():
    with pytest.raises(ValueError, match="linear_solve: `symmetric` must be one of True, False, 'indefinite'"):
        jaxnum.linear_solve(jnp.eye(2), jnp.ones(2), symmetric="yes")


def test_a_matrix_that_is_not_symmetric_is_a_breakdown(x64):
    A = jnp.asarray(np.random.default_rng(0).normal(size=(20, 20)))
    solution = jaxnum.linear_solve(
        A, jnp.ones(20), solver=jaxnum.solvers.minres(), symmetric="indefinite", on_failure="return"
    )
    assert int(solution.status) == jaxnum.Status.breakdown


def test_a_function_that_is_not_symmetric_is_found_on_request(x64):
    A = jnp.asarray(indefinite(20, 5))
    for M, status in ((A, Status.converged), (A.at[3, 4].add(0.5), Status.breakdown)):
        problem = Linear(lambda v: M @ v, jnp.ones(20), symmetric="indefinite")  # noqa: B023
        solution = jaxnum.solve(minres(verify_symmetry=True), jnp.zeros(20), problem, on_failure="return")
        assert int(solution.status) == status
    with pytest.raises(ValueError, match="minres: `verify_symmetry` must be a Python bool"):
        minres(verify_symmetry=1)
