"""Learning-rate sensitivity: its exact values, and a sweep against runs one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import lr_sensitivity, lr_sensitivity_sweep
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance

GRID = np.geomspace(3e-4, 3e-1, 8)


@pytest.mark.parametrize("diverged", [np.nan, np.inf, 9.0])
def test_the_share_of_diverged_runs_is_exact(float_dtype, diverged):
    # A power of two, so that the mean is exact.
    for lost in range(8):
        final = np.where(np.arange(8) < lost, diverged, 1.25)
        assert float(lr_sensitivity(GRID.astype(float_dtype), final, 4.25)) == lost / 8 * 3.0


def test_only_the_range_counts_and_its_ends_do():
    rates = np.geomspace(3e-6, 3e1, 15)
    final = np.where((rates > 2.9e-4) & (rates < 3.1e-1), 1.0, 2.0)
    assert float(lr_sensitivity(rates, final, 4.0)) == 0.0
    assert float(lr_sensitivity(rates, final, 4.0, low=3e-5)) > 0.0


def test_columns_are_measured_apart():
    final = jnp.array([[1.0, jnp.nan], [3.0, jnp.nan]])
    got = lr_sensitivity([1e-3, 1e-2], final, jnp.array([2.0, 2.0]))
    assert float(got[0]) == 0.5
    # Nothing trained is not flat.
    assert bool(jnp.isnan(got[1]))


def descent(rate, key):
    """Gradient descent on a random quadratic."""
    curvature = jax.random.uniform(key, (3,), minval=1.0, maxval=20.0)
    x, _ = jax.lax.scan(lambda x, _: (x - rate * curvature * x, None), jnp.ones(3), length=200)
    return jnp.sum(curvature), jnp.sum(curvature * x**2)


def test_a_sweep_is_its_runs_one_by_one(key):
    keys = jax.random.split(key, 2)
    sweep = lr_sensitivity_sweep(descent, keys, points=4)
    np.testing.assert_allclose(sweep.learning_rates, np.geomspace(3e-4, 3e-1, 4), rtol=1e-6)
    single = jax.jit(descent)
    for row, rate in enumerate(sweep.learning_rates):
        for column, one in enumerate(keys):
            initial, final = single(rate, one)
            assert float(sweep.initial_losses[row, column]) == pytest.approx(float(initial), rel=1e-6)
            got = sweep.final_losses[row, column]
            np.testing.assert_allclose(got, final, rtol=tolerance("float32", 600, condition=20), atol=1e-30)
    assert not bool(jnp.isfinite(sweep.final_losses[-1]).any())
    want = [
        float(lr_sensitivity(sweep.learning_rates, sweep.final_losses[:, s], sweep.initial_losses[0, s]))
        for s in range(2)
    ]
    np.testing.assert_allclose(sweep.sensitivity, want, rtol=1e-6)
    assert sweep.best.tolist() == sweep.learning_rates[jnp.nanargmin(sweep.final_losses, axis=0)].tolist()


def test_pieces_of_a_sweep_and_given_rates(key):
    keys, rates = jax.random.split(key, 3), [1e-3, 1e-2]
    whole, pieces = (lr_sensitivity_sweep(descent, keys, learning_rates=rates, batch_size=b) for b in (None, 4))
    limit = tolerance("float32", 600, condition=20)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=limit), whole, pieces)


def test_inside_jit_with_constant_rates():
    rates, final = jnp.asarray([1e-3, 1e-2]), jnp.asarray([1.0, 2.0])
    assert float(jax.jit(lambda final: lr_sensitivity(rates, final, 4.0))(final)) == 0.5


def test_bad_arguments_are_named(key):
    keys = jax.random.split(key, 2)
    with pytest.raises(ShapeError, match="^lr_sensitivity: `final_losses` must have shape"):
        lr_sensitivity(GRID, np.ones(7), 1.0)
    with pytest.raises(ShapeError, match="^lr_sensitivity: `initial_loss` must have shape"):
        lr_sensitivity(GRID, np.ones((8, 2)), np.ones(3))
    with pytest.raises(ValueError, match="^lr_sensitivity: `high` must be greater than low"):
        lr_sensitivity(GRID, np.ones(8), 1.0, low=1.0)
    with pytest.raises(ValueError, match="^lr_sensitivity: `learning_rates` must be positive; got"):
        lr_sensitivity([0.1, -1.0, 0.2], np.ones(3), 1.0)
    with pytest.raises(DtypeError, match="^lr_sensitivity_sweep: `keys` must be typed random keys; got uint32. Pass"):
        lr_sensitivity_sweep(descent, jax.random.PRNGKey(0))
    for rates in ([0.1, 0.01], [-0.1, 0.1]):
        with pytest.raises(ValueError, match="^lr_sensitivity_sweep: `learning_rates` must be positive and ascending"):
            lr_sensitivity_sweep(descent, keys, learning_rates=rates)
    with pytest.raises(ShapeError, match="^lr_sensitivity_sweep: `keys` must have shape"):
        lr_sensitivity_sweep(descent, key)
    with pytest.raises(ShapeError, match="^lr_sensitivity_sweep: `final_loss` must have shape"):
        lr_sensitivity_sweep(lambda rate, key: (1.0, jnp.ones(2)), keys)
    for wrong in ({"points": 1}, {"batch_size": 0}, {"low": -1.0}):
        with pytest.raises(ValueError, match=f"^lr_sensitivity_sweep: `{next(iter(wrong))}` must be"):
            lr_sensitivity_sweep(descent, keys, **wrong)
