"""Sketch and precondition: LAPACK's solution, steps that do not know the condition number, derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxnum import SolverError, Status
from jaxnum.solvers import sketched_least_squares
from tests.tolerances import tolerance


def problem(n, d, kappa, noise=1e-3, seed=0):
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(m, d)))[0] for m in (n, d))
    A = U * np.geomspace(1, 1 / kappa, d) @ V.T
    return A, A @ rng.normal(size=d) + noise * rng.normal(size=n)


def solve(A, b, dtype="float64", **options):
    return sketched_least_squares(jax.random.key(0), jnp.asarray(A, dtype), jnp.asarray(b, dtype), **options)


@pytest.mark.parametrize("kind", ["srht", "gaussian", "countsketch"])
def test_equals_scipy_in_steps_that_do_not_grow_with_the_condition(kind, x64):
    steps = []
    for kappa in (1, 1e3, 1e6):
        A, b = problem(400, 10, kappa)
        solution = solve(A, b, kind=kind, rtol=1e-10)
        want = scipy.linalg.lstsq(A, b)[0]
        # What the tolerance leaves of the gradient, and kappa times that in x.
        assert np.linalg.norm(A @ (solution.x - want)) <= 1e-9 * np.linalg.norm(b)
        assert np.linalg.norm(solution.x - want) <= 1e-9 * kappa * np.linalg.norm(b)
        steps.append(int(solution.steps))
    assert max(steps) <= min(steps) + 3, steps
    assert max(steps) <= 25


def test_a_heavy_row_is_found_by_the_transform(x64):
    A, b = problem(512, 10, 10)
    A[100] *= 1e4
    want = scipy.linalg.lstsq(A, b)[0]
    np.testing.assert_allclose(solve(A, b, rtol=1e-12).x, want, rtol=1e-7)


def test_float32():
    A, b = problem(400, 10, 10)
    solution = solve(A, b, "float32", rtol=1e-4)
    np.testing.assert_allclose(solution.x, scipy.linalg.lstsq(A, b)[0], atol=tolerance("float32", 400, condition=100))


def test_vmap_and_gradient_equal_the_normal_equations(x64):
    A, b = problem(60, 4, 10, noise=0.3)
    keys = jax.random.split(jax.random.key(1), 2)
    run = lambda A, b, key: sketched_least_squares(key, A, b, rtol=1e-13, on_failure="return").x  # noqa: E731
    loss = lambda A, b, key: jnp.sum(jnp.sin(run(A, b, key)))  # noqa: E731
    exact = lambda A, b: jnp.sum(jnp.sin(jnp.linalg.solve(A.T @ A, A.T @ b)))  # noqa: E731
    A, b = jnp.asarray(A), jnp.asarray(b)
    got = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (None, None, 0)))(A, b, keys)
    for mine, want in zip(got, jax.grad(exact, (0, 1))(A, b), strict=True):
        np.testing.assert_allclose(mine, jnp.stack([want, want]), atol=1e-9)


def test_statuses(x64):
    A, b = problem(200, 6, 10)
    status = lambda A, **options: int(solve(A, b, on_failure="return", **options).status)  # noqa: E731
    assert status(A, max_steps=2) == Status.max_steps
    spoilt = A.copy()
    spoilt[0, 0] = np.nan
    assert status(spoilt) != Status.converged
    A[:, 1] = A[:, 0]
    with pytest.raises(SolverError, match="sketched_least_squares: breakdown"):
        solve(A, b)


def test_a_matrix_of_few_rows_is_factorised_itself(x64):
    """A transform of as many rows as A has would give a worse factor than A: this one broke down."""
    rng = np.random.default_rng(0)
    A, b = rng.normal(size=(5, 5)), rng.normal(size=5)
    solution = solve(A, b)
    np.testing.assert_allclose(solution.x, np.linalg.solve(A, b), rtol=1e-10)
    assert int(solution.steps) == 1


def test_wrong_arguments():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="sketched_least_squares: `A` must have a column"):
        sketched_least_squares(key, jnp.ones((2, 0)), jnp.ones(2))
    with pytest.raises(ValueError, match="sketched_least_squares: `A` must have as many rows as columns"):
        sketched_least_squares(key, jnp.ones((2, 3)), jnp.ones(2))
    with pytest.raises(ValueError, match=r"`rows` must be a Python int in \[d, n\] = \[2, 5\]; got 6"):
        sketched_least_squares(key, jnp.ones((5, 2)), jnp.ones(5), rows=6)
    with pytest.raises(ValueError, match="`kind` must be one of"):
        sketched_least_squares(key, jnp.ones((5, 2)), jnp.ones(5), kind="none")
