"""Gauss-Newton products: the explicit J^T H J, the Hessian of linear models, the Fisher matrix of a likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.curvature import gauss_newton_product, hessian_product
from kernels_pallas import attention
from tests.curvature.problems import dense, flat, losses, network
from tests.tolerances import tolerance


def explicit(params, logits, mean_loss):
    """J^T H J from jax.jacobian and jax.hessian."""
    vector, f, _ = flat(logits, params)
    z = f(vector)
    J = np.asarray(jax.jacobian(f)(vector)).reshape(z.size, -1)
    H = np.asarray(jax.hessian(mean_loss)(z)).reshape(z.size, z.size)
    return J.T @ H @ J


@pytest.mark.parametrize("mode", ["auto", "reverse"])
def test_equals_the_explicit_product(mode, x64):
    params, logits = network()
    loss = lambda z: jnp.mean(losses(z))  # noqa: E731
    got = dense(gauss_newton_product(logits, loss, params, mode=mode), params)
    np.testing.assert_allclose(got, explicit(params, logits, loss), atol=1e-12)


def test_is_the_hessian_of_a_linear_model(x64):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)))
    loss, w = lambda z: 0.5 * jnp.mean((z - 1) ** 2), jnp.ones(3)  # noqa: E731
    got = dense(gauss_newton_product(lambda w: x @ w, loss, w), w)
    np.testing.assert_allclose(got, dense(hessian_product(lambda w: loss(x @ w), w), w), atol=1e-14)
    np.testing.assert_allclose(got, x.T @ x / 6, atol=1e-14)


def test_is_the_fisher_matrix_of_logistic_regression(x64):
    """The mean over both labels of the outer product of the score (p - y) x, in NumPy: nothing is drawn."""
    x = np.random.default_rng(2).normal(size=(6, 3))
    w = np.array([0.3, -0.5, 0.8])
    p = 1 / (1 + np.exp(-x @ w))
    fisher = np.einsum("b,bi,bj->ij", p * (1 - p) ** 2 + (1 - p) * p**2, x, x) / 6
    labels = jnp.array([0, 1, 1, 0, 1, 0])
    loss = lambda z: jnp.mean(jnp.logaddexp(0, z) - labels * z)  # noqa: E731
    params = jnp.asarray(w)
    np.testing.assert_allclose(dense(gauss_newton_product(lambda w: x @ w, loss, params), params), fisher, atol=1e-14)


def test_goes_through_kernels_that_refuse_forward_mode():
    q, k, v = jax.random.normal(jax.random.key(3), (3, 1, 5, 1, 4))
    model = lambda w, of=None: attention(q * w, k, v, causal=True, implementation=of)  # noqa: E731
    w = jnp.float32(1.3)
    got = gauss_newton_product(model, lambda z: jnp.sum(z**2), w)(jnp.float32(1.0))
    J = jax.jvp(lambda w: model(w, "reference"), (w,), (jnp.float32(1.0),))[1]
    np.testing.assert_allclose(got, 2 * jnp.sum(J**2), rtol=tolerance("float32", 100))


def test_bad_input():
    product = gauss_newton_product(lambda w: 2 * w, lambda z: z, jnp.ones(3))
    with pytest.raises(ValueError, match=r"gauss_newton_product: `loss\(params\)` must be one real scalar"):
        product(jnp.ones(3))
    with pytest.raises(ValueError, match=r"gauss_newton_product: `v` must have shape \(3,\)"):
        product(jnp.ones(4))
