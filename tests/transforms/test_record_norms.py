"""Recorded norms against optax's own, and a refined schedule made from a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.schedules import refine_schedule
from jaxnum.transforms import record_norms
from kernels_pallas.checks import DtypeError, ShapeError, TreeError
from tests.tolerances import tolerance


def test_norms_are_those_of_the_whole_tree_before_clipping(key):
    params = {"a": jax.random.normal(key, (3, 4)), "b": jnp.ones(5, jnp.bfloat16)}
    for order, norm in ((2, optax.tree.norm), (1, lambda t: sum(jnp.abs(x).sum() for x in jax.tree.leaves(t)))):
        tx = optax.chain(record_norms(2, order=order), optax.clip_by_global_norm(0.1))
        state = tx.init(params)
        for _ in range(3):  # one more than the record holds
            updates, state = tx.update(params, state)
        want = norm(jax.tree.map(lambda x: x.astype("float32"), params))
        np.testing.assert_allclose(state[0].norms, [want, want], rtol=tolerance("float32", 17))
        assert int(state[0].count) == 3
        assert float(optax.tree.norm(updates)) < 0.11


def test_a_run_under_jit_gives_the_next_run_its_schedule():
    tx = optax.chain(record_norms(40), optax.sgd(0.3))

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(2 * x, state, x)
        return (optax.apply_updates(x, updates), state), jnp.abs(2 * x)

    x = jnp.array(1.0)
    (_, state), seen = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), length=40))(x)
    np.testing.assert_allclose(state[0].norms, seen, rtol=1e-6)
    with pytest.warns(RuntimeWarning, match="norms below"):
        schedule = refine_schedule(state[0].norms, peak=0.5)
    assert float(max(map(schedule, range(40)))) == 0.5


def test_unrecorded_steps_are_nan_and_left_out():
    recorder = record_norms(20)
    state = recorder.init(jnp.zeros(1))
    for _ in range(12):
        _, state = recorder.update(jnp.ones(1), state)
    assert int(jnp.isnan(state.norms).sum()) == 8
    linear = optax.linear_schedule(1.0, 0.0, 11)
    got = refine_schedule(state.norms)
    np.testing.assert_allclose([got(t) for t in range(12)], [linear(t) for t in range(12)], atol=1e-6)


def test_parameters_and_updates_are_checked():
    params = {"w": jnp.ones((3, 2))}
    recorder = record_norms(2)
    with pytest.raises(DtypeError, match=r"^record_norms: `params\['w'\]` must have a floating-point or complex dtype"):
        recorder.init({"w": jnp.arange(3)})
    for error, updates in (
        (ShapeError, {"w": jnp.ones(2)}),
        (DtypeError, {"w": jnp.ones((3, 2), jnp.bfloat16)}),
        (TreeError, jnp.ones((3, 2))),
    ):
        with pytest.raises(error, match="^record_norms: `updates.*` must have .* to match|tree structure"):
            recorder.update(updates, recorder.init(params), params)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="^record_norms: `steps` must be at least 1; got 0"):
        record_norms(0)
    with pytest.raises(ValueError, match="^record_norms: `order` must be one of 1, 2; got 3"):
        record_norms(2, order=3)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_norms_whose_squares_vanish_or_overflow(size):
    recorder = record_norms(1)
    _, state = recorder.update({"a": jnp.float32(3 * size), "b": jnp.float32(4 * size)}, recorder.init(None))
    np.testing.assert_allclose(state.norms, [5 * size], rtol=1e-6)
