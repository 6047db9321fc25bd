"""Stochastic Lanczos quadrature on spectra that are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.curvature import spectral_density
from tests.curvature.test_lanczos import with_spectrum

VALUES = np.linspace(0.5, 3, 40)


def test_traces_of_functions_within_three_errors(key, x64):
    rule = spectral_density(with_spectrum(VALUES), jnp.zeros(40), key, num_probes=40, num_steps=20)
    for f, want in ((jnp.exp, np.exp(VALUES).sum()), (jnp.log, np.log(VALUES).sum())):
        mean, error = rule.trace(f)
        assert 0 < float(error) < 0.05 * abs(want)
        assert abs(float(mean) - want) < 3 * float(error)


def test_density_of_an_operator_of_low_rank_on_a_tree(key):
    """Of 40 eigenvalues 30 are 0 and 10 are 2: mass 3/4 about 0, no NaN where the Krylov space ends after two steps."""
    A = jnp.asarray(with_spectrum(np.r_[np.zeros(30), np.full(10, 2.0)]), jnp.float32)

    def op(v):
        image = A @ jnp.concatenate([v["a"], v["b"].ravel()])
        return {"a": image[:10], "b": image[10:].reshape(5, 6)}

    like = {"a": jnp.zeros(10), "b": jnp.zeros((5, 6))}
    rule = spectral_density(op, like, key, num_probes=60, num_steps=8)
    assert int(jnp.max(jnp.sum(rule.weights > 0, axis=1))) == 2
    grid = jnp.linspace(-1, 3, 401)
    density = rule.density(grid, 0.1)
    np.testing.assert_allclose(jnp.sum(density) * 0.01, 1, rtol=1e-3)
    low = float(jnp.sum(density[grid < 1]) * 0.01)
    assert abs(low - 0.75) < 0.05
    mean, error = rule.trace(lambda x: jnp.where(x > 1, jnp.log2(x), 0))
    assert abs(float(mean) - 10) < 3 * float(error)


def test_bad_input(key):
    with pytest.raises(ValueError, match="spectral_density: `num_probes` must be a Python int >= 2; got 1"):
        spectral_density(jnp.eye(2), jnp.zeros(2), key, num_probes=1)
    with pytest.raises(ValueError, match="spectral_density: `num_steps` must be a Python int >= 1; got 0"):
        spectral_density(jnp.eye(2), jnp.zeros(2), key, num_steps=0)
