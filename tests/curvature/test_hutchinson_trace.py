"""Hutchinson's trace: the law of its mean and of its error, and a clear word where matfree is missing."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.curvature import hutchinson_trace


def test_mean_and_error_are_those_of_the_law(key, x64):
    A = np.random.default_rng(0).normal(size=(12, 12))
    A = A @ A.T
    means, errors = jax.vmap(lambda k: hutchinson_trace(A, jnp.zeros(12), k, num_probes=4))(jax.random.split(key, 4000))
    variance = 2 * (np.sum(A**2) - np.sum(np.diag(A) ** 2)) / 4
    assert abs(means.mean() - np.trace(A)) < 4 * np.sqrt(variance / 4000)
    np.testing.assert_allclose(means.var(), variance, rtol=0.1)
    np.testing.assert_allclose(jnp.mean(errors**2), variance, rtol=0.1)


def test_bfloat16_is_summed_in_float32(key):
    mean, error = hutchinson_trace(lambda v: v, jnp.zeros(1001, jnp.bfloat16), key, num_probes=2)
    assert mean.dtype == jnp.float32
    assert (float(mean), float(error)) == (1001.0, 0.0)


def test_matfree_is_asked_for_by_the_name_of_its_extra(key, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matfree"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matfree", None)
    with pytest.raises(ImportError, match=r'hutchinson_trace: matfree is missing: pip install "jaxnum\[interop\]"'):
        hutchinson_trace(jnp.eye(2), jnp.zeros(2), key)


def test_bad_input(key):
    with pytest.raises(ValueError, match="hutchinson_trace: `num_probes` must be a Python int >= 2; got 1"):
        hutchinson_trace(jnp.eye(2), jnp.zeros(2), key, num_probes=1)
    with pytest.raises(TypeError, match="hutchinson_trace: `key` must be a typed random key"):
        hutchinson_trace(jnp.eye(2), jnp.zeros(2), 0)
