"""Rates from quadratures: moments and spectra that are known, and the heavy ball that they steer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.curvature import SpectralDensity, spectral_density
from jaxnum.training import slq_learning_rate
from tests.curvature.test_lanczos import with_spectrum

VALUES = np.linspace(0.5, 8, 24)


def test_a_quadrature_integrates_polynomials_exactly(key, x64):
    """sum_i w_i node_i^j is vᵀ H^j v up to j = 2 k - 1, for the signs v that the same key draws."""
    H, k = with_spectrum(VALUES), 6
    rule = spectral_density(H, jnp.zeros(24), key, num_probes=2, num_steps=k)
    for nodes, weights, probe in zip(rule.nodes, rule.weights, jax.random.split(key, 2), strict=True):
        v = np.asarray(jax.random.rademacher(jax.random.split(probe, 1)[0], (24,), "float64")) / 24**0.5
        for j in range(2 * k):
            want = v @ np.linalg.matrix_power(H, j) @ v
            np.testing.assert_allclose(jnp.sum(weights * nodes**j), want, rtol=1e-6)


def test_the_heavy_ball_contracts_as_predicted(key, x64):
    H = jnp.asarray(with_spectrum(VALUES))
    rule = spectral_density(H, jnp.zeros(24), key, num_probes=2, num_steps=24)
    np.testing.assert_allclose(rule.nodes, [VALUES] * 2, rtol=1e-6)
    ball = slq_learning_rate(rule, safety=1.0)
    np.testing.assert_allclose([ball.smallest, ball.largest], [0.5, 8.0], rtol=1e-8)

    def step(carry, _):
        x, before = carry
        after = x - ball.learning_rate * (H @ x) + ball.momentum * (x - before)
        return (after, x), jnp.linalg.norm(after)

    start = jax.random.normal(jax.random.key(3), (24,))
    norms = jax.lax.scan(step, (start, start), length=200)[1]
    observed = float((norms[-1] / norms[99]) ** (1 / 100))
    root = (8 / 0.5) ** 0.5
    assert abs(observed / ((root - 1) / (root + 1)) - 1) < 0.05


def test_what_counts_as_the_smallest():
    rule = SpectralDensity(
        jnp.array([[-1.0, 0.0, 1.0, 4.0], [1e-8, 0.25, 9.0, 0.0]]),
        jnp.array([[0.1, 0.4, 0.4, 0.1], [0.1, 0.001, 0.899, 0.0]]),
        jnp.float32(10),
    )
    ends = lambda **options: [float(x) for x in slq_learning_rate(rule, safety=1.0, **options)[2:]]  # noqa: E731
    assert ends() == [9.0, 0.25]
    assert ends(min_weight=0.01) == [9.0, 1.0]
    assert ends(floor=0.2) == [9.0, 4.0]
    assert ends(floor=0.2, min_weight=0.95) == [9.0, 9.0]
    # All alike: gradient descent.
    np.testing.assert_allclose(slq_learning_rate(rule, safety=1.0, min_weight=0.95)[:2], (1 / 9, 0))
    np.testing.assert_allclose(slq_learning_rate(rule, safety=4.0)[0], (2 / 6.5) ** 2, rtol=1e-6)


def test_nothing_is_absorbed_and_bad_arguments_are_named():
    rule = SpectralDensity(jnp.array([[1.0, 2.0]] * 2), jnp.full((2, 2), 0.5), jnp.float32(2))
    nan = jax.jit(slq_learning_rate)(rule._replace(nodes=rule.nodes.at[0].set(jnp.nan), weights=rule.weights * jnp.nan))
    assert np.isnan(nan.learning_rate)
    assert np.isnan(slq_learning_rate(rule._replace(nodes=-rule.nodes)).learning_rate)
    for safety in (0.5, np.float32(0.5)):
        with pytest.raises(ValueError, match="^slq_learning_rate: `safety` must be at least 1; got 0.5"):
            slq_learning_rate(rule, safety=safety)
    with pytest.raises(ValueError, match=r"^slq_learning_rate: `floor` must be in \[0, 1\); got 1"):
        slq_learning_rate(rule, floor=1)


def test_a_hessian_of_zeros_has_no_rate():
    density = SpectralDensity(jnp.zeros((1, 3)), jnp.full((1, 3), 1 / 3), jnp.float32(3))
    assert np.isnan(slq_learning_rate(density).learning_rate)
