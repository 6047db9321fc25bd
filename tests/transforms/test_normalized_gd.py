"""Normalised gradient descent: the step by hand, where probabilities underflow, and the loop of `separate`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import separate
from jaxnum.transforms import normalized_gd, scale_by_normalized_gd
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance


def problem(dtype="float64"):
    rng = np.random.default_rng(0)
    labels = np.sign(rng.normal(size=12))
    return rng.normal(size=(12, 3)).astype(dtype) + labels[:, None].astype(dtype), labels.astype(dtype)


def margins(x, features, labels):
    return labels * (features @ x)


def loss(x, features, labels):
    return jnp.mean(jax.nn.softplus(-margins(x, features, labels)))


def test_a_step_is_the_mean_weighted_by_the_probability_of_error(float_dtype):
    features, labels = problem(float_dtype)
    x = jnp.array([0.3, -0.2, 0.1], float_dtype)
    tx = normalized_gd(0.7)
    z = margins(x, features, labels)
    got, _ = tx.update(jax.grad(loss)(x, features, labels), tx.init(x), x, margins=z)
    p = 1 / (1 + np.exp(np.asarray(z, "float64")))
    want = 0.7 * (p * labels) @ features.astype("float64") / p.sum()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance(float_dtype, 36))


def test_separate_takes_the_same_steps():
    features, labels = problem("float32")
    want = separate(features, labels, 3.0)
    tx, x = normalized_gd(3.0), jnp.zeros(3)

    @jax.jit
    def step(x):
        z = margins(x, features, labels)
        updates, _ = tx.update(jax.grad(loss)(x, features, labels), tx.init(x), x, margins=z)
        return x + updates

    for _ in range(int(want.steps)):
        x = step(x)
    assert bool(want.solved)
    np.testing.assert_allclose(x, want.theta, rtol=tolerance("float32", 36 * int(want.steps)))


def test_where_all_probabilities_underflow_the_step_is_zero_and_nan_is_nan():
    tx = scale_by_normalized_gd()
    step = lambda g, z: float(tx.update(jnp.float32(g), tx.init(jnp.zeros([])), jnp.zeros([]), margins=z)[0])  # noqa: E731
    assert step(0.0, jnp.array([200.0, 1e6])) == 0.0
    # p is about exp(-z): at 80 it is far below float32's eps and still a number.
    np.testing.assert_allclose(step(np.exp(-80.0), jnp.array([80.0])), 1.0, rtol=1e-5)
    assert np.isnan(step(1.0, jnp.array([jnp.nan, 1.0])))
    assert np.isnan(step(jnp.nan, jnp.array([200.0])))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="^normalized_gd: `learning_rate` must be at least 0; got -1"):
        normalized_gd(-1)
    tx, x = normalized_gd(1.0), jnp.ones(2)
    with pytest.raises(ValueError, match="^normalized_gd: `margins` must be given; got None. Pass update"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ShapeError, match=r"^normalized_gd: `margins` must have shape \(N,\)"):
        tx.update(x, tx.init(x), x, margins=jnp.ones((2, 1)))
    with pytest.raises(DtypeError, match="^normalized_gd: `margins` must have a floating-point"):
        tx.update(x, tx.init(x), x, margins=jnp.ones(2, bool))


def test_infinite_margins_are_probabilities_of_0_and_1_and_none_is_refused():
    optimiser, x = normalized_gd(1.0), jnp.ones(1)
    for margin, beta in ((jnp.inf, 0.25), (-jnp.inf, 0.75)):
        updates, _ = optimiser.update(x, optimiser.init(x), x, margins=jnp.array([margin, 0.0]))
        np.testing.assert_allclose(updates, [-1 / beta], rtol=1e-6)
    with pytest.raises(ValueError, match=r"^normalized_gd: `margins` must have an entry; got shape \(0,\)"):
        optimiser.update(x, optimiser.init(x), x, margins=jnp.ones(0))
