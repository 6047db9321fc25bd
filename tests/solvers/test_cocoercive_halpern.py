"""Anchored forward-backward: exact worst cases, the bound under constraints, the search, scipy's constrained fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import jaxnum
from jaxnum import Inclusion, Status
from jaxnum.solvers import cocoercive_halpern, resolvents, restarted
from tests.solvers.monotone_problems import driven, residuals


@pytest.mark.parametrize("lipschitz", [1.0, 3.0])
def test_linear_and_huber_forces_meet_the_bound_with_equality(lipschitz, x64):
    counts = np.array([10, 50, 200])
    got = residuals(cocoercive_halpern(lipschitz), Inclusion(lambda x: lipschitz * x), jnp.ones(1), counts)
    np.testing.assert_allclose(got * (counts + 1) / lipschitz, 1, atol=1e-12)
    for count in (3, 10, 51):
        c = 1 / (count + 1)
        huber = Inclusion(lambda x, c=c: lipschitz * jnp.clip(x, -c, c))
        got = residuals(cocoercive_halpern(lipschitz), huber, jnp.ones(1), [count])
        np.testing.assert_allclose(got * (count + 1) / lipschitz, 1, atol=1e-12)


def fit(seed=0, m=12, n=6):
    rng = np.random.default_rng(seed)
    A, b = rng.normal(size=(m, n)), rng.normal(size=m)
    return A, b, np.linalg.norm(A, 2) ** 2


def test_constrained_bound_holds_along_the_way(x64):
    A, b, L = fit()
    exact = scipy.optimize.lsq_linear(A, b, (-0.1, 0.1), tol=1e-14).x
    problem = Inclusion(lambda x: A.T @ (A @ x - b), resolvents.box(-0.1, 0.1))
    counts = np.array([1, 2, 3, 10, 50, 500])
    got = residuals(cocoercive_halpern(L), problem, jnp.full(6, 0.1), counts)
    distance = np.linalg.norm(exact - 0.1)
    assert np.all(got <= L * distance / (counts + 1) * (1 + 1e-9))


def test_search_keeps_the_bound_with_its_last_estimate(x64):
    A, b, L = fit()
    exact = np.linalg.lstsq(A, b, rcond=None)[0]
    problem, counts = Inclusion(lambda x: A.T @ (A @ x - b)), np.array([10, 50, 500, 2000])
    for (x, state, residual), count in zip(
        driven(cocoercive_halpern(), problem, jnp.zeros(6), counts), counts, strict=True
    ):
        taken = float(state.phi) - 1
        assert state.lipschitz <= 2 * L
        assert count - taken <= 8
        assert residual <= state.lipschitz * np.linalg.norm(exact) / taken
        np.testing.assert_allclose(residual, np.linalg.norm(A.T @ (A @ x - b)), rtol=1e-6)


def test_restarted_search_solves_nonnegative_least_squares(x64):
    A, b, _ = fit(1)
    exact, _ = scipy.optimize.nnls(A, b)
    solver = restarted(cocoercive_halpern())
    force = lambda x: A.T @ (A @ x - b)  # noqa: E731
    solution = jaxnum.inclusion(force, jnp.zeros(6), resolvent=resolvents.nonnegative(), solver=solver)
    np.testing.assert_allclose(solution.x, exact, atol=1e-6)
    assert np.all(np.asarray(solution.x) >= 0)


def test_what_is_not_cocoercive_breaks_down(x64):
    for dtype in (jnp.float64, jnp.float32):
        turn = lambda z: jnp.stack([z[1], -z[0]])  # noqa: E731
        solution = jaxnum.inclusion(turn, jnp.ones(2, dtype), solver=cocoercive_halpern(), on_failure="return")
        assert int(solution.status) == Status.breakdown
        assert np.all(np.isfinite(solution.x))


def test_a_wrong_constant_ends_with_a_status_and_the_last_finite_x(x64):
    solution = jaxnum.inclusion(lambda x: 4 * x, jnp.ones(2), solver=cocoercive_halpern(1.0), on_failure="return")
    assert int(solution.status) == Status.nonfinite
    assert np.all(np.isfinite(solution.x))


def test_search_starts_where_the_force_vanishes(x64):
    # F(x0) = 0 says nothing about L, and 0 is no solution: G pulls to 1.
    solver = restarted(cocoercive_halpern())
    solution = jaxnum.inclusion(lambda x: 5 * x, jnp.zeros(3), resolvent=resolvents.box(1.0, 2.0), solver=solver)
    np.testing.assert_allclose(solution.x, 1, atol=1e-8)


def test_lanes_search_for_themselves(x64):
    stiffness = jnp.array([0.1, 1.0, 50.0])
    solve = lambda s: jaxnum.inclusion(lambda x: s * (x - 1), jnp.zeros(2), solver=restarted(cocoercive_halpern()))  # noqa: E731
    np.testing.assert_allclose(jax.vmap(lambda s: solve(s).x)(stiffness), 1, atol=1e-7)


def test_constant_outside_its_range():
    with pytest.raises(ValueError, match="cocoercive_halpern: `lipschitz` must be a finite real number > 0, or None"):
        cocoercive_halpern(-1.0)
