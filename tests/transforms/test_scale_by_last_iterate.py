"""The last iterate under shrinking steps against averages of the learner's own iterates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.schedules import refine_schedule_values
from jaxnum.transforms import scale_by_last_iterate
from tests.tolerances import tolerance


def path(tx, gradients):
    """Every iterate from 0 under a linear loss of each step."""

    def step(carry, g):
        x, state = carry
        updates, state = tx.update(g, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    x = jnp.zeros(gradients.shape[1], gradients.dtype)
    return jax.jit(lambda g: jax.lax.scan(step, (x, tx.init(x)), g)[1])(gradients)


@pytest.mark.parametrize("learner", [optax.identity, lambda: optax.trace(0.9)], ids=["sgd", "momentum"])
def test_the_last_iterate_is_the_weighted_average_of_the_learners(learner):
    rng = np.random.default_rng(0)
    gradients, weights = jnp.asarray(rng.normal(size=(30, 4)), "float32"), rng.lognormal(size=30)
    weighing = lambda count: -jnp.asarray(weights, "float32")[count]  # noqa: E731
    online = optax.chain(optax.scale_by_schedule(weighing), learner())
    plain = np.vstack([np.zeros(4), path(online, gradients)[:-1]])
    got = path(optax.chain(online, scale_by_last_iterate(weights)), gradients)
    want = weights @ plain / weights.sum()
    np.testing.assert_allclose(got[-1], want, rtol=0, atol=tolerance("float32", 30) * np.abs(plain).max())
    # Of sgd it is the refined schedule of the norms that have these weights.
    if learner is optax.identity:
        schedule = refine_schedule_values(weights**-0.5, method="none")
        raw = weights * np.append(np.cumsum(weights[:0:-1])[::-1], 0.0) / weights.sum()
        np.testing.assert_allclose(
            -np.diff(np.vstack([np.zeros(4), got]), axis=0), (schedule * raw.max())[:, None] * gradients, atol=1e-5
        )


def test_equal_weights_are_the_linear_decay_and_nothing_moves_beyond():
    got = path(optax.chain(optax.sgd(1.0), scale_by_last_iterate(np.ones(8))), jnp.ones((11, 1)))
    steps = -np.diff(np.append(0.0, got))
    np.testing.assert_allclose(steps, np.maximum(7 - np.arange(11), 0) / 8, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: scale_by_last_iterate([[1.0]]), r"be a vector \[T\] of positive numbers; got shape \(1, 1\)"),
        (lambda: scale_by_last_iterate([]), r"be a vector \[T\] of positive numbers; got shape \(0,\)"),
        (lambda: scale_by_last_iterate([1.0, 0.0]), r"be a vector \[T\] of positive numbers; got .0.."),
        (lambda: scale_by_last_iterate([1.0, np.nan]), r"be a vector \[T\] of positive numbers; got .nan."),
        (lambda: jax.jit(lambda w: scale_by_last_iterate(w).init(w))(jnp.ones(2)), "be concrete; got a tracer"),
    ],
)
def test_bad_arguments_are_named(call, sentence):
    with pytest.raises(ValueError, match=f"^scale_by_last_iterate: `weights` must {sentence}"):
        call()


def test_a_list_of_traced_weights_is_named():
    with pytest.raises(ValueError, match="scale_by_last_iterate: `weights` must be concrete"):
        jax.jit(lambda w: scale_by_last_iterate([w, w]).init(w))(1.0)


def test_shares_keep_float64(x64):
    tx, x = scale_by_last_iterate([1.0, 2.0, 3.0]), jnp.ones(())
    np.testing.assert_allclose(tx.update(x, tx.init(x), x)[0], 5 / 6, rtol=1e-15)
