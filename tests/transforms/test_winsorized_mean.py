"""Winsorised means against scipy, their limits, and what they do to a single wild example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import mstats

from jaxnum.transforms import median_of_means, winsorized_mean
from tests.tolerances import tolerance
from tests.transforms.aggregators import behaves, counts


def test_it_is_an_aggregator():
    behaves("winsorized_mean", lambda axis: winsorized_mean(1, axis=axis))


@pytest.mark.parametrize(("m", "c"), [(9, 2), (8, 3), (5, 0), (200, 70)])
def test_equals_scipy(m, c, x64):
    x = np.random.default_rng(0).normal(size=(m, 4))
    want = mstats.winsorize(x, limits=(c / m, c / m), axis=0).mean(axis=0)
    got, _ = winsorized_mean(c).update(jnp.asarray(x), (), x[0])
    np.testing.assert_allclose(got, want, rtol=tolerance("float64", m))


def test_percentiles_behave_as_an_aggregator():
    behaves("winsorized_mean", lambda axis: winsorized_mean(15, method="linear", axis=axis))


@pytest.mark.parametrize("m", [1, 2, 8, 33])
@pytest.mark.parametrize("c", [0, 10, 12.5, 37.3, 50])
def test_percentiles_equal_numpy_s(m, c, x64):
    x = np.random.default_rng(0).normal(size=(m, 4))
    want = np.clip(x, np.percentile(x, c, axis=0), np.percentile(x, 100 - c, axis=0)).mean(axis=0)
    got, _ = winsorized_mean(c, method="linear").update(jnp.asarray(x), (), x[0])
    np.testing.assert_allclose(got, want, rtol=tolerance("float64", m), atol=1e-15)


def test_an_infinite_value_is_beyond_the_percentile_or_shows():
    x = jax.random.normal(jax.random.key(0), (9, 3)).at[2, 0].set(jnp.inf).at[4, 1].set(-jnp.inf)
    far, _ = winsorized_mean(20, method="linear").update(x, (), x[0])
    assert bool(jnp.isfinite(far).all())
    near, _ = winsorized_mean(10, method="linear").update(x, (), x[0])
    np.testing.assert_array_equal(near[:2], [jnp.inf, -jnp.inf])


def test_the_largest_c_is_the_median_and_infinity_is_pulled_in():
    x = jax.random.normal(jax.random.key(0), (7, 3))
    got, _ = winsorized_mean(3).update(x, (), x[0])
    np.testing.assert_allclose(got, jnp.median(x, axis=0), rtol=tolerance("float32", 7))
    every, _ = median_of_means(None).update(x, (), x[0])
    np.testing.assert_array_equal(every, jnp.median(x, axis=0))
    wild, _ = winsorized_mean(1).update(x.at[2].set(jnp.inf), (), x[0])
    assert bool(jnp.isfinite(wild).all())


def test_too_few_examples_and_bad_counts_are_named():
    with pytest.raises(ValueError, match="^winsorized_mean: `updates` must have at least 5 examples; got 4"):
        winsorized_mean(2).update(jnp.ones((4, 2)), (), jnp.ones(2))
    counts("winsorized_mean", "c", 0, winsorized_mean)
    for bad in (-1, 50.5, True, float("nan"), "5"):
        with pytest.raises(ValueError, match=f"^winsorized_mean: `c` must be a percentage from 0 to 50; got {bad}"):
            winsorized_mean(bad, method="linear")
    with pytest.raises(ValueError, match="^winsorized_mean: `method` must be one of 'order', 'linear'; got 'other'"):
        winsorized_mean(1, method="other")
