"""Hessian-aided momentum: exact on quadratics, unbiased on a cubic, and products for policy gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import quad

from jaxnum.transforms import harp, scale_by_harp
from kernels_pallas.checks import TreeError
from tests.tolerances import tolerance


@pytest.mark.parametrize("eta_power", [0.3, 1.0])
def test_on_a_quadratic_it_is_the_gradient(eta_power, x64):
    root = jax.random.normal(jax.random.key(0), (5, 5))
    H, b = root @ root.T / 5, jnp.arange(5.0)
    loss = lambda x: 0.5 * x @ H @ x - b @ x  # noqa: E731
    optimiser = scale_by_harp(jax.random.key(1), eta_power=eta_power, normalize=False)

    def step(carry, _):
        x, state = carry
        gradient = jax.grad(loss)(x)
        updates, state = optimiser.update(gradient, state, x, obj_fn=loss)
        return (x - 0.1 * updates, state), updates - gradient

    start = jnp.ones(5)
    _, errors = jax.lax.scan(step, (start, optimiser.init(start)), length=40)
    assert float(jnp.abs(errors).max()) < tolerance("float64", 40, condition=10)


def test_over_q_the_product_is_the_change_of_the_gradient(x64):
    cube = lambda x: x**3  # noqa: E731
    old, new = 0.7, -0.4
    mean = quad(lambda q: jax.hessian(cube)(q * new + (1 - q) * old) * (new - old), 0, 1, epsabs=1e-13)[0]
    np.testing.assert_allclose(mean, jax.grad(cube)(new) - jax.grad(cube)(old), atol=1e-12)
    keys = jax.random.split(jax.random.key(0), 20_000)

    def second(key):
        optimiser = scale_by_harp(key, normalize=False)
        _, state = optimiser.update(jnp.float64(0), optimiser.init(jnp.float64(old)), jnp.float64(old), obj_fn=cube)
        return optimiser.update(jnp.float64(0), state, jnp.float64(new), obj_fn=cube)[0]

    drawn = jax.vmap(second)(keys) / (1 - 2 / 3)
    assert abs(float(drawn.mean()) - mean) < 4 * float(drawn.std()) / 20_000**0.5


def test_a_product_for_a_policy_by_enumeration(x64):
    # Bandit with a softmax policy: the Hessian estimate of an action drawn at the point itself, summed over actions.
    rewards, at, vector = jnp.array([1.0, -0.5, 2.0]), jnp.array([0.2, -0.1, 0.4]), jnp.array([0.3, 1.0, -0.7])

    def estimate(theta, u, action):
        log_policy = lambda t: jax.nn.log_softmax(t)[action]  # noqa: E731
        phi = lambda t: rewards[action] * log_policy(t)  # noqa: E731
        return jax.grad(phi)(theta) * (jax.grad(log_policy)(theta) @ u) + jax.jvp(jax.grad(phi), (theta,), (u,))[1]

    probabilities = jax.nn.softmax(at)
    mean = sum(p * estimate(at, vector, a) for a, p in enumerate(probabilities))
    expected = jax.hessian(lambda t: jax.nn.softmax(t) @ rewards)(at) @ vector
    np.testing.assert_allclose(mean, expected, atol=1e-12)
    asked = []
    optimiser = scale_by_harp(jax.random.key(0), normalize=False)
    _, state = optimiser.update(at, optimiser.init(at), at, hvp_fn=lambda p, v: asked.append((p, v)) or v)
    updates, _ = optimiser.update(at, state, at + vector, hvp_fn=lambda p, v: asked.append((p, v)) or 2 * v)
    np.testing.assert_allclose(asked[1][1], vector, rtol=1e-14)
    share = (asked[1][0] - at) / vector
    np.testing.assert_allclose(share, share[0], rtol=1e-10)
    np.testing.assert_allclose(updates, (at + 2 * vector) / 3 + 2 * at / 3, rtol=1e-14)


def test_steps_are_normalised_over_the_tree(x64):
    params = {"a": jnp.array([1.0]), "b": jnp.array([2.0])}
    optimiser = harp(0.1, jax.random.key(0))
    loss = lambda p: 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))  # noqa: E731
    updates, _ = optimiser.update(params, optimiser.init(params), params, obj_fn=loss)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.1, rtol=1e-14)


def test_what_is_missing_is_named():
    x = jnp.ones(2)
    optimiser = harp(0.1, jax.random.key(0))
    with pytest.raises(ValueError, match="^harp: `obj_fn` must be given, or hvp_fn; got None. Call update"):
        optimiser.update(x, optimiser.init(x), x)
    with pytest.raises(TreeError, match="^harp: `hvp_fn"):
        optimiser.update(x, optimiser.init(x), x, hvp_fn=lambda p, v: {"w": v})
    with pytest.raises(ValueError, match=r"^harp: `eta_power` must be in \(0, 1\]; got 2.0"):
        harp(0.1, jax.random.key(0), eta_power=2.0)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_steps_have_their_length_whatever_the_gradient(size):
    optimiser, x = harp(0.1, jax.random.key(0)), jnp.zeros(3)
    updates, _ = optimiser.update(jnp.array([size, 0.0, 0.0]), optimiser.init(x), x, obj_fn=jnp.sum)
    np.testing.assert_allclose(updates, [-0.1, 0, 0], rtol=1e-6)


def test_the_product_before_the_first_step_is_not_used():
    optimiser, x = harp(0.1, jax.random.key(0)), jnp.array([0.0, 1.0])
    loss = lambda x: jnp.sum(jnp.abs(x) ** 1.5)  # noqa: E731  # whose second derivative at 0 is none
    updates, state = optimiser.update(jax.grad(loss)(x), optimiser.init(x), x, obj_fn=loss)
    np.testing.assert_allclose(updates, [0, -0.1], rtol=1e-6)
    assert jnp.isfinite(state[0].d).all()


def test_a_loss_without_a_forward_mode_has_its_products_in_reverse():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
    optimiser, x = harp(0.1, jax.random.key(0)), jnp.array([1.0, 2.0])

    def two_steps(loss):
        state, at = optimiser.init(x), x
        for _ in range(2):
            updates, state = optimiser.update(jax.grad(loss)(at), state, at, obj_fn=loss)
            at = optax.apply_updates(at, updates)
        return at

    got, want = two_steps(lambda x: jnp.sum(cube(x))), two_steps(lambda x: jnp.sum(x**3))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^harp: `obj_fn\(params\)` must be one real scalar"):
        optimiser.update(x, optimiser.init(x), x, obj_fn=lambda x: x)
