"""Adan: the released code's arithmetic, its two-step value by hand, and where optax differs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.transforms import adan, adan_restart, scale_by_adan
from kernels_pallas.checks import DtypeError
from tests.tolerances import tolerance
from tests.transforms.trajectories import copied, donated, follow

DECAYS = {"b1": 0.98, "b2": 0.92, "b3": 0.99}


def transcription(gradients, x, rate, decay, proximal, limit, eps=1e-8):
    """The released code in NumPy: gradients [T, n], from x [n]."""
    m, v, n, before = (np.zeros_like(x) for _ in range(4))
    b1, b2, b3 = DECAYS.values()
    for k, g in enumerate(gradients, start=1):
        g = g * min(1.0, limit / np.linalg.norm(g))
        d = g - before if k > 1 else np.zeros_like(g)
        before = g
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d
        n = b3 * n + (1 - b3) * (g + b2 * d) ** 2
        root = np.sqrt(n) / np.sqrt(1 - b3**k) + eps
        u = m / (1 - b1**k) / root + b2 * v / (1 - b2**k) / root
        x = (x - rate * u) / (1 + rate * decay) if proximal else x * (1 - rate * decay) - rate * u
    return x


@pytest.mark.parametrize("decay", ["proximal", "decoupled"])
def test_a_hundred_steps_equal_the_released_code(decay, float_dtype):
    rng = np.random.default_rng(0)
    gradients, x = rng.normal(size=(100, 7)).astype(float_dtype), rng.normal(size=7).astype(float_dtype)
    optimiser = adan(0.01, weight_decay=0.3, decay=decay, max_grad_norm=2.0)
    (got, _), _ = follow(optimiser, gradients, jnp.asarray(x))
    wide = transcription(gradients.astype("float64"), x.astype("float64"), 0.01, 0.3, decay == "proximal", 2.0)
    np.testing.assert_allclose(got, wide, rtol=0, atol=tolerance(float_dtype, 700))


def test_the_second_step_by_hand_is_not_optax_s(x64):
    _, updates = follow(scale_by_adan(eps=0.0), jnp.array([1.0, 2.0]), jnp.array(0.0))
    m, v = (0.98 * 0.02 + 0.02 * 2) / (1 - 0.98**2), 0.08 / (1 - 0.92**2)
    n = (0.99 * 0.01 + 0.01 * 2.92**2) / (1 - 0.99**2)
    np.testing.assert_allclose(updates, [1.0, (m + 0.92 * v) / np.sqrt(n)], rtol=1e-14)
    assert abs(float(updates[1]) - 0.9073595) < 1e-7
    _, theirs = follow(optax.scale_by_adan(eps=0.0), jnp.array([1.0, 2.0]), jnp.array(0.0))
    assert abs(float(theirs[1]) - 0.9462995) < 1e-7, "optax has repaired its coefficient: say so in the docstring"


def test_steps_do_not_know_the_scale_of_the_loss(x64):
    gradients = jax.random.normal(jax.random.key(1), (20, 3))
    _, small = follow(scale_by_adan(eps=0.0), 1e-6 * gradients, jnp.zeros(3))
    _, large = follow(scale_by_adan(eps=0.0), 1e6 * gradients, jnp.zeros(3))
    np.testing.assert_allclose(small, large, rtol=1e-12)


def test_constant_gradients_give_sign_steps():
    _, updates = follow(scale_by_adan(), jnp.broadcast_to(jnp.array([3.0, -0.2]), (50, 2)), jnp.zeros(2))
    np.testing.assert_allclose(updates, np.broadcast_to([1.0, -1.0], (50, 2)), rtol=tolerance("float32", 50))


def test_bfloat16_parameters_keep_float32_moments():
    x, g = jnp.ones(4, jnp.bfloat16), jnp.full(4, 1e-3, jnp.bfloat16)
    optimiser = adan(0.1)
    updates, state = optimiser.update(g, optimiser.init(x), x)
    assert (updates.dtype, state[1].previous.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {a.dtype.name for a in (state[1].m, state[1].v, state[1].n)} == {"float32"}
    assert adan(0.1, moment_dtype="bfloat16").init(x)[1].m.dtype == jnp.bfloat16


def test_decay_goes_by_the_mask_and_the_schedule_s_own_count():
    params = {"w": jnp.array([2.0]), "b": jnp.array([2.0])}
    schedule = lambda count: 0.1 / (1 + count)  # noqa: E731
    optimiser = adan(schedule, weight_decay=0.5, weight_decay_mask=lambda p: {"w": True, "b": False})
    state, x = optimiser.init(params), params
    for rate in (0.1, 0.05):
        updates, state = optimiser.update(jax.tree.map(jnp.ones_like, x), state, x)
        want = {"w": (x["w"] - rate) / (1 + 0.5 * rate), "b": x["b"] - rate}
        x = optax.apply_updates(x, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance("float32", 9)), x, want)


def test_restart_forgets_moments_and_keeps_the_schedule(key):
    optimiser = optax.chain(optax.masked(adan(lambda count: 0.1), {"w": True}), optax.scale(1.0))
    params = {"w": jax.random.normal(key, (3,))}
    state = optimiser.init(params)
    for _ in range(3):
        _, state = optimiser.update(params, state, params)
    fresh = adan_restart(state)
    counts = [optax.tree_utils.tree_get_all_with_path(s, "count") for s in (state, fresh)]
    assert [[int(c) for _, c in s] for s in counts] == [[3, 3], [0, 3]]
    first, _ = optimiser.update(params, optimiser.init(params), params)
    again, _ = optimiser.update(params, fresh, params)
    np.testing.assert_array_equal(first["w"], again["w"])


def test_bad_arguments_are_named():
    for wrong in ({"b1": 1.0}, {"b2": -0.1}, {"eps": -1e-8}, {"weight_decay": -1.0}, {"max_grad_norm": 0.0}):
        with pytest.raises(ValueError, match=f"^adan: `{next(iter(wrong))}` must be "):
            adan(0.1, **wrong)
    with pytest.raises(ValueError, match="^adan: `decay` must be one of 'proximal', 'decoupled'"):
        adan(0.1, decay="l2")
    with pytest.raises(ValueError, match="^adan_restart: `state` must hold an AdanState"):
        adan_restart(optax.adam(0.1).init(jnp.ones(2)))
    with pytest.raises(DtypeError):
        adan(0.1).init(jnp.arange(3))


@pytest.mark.parametrize(("dtype", "size"), [("float16", 200.0), ("float32", 1e20)])
def test_clipping_bears_norms_whose_squares_overflow(dtype, size):
    optimiser, x = adan(0.01, max_grad_norm=1.0), jnp.ones(4, dtype)
    updates, state = optimiser.update(jnp.full(4, size, dtype), optimiser.init(x), x)
    np.testing.assert_allclose(updates, np.full(4, -0.01), rtol=2e-3)
    np.testing.assert_allclose(state[1].previous, np.full(4, 0.5), rtol=2e-3)


def test_what_overflows_is_shown_and_clipping_spreads_it():
    x = jnp.ones(2)
    for bad in (1e20, jnp.inf, jnp.nan):
        updates, state = adan(0.01).update(jnp.array([bad, 1.0]), adan(0.01).init(x), x)
        assert np.isnan(updates).tolist() == [True, False]
        assert np.isnan(adan(0.01).update(x, state, x)[0]).tolist() == [True, False]
    clipping = adan(0.01, max_grad_norm=1.0)
    assert np.isnan(clipping.update(jnp.array([jnp.inf, 1.0]), clipping.init(x), x)[0]).all()


def test_array_options_are_checked():
    for wrong in ({"b1": jnp.float32(1.5)}, {"weight_decay": np.float32(-1)}, {"max_grad_norm": np.int64(0)}):
        with pytest.raises(ValueError, match=f"^adan: `{next(iter(wrong))}` must be "):
            adan(0.1, **wrong)


def test_the_donated_gradient_of_the_step_before_is_not_copied():
    assert copied(donated(adan(0.1), jnp.ones((64, 64))), "64,64") == 0
