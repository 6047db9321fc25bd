"""Separation with large steps: the verified step counts of the worst case, the perceptron limits, Novikoff's bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import separate
from kernels_pallas.checks import ShapeError


def worst_case(n):
    """n - 1 copies of (1, 0) and (-0.5, 0.1), all of class 1."""
    features = jnp.tile(jnp.array([1.0, 0.0]), (n, 1)).at[-1].set(jnp.array([-0.5, 0.1]))
    return features, jnp.ones(n)


def steps(n, mode, rate=1.0):
    result = separate(*worst_case(n), rate, mode=mode)
    assert bool(result.solved)
    return int(result.steps)


def test_the_worst_case_separates_in_the_steps_verified_before(x64):
    assert [steps(n, "batch_perceptron") for n in (10, 100, 1000)] == [28, 96, 962]
    assert [steps(n, "normalized_perceptron") for n in (10, 100, 1000)] == [29, 38, 38]
    assert [steps(n, "plain", 100.0) for n in (10, 100, 1000)] == [11, 398, 5245]
    assert [steps(n, "plain", 1e6) for n in (10, 100, 1000)] == [28, 96, 962]
    for rate in (100.0, 1e6):
        assert [steps(n, "normalized", rate) for n in (10, 100, 1000)] == [29, 38, 38]


@pytest.mark.parametrize(("mode", "limit"), [("plain", "batch_perceptron"), ("normalized", "normalized_perceptron")])
def test_large_steps_follow_their_perceptron(mode, limit, x64):
    features, labels = random_sets(1)
    for count in (1, 2, 5, 12):
        large = separate(features[0], labels[0], 1e8, mode=mode, max_steps=count)
        small = separate(features[0], labels[0], mode=limit, max_steps=count)
        assert int(large.steps) == int(small.steps)
        z, zhat = (labels[0] * (features[0] @ r.theta) for r in (large, small))
        np.testing.assert_array_equal(z > 0, zhat > 0)
        np.testing.assert_allclose(large.theta / 1e8, small.theta, atol=1e-7)


def random_sets(count):
    """Sets of 30 points in the plane of margin 0.05 or more to the first axis, rotated: [count, 30, 2], [count, 30]."""
    rng = np.random.default_rng(0)
    labels = np.sign(rng.normal(size=(count, 30)))
    first, second = labels * rng.uniform(0.05, 1, labels.shape), rng.normal(size=labels.shape)
    angle = rng.uniform(0, np.pi, (count, 1))
    turned = [np.cos(angle) * first - np.sin(angle) * second, np.sin(angle) * first + np.cos(angle) * second]
    return jnp.asarray(np.stack(turned, axis=-1)), jnp.asarray(labels)


def test_novikoff_s_bound_holds_on_a_hundred_sets(x64):
    features, labels = random_sets(100)
    radius = jnp.max(jnp.linalg.norm(features, axis=-1), axis=1)
    run = lambda mode, rate: jax.jit(jax.vmap(lambda a, y: separate(a, y, rate, mode=mode)))(features, labels)  # noqa: E731
    perceptron = run("normalized_perceptron", 1.0)
    assert bool(perceptron.solved.all())
    assert bool((perceptron.steps <= 1 + radius**2 / 0.05**2).all())
    finite = run("normalized", 10.0)
    assert bool((finite.solved & (finite.steps <= (radius**2 + 1.12 * 29 / 10.0) / 0.05**2)).all())


def test_no_rate_overflows_and_what_cannot_be_separated_is_not_solved():
    features = jnp.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    for mode in ("normalized", "plain", "normalized_perceptron", "batch_perceptron"):
        result = separate(features, jnp.ones(3), 1e6, mode=mode, max_steps=50)
        assert (int(result.steps), bool(result.solved)) == (50, False)
        assert bool(jnp.isfinite(result.theta).all())
    bad = separate(features.at[0, 0].set(jnp.nan), jnp.ones(3))
    assert (int(bad.steps), bool(bad.solved)) == (1, False)
    assert separate(features.astype(jnp.bfloat16), jnp.ones(3), max_steps=2).theta.dtype == jnp.float32


def test_bad_input():
    features, labels = worst_case(10)
    with pytest.raises(ShapeError, match="separate: `labels` must have shape"):
        separate(features, labels[1:])
    with pytest.raises(ValueError, match="separate: `mode` must be one of 'normalized', 'plain'"):
        separate(features, labels, mode="online")
    for rate in (0, np.int64(0)):
        with pytest.raises(ValueError, match="separate: `rate` must be greater than 0; got 0"):
            separate(features, labels, rate)
    with pytest.raises(ValueError, match="separate: `max_steps` must be at least 0; got -1"):
        separate(features, labels, max_steps=-1)
