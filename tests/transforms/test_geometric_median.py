"""Geometric medians against scipy's minimiser, and a minority that lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jaxnum.transforms import geometric_median
from tests.transforms.aggregators import behaves, counts


def test_it_is_an_aggregator():
    behaves("geometric_median", lambda axis: geometric_median(axis=axis))


def test_equals_a_minimiser_over_the_whole_tree(x64):
    x = np.random.default_rng(0).normal(size=(9, 5))
    want = minimize(lambda z: np.linalg.norm(x - z, axis=1).sum(), x.mean(axis=0), tol=1e-14).x
    tree = {"a": jnp.asarray(x[:, :2]), "b": jnp.asarray(x[:, 2:])}
    got, _ = geometric_median(iterations=300).update(tree, (), {"a": x[0, :2], "b": x[0, 2:]})
    np.testing.assert_allclose(np.concatenate([got["a"], got["b"]]), want, atol=1e-5)


def test_a_minority_moves_it_little():
    x = jax.random.normal(jax.random.key(0), (11, 4))
    clean, _ = geometric_median(iterations=100).update(x, (), x[0])
    dirty, _ = geometric_median(iterations=100).update(x.at[:3].set(1e8), (), x[0])
    assert float(jnp.linalg.norm(dirty - clean)) < 3.0


def test_bad_arguments_are_named():
    counts("geometric_median", "iterations", 1, lambda n: geometric_median(iterations=n))
    with pytest.raises(ValueError, match="^geometric_median: `eps` must be greater than 0; got 0.0"):
        geometric_median(eps=0.0)
