"""Independent weight decay: its rate, its schedule, and that Adam's step is optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.schedules import wsd
from jaxnum.transforms import adamw_independent
from tests.tolerances import tolerance
from tests.transforms.trajectories import follow


def test_decay_does_not_know_the_learning_rate(x64):
    x, nothing = jnp.array([3.0, -2.0]), jnp.zeros((50, 2))
    for peak in (1e-4, 1.0):
        got = follow(adamw_independent(peak, weight_decay=0.02), nothing, x)[0][0]
        np.testing.assert_allclose(got, x * 0.98**50, rtol=1e-12)
        theirs = follow(optax.adamw(peak, weight_decay=0.02), nothing, x)[0][0]
        np.testing.assert_allclose(theirs, x * (1 - 0.02 * peak) ** 50, rtol=1e-12)


def test_without_decay_it_is_clipped_adam_and_with_it_the_schedule_scales_both(key):
    gradients, x = 3 * jax.random.normal(key, (20, 4)), jnp.ones(4)
    share = wsd(1.0, 20, 4, 8)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda t: 0.1 * share(t), b2=0.95))
    got = follow(adamw_independent(0.1, share, weight_decay=0.0), gradients, x)[0][0]
    np.testing.assert_allclose(got, follow(adam, gradients, x)[0][0], rtol=tolerance("float32", 20))
    (decayed, _), _ = follow(adamw_independent(0.1, share, weight_decay=0.01), jnp.zeros((20, 4)), x)
    want = np.prod([1 - 0.01 * float(share(t)) for t in range(20)])
    np.testing.assert_allclose(decayed, want * x, rtol=tolerance("float32", 20))


def test_decay_goes_by_the_mask():
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    optimiser = adamw_independent(0.1, weight_decay=0.5, weight_decay_mask={"w": True, "b": False}, max_grad_norm=None)
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params)
    assert jax.tree.map(lambda u: float(u[0]), updates) == {"w": -0.5, "b": 0.0}


def test_bad_arguments_are_named():
    for wrong in ({"b2": 1.0}, {"eps": -1.0}, {"weight_decay": 1.0}, {"max_grad_norm": 0.0}):
        with pytest.raises(ValueError, match=f"^adamw_independent: `{next(iter(wrong))}` must be "):
            adamw_independent(0.1, **wrong)


def test_an_infinite_gradient_is_shown_in_every_coordinate_that_it_would_clip_to_nothing():
    optimiser, x = adamw_independent(0.01), jnp.ones(2)
    _, state = optimiser.update(jnp.ones(2), optimiser.init(x), x)
    updates, state = optimiser.update(jnp.array([jnp.inf, 1.0]), state, x)
    assert np.isnan(updates).all()
    assert np.isnan(optimiser.update(x, state, x)[0]).all()
