"""The Gauss-Newton-Bartlett diagonal: exact in the mean, by enumeration and by sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.curvature import gauss_newton_bartlett
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance


def estimates(key, count, w, logits_fn, weights=None, **options):
    """`count` independent estimates, stacked."""

    def one(k):
        estimator = gauss_newton_bartlett(k, **options)
        return estimator.update(w, estimator.init(w), w, logits_fn=logits_fn, weights=weights)[0]

    return jax.jit(jax.vmap(one))(jax.random.split(key, count))


def linear_model(key, positions, features, classes):
    """Weights, inputs and the logits of a linear softmax model."""
    k1, k2 = jax.random.split(key)
    w = jax.random.normal(k1, (features, classes))
    x = jax.random.normal(k2, (positions, features))
    return w, x, lambda w: x @ w


def mean_cross_entropy(logits_fn, labels, weights=None):
    def loss(w):
        each = optax.softmax_cross_entropy_with_integer_labels(logits_fn(w), labels)
        return jnp.average(each, weights=weights)

    return loss


def hessian_diagonal(loss, w):
    flat = jax.hessian(lambda v: loss(v.reshape(w.shape)))(w.ravel())
    return jnp.diag(flat).reshape(w.shape)


def enumerated(w, logits_fn, factor, weights=None):
    """All label tuples: probability and factor * gradient^2 of each, by the paper's formula."""
    probabilities = jax.nn.softmax(logits_fn(w))
    table = []
    for labels in itertools.product(range(probabilities.shape[1]), repeat=probabilities.shape[0]):
        gradient = jax.grad(mean_cross_entropy(logits_fn, jnp.array(labels), weights))(w)
        chance = jnp.prod(probabilities[jnp.arange(len(labels)), jnp.array(labels)])
        table.append((chance, factor * gradient**2))
    return table


def test_exact_by_enumeration(key, x64):
    w, _, logits_fn = linear_model(key, 2, 2, 3)
    table = enumerated(w, logits_fn, factor=2)
    exact = hessian_diagonal(mean_cross_entropy(logits_fn, jnp.array([0, 1])), w)
    mean = sum(chance * square for chance, square in table)
    assert float(jnp.abs(mean - exact).max()) < 1e-12
    # Every estimate is one of the nine terms, each term is drawn, and as often as its probability says.
    got = estimates(key, 4_000, w, logits_fn)
    squares = jnp.stack([square for _, square in table])
    distance = jnp.abs(got[:, None] - squares[None]).max((2, 3))
    assert float(distance.min(1).max()) < 1e-12
    share = jnp.bincount(distance.argmin(1), length=9) / 4_000
    chances = jnp.stack([chance for chance, _ in table])
    assert bool((jnp.abs(share - chances) < 5 * jnp.sqrt(chances / 4_000)).all())


def test_without_the_factor_b_the_mean_is_too_small_by_exactly_b(key, x64):
    w, _, logits_fn = linear_model(key, 2, 2, 3)
    exact = hessian_diagonal(mean_cross_entropy(logits_fn, jnp.array([0, 1])), w)
    mean = sum(chance * square for chance, square in enumerated(w, logits_fn, factor=1))
    np.testing.assert_allclose(mean / exact, 0.5, rtol=tolerance("float64", 9))


def test_monte_carlo(key, x64):
    w, _, logits_fn = linear_model(key, 6, 3, 4)
    exact = hessian_diagonal(mean_cross_entropy(logits_fn, jnp.zeros(6, int)), w)
    got = estimates(key, 200_000, w, logits_fn)
    assert float(jnp.abs(got.mean(0) - exact).max() / exact.max()) < 1e-2
    # Labels of the data in place of drawn ones (the empirical Fisher) would miss by far.
    empirical = 6 * jax.grad(mean_cross_entropy(logits_fn, jnp.zeros(6, int)))(w) ** 2
    assert float(jnp.abs(empirical - exact).max() / exact.max()) > 0.1


@pytest.mark.parametrize("weights", [[1, 1, 0, 1], [0.5, 2.0, 0.0, 1.5]])
def test_weights_mask_positions_and_keep_the_mean_exact(key, x64, weights):
    w, _, logits_fn = linear_model(key, 4, 2, 3)
    weights = jnp.array(weights)
    exact = hessian_diagonal(mean_cross_entropy(logits_fn, jnp.zeros(4, int), weights), w)
    got = estimates(key, 40_000, w, logits_fn, weights)
    assert bool((jnp.abs(got.mean(0) - exact) < 5 * got.std(0) / 200).all())


def test_masked_positions_equal_absent_ones(key, x64):
    w, x, _ = linear_model(key, 5, 2, 3)
    kept = jnp.array([True, True, True, False, False])
    poisoned = x.at[3:].set(1e3)
    got = estimates(key, 20_000, w, lambda w: poisoned @ w, kept)
    alone = estimates(key, 20_000, w, lambda w: x[:3] @ w)
    spread = jnp.sqrt(got.var(0) + alone.var(0)) / np.sqrt(20_000)
    assert bool((jnp.abs(got.mean(0) - alone.mean(0)) < 5 * spread).all())


