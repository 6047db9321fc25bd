"""Newton-Schulz: the error squares, NumPy's inverse and pseudo-inverse, steps against the condition, derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxnum import SolverError, Status
from jaxnum.solvers import newton_schulz, newton_schulz_regression
from tests.tolerances import tolerance


def matrix(n, d, singular, seed=0):
    rng = np.random.default_rng(seed)
    r = len(singular)
    U, V = (np.linalg.qr(rng.normal(size=(m, r)))[0] for m in (n, d))
    return (U * singular) @ V.T


@pytest.mark.parametrize("order", [2, 3])
def test_error_is_squared_or_cubed(order, x64):
    A = matrix(6, 6, np.geomspace(1, 20, 6))
    iterate = lambda k: newton_schulz(jnp.asarray(A), order=order, max_steps=k, on_failure="return").x  # noqa: E731
    for k in (0, 3, 6):
        E, after = (np.eye(6) - np.asarray(iterate(j)) @ A for j in (k, k + 1))
        np.testing.assert_allclose(after, np.linalg.matrix_power(E, order), atol=1e-10)


def test_inverse_equals_numpy(float_dtype):
    A = matrix(20, 20, np.geomspace(1, 100, 20))
    rtol = 1e-10 if float_dtype == "float64" else 1e-4
    want = np.linalg.inv(A)
    for order in (2, 3):
        solution = newton_schulz(jnp.asarray(A, float_dtype), order=order, rtol=rtol)
        assert solution.x.dtype == float_dtype
        atol = tolerance(float_dtype, 20, condition=100) + rtol
        assert np.linalg.norm(solution.x - want) <= atol * np.linalg.norm(want)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)])
def test_pseudo_inverse_of_a_rank_deficient_matrix(shape, x64):
    A = matrix(*shape, np.geomspace(1, 3, 5))
    solution = newton_schulz(jnp.asarray(A), max_steps=40)
    np.testing.assert_allclose(solution.x, np.linalg.pinv(A, rcond=1e-10), atol=1e-6)


@pytest.mark.parametrize("order", [2, 3])
def test_steps_grow_as_twice_the_logarithm_of_the_condition(order, x64):
    kappas = 10.0 ** np.arange(1, 5)
    steps = [
        int(newton_schulz(jnp.asarray(matrix(20, 20, np.geomspace(1, kappa, 20))), order=order).steps)
        for kappa in kappas
    ]
    slope = np.polyfit(np.log2(kappas), steps, 1)[0]
    # In doublings of the error's logarithm, of which a step of order 3 makes log2(3).
    assert abs(slope * np.log2(order) - 2) <= 0.3, steps


def test_symmetric_iterates_stay_symmetric(x64):
    A = matrix(12, 12, np.geomspace(1, 1e3, 12))
    S = jnp.asarray(A @ A.T)
    M = newton_schulz(S, symmetric=True, rtol=1e-6).x
    np.testing.assert_array_equal(M, M.T)
    np.testing.assert_allclose(M @ S, np.eye(12), atol=1e-4)


def test_regression_equals_lstsq_and_its_steps_are_the_papers(x64):
    X = matrix(30, 5, np.geomspace(1, 10, 5))
    y = np.random.default_rng(1).normal(size=30)
    want = np.linalg.lstsq(X, y, rcond=None)[0]
    solution = newton_schulz_regression(jnp.asarray(X), jnp.asarray(y), rtol=1e-12)
    np.testing.assert_allclose(solution.x, want, rtol=1e-9)
    S = X.T @ X
    M = 1.9 * S / np.linalg.norm(S, 1) ** 2
    for _ in range(4):
        M = 2 * M - M @ S @ M
    short = newton_schulz_regression(jnp.asarray(X), jnp.asarray(y), max_steps=4, on_failure="return")
    assert int(short.status) == Status.max_steps
    np.testing.assert_allclose(short.x, M @ X.T @ y, rtol=1e-10)


def test_batches_are_separate_solves(x64):
    A = jnp.stack([jnp.asarray(matrix(6, 4, np.geomspace(1, kappa, 4))) for kappa in (1, 10, 100, 1000)])
    batch = newton_schulz(A.reshape(2, 2, 6, 4))
    single = [newton_schulz(a) for a in A]
    assert np.max(np.abs(np.ravel(batch.steps) - [int(s.steps) for s in single])) <= 1
    np.testing.assert_allclose(batch.x.reshape(4, 4, 6), jnp.stack([s.x for s in single]), atol=1e-8)
    with pytest.raises(SolverError, match="1 of 4 lanes failed: 2"):
        newton_schulz(A.at[2].set(jnp.nan))


def test_derivatives(x64):
    inverse = jax.jit(lambda A: newton_schulz(A, rtol=1e-13, on_failure="return").x)
    tall = jnp.asarray(matrix(5, 3, np.geomspace(1, 4, 3)))
    check_grads(inverse, (tall,), 2, modes=["rev"], atol=1e-4, rtol=1e-4)
    A, G = (jnp.asarray(matrix(4, 4, np.geomspace(1, 4, 4), seed)) for seed in (0, 1))
    M, pull = jax.vjp(inverse, A)
    np.testing.assert_allclose(pull(G)[0], -M.T @ G @ M.T, atol=1e-10)
    np.testing.assert_allclose(jax.jvp(inverse, (A,), (G,))[1], -M @ G @ M, atol=1e-10)


def test_statuses(x64):
    A = jnp.asarray(matrix(8, 8, np.geomspace(1, 1e4, 8)))
    status = lambda A, **options: int(newton_schulz(A, on_failure="return", **options).status)  # noqa: E731
    assert status(A, max_steps=3) == Status.max_steps
    assert status(A.at[0, 0].set(jnp.nan)) == Status.nonfinite
    assert status(A.astype(jnp.float32), rtol=1e-7, max_steps=300) == Status.stagnated
    np.testing.assert_array_equal(newton_schulz(jnp.zeros((3, 2))).x, np.zeros((2, 3)))


def test_sizes_whose_squares_overflow_or_vanish():
    for size in (1e25, 1e-25):
        solution = newton_schulz(jnp.diag(jnp.array([1.0, 2.0])) * size)
        np.testing.assert_allclose(np.diag(solution.x) * size, [1.0, 0.5], rtol=1e-5)


def test_a_target_of_nan_is_no_regression(x64):
    X = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    y = jnp.array([[1.0, 3.0, 5.0], [1.0, jnp.nan, 5.0]])
    with pytest.raises(SolverError, match="newton_schulz_regression: 1 of 2 lanes failed: 1 .nonfinite") as raised:
        newton_schulz_regression(jnp.stack([X, X]), y)
    assert raised.value.solution.status.tolist() == [Status.converged, Status.nonfinite]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="newton_schulz: `A` must have a row and a column"):
        newton_schulz(jnp.ones((0, 2)))
    with pytest.raises(ValueError, match="newton_schulz: `order` must be one of 2, 3; got 4"):
        newton_schulz(jnp.eye(2), order=4)
    with pytest.raises(ValueError, match="`symmetric` must be False for a rectangular A"):
        newton_schulz(jnp.ones((3, 2)), symmetric=True)
    with pytest.raises(ValueError, match="newton_schulz_regression: `y`"):
        newton_schulz_regression(jnp.ones((3, 2)), jnp.ones(2))
