"""Root mean squares against NumPy, small gradients that must not vanish, and the flag beside Adam's epsilon."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.training import grad_rms, rms, update_rms
from kernels_pallas.checks import DtypeError
from tests.tolerances import tolerance


def test_numpy_agrees(key):
    tree = {"a": jax.random.normal(key, (3, 4)), "b": 1j * jnp.arange(5.0), "c": jnp.full(3, 2, jnp.bfloat16)}
    got = jax.jit(rms)(tree)
    assert got["c"].dtype == jnp.float32
    want = {"a": np.sqrt(np.mean(np.square(tree["a"]))), "b": np.sqrt(6.0), "c": 2.0}
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=tolerance("float32", 12)), got, want)


def test_squares_do_not_underflow():
    np.testing.assert_allclose(rms(jnp.array([3e-30, -1e-30])), np.sqrt(5) * 1e-30, rtol=tolerance("float32", 2))
    assert float(rms(jnp.zeros(3))) == 0.0


def test_the_flag_warns_where_adam_would_stall():
    eps = 1e-8
    gradients = {"well": jnp.full(4, 1e-5), "near": jnp.full(4, 5e-8), "nan": jnp.full(4, jnp.nan)}
    watch = jax.jit(grad_rms)
    watched = watch(gradients, eps=eps)
    assert jax.tree.map(bool, watched.low) == {"well": False, "near": True, "nan": True}
    np.testing.assert_allclose(watched.over_eps["near"], 5.0, rtol=tolerance("float32", 4))
    assert not any(jax.tree.leaves(jax.tree.map(bool, watch({"near": gradients["near"]}, eps=1e-15).low)))
    # What the flag foretells: a step that eps shortens, and none where it does not.
    adam = optax.scale_by_adam(eps=eps)
    steps, _ = jax.jit(adam.update)(gradients, adam.init(gradients))
    sizes = jax.jit(update_rms)(steps, learning_rate=0.5)
    np.testing.assert_allclose(sizes["well"], 2 / (1 + 1e-3), rtol=1e-5)
    np.testing.assert_allclose(sizes["near"], 10 / 6, rtol=1e-5)


def test_bad_arguments_are_named():
    with pytest.raises(DtypeError, match=r"^rms: `tree\['n'\]` must have"):
        rms({"n": jnp.arange(3)})
    for eps in (0.0, np.float32(0), jnp.zeros([])):
        with pytest.raises(ValueError, match="^grad_rms: `eps` must be greater than 0"):
            grad_rms(jnp.ones(2), eps=eps)


def test_the_largest_numbers_do_not_vanish():
    np.testing.assert_allclose(rms(jnp.full(3, 3e38)), 3e38, rtol=tolerance("float32", 3))
