"""Leverage scores: the diagonal of the hat matrix, the rank as their sum, rows that do not count."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.solvers import leverage_scores
from tests.tolerances import tolerance


def test_diagonal_of_the_hat_matrix(float_dtype):
    A = np.random.default_rng(0).normal(size=(30, 6)) * np.geomspace(1, 100, 6)
    tau = leverage_scores(jnp.asarray(A, float_dtype))
    atol = tolerance(float_dtype, 30, condition=100)
    np.testing.assert_allclose(tau, np.diag(A @ np.linalg.pinv(A)), atol=atol)


def test_sum_is_the_rank(x64):
    rng = np.random.default_rng(1)
    A = rng.normal(size=(40, 4)) @ rng.normal(size=(4, 9))
    A[7] = 0
    tau = np.asarray(leverage_scores(jnp.asarray(A)))
    np.testing.assert_allclose(tau, np.diag(A @ np.linalg.pinv(A, rcond=1e-10)), atol=1e-10)
    assert abs(tau.sum() - 4) <= 1e-10
    assert tau[7] == 0
    np.testing.assert_array_equal(leverage_scores(jnp.zeros((3, 2))), np.zeros(3))


def test_cut_can_be_chosen(x64):
    A = jnp.diag(jnp.array([1.0, 1e-3, 1e-6]))
    np.testing.assert_allclose(leverage_scores(A, rtol=1e-4), [1, 1, 0], atol=1e-12)


def test_nan_is_seen(x64):
    tau = leverage_scores(jnp.array([[1.0, 2.0], [jnp.nan, 1.0], [3.0, 4.0]]))
    assert np.all(np.isnan(tau))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="leverage_scores: `A` must have a column"):
        leverage_scores(jnp.ones((3, 0)))
    with pytest.raises(ValueError, match="leverage_scores: `A` must have as many rows as columns"):
        leverage_scores(jnp.ones((2, 3)))
