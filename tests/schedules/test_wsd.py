"""Warm-up, stable phase, decay: values by hand, optax's pieces, and the theory of the stable phase."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.schedules import wsd, wsd_branch, wsd_s
from tests.tolerances import tolerance

STEPS = jnp.arange(70)


def joined(peak, total, warmup, length, last):
    """optax's pieces for the decays that it has."""
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, optax.constant_schedule(peak), last], [warmup, total - length])


def test_an_inverse_decay_to_a_tenth_over_nine_steps():
    schedule = wsd_branch(1.0, 0, 9)
    np.testing.assert_allclose([schedule(i) for i in range(10)], [1 / (1 + i) for i in range(10)], rtol=1e-7)


@pytest.mark.parametrize(
    ("decay", "last"),
    [
        ("linear", optax.linear_schedule(2.0, 0.5, 20)),
        ("cosine", optax.cosine_decay_schedule(2.0, 20, alpha=0.25)),
        ("exponential", optax.exponential_decay(2.0, 20, 0.25, end_value=0.5)),
        ("sqrt", lambda t: 2.0 * (1 - 0.75 * jnp.sqrt(jnp.minimum(t, 20) / 20))),
        ("inverse", lambda t: 1 / (0.5 + 1.5 * jnp.minimum(t, 20) / 20)),
    ],
)
def test_shapes_equal_optax_s_pieces(decay, last):
    schedule = wsd(2.0, 60, 10, 20, end_ratio=0.25, decay=decay)
    want = jax.vmap(joined(2.0, 60, 10, 20, last))(STEPS)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(STEPS), want, rtol=tolerance("float32", 9))
    np.testing.assert_array_equal(schedule(STEPS), jax.vmap(schedule)(STEPS))


def test_one_endpoint_is_wsd_and_later_cycles_jump_to_the_peak():
    one = wsd_s(1.0, [60], 5)
    np.testing.assert_array_equal(one(STEPS), wsd(1.0, 60, 5, 6)(STEPS))
    two = wsd_s(1.0, [20, 60], 5, decay="linear", end_ratio=0.0)
    np.testing.assert_allclose(two(jnp.array([18, 19, 20, 21, 55, 56, 58, 60, 99])), [1, 0.5, 1, 1, 1, 1, 0.5, 0, 0])
    again = wsd_s(1.0, [20, 60], 5, decay="linear", rewarmup_steps=10)
    np.testing.assert_allclose(again(jnp.array([20, 25, 30])), [0.1, 0.55, 1.0], rtol=1e-6)


NOISE = jax.random.normal(jax.random.key(0), (30, 3))


def train(schedule, carry, steps):
    """Parameters and state of noisy Adam after some steps of a run, from a checkpoint or, at None, from the start."""
    tx = optax.adam(schedule)

    def step(carry, n):
        x, state = carry
        updates, state = tx.update(x + n, state, x)
        return (optax.apply_updates(x, updates), state), None

    x = jnp.ones(3)
    return jax.jit(lambda c: jax.lax.scan(step, c, NOISE[steps])[0])(carry or (x, tx.init(x)))


def through_a_file(carry, schedule, path):
    """A checkpoint written as a NumPy archive, and read into the tree of a new optimiser."""
    np.savez(path, *jax.tree.leaves(carry))
    x = jnp.zeros(3)
    tree = jax.tree.structure((x, optax.adam(schedule).init(x)))
    with np.load(path) as saved:
        return jax.tree.unflatten(tree, [jnp.asarray(saved[name]) for name in saved.files])


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_branches_off_a_file_equal_runs_of_their_lengths_bit_for_bit(tmp_path):
    # The stable run is meant to be longer; what it is at steps 10 and 20 does not depend on that.
    main = wsd(0.3, 300, 4, 10)
    carry = None
    for start in (10, 20):
        carry = train(main, carry, slice(start - 10, start))
        branch = wsd_branch(0.3, start, 10)
        restored = through_a_file(carry, branch, tmp_path / f"{start}.npz")
        got = train(branch, restored, slice(start, start + 10))
        same(got, train(wsd(0.3, start + 10, 4, 10), None, slice(0, start + 10)))


