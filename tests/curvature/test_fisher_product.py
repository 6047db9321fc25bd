"""Fisher products: explicit outer products, and the mean over labels that is the Gauss-Newton matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.curvature import empirical_fisher_product, fisher_product, gauss_newton_product
from kernels_pallas.checks import DtypeError, ShapeError
from tests.curvature.problems import dense, flat, losses, network


def gauss_newton(params, logits):
    return dense(gauss_newton_product(logits, lambda z: jnp.mean(losses(z)), params), params)


def test_empirical_equals_the_outer_products_and_differs_from_the_fisher_matrix(x64):
    params, logits = network()
    vector, f, _ = flat(lambda p: losses(logits(p)), params)
    J = np.asarray(jax.jacobian(f)(vector))
    got = dense(empirical_fisher_product(lambda p: losses(logits(p)), params), params)
    np.testing.assert_allclose(got, J.T @ J / 5, atol=1e-12)
    assert np.linalg.norm(got - gauss_newton(params, logits)) > 0.1 * np.linalg.norm(got)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_mean_over_labels_is_the_gauss_newton_matrix(likelihood, key, x64):
    params, logits = network()
    if likelihood == "categorical":
        want = gauss_newton(params, logits)
    else:
        loss = lambda z: 0.5 * jnp.sum(z**2) / 5  # noqa: E731
        want = dense(gauss_newton_product(logits, loss, params), params)
    # 20 independent matrices of 2000 samples each: their own spread says how far the mean may be.
    keys = jax.random.split(key, 20)
    make = lambda k: fisher_product(logits, params, k, likelihood=likelihood, num_samples=2000)  # noqa: E731
    got = np.asarray(jax.jit(jax.vmap(lambda k: dense(make(k), params)))(keys))
    spread = np.linalg.norm(got.std(axis=0, ddof=1)) / np.sqrt(20)
    assert np.linalg.norm(got.mean(axis=0) - want) < 3 * spread
    assert spread < 0.02 * np.linalg.norm(want)
    np.testing.assert_allclose(got[0], got[0].T, atol=1e-14)
    assert np.linalg.eigvalsh(got[0])[0] > -1e-12


def test_bad_input(key):
    with pytest.raises(ShapeError, match=r"empirical_fisher_product: `losses_fn\(params\)` must have shape \(B,\)"):
        empirical_fisher_product(lambda p: jnp.mean(p), jnp.ones(3))(jnp.ones(3))
    with pytest.raises(ShapeError, match=r"fisher_product: `logits_fn\(params\)` must have shape"):
        fisher_product(lambda p: jnp.mean(p), jnp.ones(3), key)(jnp.ones(3))
    with pytest.raises(DtypeError, match="fisher_product: `key` must be a typed random key; got int"):
        fisher_product(lambda p: p, jnp.ones(3), 0)
    with pytest.raises(ValueError, match="fisher_product: `num_samples` must be at least 1; got 0"):
        fisher_product(lambda p: p, jnp.ones(3), key, num_samples=0)
    with pytest.raises(ValueError, match="fisher_product: `likelihood` must be one of"):
        fisher_product(lambda p: p, jnp.ones(3), key, likelihood="poisson")
