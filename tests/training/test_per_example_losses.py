"""Losses of examples one by one, whole and in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import per_example_losses
from kernels_pallas.checks import ShapeError


def loss(w, example):
    return jnp.sum((example["x"] @ w - example["y"]) ** 2)


def test_pieces_and_whole_are_the_loop(key):
    data = {"x": jax.random.normal(key, (7, 3)), "y": jnp.arange(7.0)}
    w = jnp.array([1.0, -2.0, 0.5])
    want = (np.asarray(data["x"]) @ np.asarray(w) - np.arange(7)) ** 2
    for batch_size in (None, 3):
        np.testing.assert_allclose(per_example_losses(loss, w, data, batch_size=batch_size), want, rtol=1e-5)


def test_bad_arguments_are_named():
    w = jnp.ones(3)
    with pytest.raises(ShapeError, match=r"^per_example_losses: `data\['y'\]` must have an axis of examples"):
        per_example_losses(loss, w, {"x": jnp.ones((2, 3)), "y": jnp.ones(3)})
    with pytest.raises(ShapeError, match="^per_example_losses: `loss` must have shape"):
        per_example_losses(lambda w, x: w * x, w, jnp.ones(2))
    with pytest.raises(ValueError, match="^per_example_losses: `batch_size` must be"):
        per_example_losses(loss, w, {"x": jnp.ones((2, 3)), "y": jnp.ones(2)}, batch_size=0)
