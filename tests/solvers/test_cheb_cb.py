"""ChebCB: scipy's box-constrained fits of all the past, its draw by hand, and a toy that no fixed arm wins."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxnum.solvers import cheb_cb, tsallis_inf
from jaxnum.solvers.linear._cheb_cb import box_least_squares
from tests.tolerances import tolerance

LOW, HIGH = -1.0, 3.0


def losses(context):
    """Of four arms above 1, the best of which are three in turn."""
    return 8 * jnp.abs(context - jnp.asarray([-0.8, 1.0, 2.8, 6.0]))


@partial(jax.jit, static_argnums=(0, 1))
def play(fits, rounds, key, spread):
    """Contexts, some outside the interval, arms, losses and every state."""
    bins = jnp.linspace(LOW, HIGH, 5)[1:-1]
    init, sample, update = cheb_cb(4, LOW, HIGH) if fits else tsallis_inf(4, context_bins=bins)

    def round(state, key):
        first, second, third = jax.random.split(key, 3)
        context = jax.random.uniform(first, (), minval=LOW - 0.3, maxval=HIGH)
        arm, state = sample(state, second, context)
        loss = 1 + spread * (losses(context)[arm] + jax.random.uniform(third))
        new = update(state, loss)
        return new, (context, arm, loss, new)

    return jax.lax.scan(round, init(), jax.random.split(key, rounds))[1]


def played(rounds, spread=1.0):
    """The first of 300 rounds, and the state after each."""
    run = play(True, 300, jax.random.key(3), spread)
    return jax.tree.map(lambda leaf: np.asarray(leaf[:rounds]), run)


def features(contexts):
    x = 2 * (np.asarray(contexts, float) - LOW) / (HIGH - LOW) - 1
    return np.polynomial.chebyshev.chebvander(np.clip(x, -1, 1), 5)


@pytest.mark.parametrize("rounds", [7, 300])
def test_fits_are_those_of_all_past_rounds(rounds, float_dtype):
    contexts, arms, got, states = played(rounds)
    got, state = got.astype(float), jax.tree.map(lambda leaf: leaf[-1], states)
    bound = np.append(got.max(), 2 * (got.max() - got.min()) / np.arange(1, 6))
    tol = tolerance(float_dtype, rounds, condition=20)
    for arm in range(4):
        Phi, y = features(contexts[arms == arm]), got[arms == arm] - 1
        ours = state.weights[arm]
        assert np.all(np.abs(ours) <= bound * (1 + tol))
        if not y.size:
            np.testing.assert_array_equal(ours, 0)
            continue
        # Few rounds leave several best fits, of one cost.
        cost = 2 * scipy.optimize.lsq_linear(Phi, y, (-bound, bound), method="bvls", tol=1e-14).cost
        assert np.sum((Phi @ ours - y) ** 2) == pytest.approx(cost, abs=tol * np.sum(y**2))
        assert float(state.misfits[arm]) == pytest.approx(cost, abs=tol * np.sum(y**2))
    # The errors are those of predictions made with the weights before.
    before = np.concatenate([np.zeros_like(states.weights[:1]), states.weights[:-1]])
    predicted = np.sum(before[np.arange(rounds), arms] * features(contexts), axis=1)
    assert float(state.errors) == pytest.approx(np.sum((predicted - got + 1) ** 2), rel=tol)


def test_the_box_binds(float_dtype):
    """Where it does, the fit is scipy's; where it does not and nothing decides, the shortest."""
    rng, fit = np.random.default_rng(0), jax.jit(box_least_squares)
    for rows in (1, 2, 5, 12, 40):
        Phi, y = features(rng.uniform(LOW, HIGH, rows)), 1 + rng.normal(size=rows) ** 2
        R = np.asarray(np.linalg.qr(np.vstack([np.column_stack([Phi, y]), np.zeros((7, 7))]), mode="r"))
        bound = np.append(0.1, 0.2 / np.arange(1, 6))
        want = scipy.optimize.lsq_linear(Phi, y, (-bound, bound), method="bvls", tol=1e-14)
        assert np.any(want.active_mask)
        inputs = (jnp.asarray(part, float_dtype) for part in (R[:6, :6], R[:6, 6], bound))
        ours = np.asarray(fit(*inputs), float)
        tol = tolerance(float_dtype, rows, condition=20) * np.sum(y**2)
        assert np.sum((Phi @ ours - y) ** 2) == pytest.approx(2 * want.cost, abs=tol)
        if rows < 3:
            wide = fit(*(jnp.asarray(part, float_dtype) for part in (R[:6, :6], R[:6, 6], 1e6 * bound)))
            np.testing.assert_allclose(wide, np.linalg.pinv(Phi) @ y, atol=tolerance(float_dtype, 6, condition=20))


def test_draws_are_inverse_in_the_gap(x64):
    """The formulas of the docstring, with NumPy, from a state in the middle of a run."""
    contexts, arms, got, states = played(150)
    q, m, n = 149, 6, 4
    state = jax.tree.map(lambda leaf: leaf[q - 1], states)
    fits = state.weights @ features(contexts[q : q + 1])[0]
    K, D = got[:q].max(), got[:q].max() - got[:q].min()
    s = 2 * K + 4 * D * (1 + np.log(m))
    alpha = (np.pi + 2 / np.pi * np.log(2 * m - 1)) * D / (2 * m * s)
    excess = (state.errors - state.misfits.sum()) / s**2
    eta = 2 * q * np.sqrt(n * q / (excess + 2 * q * alpha**2))
    want = 1 / (n + eta * (fits - fits.min()) / s)
    want[fits.argmin()] = 1 - np.delete(want, fits.argmin()).sum()
    np.testing.assert_allclose(states.probabilities[q], want, rtol=tolerance("float64", q, condition=100))
    np.testing.assert_allclose(states.probabilities.sum(axis=1), 1, rtol=tolerance("float64", n))
    assert np.all(states.probabilities > 0)
    # Early on each arm has its turn.
    assert set(arms[:12]) == {0, 1, 2, 3}


def test_a_context_beats_every_fixed_arm(x64):
    """In the second half at most a third of the best arm's excess; a bandit a bin gets below it too, later."""

    def excess(contexts, arms, *_):
        table = np.asarray(losses(contexts[len(contexts) // 2 :, None]))
        table = table - table.min(axis=1, keepdims=True)
        return table[np.arange(len(table)), arms[len(contexts) // 2 :]].mean(), table.mean(axis=0).min()

    ours, best_arm = excess(*played(300))
    assert 3 * ours < best_arm
    binned, best_arm = excess(*jax.tree.map(np.asarray, play(False, 1600, jax.random.key(4), 1.0)))
    assert binned < best_arm


def test_equal_losses():
    """With nothing to learn the rule stays finite."""
    *_, states = played(300, 0.0)
    assert all(np.all(np.isfinite(leaf)) for leaf in states)
    np.testing.assert_allclose(states.probabilities.sum(axis=1), 1, rtol=tolerance("float32", 4))


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="cheb_cb: `n_arms` must be a Python int >= 1; got 0"):
        cheb_cb(0, 0.0, 1.0)
    with pytest.raises(ValueError, match="cheb_cb: `high` must be above low = 1.0; got 1.0"):
        cheb_cb(2, 1.0, 1.0)
    init, sample, _ = cheb_cb(2, 0.0, 1.0)
    with pytest.raises(ValueError, match="cheb_cb: `context` must be given; got None"):
        sample(init(), jax.random.key(0))