def test_wsd_s_goes_on_from_the_file_of_an_endpoint_with_its_moments(tmp_path):
    schedule = wsd_s(0.3, [12, 30], 4, decay_fraction=0.3)
    whole = train(schedule, None, slice(0, 30))
    finished = train(schedule, None, slice(0, 12))
    same(train(wsd(0.3, 12, 4, 4), None, slice(0, 12)), finished)
    restored = through_a_file(finished, schedule, tmp_path / "12.npz")
    same(train(schedule, restored, slice(12, 30)), whole)
    # Fresh moments at the endpoint are another run.
    x, state = restored
    forgot = (x, jax.tree.map(lambda s: s if s.ndim == 0 else 0 * s, state))
    assert not np.allclose(train(schedule, forgot, slice(12, 30))[0], whole[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "first", "horizon"),
    [
        (wsd(2.0, 30, 5, 10, init_value=0.5), 0.5, 30),
        (wsd(2.0, 30, 0, 10), 2.0, 30),
        (wsd_s(2.0, [10, 30], 5), 0.0, 30),
        (wsd_branch(2.0, 20, 10), 2.0, 30),
    ],
    ids=["wsd", "wsd_without_warmup", "wsd_s", "wsd_branch"],
)
def test_steps_outside_the_horizon_have_the_rates_of_its_ends(schedule, first, horizon):
    np.testing.assert_allclose(schedule(jnp.array([horizon, horizon + 1, 10**9])), 0.2, rtol=1e-6)
    assert float(schedule(horizon - 1)) > 0.2
    np.testing.assert_array_equal(schedule(jnp.array([-7, 0])), first)


def test_counts_beyond_two_to_the_24_lose_no_step():
    total = 2**25
    schedule = wsd(1.0, total, 0, 9)
    np.testing.assert_allclose(
        [schedule(total - 9 + i) for i in range(10)], [1 / (1 + i) for i in range(10)], rtol=1e-6
    )


def test_variance_of_the_stable_phase():
    h, sigma, rate = 2.0, 0.5, 0.3
    noise = jax.random.normal(jax.random.key(0), (60, 20_000))
    y = jax.lax.scan(
        lambda y, n: (y - wsd(rate, 10**6, 0, 1)(1000) * (h * y + sigma * n), None), jnp.zeros(20_000), noise
    )[0]
    np.testing.assert_allclose(jnp.mean(h * y**2 / 2), rate * sigma**2 / (2 * (2 - rate * h)), rtol=0.03)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: wsd(1.0, 10, 5, 6), "wsd: `total_steps` must leave room for warm-up and decay, 11 steps; got 10"),
        (lambda: wsd(1.0, 10, 5, 0), "wsd: `decay_steps` must be at least 1; got 0"),
        (lambda: wsd(1.0, 10.5, 5, 1), "wsd: `total_steps` must be an integer of at least 0; got 10.5"),
        (lambda: wsd(0.0, 10, 5, 1), "wsd: `peak` must be greater than 0; got 0.0"),
        (lambda: wsd(1.0, 10, 5, 1, end_ratio=0.0), "wsd: `end_ratio` must be greater than 0 and at most 1"),
        (lambda: wsd(1.0, 10, 5, 1, decay="cubic"), "wsd: `decay` must be one of 'inverse'"),
        (lambda: wsd_s(1.0, [10, 10], 0), "wsd_s: `endpoints` must be positive and increase; got .10, 10."),
        (lambda: wsd_s(1.0, [10], 10), "wsd_s: `endpoints` must leave room for a rise of 10 and a decay of 1"),
        (lambda: wsd_s(1.0, [10.0, 20.0], 0), r"wsd_s: `endpoints\[0\]` must be an integer of at least 0; got 10.0"),
        (lambda: wsd(1.0, 3_000_000_000, 0, 1), r"wsd: `total_steps` must be below 2\^30; got 3000000000"),
        (lambda: jax.jit(lambda r: wsd(1.0, 9, 0, 1, end_ratio=r)(0))(0.5), "wsd: `end_ratio` must be concrete; got a"),
        (lambda: wsd_branch(1.0, -1, 3), "wsd_branch: `start_step` must be an integer of at least 0; got -1"),
    ],
)
def test_bad_arguments_are_named(call, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        call()


def test_several_peaks_at_once():
    both = wsd(jnp.array([1.0, 2.0]), 14, 2, 9)
    np.testing.assert_allclose([both(step) for step in (1, 5, 14)], [[0.5, 1.0], [1.0, 2.0], [0.1, 0.2]], rtol=1e-6)
