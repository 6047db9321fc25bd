"""Refined schedules: values by hand, a median written out, and what a run that interpolates would do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage

from jaxnum.schedules import refine_schedule, refine_schedule_values

NORMS = [4.0, 2.0, 1.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("p", "want"),
    [(2, [0.35 / 3.6, 1.3 / 3.6, 1.0, 2 / 3.6, 0.4 / 3.6, 0.0]), (1, [0.4, 0.7, 1.0, 0.6, 0.2, 0.0])],
)
def test_values_by_hand(p, want):
    weights = np.array(NORMS) ** -p
    tails = [weights[t + 1 :].sum() for t in range(6)]
    by_hand = weights * tails / max(weights * tails)
    got = refine_schedule_values(NORMS, p=p, method="none")
    np.testing.assert_allclose(got, by_hand, rtol=1e-14)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(refine_schedule_values(7 * np.array(NORMS), p=p, method="none"), got, rtol=1e-12)


def test_constant_norms_give_the_linear_decay_and_beyond_it_the_last_value():
    schedule = jax.jit(jax.vmap(refine_schedule(np.full(50, 3.0), peak=0.2)))
    linear = jax.vmap(optax.linear_schedule(0.2, 0.0, 49))
    np.testing.assert_allclose(schedule(jnp.arange(60)), linear(jnp.arange(60)), atol=1e-7)
    longer = jax.vmap(refine_schedule(np.full(50, 3.0), total_steps=99))(jnp.arange(99))
    np.testing.assert_allclose(longer, 1 - np.arange(99) / 98, atol=1e-6)


def test_five_constant_norms_by_hand():
    np.testing.assert_allclose(refine_schedule_values(np.full(5, 3.0)), [1, 0.75, 0.5, 0.25, 0], atol=1e-12)


def test_steps_outside_the_horizon_have_the_values_of_its_ends():
    schedule = refine_schedule(NORMS, method="none", peak=0.5)
    values = 0.5 * refine_schedule_values(NORMS, method="none")
    asked = jnp.array([-5, -1, 0, 5, 6, 10**6])
    np.testing.assert_allclose(schedule(asked), values[[0, 0, 0, 5, 5, 5]], rtol=1e-6)
    assert float(schedule(10**6)) == 0.0


@pytest.mark.parametrize(("share", "steps"), [(0.1, 60), (0.03, 1000), (0.4, 200)])
def test_the_running_median_of_scipy(share, steps):
    norms = np.random.default_rng(0).lognormal(size=steps)
    width = 2 * (int(share * steps) // 2) + 1
    mirrored = np.pad(norms, (0, 2 * width), mode="reflect")
    smooth = scipy.ndimage.median_filter(mirrored, size=width, mode="nearest")[: -2 * width]
    want = refine_schedule_values(smooth, method="none")
    np.testing.assert_allclose(refine_schedule_values(norms, smoothing=share), want, rtol=1e-12)


def test_the_running_median_written_out():
    norms = np.random.default_rng(0).lognormal(size=60)
    half = 3  # a tenth of 60 steps, an odd width
    wide = np.concatenate([np.full(half, norms[0]), norms, norms[-2 : -2 - half : -1]])
    smooth = np.array([np.median(wide[t : t + 2 * half + 1]) for t in range(60)])
    want = refine_schedule_values(smooth, method="none")
    np.testing.assert_allclose(refine_schedule_values(norms, smoothing=0.1), want, rtol=1e-12)


def forward_mean(norms, rate):
    """Exponentially weighted means of all so far, as sums."""
    shares = [(1 - rate) ** np.arange(t, -1, -1) for t in range(norms.size)]
    return np.array([share @ norms[: share.size] / share.sum() for share in shares])


def test_exponential_means_look_both_ways():
    norms = np.random.default_rng(0).lognormal(size=60)
    smooth = (forward_mean(norms, 0.25) + forward_mean(norms[::-1], 0.25)[::-1]) / 2
    want = refine_schedule_values(smooth, method="none")
    np.testing.assert_allclose(refine_schedule_values(norms, method="ewma"), want, rtol=1e-12)


def test_the_last_iterate_of_the_schedule_is_a_weighted_average(x64):
    # With a linear loss the last iterate under the schedule equals the average of plain steps with weights w.
    rng = np.random.default_rng(1)
    gradients, weights = rng.normal(size=(30, 4)), rng.lognormal(size=30)
    tails = np.array([weights[t + 1 :].sum() for t in range(30)]) / weights.sum()
    plain = -np.cumsum(gradients * weights[:, None], axis=0)
    before = np.vstack([np.zeros(4), plain[:-1]])
    average = weights @ before / weights.sum()
    last = -(gradients * (weights * tails)[:, None]).sum(axis=0)
    np.testing.assert_allclose(last, average, rtol=1e-12)
    ours = refine_schedule_values(weights**-0.5, p=2, method="none")
    np.testing.assert_allclose(ours, weights * tails / (weights * tails).max(), rtol=1e-12)


def test_vanishing_norms_are_held_with_a_warning():
    norms = np.concatenate([np.ones(50), np.full(10, 1e-9)])
    with pytest.warns(RuntimeWarning, match="refine_schedule_values: norms below 0.001, a thousandth of the median"):
        refine_schedule_values(norms, method="none")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: refine_schedule([1.0]), "`norms` must have at least 2 finite entries; got 1"),
        (lambda: refine_schedule([[1.0, 1.0]]), r"`norms` must be a vector \[T\]; got shape \(1, 2\)"),
        (lambda: refine_schedule([-1.0, 1.0]), "`norms` must be non-negative, not all 0; got -1.0"),
        (lambda: refine_schedule([1.0, 2.0], p=0), "`p` must be greater than 0; got 0"),
        (lambda: refine_schedule([1.0, 2.0], smoothing=1.0), r"`smoothing` must be in \(0, 1\); got 1.0"),
        (lambda: refine_schedule([1.0, 2.0], method="mean"), "`method` must be one of 'median', 'ewma', 'none'"),
        (lambda: refine_schedule([1.0, 2.0], total_steps=1), "`total_steps` must be at least 2; got 1"),
        (lambda: refine_schedule([1.0, 2.0], total_steps=10.0), "`total_steps` must be an integer; got 10.0"),
        (lambda: refine_schedule([1.0, 2.0], p=np.inf), "`p` must be finite; got inf"),
        (lambda: refine_schedule([1.0, 2.0], peak=np.float32(-1)), "`peak` must be greater than 0; got -1.0"),
        (lambda: jax.jit(lambda n: refine_schedule([n, n])(0))(1.0), "`norms` must be concrete; got a tracer"),
        (lambda: refine_schedule([1.0, 2.0], peak=0.0), "`peak` must be greater than 0; got 0.0"),
        (lambda: jax.jit(lambda n: refine_schedule(n)(0))(jnp.ones(3)), "`norms` must be concrete; got a tracer"),
    ],
)
def test_bad_arguments_are_named(call, sentence):
    with pytest.raises(ValueError, match=f"^refine_schedule: {sentence}"):
        call()


def test_fewer_steps_do_not_pass_over_the_peak():
    norms = np.full(1001, 10.0)
    norms[500] = 1.0
    schedule = refine_schedule(norms, method="none", total_steps=100, peak=0.1)
    assert max(float(schedule(step)) for step in range(100)) == np.float32(0.1)


def test_steps_that_were_skipped_take_their_neighbours_norms_and_those_never_taken_are_cut():
    norms = np.array([1.0, 2.0, np.nan, 4.0, np.inf, 2.0, np.nan, np.nan])
    filled = np.array([1.0, 2.0, 3.0, 4.0, 3.0, 2.0])
    got, want = (refine_schedule_values(x, method="none") for x in (norms, filled))
    np.testing.assert_allclose(got, want, rtol=1e-14)


@pytest.mark.parametrize("unit", [1e-160, 1e160])
def test_the_unit_of_the_norms_is_nobody_s(unit):
    norms = np.array([4.0, 2.0, 1.0, 3.0])
    got, want = (refine_schedule_values(u * norms, method="none", p=3.0) for u in (unit, 1.0))
    np.testing.assert_allclose(got, want, rtol=1e-13)
