"""Variance-reduced Halpern: deterministic when it never guesses, unbiased when it does, and it counts every term."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import jaxnum
from jaxnum import FiniteSum
from jaxnum.solvers import resolvents, restarted, vr_halpern
from tests.solvers.monotone_problems import driven
from tests.tolerances import tolerance


def rows(n=60, d=4, seed=0):
    """Least squares with unit rows: L = 1 on average."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, d)) / np.arange(1, d + 1)
    A /= np.linalg.norm(A, axis=1, keepdims=True)
    return A, A @ rng.normal(size=d) + 0.1 * rng.normal(size=n)


def least_squares(A, b, resolvent=None):
    A, b = jnp.asarray(A), jnp.asarray(b)
    terms = lambda u, i, A, b: A[i].T @ (A[i] @ u - b[i]) / i.size  # noqa: E731
    return FiniteSum(terms, len(b), (A, b), resolvent)


@pytest.mark.parametrize("constrained", [False, True])
def test_refresh_at_every_step_is_the_deterministic_iteration(constrained, key, x64):
    A, b = rows()
    u0 = u = np.full(4, 0.1)
    for k in range(30):
        weight = 2 / (k + 4)
        u = weight * u0 + (1 - weight) * u - 0.5 * (1 - weight) * (A.T @ (A @ u - b)) / 60
        u = np.clip(u, -0.2, 0.2) if constrained else u
    problem = least_squares(A, b, resolvents.box(-0.2, 0.2) if constrained else None)
    x, state, residual = driven(vr_halpern(key, 1.0, refresh=1.0), problem, jnp.asarray(u0), [30])[0]
    np.testing.assert_allclose(x, u, atol=1e-12)
    assert int(state.calls) == 60 * 31
    if not constrained:
        np.testing.assert_allclose(residual, np.linalg.norm(A.T @ (A @ u - b)) / 60, rtol=1e-12)


def test_estimate_is_unbiased(key, x64):
    A, b = rows()
    problem = least_squares(A, b)

    def bias(key):
        x, state, _ = driven(vr_halpern(key, 1.0, refresh=0.3, batch=3), problem, jnp.zeros(4), [6])[0]
        return state.estimate - problem.operator(x)

    errors = np.asarray(jax.jit(jax.vmap(bias))(jax.random.split(key, 400)))
    assert np.any(errors != 0)
    assert np.all(np.abs(errors.mean(0)) <= 4 * errors.std(0) / np.sqrt(400))


def test_every_evaluation_is_counted_and_the_exit_is_exact(key, x64):
    A, b = rows(400)
    rows_, targets = jnp.asarray(A), jnp.asarray(b)
    seen = Counter()

    def terms(u, i):
        jax.debug.callback(lambda: seen.update(terms=i.size))
        return rows_[i].T @ (rows_[i] @ u - targets[i]) / i.size

    solution = jaxnum.solve(
        vr_halpern(key, 1.0), jnp.zeros(4), FiniteSum(terms, 400), rtol=0.0, atol=3e-3, adjoint="none"
    )
    jax.effects_barrier()
    assert int(solution.state.calls) == seen["terms"]
    assert int(solution.state.calls) < 400 * (1 + int(solution.steps))
    exact = np.linalg.norm(A.T @ (A @ solution.x - b)) / 400
    np.testing.assert_allclose(solution.residual, exact, rtol=tolerance("float64", 400, condition=1e4))
    assert exact <= 3e-3


def test_late_looks_return_the_point_of_the_residual(key, x64):
    A, b = rows(400)
    options = {"rtol": 0.0, "atol": 3e-3, "check_every": 7}
    solution = jaxnum.solve(vr_halpern(key, 1.0), jnp.zeros(4), least_squares(A, b), **options)
    exact = np.linalg.norm(A.T @ (A @ solution.x - b)) / 400
    np.testing.assert_allclose(solution.residual, exact, rtol=tolerance("float64", 400, condition=1e4))


def test_box_constrained_fit_and_its_derivative(key, x64):
    A, b = rows()
    exact = scipy.optimize.lsq_linear(A, b, (-0.3, 0.3), tol=1e-14).x
    solver = restarted(vr_halpern(key, 1.0, refresh=1.0, step=0.9))

    def fit(b, bound):
        problem = least_squares(A, b, resolvents.box(-bound, bound))
        return jaxnum.solve(solver, jnp.zeros(4), problem, rtol=1e-10).x

    fit = jax.jit(fit)
    np.testing.assert_allclose(fit(b, 0.3), exact, atol=1e-7)
    slopes = jax.jit(jax.jacfwd(fit, (0, 1)))(jnp.asarray(b), 0.3)
    step = 1e-4 * np.random.default_rng(1).normal(size=60)
    numeric = (fit(b + step, 0.3) - fit(b - step, 0.3)) / 2
    np.testing.assert_allclose(slopes[0] @ step, numeric, atol=1e-8)
    numeric = (fit(b, 0.3001) - fit(b, 0.2999)) / 2e-4
    np.testing.assert_allclose(slopes[1], numeric, atol=1e-4)


def test_other_batches_give_the_same_mean(x64):
    A, b = rows()
    problem = least_squares(A, b)
    u, chosen = jnp.arange(4.0), jnp.array([3, 3, 7, 50, 1])
    np.testing.assert_allclose(
        problem.traced(u).mean(u, chosen), problem.mean(u, chosen), atol=tolerance("float64", 60)
    )


def test_a_wrong_constant_ends_with_a_status_and_the_last_finite_x(key, x64):
    A, b = rows()
    solution = jaxnum.solve(vr_halpern(key, 0.05), jnp.ones(4), least_squares(A, b), on_failure="return")
    assert int(solution.status) == jaxnum.Status.nonfinite
    assert np.all(np.isfinite(solution.x))


def test_arguments_outside_their_range(key):
    with pytest.raises(TypeError, match="vr_halpern: `key` must be a typed key; got .*jax.random.key"):
        vr_halpern(0, 1.0)
    with pytest.raises(ValueError, match="vr_halpern: `lipschitz` must be a finite real number > 0; got"):
        vr_halpern(key, 0.0)
    with pytest.raises(ValueError, match="vr_halpern: `batch` must be None or a Python int >= 1; got 0"):
        vr_halpern(key, 1.0, batch=0)
    with pytest.raises(ValueError, match=r"vr_halpern: `refresh` must be in \(0, 1\]; got"):
        vr_halpern(key, 1.0, refresh=1.5)
