"""Planted outliers with opposing targets: gradient descent at the edge of stability names exactly them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.ops.opposing_signals import descend, loss, planted
from jaxnum.training import (
    opposing_signals,
    opposing_signals_feature,
    opposing_signals_groups,
    opposing_signals_score,
)
from kernels_pallas.checks import ShapeError


def test_planted_groups_are_found_at_the_edge_of_stability(x64):
    data, params = planted()
    losses, path = descend(data, params, 0.15, 300)
    events = [event for event in opposing_signals(losses, 5) if event.step > 5]
    # Relative rises; ten of the twelve are above 1e-4 of the loss's own unit too.
    absolute = [event.step for event in events if losses[event.step].mean() - losses[event.step - 1].mean() > 1e-4]
    assert len(absolute) == 10
    assert absolute[:5] == [75, 76, 77, 78, 79]
    one, other = set(range(5)), set(range(5, 10))
    for event in events:
        sides = [set(event.groups.up.tolist()), set(event.groups.down.tolist())]
        assert sides in ([one, other], [other, one])
        want = losses[event.step] - losses[event.step - 1]
        np.testing.assert_array_equal(event.groups.up_change, want[event.groups.up])
        np.testing.assert_allclose(event.rise, want.mean() / losses[event.step - 1].mean(), rtol=1e-9)
    # The groups swap roles from step to step.
    firsts = [min(event.groups.up.tolist()) < 5 for event in events[:5]]
    assert all(a != b for a, b in zip(firsts, firsts[1:], strict=False))

    before = jax.tree.map(lambda leaf: leaf[events[0].step - 1], path)
    score = jax.jit(lambda *given: opposing_signals_score(loss, *given, batch_size=64))(before, data, events[0].groups)
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(before, data)
    flat = np.concatenate([np.asarray(leaf).reshape(200, -1) for leaf in gradients], axis=1)
    up, down = (flat[list(group)].mean(axis=0) for group in events[0].groups[:2])
    norms = np.linalg.norm(flat, axis=1)
    sizes = np.linalg.norm(up), np.linalg.norm(down)
    want = (up @ down / sizes[0] / sizes[1], *(sizes / norms.mean()), norms[:10].sum() / norms.sum())
    np.testing.assert_allclose(score, want, rtol=1e-10)
    assert score.cosine < -0.95
    assert min(score.up_ratio, score.down_ratio) > 3
    share, direction = opposing_signals_feature(data[0], events[0].groups)
    assert share > 0.9
    assert abs(direction[-1]) > 0.99


def test_below_the_edge_nothing_rises_and_beyond_it_the_search_ends(x64):
    data, params = planted()
    assert [event for event in opposing_signals(descend(data, params, 0.1, 300)[0], 5) if event.step > 5] == []
    losses, _ = descend(data, params, 0.25, 100)
    with pytest.warns(RuntimeWarning, match="^opposing_signals: losses of step .* are not all finite"):
        events = opposing_signals(losses, 5)
    assert 0 < len(events) < 20


def test_an_iterator_of_losses_is_a_history():
    history = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 5.0, 1.0, 4.0], [1.0, 1.0, 9.0, 3.0]], np.float32)
    events = opposing_signals((row for row in history), 1)
    assert [(e.step, int(e.groups.up[0]), int(e.groups.down[0])) for e in events] == [(1, 1, 2), (2, 2, 1)]
    assert opposing_signals(history, 1, min_rise=0.2)[0].step == 2


def test_groups_under_jit_and_their_ties(key):
    before, after = jax.random.normal(key, (2, 9)).round(1)
    got = jax.jit(opposing_signals_groups, static_argnums=2)(before, after, 4)
    change = np.asarray(after - before)
    np.testing.assert_array_equal(got.up, np.argsort(-change, kind="stable")[:4])
    np.testing.assert_array_equal(got.down, np.argsort(change, kind="stable")[:4])
    tied = opposing_signals_groups(jnp.zeros(6), jnp.zeros(6), 3)
    assert tied.up.tolist() == tied.down.tolist() == [0, 1, 2]
    spoilt = opposing_signals_groups(jnp.zeros(3), jnp.array([1.0, jnp.nan, 2.0]), 1)
    assert (int(spoilt.up[0]), int(spoilt.down[0])) == (1, 0)
    assert bool(jnp.isnan(spoilt.up_change[0]))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="^opposing_signals: `min_rise` must be greater than 0"):
        opposing_signals([], 1, min_rise=0.0)
    with pytest.raises(ShapeError, match="^opposing_signals: `losses` must have shape"):
        opposing_signals([np.ones(4), np.ones(3)], 1)
    with pytest.raises(ValueError, match="^opposing_signals: `k` must be an int from 1 to half"):
        opposing_signals([np.ones(4)], 3)
    with pytest.raises(ValueError, match="^opposing_signals: `losses` must be concrete"):
        jax.jit(lambda x: opposing_signals([x], 1))(jnp.ones(4))
    with pytest.raises(ShapeError, match="^opposing_signals_groups: `after` must have shape"):
        opposing_signals_groups(jnp.ones(4), jnp.ones(3), 1)
    groups = opposing_signals_groups(jnp.ones(4), jnp.ones(4), 1)
    with pytest.raises(ShapeError, match="^opposing_signals_feature: `features` must have shape"):
        opposing_signals_feature(jnp.ones(4), groups)
    with pytest.raises(ValueError, match="^opposing_signals_score: `batch_size` must be"):
        opposing_signals_score(loss, (), jnp.ones(4), groups, batch_size=0)
    other = opposing_signals_groups(jnp.zeros(9), jnp.arange(9.0), 1)
    with pytest.raises(ValueError, match="^opposing_signals_score: `groups.up` must be at most half of the 4 examples"):
        opposing_signals_score(lambda w, one: w * one, 0.1, jnp.ones(4), other)
    with pytest.raises(ValueError, match="^opposing_signals_feature: `groups.up` must be at most half of the 4 examp"):
        opposing_signals_feature(jnp.ones((4, 2)), other)
    many = opposing_signals_groups(jnp.zeros(9), jnp.arange(9.0), 3)
    with pytest.raises(ValueError, match="^opposing_signals_feature: `groups.up` must be at most half of the 4 examp"):
        jax.jit(opposing_signals_feature)(jnp.ones((4, 2)), many)


def test_scores_know_no_unit():
    data = (jnp.array([1.0, 1.0, 0.1, 0.1]), jnp.array([1.0, -1.0, 0.0, 0.0]))
    groups = opposing_signals_groups(jnp.zeros(4), jnp.array([1.0, -1.0, 0.0, 0.0]), 1)
    want, got = (
        opposing_signals_score(lambda w, one, s=s: s * (w * one[0] - one[1]) ** 2, 0.1, data, groups)
        for s in (1.0, 1e-24)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_leaves_of_different_lengths_are_named():
    groups = opposing_signals_groups(jnp.zeros(4), jnp.array([1.0, -1.0, 0.0, 0.0]), 1)
    with pytest.raises(ShapeError, match="opposing_signals_score: `data` must have an axis of examples"):
        opposing_signals_score(lambda w, one: w * one[0] * one[1], 0.1, (jnp.ones(4), jnp.ones(2)), groups)
