"""MKOR-H: when it switches, that it does so once, and that each method's step is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.transforms import MkorLayer, mkor_hybrid, scale_by_mkor
from kernels_pallas.checks import DtypeError, ShapeError


def switches(values, **options):
    """Whether the first-order method made the step, step by step."""
    tx, x = mkor_hybrid(optax.scale(2.0), optax.scale(1.0), **options), jnp.ones(1)

    def step(state, value):
        moved, state = tx.update(x, state, x, value=value)
        return state, moved[0] == 1.0

    return jax.lax.scan(step, tx.init(x), jnp.array(values))[1].tolist()


def test_switches_after_enough_slow_windows_and_never_back():
    # Windows of two: means 8, 4, 4, 4 (two slow ones), and then it falls fast again.
    losses = [9.0, 7.0, 5.0, 3.0, 4.0, 4.0, 3.0, 5.0, 1.0, 0.5, 0.1, 0.01]
    assert switches(losses, window=2, patience=2) == [False] * 8 + [True] * 4
    assert switches(losses, window=2, patience=3) == [False] * 12
    assert switches(losses, window=2, patience=1) == [False] * 6 + [True] * 6
    # Slow windows count in a row.
    assert not any(switches([4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5], window=1, patience=2))
    assert any(switches([4.0, 4.0, 3.9, 2.0], window=1, patience=2, threshold=0.1))
    # A loss below zero that falls is no slow one.
    assert not any(switches([-1.0, -2.0, -3.0, -4.0], window=1, patience=1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_decides_nothing(bad):
    assert not any(switches([4.0, bad, 4.0, bad, 4.0], window=1, patience=1))
    assert switches([4.0, bad, 4.0, 4.0, 4.0], window=1, patience=1) == [False] * 4 + [True]


def test_bypasses_mkor_and_keeps_momentum():
    layers, params = {"l": MkorLayer("w")}, {"w": jnp.ones((2, 3))}
    grads, stats = {"w": jnp.arange(6.0).reshape(2, 3)}, {"l": (jnp.arange(2.0), jnp.arange(3.0))}
    hybrid = mkor_hybrid(scale_by_mkor(layers, stats_every=1), optax.identity(), window=1, patience=1)
    tx, second = optax.chain(hybrid, optax.trace(0.5)), scale_by_mkor(layers, stats_every=1)
    state, own, trace = tx.init(params), second.init(params), 0.0
    step = jax.jit(lambda state, value: tx.update(grads, state, params, stats=stats, value=value))
    own_step = jax.jit(lambda own: second.update(grads, own, params, stats=stats))
    for value, by_second in ((1.0, True), (1.0, True), (1.0, False), (0.1, False)):
        got, state = step(state, value)
        if by_second:
            want, own = own_step(own)
        else:
            want = grads
        trace = want["w"] + 0.5 * trace
        np.testing.assert_allclose(got["w"], trace, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state[0].second, own)  # at rest since the switch


def test_bad_arguments():
    x, tx = jnp.ones(2), mkor_hybrid(optax.scale(1.0), optax.sgd(0.1))
    with pytest.raises(TypeError, match="mkor_hybrid: `first_order` must be an optax gradient transformation"):
        mkor_hybrid(optax.scale(1.0), optax.sgd)
    with pytest.raises(ValueError, match="mkor_hybrid: `patience` must be at least 1; got 0"):
        mkor_hybrid(optax.scale(1.0), optax.sgd(0.1), patience=0)
    with pytest.raises(ValueError, match="mkor_hybrid: `value` must be given, the loss of the step; got None. Pass"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ShapeError, match=r"mkor_hybrid: `value` must have shape \(\); got \(2,\)"):
        tx.update(x, tx.init(x), x, value=x)
    with pytest.raises(DtypeError, match="mkor_hybrid: `value` must have a floating-point dtype; got int32"):
        tx.update(x, tx.init(x), x, value=1)


def test_methods_that_widen_may_be_paired_with_those_that_do_not():
    tx = mkor_hybrid(optax.scale(jnp.float32(1)), optax.identity())
    x = jnp.ones(2, jnp.bfloat16)
    assert tx.update(x, tx.init(x), x, value=1.0)[0].dtype == jnp.bfloat16
