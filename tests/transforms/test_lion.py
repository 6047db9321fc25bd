"""Lion: optax's, its memory, the lag of its sign, and settings from AdamW's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.transforms import lion, lion_from_adamw
from tests.tolerances import tolerance
from tests.transforms.trajectories import copied, donated, follow


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.99), (0.5, 0.5), (0.9, 0.8), (0.0, 0.0)])
def test_equals_optax_bit_for_bit(b1, b2, float_dtype, key):
    gradients, x = jax.random.normal(key, (50, 5), float_dtype), jnp.arange(5.0, dtype=float_dtype)
    got, want = (follow(make(0.01, b1=b1, b2=b2), gradients, x)[0][0] for make in (lion, optax.lion))
    np.testing.assert_array_equal(got, want)


def test_modes_are_optax_s(key):
    gradients, x = jax.random.normal(key, (30, 5)), jnp.arange(5.0)
    for mode, beta in (("hard", 1.0), ("smooth", 2.0), ("refined", 1.0)):
        scaled = optax.chain(optax.scale_by_lion(mode=mode, smooth_beta=beta), optax.scale(-0.01))
        got = follow(lion(0.01, mode=mode, smooth_beta=beta, weight_decay=0.0), gradients, x)[0][0]
        np.testing.assert_allclose(got, follow(scaled, gradients, x)[0][0], rtol=tolerance("float32", 30))


def test_a_bfloat16_momentum_does_not_round_the_direction(key):
    gradients, x = jax.random.normal(key, (50, 5)), jnp.arange(5.0)
    got, want = (follow(make(0.01, mu_dtype="bfloat16"), gradients, x)[0][0] for make in (lion, optax.lion))
    np.testing.assert_array_equal(got, want)


def test_no_donated_momentum_is_copied():
    x = jnp.ones((64, 64))
    assert copied(donated(lion(0.1), x), "64,64") == 0
    assert copied(donated(optax.lion(0.1), x), "64,64") == 1, "optax's is repaired: compare again"


def test_the_sign_lags_behind_a_flip_as_the_recursion_says(x64):
    gradients = jnp.concatenate([jnp.ones(100), -jnp.ones(60)])
    _, updates = follow(lion(1.0, weight_decay=0.0), gradients, jnp.array(0.0))
    m, signs = 0.0, []
    for g in np.asarray(gradients):
        signs.append(np.sign(0.9 * m + 0.1 * g))
        m = 0.99 * m + 0.01 * g
    np.testing.assert_array_equal(updates, -np.array(signs))
    assert 135 <= int(np.argmax(np.array(signs) < 0)) <= 140


def test_steps_do_not_know_the_scale_of_the_loss_and_state_is_half_of_adams(key, x64):
    gradients = jax.random.normal(key, (20, 3))
    plain, scaled = (follow(lion(0.1), c * gradients, jnp.ones(3))[0][0] for c in (1.0, 2.0**20))
    np.testing.assert_array_equal(plain, scaled)
    size = lambda state: sum(x.size for x in jax.tree.leaves(state) if x.ndim)  # noqa: E731
    assert 2 * size(lion(0.1).init(jnp.ones(64))) == size(optax.adamw(0.1).init(jnp.ones(64)))


def test_settings_keep_the_product_of_rate_and_decay():
    settings = lion_from_adamw(1e-3, 0.1, ratio=3.0)
    assert settings["learning_rate"] * settings["weight_decay"] == pytest.approx(1e-4)
    assert settings["learning_rate"] == pytest.approx(1e-3 / 3)
    lion(**settings)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: lion(0.1, b1=1.0), r"lion: `b1` must be in \[0, 1\); got 1.0"),
        (lambda: lion(-0.1), "lion: `learning_rate` must be at least 0; got -0.1"),
        (lambda: lion(0.1, mode="soft"), "lion: `mode` must be one of 'hard', 'smooth', 'refined'"),
        (lambda: lion_from_adamw(0.1, 0.1, ratio=2.0), r"lion_from_adamw: `ratio` must be in \[3, 10\]; got 2.0"),
    ],
)
def test_bad_arguments_are_named(call, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        call()
