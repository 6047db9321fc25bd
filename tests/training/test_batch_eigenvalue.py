"""Eigenvalues of spiked random matrices, drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import eigsh

from jaxnum.training import batch_eigenvalue
from tests.tolerances import tolerance


def test_drawn_matrices_have_the_outlier_or_the_edge():
    """P = 600, entries of variance 0.01: s = 6, so that a spike of 6 stands out and one of 1 does not."""
    rng = np.random.default_rng(0)
    entries = rng.normal(0, 0.1, (600, 600))
    noise = np.tril(entries, -1) + np.tril(entries, -1).T + np.diag(np.sqrt(2) * np.diag(entries))
    u = rng.normal(size=600)
    u /= np.linalg.norm(u)
    for spike, want, rtol in ((6.0, 7.0, 0.03), (1.0, 4.899, 0.04), (-6.0, -7.0, 0.03)):
        ends = {"k": 1, "which": "LA" if spike > 0 else "SA", "v0": u}
        value, vector = eigsh(noise + spike * np.outer(u, u), **ends)
        found = batch_eigenvalue(spike, noise=24.0, batch_size=4)
        np.testing.assert_allclose(found.value, want, rtol=1e-4)
        np.testing.assert_allclose(value, want, rtol=rtol)
        # The square of a cosine over the edge's fluctuation of P^(-1/3).
        assert abs(float((u @ vector)[0]) ** 2 - float(found.overlap)) < 0.06


def test_sampling_without_replacement_ends_in_the_full_hessian(float_dtype):
    eigenvalue = jnp.asarray(6.0, float_dtype)
    sizes = jnp.asarray([10, 50, 100])
    found = batch_eigenvalue(eigenvalue, 60.0, sizes, num_examples=100)
    assert found.value.dtype == float_dtype
    effective = 60 * (1 / np.array([10, 50]) - 0.01)
    np.testing.assert_allclose(found.value[:2], 6 + effective / 6, rtol=tolerance(float_dtype, 4))
    assert (float(found.value[2]), float(found.overlap[2])) == (6.0, 1.0)


def test_nan_shows_and_bad_arguments_are_named():
    for arguments in ((jnp.nan, 1.0, 2.0), (1.0, jnp.nan, 2.0)):
        assert np.isnan(batch_eigenvalue(*map(jnp.float32, arguments))).all()
    np.testing.assert_allclose(batch_eigenvalue(0.0, 4.0, 1), (4.0, 0.0))
    for arguments, words in (
        ((1.0, -1.0, 1), "`noise` must be at least 0; got -1.0"),
        ((1.0, 1.0, 0), "`batch_size` must be at least 1; got 0"),
        ((1.0, 1.0, np.int64(0)), "`batch_size` must be at least 1; got 0"),
        ((1.0, float("nan"), 1), "`noise` must be at least 0; got nan"),
    ):
        with pytest.raises(ValueError, match="^batch_eigenvalue: " + words):
            batch_eigenvalue(*arguments)
    # Constants that are arrays can be read inside jax.jit too.
    eight, sixteen = jnp.float32(8), jnp.float32(16)
    inside = jax.jit(lambda value: batch_eigenvalue(value, 1.0, eight, num_examples=sixteen).value)(2.0)
    assert inside == batch_eigenvalue(2.0, 1.0, 8, num_examples=16).value
    with pytest.raises(ValueError, match="`num_examples` must be at least `batch_size`; got 4"):
        batch_eigenvalue(1.0, 1.0, 8, num_examples=4)


def test_no_noise_has_a_derivative_and_short_floats_keep_their_range():
    assert jax.grad(lambda noise: batch_eigenvalue(2.0, noise, 16).value)(0.0) == 1 / 32
    overlap = batch_eigenvalue(jnp.float16(300.0), jnp.float16(6e4), 1).overlap
    np.testing.assert_allclose(overlap, 1 / 3, atol=2e-3)
