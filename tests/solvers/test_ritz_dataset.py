"""Ritz-vector right-hand sides: unit norms, the spectrum they are to have, cells without equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.solvers import ritz_dataset


def test_low_half_is_emphasised_as_asked(x64):
    """With all Ritz vectors found, the coefficients are those along the eigenvectors."""
    d = jnp.arange(1.0, 31)
    data = ritz_dataset(lambda v: d * v, jnp.zeros(30), jax.random.key(0), samples=400, vectors=30, extra=3)
    np.testing.assert_allclose(jnp.linalg.norm(data, axis=1), 1, rtol=1e-12)
    power = np.asarray(jnp.mean(data**2, axis=0))
    low, high = power[:18], power[18:]
    np.testing.assert_allclose(np.mean(low) / np.mean(high), 81, rtol=0.15)
    assert np.all(np.abs(low / np.mean(low) - 1) < 0.5)


def test_rows_of_zeros_stay_empty(x64):
    """Cells outside the domain: the Krylov space of A times noise does not reach them."""
    d = jnp.concatenate([jnp.arange(1.0, 9), jnp.zeros(4)])
    data = ritz_dataset(lambda v: d * v, jnp.zeros(12), jax.random.key(1), samples=5, vectors=12)
    assert np.all(np.isfinite(data))
    assert float(jnp.max(jnp.abs(data[:, 8:]))) <= 1e-12


def test_trees_and_float32():
    like = {"u": jnp.zeros((2, 3)), "p": jnp.zeros(4)}
    data = ritz_dataset(lambda v: jax.tree.map(lambda x: 2 * x, v), like, jax.random.key(2), samples=3, vectors=4)
    assert data["u"].shape == (3, 2, 3)
    assert data["p"].dtype == jnp.float32
    norms = jnp.sum(data["u"] ** 2, axis=(1, 2)) + jnp.sum(data["p"] ** 2, axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="ritz_dataset: `samples` must be an int >= 1; got 0"):
        ritz_dataset(lambda v: v, jnp.zeros(3), jax.random.key(0), samples=0)
    with pytest.raises(ValueError, match="ritz_dataset: `emphasis` must be positive"):
        ritz_dataset(lambda v: v, jnp.zeros(3), jax.random.key(0), emphasis=0.0)
