"""Medians of means: their limits, and groups that lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.transforms import median_of_means
from tests.tolerances import tolerance
from tests.transforms.aggregators import behaves, counts


def test_it_is_an_aggregator():
    behaves("median_of_means", lambda axis: median_of_means(3, axis=axis))


@pytest.mark.parametrize("groups", [1, 2, 3, 4, None])
def test_equals_numpy_s_median_of_split_means(groups):
    x = jax.random.normal(jax.random.key(0), (12, 5))
    means = [part.mean(axis=0) for part in np.split(np.asarray(x), groups or 12)]
    got, _ = median_of_means(groups).update(x, (), x[0])
    np.testing.assert_allclose(got, np.median(means, axis=0), rtol=tolerance("float32", 12), atol=1e-7)


def test_gradients_of_the_groups_losses_are_enough(key):
    w, data = jnp.ones(3), jax.random.normal(key, (12, 3))
    loss = lambda w, x: jnp.tanh(x @ w) ** 2  # noqa: E731
    want, _ = median_of_means(4).update(jax.vmap(jax.grad(loss), (None, 0))(w, data), (), w)
    of_group = jax.grad(lambda w, group: jax.vmap(loss, (None, 0))(w, group).mean())
    means = jax.lax.map(lambda group: of_group(w, group), data.reshape(4, 3, 3))
    got, _ = median_of_means(None).update(means, (), w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_fewer_than_half_of_the_groups_may_lie():
    x = jax.random.normal(jax.random.key(1), (20, 3))
    clean = x.reshape(5, 4, 3).mean(axis=1)
    lies = x.at[:4].set(1e6).at[8:12].set(-1e6)
    got, _ = median_of_means(5).update(lies, (), x[0])
    honest = clean[jnp.array([1, 3, 4])]
    assert bool(((got >= honest.min(axis=0)) & (got <= honest.max(axis=0))).all())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="^median_of_means: `updates` must have at least 3 examples; got 2"):
        median_of_means(3).update(jnp.ones((2, 2)), (), jnp.ones(2))
    counts("median_of_means", "groups", 1, median_of_means)
