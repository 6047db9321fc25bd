"""Sketches: linear, unbiased, and as good at keeping a subspace as their theorems say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxnum.solvers import sketch

KINDS = ("gaussian", "srht", "countsketch")


@pytest.mark.parametrize("kind", KINDS)
def test_linear_in_its_matrix_and_fixed_by_the_key(kind, x64):
    key, A = jax.random.key(0), jnp.asarray(np.random.default_rng(0).normal(size=(13, 3)))
    S = sketch(key, jnp.eye(13), 5, kind=kind)
    np.testing.assert_allclose(sketch(key, A, 5, kind=kind), S @ A, atol=1e-12)
    np.testing.assert_allclose(sketch(key, A[:, 0], 5, kind=kind), S @ A[:, 0], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_expected_gram_is_the_identity(kind, x64):
    keys = jax.random.split(jax.random.key(1), 2000)
    S = jax.vmap(lambda key: sketch(key, jnp.eye(6), 4, kind=kind))(keys)
    grams = np.asarray(jnp.einsum("kri,krj->kij", S, S))
    assert np.all(np.abs(grams.mean(0) - np.eye(6)) <= 5 * grams.std(0) / np.sqrt(2000) + 1e-12)


def test_srht_is_scipys_hadamard_matrix_but_for_signs_and_order(x64):
    S = np.asarray(sketch(jax.random.key(2), jnp.eye(8), 8))
    # Two rows of the same signs multiply to a row of the Hadamard matrix.
    products = np.round(8 * S * S[0], 12)
    assert {tuple(row) for row in products} == {tuple(row) for row in scipy.linalg.hadamard(8)}


@pytest.mark.parametrize("kind", KINDS)
def test_subspace_survives(kind, x64):
    """Singular values of S Q within 1 +- 2 sqrt(d / rows), twice the width a Gaussian matrix has."""
    d, rows = 8, 256
    Q, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(1000, d)))
    singular = np.linalg.svd(np.asarray(sketch(jax.random.key(3), jnp.asarray(Q), rows, kind=kind)))[1]
    assert np.max(np.abs(singular - 1)) <= 2 * np.sqrt(d / rows)


def test_wrong_arguments():
    A = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="sketch: `kind` must be one of"):
        sketch(jax.random.key(0), A, 2, kind="fourier")
    with pytest.raises(ValueError, match="sketch: `rows` must be at most 4 for srht; got 5"):
        sketch(jax.random.key(0), A, 5)
    with pytest.raises(ValueError, match="sketch: `rows` must be a Python int >= 1; got 0"):
        sketch(jax.random.key(0), A, 0)
