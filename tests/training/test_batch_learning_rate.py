"""The law of the learning rate: its two ends, its bend, and what is carried from one batch size to another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import batch_eigenvalue, batch_learning_rate, rescale_batch_learning_rate

LARGE = {"eigenvalue": 2.0, "noise": 400.0}  # the bend is at a batch of 100


def test_linear_then_level():
    sizes = jnp.array([1.0, 2.0, 100.0, 1e5, 2e5])
    rates = jax.jit(batch_learning_rate)(LARGE["eigenvalue"], LARGE["noise"], sizes)
    np.testing.assert_allclose(rates[1] / rates[0], 2, rtol=0.02)
    np.testing.assert_allclose(rates[2], 0.5, rtol=1e-6)
    np.testing.assert_allclose(rates[3:], 1, rtol=2e-3)
    # Never above what the model itself says, and equal to it where the outlier stands.
    values = batch_eigenvalue(LARGE["eigenvalue"], LARGE["noise"], sizes).value
    assert bool((rates <= 2 / values * (1 + 1e-6)).all())
    np.testing.assert_allclose(rates[2:], 2 / values[2:], rtol=1e-6)
    np.testing.assert_allclose(batch_learning_rate(-2.0, 0.0, 1), 1)
    assert np.isnan(batch_learning_rate(jnp.nan, 1.0, 1))


def test_rescaled_rates():
    rescale = rescale_batch_learning_rate
    np.testing.assert_allclose(rescale(0.1, 32, 128), 0.4, rtol=1e-6)
    np.testing.assert_allclose(rescale(0.1, 32, 128, optimizer="adam"), 0.2, rtol=1e-6)
    for optimizer, power in (("sgd", 1), ("adam", 0.5)):
        small, beyond = (rescale(1.0, *sizes, optimizer=optimizer, **LARGE) for sizes in ((1, 2), (1e5, 2e5)))
        np.testing.assert_allclose([small, beyond], [2**power, 1], rtol=0.02)
        back = rescale(small, 2, 1, optimizer=optimizer, **LARGE)
        np.testing.assert_allclose(back, 1, rtol=1e-6)
    full = rescale(1.0, 50, 100, num_examples=100, eigenvalue=1.0, noise=100.0)
    np.testing.assert_allclose(full, 2, rtol=1e-6)  # s falls from 1 to 0


def test_bad_arguments_are_named():
    name = "^rescale_batch_learning_rate: "
    with pytest.raises(ValueError, match=name + "`optimizer` must be one of 'sgd', 'adam'; got 'lion'"):
        rescale_batch_learning_rate(0.1, 1, 2, optimizer="lion")
    with pytest.raises(ValueError, match=name + "`noise` must be given with `eigenvalue` or not at all; got None"):
        rescale_batch_learning_rate(0.1, 1, 2, eigenvalue=1.0)
    for size in (0, np.int64(0)):
        with pytest.raises(ValueError, match=name + "`new_size` must be at least 1; got 0"):
            rescale_batch_learning_rate(0.1, 1, size)
    with pytest.raises(ValueError, match="^batch_learning_rate: `batch_size` must be at least 1; got 0.5"):
        batch_learning_rate(1.0, 1.0, 0.5)


def test_squares_of_the_eigenvalue_may_leave_the_range():
    np.testing.assert_allclose(batch_learning_rate(jnp.array([1e25, 1e-25]), 0.0, 1), [2e-25, 2e25], rtol=1e-5)
    np.testing.assert_allclose(batch_learning_rate(jnp.float16(300.0), 0.0, 1), 2 / 300, rtol=2e-3)
    slope = jax.grad(batch_learning_rate)
    assert slope(2.0, 0.0, 1) == -0.5
    assert np.isfinite(slope(0.0, 4.0, 1))
