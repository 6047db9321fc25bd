"""Implicit gradient transport: exact on quadratics, and the transported point by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.transforms import n_igt, n_igt_params
from tests.tolerances import tolerance


def test_on_a_quadratic_the_error_is_an_average_of_the_noise_alone(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    root = jax.random.normal(keys[0], (5, 5))
    H, b = root @ root.T / 5, jax.random.normal(keys[1], (5,))
    noise = jax.random.normal(keys[2], (50, 5))
    optimiser = n_igt(lambda t: 0.3 / (t + 10))

    def step(carry, n):
        (y, state), average, t = carry
        at = n_igt_params(state, y)
        updates, state = optimiser.update(H @ y - b + n, state, y)
        eta = (2 / (t + 2)) ** 0.8
        average = (1 - eta) * average + eta * n
        return ((optax.apply_updates(y, updates), state), average, t + 1), state.d - (H @ at - b) - average

    start = jnp.ones(5)
    _, errors = jax.lax.scan(step, ((start, optimiser.init(start)), jnp.zeros(5), 0), noise)
    assert float(jnp.abs(errors).max()) < tolerance("float64", 50, condition=10)


def test_two_steps_by_hand(x64):
    params = {"a": jnp.array([1.0]), "b": jnp.array([2.0])}
    optimiser = n_igt(lambda t: 0.5 / (1 + t), weight_decay=0.1)
    state = optimiser.init(params)
    first = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    updates, state = optimiser.update(first, state, params)
    x1 = np.array([1.0, 2.0]) * (1 - 0.05) - 0.5 * np.array([3.0, 4.0]) / 5
    eta = (2 / 3) ** 0.8
    y1 = x1 + (1 - eta) / eta * (x1 - np.array([1.0, 2.0]))
    y = optax.apply_updates(params, updates)
    np.testing.assert_allclose([y["a"][0], y["b"][0]], y1, rtol=1e-14)
    at = n_igt_params(optax.chain(optax.identity(), optimiser).init(params), params)
    assert at == params
    _, state = optimiser.update({"a": jnp.array([-1.0]), "b": jnp.array([0.5])}, state, y)
    d = (1 - eta) * np.array([3.0, 4.0]) + eta * np.array([-1.0, 0.5])
    np.testing.assert_allclose([state.d["a"][0], state.d["b"][0]], d, rtol=1e-14)
    x2 = x1 * (1 - 0.025) - 0.25 * d / np.linalg.norm(d)
    np.testing.assert_allclose([state.x["a"][0], state.x["b"][0]], x2, rtol=1e-14)


def test_bfloat16_parameters_keep_a_float32_iterate_and_no_gradient_is_no_step():
    x = jnp.ones(3, jnp.bfloat16)
    optimiser = n_igt(0.1)
    updates, state = optimiser.update(jnp.zeros(3, jnp.bfloat16), optimiser.init(x), x)
    assert (updates.dtype, state.x.dtype, state.d.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_array_equal(updates, 0)
    assert n_igt_params(state, x).dtype == jnp.bfloat16


def test_bad_arguments_are_named():
    for wrong in ({"eta_power": 0.0}, {"eta_power": 1.5}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=f"^n_igt: `{next(iter(wrong))}` must be "):
            n_igt(0.1, **wrong)
    with pytest.raises(ValueError, match="^n_igt_params: `state` must hold one NIgtState; got 0"):
        n_igt_params(optax.adam(0.1).init(jnp.ones(2)), jnp.ones(2))


@pytest.mark.parametrize("size", [1e-20, 1e20, 1e37])
def test_steps_have_their_length_whatever_the_gradient(size):
    optimiser, y = n_igt(0.1), jnp.zeros(3)
    _, state = optimiser.update(jnp.array([size, 0.0, 0.0]), optimiser.init(y), y)
    np.testing.assert_allclose(n_igt_params(state, y), [-0.1, 0, 0], rtol=1e-6)


def test_an_infinite_gradient_stops_no_coordinate_without_a_word():
    optimiser, y = n_igt(0.1), jnp.zeros(2)
    updates, _ = optimiser.update(jnp.array([jnp.inf, 1.0]), optimiser.init(y), y)
    assert np.isnan(updates).all()
