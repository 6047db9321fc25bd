"""Tsallis-INF: the minimiser of its regularised problem, and the regret on a fixed Bernoulli bandit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxnum.solvers import tsallis_inf
from tests.tolerances import tolerance


@pytest.mark.parametrize("spread", [0.0, 3.0, 1e6])
def test_probabilities_minimise_the_regularised_loss(spread, float_dtype):
    init, sample, _ = tsallis_inf(7)
    k = spread * np.random.default_rng(0).uniform(size=7)
    t, mean = 12, 2.5
    state = init()._replace(totals=jnp.asarray(k, float_dtype), rounds=jnp.int32(t - 1))
    state = state._replace(seen=jnp.asarray(mean * (t - 1), float_dtype))
    p = np.asarray(sample(state, jax.random.key(1))[1].probabilities, float)
    assert p.sum() == pytest.approx(1, abs=tolerance(float_dtype, 7))
    # Stationary: the derivative of <p, k/s> - (4/eta) sum sqrt(p) is the same for every arm.
    eta = 2 / np.sqrt(t)
    slope = k / mean - 2 / (eta * np.sqrt(p))
    np.testing.assert_allclose(slope, slope[0], atol=tolerance(float_dtype, 7) * max(1, spread))
    # And scipy's root of the normaliser.
    excess = lambda x: np.sum(4 / (eta * (k / mean - x)) ** 2) - 1  # noqa: E731
    least = k.min() / mean
    x = scipy.optimize.brentq(excess, least - 2 * np.sqrt(7) / eta - 1, least - 1e-3, xtol=1e-14)
    rtol = tolerance(float_dtype, 7, condition=4) + 1e-15 * spread
    np.testing.assert_allclose(p, 4 / (eta * (k / mean - x)) ** 2, rtol=rtol)


def test_regret_on_a_bernoulli_bandit():
    """At most the proven 4 sqrt(n T) + 1; choosing at random pays more than twice as much."""
    means, T = jnp.asarray([0.1, 0.5, 0.5, 0.6, 0.7]), 1500
    init, sample, update = tsallis_inf(means.size)

    def play(state, key):
        first, second = jax.random.split(key)
        arm, state = sample(state, first)
        return update(state, 1 + jax.random.bernoulli(second, means[arm])), means[arm] - means[0]

    runs = jax.vmap(lambda key: jax.lax.scan(play, init(), jax.random.split(key, T))[1].sum())
    regret = np.asarray(jax.jit(runs)(jax.random.split(jax.random.key(0), 16)))
    assert regret.mean() < 4 * np.sqrt(means.size * T) + 1
    assert 2 * regret.mean() < T * float(jnp.mean(means) - means[0])


def test_bins_are_bandits_of_their_own():
    """Rounds in the bins 2, 0, 2 of a bandit with bins are the rounds of two bandits."""
    init, sample, update = tsallis_inf(3, context_bins=jnp.asarray([-1.0, 0.5]))
    plain_init, plain_sample, plain_update = tsallis_inf(3)

    @jax.jit
    def both():
        state, alone, arms = init(), [plain_init()] * 3, []
        for k, (context, bin, loss) in enumerate(((0.5, 2, 4.0), (-3.0, 0, 9.0), (8.0, 2, 2.0))):
            arm, state = sample(state, jax.random.key(k), context)
            same, alone[bin] = plain_sample(alone[bin], jax.random.key(k))
            state, alone[bin] = update(state, loss), plain_update(alone[bin], loss)
            arms.append((arm, same))
        return arms, state.bandits, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)

    arms, ours, want = both()
    assert all(int(arm) == int(same) for arm, same in arms)
    rtol = tolerance("float32", 3)
    jax.tree.map(lambda mine, theirs: np.testing.assert_allclose(mine, theirs, rtol=rtol), ours, want)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="tsallis_inf: `n_arms` must be a Python int >= 1; got 0"):
        tsallis_inf(0)
    with pytest.raises(ValueError, match="tsallis_inf: `context_bins` must increase"):
        tsallis_inf(2, context_bins=jnp.asarray([1.0, 0.0]))
    init, sample, _ = tsallis_inf(2)
    with pytest.raises(ValueError, match="tsallis_inf: `context` must be left out; got one"):
        sample(init(), jax.random.key(0), 0.5)
    init, sample, _ = tsallis_inf(2, context_bins=jnp.asarray([0.0]))
    with pytest.raises(ValueError, match="tsallis_inf: `context` must be given; got None"):
        sample(init(), jax.random.key(0))