def test_gaussian_likelihood(key, x64):
    w, x, logits_fn = linear_model(key, 5, 3, 2)
    exact = jnp.broadcast_to(jnp.mean(x**2, axis=0)[:, None], w.shape)
    got = estimates(key, 100_000, w, logits_fn, likelihood="gaussian")
    assert bool((jnp.abs(got.mean(0) - exact) < 5 * got.std(0) / np.sqrt(100_000)).all())


def test_positions_over_several_axes_are_one_batch(key, float_dtype):
    w = jnp.ones((3, 4), float_dtype)
    x = jax.random.normal(key, (2, 5, 3), float_dtype)
    estimator = gauss_newton_bartlett(key)
    state = estimator.init(w)
    got, _ = estimator.update(w, state, w, logits_fn=lambda w: x @ w)
    flat, _ = estimator.update(w, state, w, logits_fn=lambda w: x.reshape(10, 3) @ w)
    np.testing.assert_allclose(got, flat, rtol=tolerance(float_dtype, 10), atol=tolerance(float_dtype, 10))
    assert got.dtype == jnp.dtype(float_dtype)


def test_needs_no_second_derivative(key):
    @jax.custom_vjp
    def kernel(w):
        return w * jnp.ones((6, 3))

    def backward(_, cotangent):
        host = jax.ShapeDtypeStruct((3,), cotangent.dtype)
        return (jax.pure_callback(lambda c: np.asarray(c).sum(0), host, cotangent),)

    kernel.defvjp(lambda w: (kernel(w), None), backward)
    w = jnp.array([0.1, 0.2, 0.3])
    estimator = gauss_newton_bartlett(key)
    got, _ = estimator.update(w, estimator.init(w), w, logits_fn=kernel)
    assert bool((got >= 0).all())


def test_bfloat16_parameters_give_float32_estimates(key):
    w = jnp.ones((3, 4), jnp.bfloat16)
    x = jax.random.normal(key, (8, 3), jnp.bfloat16)
    estimator = gauss_newton_bartlett(key)
    got, _ = estimator.update(w, estimator.init(w), w, logits_fn=lambda w: x @ w)
    assert got.dtype == jnp.float32


def test_no_weight_gives_zero_and_negative_weight_is_loud(key):
    w, _, logits_fn = linear_model(key, 2, 2, 3)
    estimator = gauss_newton_bartlett(key)
    state = estimator.init(w)
    zero, _ = estimator.update(w, state, w, logits_fn=logits_fn, weights=jnp.zeros(2))
    np.testing.assert_array_equal(zero, jnp.zeros((2, 3)))
    bad, _ = estimator.update(w, state, w, logits_fn=logits_fn, weights=jnp.array([2.0, -1.0]))
    assert bool(jnp.isnan(bad).all())


def test_serves_optax_sophia(key):
    w, _, logits_fn = linear_model(key, 6, 3, 4)
    loss = mean_cross_entropy(logits_fn, jnp.arange(6) % 4)
    optimiser = optax.contrib.sophia(0.05, hessian_diagonal_fn=gauss_newton_bartlett(key), update_interval=2)
    state = optimiser.init(w)
    step = jax.jit(lambda w, state: optimiser.update(jax.grad(loss)(w), state, w, logits_fn=logits_fn))
    before = loss(w)
    for _ in range(20):
        updates, state = step(w, state)
        w = optax.apply_updates(w, updates)
    assert loss(w) < before


def test_bad_arguments(key):
    w, _, logits_fn = linear_model(key, 2, 2, 3)
    estimator = gauss_newton_bartlett(key)
    state = estimator.init(w)
    name = "gauss_newton_bartlett"
    with pytest.raises(DtypeError, match=f"{name}: `key` must be a typed random key"):
        gauss_newton_bartlett(jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=f"{name}: `likelihood` must be one of 'categorical', 'gaussian'; got 'x'"):
        gauss_newton_bartlett(key, likelihood="x")
    with pytest.raises(ValueError, match=f"{name}: `logits_fn` must be given, a function of params; got None"):
        estimator.update(w, state, w)
    with pytest.raises(ValueError, match=f"{name}: `params` must be given"):
        estimator.update(w, state, logits_fn=logits_fn)
    with pytest.raises(DtypeError, match=f"{name}: `params` must have a floating-point dtype; got int32"):
        estimator.init(jnp.arange(3))
    with pytest.raises(ShapeError, match=rf"{name}: `weights` must have shape \(2,\) to match .*; got \(3,\)"):
        estimator.update(w, state, w, logits_fn=logits_fn, weights=jnp.ones(3))
    with pytest.raises(ShapeError, match=rf"{name}: `logits_fn\(params\)` must have shape"):
        estimator.update(w, state, w, logits_fn=jnp.sum)
    with pytest.raises(DtypeError, match=rf"{name}: `logits_fn\(params\)` must have a floating-point dtype"):
        estimator.update(w, state, w, logits_fn=lambda w: jnp.arange(3))
