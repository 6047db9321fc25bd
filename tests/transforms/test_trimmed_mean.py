"""Trimmed means against scipy."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import trim_mean

from jaxnum.transforms import trimmed_mean
from tests.tolerances import tolerance
from tests.transforms.aggregators import behaves, counts


def test_it_is_an_aggregator():
    behaves("trimmed_mean", lambda axis: trimmed_mean(1, axis=axis))


@pytest.mark.parametrize(("m", "c"), [(10, 2), (7, 3), (5, 0)])
def test_equals_scipy(m, c, x64):
    x = np.random.default_rng(0).normal(size=(m, 4))
    got, _ = trimmed_mean(c).update(jnp.asarray(x), (), x[0])
    np.testing.assert_allclose(got, trim_mean(x, (c + 0.1) / m, axis=0), rtol=tolerance("float64", m))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="^trimmed_mean: `updates` must have at least 3 examples; got 2"):
        trimmed_mean(1).update(jnp.ones((2, 2)), (), jnp.ones(2))
    counts("trimmed_mean", "c", 0, trimmed_mean)
