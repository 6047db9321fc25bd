import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import lightning_attention, lightning_attention_slopes
from kernels_pallas import linear_attention_step
from tests.tolerances import tolerance


def test_slopes_are_those_of_released_models():
    np.testing.assert_array_equal(lightning_attention_slopes(8), 2.0 ** -np.arange(1, 9))
    base = np.asarray(lightning_attention_slopes(12))
    np.testing.assert_array_equal(base[:8], 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(base[8:], 2.0 ** (-8 * np.arange(1, 8, 2) / 16), rtol=tolerance("float32"))
    assert lightning_attention_slopes(20).shape == (20,)
    first, last = (lightning_attention_slopes(12, layer=n, num_layers=24) for n in (0, 23))
    np.testing.assert_allclose(first, base * (1 + 1e-5), rtol=tolerance("float32"))
    np.testing.assert_allclose(last, base * 1e-5, rtol=tolerance("float32"))
    alone = lightning_attention_slopes(12, layer=0, num_layers=1)
    np.testing.assert_allclose(alone, base * (1 + 1e-5), rtol=tolerance("float32"))


def test_linear_slopes_are_those_of_the_paper():
    found = lightning_attention_slopes(12, kind="linear", layer=5, num_layers=20)
    # Equation 10: the decay of head h in layer l is exp(-8 h / H (1 - l / L)).
    np.testing.assert_allclose(np.exp(-found), np.exp(-8 * np.arange(12) / 12 * (1 - 5 / 20)), rtol=1e-6)
    np.testing.assert_allclose(lightning_attention_slopes(4, kind="linear"), [0, 2, 4, 6])


def test_equals_the_masked_product_and_its_gradients(x64, key):
    T, H = 133, 3
    keys = jax.random.split(key, 3)
    q, k = jax.random.normal(keys[0], (2, 1, T, H, 5))
    v, weight = jax.random.normal(keys[1], (2, 1, T, H, 4))
    slopes = lightning_attention_slopes(H)
    apart = jnp.arange(T)[:, None] - jnp.arange(T)
    decay = jnp.where(apart >= 0, jnp.exp(-slopes[:, None, None] * jnp.maximum(apart, 0)), 0)

    def dense(q, k, v):
        return jnp.einsum("bihd,bjhd,hij,bjhv->bihv", q, k, decay, v, optimize=True)

    @jax.jit
    def run(q, k, v):
        def loss(of):
            return jax.value_and_grad(lambda *x: jnp.sum(of(*x) * weight), (0, 1, 2))(q, k, v)

        return loss(lambda *x: lightning_attention(*x)[0]), loss(dense)

    got, want = run(q, k, v)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance("float64", T * 5, condition=float(jnp.abs(b).max())))
    # The state it ends with is the one that decoding goes on from.
    o, _ = lightning_attention(q, k, v)
    _, state = lightning_attention(q[:, :-1], k[:, :-1], v[:, :-1])
    last, _ = linear_attention_step(state, q[:, -1], k[:, -1], v[:, -1], log_decay=-slopes, scale=1.0)
    np.testing.assert_allclose(last, o[:, -1], rtol=0, atol=tolerance("float64", T * 5, condition=10))


def test_bad_input():
    x = jnp.ones((1, 4, 2, 3))
    with pytest.raises(ValueError, match=r"lightning_attention: `slopes` must have shape \(2,\); got \(3,\)"):
        lightning_attention(x, x, x, jnp.ones(3))
    with pytest.raises(ValueError, match=r"lightning_attention_slopes: `layer` must be an int in \[0, 4\); got 4"):
        lightning_attention_slopes(2, layer=4, num_layers=4)
    with pytest.raises(ValueError, match=r"lightning_attention_slopes: `layer` must be 0 without `num_layers`; got 4"):
        lightning_attention_slopes(2, layer=4)
    with pytest.raises(ValueError, match=r"lightning_attention: `slopes` must be >= 0; got -0.5"):
        lightning_attention(x, x, x, [-0.5, 1.0])
