"""Row sampling: unbiased norms, and what leverage scores save on a matrix with heavy rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.solvers import leverage_scores, sample_rows


@pytest.mark.parametrize("p", [1, 3])
def test_norms_are_unbiased(p, x64):
    rng = np.random.default_rng(0)
    y, scores = rng.normal(size=50), jnp.asarray(rng.uniform(0.5, 2, size=50))

    def estimate(key):
        rows, weights = sample_rows(key, scores, 10, p=p)
        return jnp.sum(jnp.abs(weights * jnp.asarray(y)[rows]) ** p)

    estimates = np.asarray(jax.vmap(estimate)(jax.random.split(jax.random.key(0), 10_000)))
    error = abs(estimates.mean() - np.sum(np.abs(y) ** p))
    assert error <= 4 * estimates.std() / np.sqrt(10_000)


def test_leverage_scores_halve_the_distortion_of_uniform_draws(x64):
    """Ten heavy rows out of a thousand, which uniform draws mostly miss; extremes over all x are eigenvalues."""
    rng = np.random.default_rng(1)
    A = rng.normal(size=(1000, 5)) * 0.01
    A[:10] = rng.normal(size=(10, 5))
    whitened = jnp.asarray(np.linalg.qr(A)[0])

    def distortion(key, scores):
        rows, weights = sample_rows(key, scores, 200)
        part = weights[:, None] * whitened[rows]
        return jnp.max(jnp.abs(jnp.linalg.eigvalsh(part.T @ part) - 1))

    keys = jax.random.split(jax.random.key(2), 20)
    by_leverage = jax.vmap(lambda key: distortion(key, leverage_scores(jnp.asarray(A))))(keys)
    uniform = jax.vmap(lambda key: distortion(key, jnp.ones(1000)))(keys)
    assert np.median(by_leverage) <= 0.5 * np.median(uniform)


def test_scores_that_are_no_weights_are_not_silent():
    for scores in ([-1.0, 2.0], [0.0, 0.0], [jnp.nan, 1.0]):
        assert np.all(np.isnan(sample_rows(jax.random.key(0), jnp.array(scores), 3)[1]))
    with pytest.raises(ValueError, match="sample_rows: `m` must be a Python int >= 1; got 0"):
        sample_rows(jax.random.key(0), jnp.ones(3), 0)
    with pytest.raises(ValueError, match="sample_rows: `p` must be a real number >= 1"):
        sample_rows(jax.random.key(0), jnp.ones(3), 2, p=0.5)
