"""The noise of a batch's Hessian, against least squares, where it is a sum over the data."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import hessian_noise
from kernels_pallas.checks import DtypeError, ShapeError

WIDTH, SIZE, DATA = 20, 4, 64


def loss(params, batch):
    residuals = batch["x"] @ jnp.concatenate([params["a"], params["b"]]) - batch["y"]
    return 0.5 * jnp.mean(residuals**2)


def drawn(replace):
    """200 pairs of batches from a small data set, and P σ² summed over it."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(DATA, WIDTH)) * np.linspace(0.5, 2, WIDTH)
    rows = np.stack([rng.choice(DATA, SIZE, replace=replace) for _ in range(400)])
    H = x.T @ x / DATA
    one = np.mean(np.sum(x**2, axis=1) ** 2) - np.sum(H**2)
    # Without replacement the variance of a mean has the factor (1/B - 1/N) N / (N - 1).
    want = one / WIDTH * (1 if replace else DATA / (DATA - 1))
    batches = {"x": jnp.asarray(x[rows], jnp.float32), "y": jnp.asarray(rows, jnp.int32)}
    return batches, want


@pytest.mark.parametrize("replace", [True, False], ids=["with_replacement", "without"])
def test_least_squares(key, replace):
    batches, want = drawn(replace)
    params = {"a": jnp.zeros(5), "b": jnp.zeros(WIDTH - 5)}
    noise, error = hessian_noise(loss, params, batches, key, num_examples=None if replace else DATA)
    assert 0 < float(error) < 0.1 * want
    assert abs(float(noise) - want) < min(0.1 * want, 3 * float(error))


def test_bad_input(key):
    w, x = jnp.ones(3), jnp.ones((4, 2, 3))
    product = lambda w, x: 0.5 * jnp.mean((x @ w) ** 2)  # noqa: E731
    assert float(hessian_noise(product, w, x, key)[0]) == 0
    assert np.isnan(hessian_noise(product, w, x.at[0].set(jnp.nan), key)[0])
    for wrong, error, words in (
        (x[:3], ValueError, "`batches` must be an even number, at least 4; got 3"),
        (jnp.ones(4), ShapeError, r"`batches` must start with the axes \(batches, examples\); got shape \(4,\)"),
        ({"x": x, "y": jnp.ones((4, 3))}, ShapeError, r"`batches\['y'\]` must start with .* of \(4, 2\)"),
    ):
        with pytest.raises(error, match="^hessian_noise: " + words):
            hessian_noise(product, w, wrong, key)
    with pytest.raises(ValueError, match="^hessian_noise: `num_examples` must be above 2; got 2"):
        hessian_noise(product, w, x, key, num_examples=2)
    with pytest.raises(DtypeError, match="^hessian_noise: `key` must be a typed random key"):
        hessian_noise(product, w, x, jnp.ones(2))
