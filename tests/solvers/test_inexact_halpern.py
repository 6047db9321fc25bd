"""Inexact Halpern: resolvents as exact as it says, games that go round in circles, and every term counted."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import FiniteSum
from jaxnum.solvers import inexact_halpern, resolvents, restarted
from jaxnum.solvers.monotone import _inexact_halpern
from tests.tolerances import tolerance


def games(n=100, half=10, seed=0):
    """Bilinear terms F_i(x, y) = (M_i y, -M_i^T x) + c_i with L = 1 on average: monotone, not cocoercive."""
    rng = np.random.default_rng(seed)
    M = rng.normal(size=(n, half, half))
    B = np.zeros((n, 2 * half, 2 * half))
    B[:, :half, half:], B[:, half:, :half] = M, -M.transpose(0, 2, 1)
    B /= np.sqrt(np.linalg.norm(np.mean(B.transpose(0, 2, 1) @ B, axis=0), 2))
    return B, rng.normal(size=(n, 2 * half)) / np.sqrt(2 * half)


def terms(u, i, B, c):
    return jnp.mean(B[i], axis=0) @ u + jnp.mean(c[i], axis=0)


def summed(B, c, resolvent=None):
    return FiniteSum(terms, len(B), (jnp.asarray(B), jnp.asarray(c)), resolvent)


@partial(jax.jit, static_argnames=("box",))
def inner(solver, u, count, problem_args, box=None):
    problem = summed(*problem_args, resolvents.box(-box, box) if box else None).traced(u)
    return _inexact_halpern._resolvent(solver.hyper, u, count, solver.hyper.key, problem)


@pytest.mark.parametrize("step", [0.1, 1.0])
def test_the_inner_solver_against_a_dense_solve(step, key, x64):
    B, c = games()
    u = np.random.default_rng(1).normal(size=20)
    eta = step * np.sqrt(100)
    exact = np.linalg.solve(np.eye(20) + eta * B.mean(0), u - eta * c.mean(0))
    for count in (0.0, 30.0, 1e3):
        found = inner(inexact_halpern(key, 1.0, step=step), jnp.asarray(u), jnp.asarray(count), (B, c))
        bound = 0.1 * np.linalg.norm(u - found.w) / (count + 2) ** 2
        assert float(found.residual) <= bound
        assert np.linalg.norm(found.w - exact) <= bound
        force = B.mean(0) @ found.w + c.mean(0)
        np.testing.assert_allclose(found.value, np.linalg.norm(force), rtol=tolerance("float64", 2000, condition=100))


def test_the_inner_solver_in_a_box_against_projected_steps(key, x64):
    B, c = games(20, 3)
    u, eta = np.random.default_rng(1).normal(size=6), np.sqrt(20)
    exact = np.zeros(6)
    for _ in range(5000):  # extragradient on a strongly monotone equation
        middle = np.clip(exact - 0.1 * (eta * (B.mean(0) @ exact + c.mean(0)) + exact - u), -0.3, 0.3)
        exact = np.clip(exact - 0.1 * (eta * (B.mean(0) @ middle + c.mean(0)) + middle - u), -0.3, 0.3)
    assert 0 < np.sum(np.abs(exact) == 0.3) < 6
    found = inner(inexact_halpern(key, 1.0), jnp.asarray(u), jnp.asarray(1e3), (B, c), box=0.3)
    assert float(found.residual) <= float(found.bound)
    assert np.linalg.norm(found.w - exact) <= float(found.residual) + 1e-12


def test_a_game_that_turns(key, x64):
    B, c = games(20, 3)
    exact = np.linalg.solve(B.mean(0), -c.mean(0))
    options = {"rtol": 0.0, "atol": 3e-2, "history": True, "max_steps": 500}
    solution = jaxnum.solve(inexact_halpern(key, 1.0), jnp.zeros(6), summed(B, c), **options)
    force = np.linalg.norm(B.mean(0) @ solution.x + c.mean(0))
    np.testing.assert_allclose(solution.residual, force, rtol=tolerance("float64", 600, condition=1e4))
    assert force <= 3e-2
    assert np.linalg.norm(solution.x - exact) <= 3e-2 / np.linalg.svd(B.mean(0), compute_uv=False)[-1]
    # ||u_k - J(u_k)|| <= 2 ||u_0 - x*|| / (k + 1) holds with exact resolvents; these are nearly so.
    steps = np.arange(int(solution.steps) + 1)
    bound = 2 * np.linalg.norm(exact) / (np.sqrt(20) * (steps + 1))
    assert np.all(np.asarray(solution.history)[steps] <= 1.1 * bound)


def test_a_game_in_a_box_and_its_derivative(key, x64):
    B, c = games(20, 3)
    solver = restarted(inexact_halpern(key, 1.0))

    def solve(c, bound):
        return jaxnum.solve(solver, jnp.zeros(6), summed(B, c, resolvents.box(-bound, bound)), rtol=1e-8).x

    solve = jax.jit(solve)
    x = np.asarray(solve(c, 0.3))
    assert 0 < np.sum(np.abs(x) == 0.3) < 6
    np.testing.assert_allclose(x, np.clip(x - B.mean(0) @ x - c.mean(0), -0.3, 0.3), atol=1e-7)
    step = 1e-3 * np.random.default_rng(1).normal(size=c.shape)
    slope = jax.jit(lambda c, step: jax.jvp(lambda c: solve(c, 0.3), (c,), (step,))[1])(jnp.asarray(c), step)
    numeric = (solve(c + step, 0.3) - solve(c - step, 0.3)) / 2
    np.testing.assert_allclose(slope, numeric, atol=1e-6)


def test_every_evaluation_is_counted(key, x64):
    B, c = (jnp.asarray(leaf) for leaf in games(20, 3))
    seen = Counter()

    def counted(u, i):
        jax.debug.callback(lambda: seen.update(terms=i.size))
        return terms(u, i, B, c)

    solution = jaxnum.solve(
        inexact_halpern(key, 1.0), jnp.zeros(6), FiniteSum(counted, 20), rtol=0.0, atol=2e-1, adjoint="none"
    )
    jax.effects_barrier()
    assert int(solution.state.calls) == seen["terms"]


def test_lanes_equal_separate_solves(key, x64):
    B, c = games(20, 3)
    solver = inexact_halpern(key, 1.0)

    @jax.jit
    def solve(c):
        solution = jaxnum.solve(solver, jnp.zeros(6), summed(B, c), rtol=0.0, atol=1e-1)
        return solution.x, solution.state.calls, solution.status

    lanes = jnp.asarray(np.stack([c, 2 * c]))
    x, calls, status = jax.jit(jax.vmap(solve))(lanes)
    assert np.all(status == jaxnum.Status.converged)
    for lane in range(2):
        alone = solve(lanes[lane])
        assert int(calls[lane]) == int(alone[1])
        np.testing.assert_allclose(x[lane], alone[0], atol=tolerance("float64", 6, condition=1e4))


def test_float32_is_honest(key):
    B, c = games(20, 3)
    problem = summed(jnp.asarray(B, jnp.float32), jnp.asarray(c, jnp.float32))
    solution = jaxnum.solve(inexact_halpern(key, 1.0), jnp.zeros(6), problem, rtol=0.0, atol=1e-1)
    assert solution.x.dtype == jnp.float32
    force = np.linalg.norm(B.mean(0) @ solution.x + c.mean(0))
    np.testing.assert_allclose(solution.residual, force, rtol=tolerance("float32", 120, condition=30))


def test_trouble_ends_with_a_status(key, x64):
    B, c = games(20, 3)
    options = {"rtol": 0.0, "atol": 1e-6, "on_failure": "return"}
    short = jaxnum.solve(inexact_halpern(key, 1.0, inner_limit=1), jnp.zeros(6), summed(B, c), **options)
    assert int(short.status) == jaxnum.Status.breakdown
    wrong = jaxnum.solve(inexact_halpern(key, 0.01), jnp.zeros(6), summed(B, c), **options)
    assert int(wrong.status) in (jaxnum.Status.nonfinite, jaxnum.Status.breakdown)
    spoilt = jaxnum.solve(inexact_halpern(key, 1.0), jnp.ones(6), summed(B, np.nan * c), **options)
    assert int(spoilt.status) == jaxnum.Status.nonfinite
    for solution in (wrong, spoilt):
        assert np.all(np.isfinite(solution.x))


def test_a_mean_of_one_term_and_a_start_at_the_solution(key, x64):
    B, c = games(1, 2)
    exact = np.linalg.solve(B[0], -c[0])
    options = {"rtol": 0.0, "atol": 1e-2}
    solution = jaxnum.solve(inexact_halpern(key, 1.0), jnp.zeros(4), summed(B, c), **options)
    assert np.linalg.norm(B[0] @ solution.x + c[0]) <= 1e-2
    still = jaxnum.solve(inexact_halpern(key, 1.0), jnp.asarray(exact), summed(B, c), **options)
    assert int(still.steps) == 0
    np.testing.assert_allclose(still.x, exact, atol=1e-12)


def test_arguments_outside_their_range(key):
    with pytest.raises(TypeError, match="inexact_halpern: `key` must be a typed key; got .*jax.random.key"):
        inexact_halpern(0, 1.0)
    with pytest.raises(ValueError, match="inexact_halpern: `lipschitz` must be a finite real number > 0; got"):
        inexact_halpern(key, 0.0)
    with pytest.raises(ValueError, match="inexact_halpern: `accuracy` must be a finite real number > 0; got"):
        inexact_halpern(key, 1.0, accuracy=-1.0)
    with pytest.raises(ValueError, match="inexact_halpern: `inner_limit` must be an integer >= 1; got 0"):
        inexact_halpern(key, 1.0, inner_limit=0)
