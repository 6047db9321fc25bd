"""ChebCB: choose among a few settings by a number known of each round, through a Chebyshev fit of each one's cost.

Cost: a QR and a box-constrained fit of degree + 1 numbers a round; memory O(arms degree^2), however many rounds.
Source: Khodak, Chow, Balcan & Talwalkar 2024; sampling: Foster & Rakhlin 2020; fits: Stark & Parker 1995.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.solvers.linear._tsallis_inf import Bandit
from kernels_pallas import checks


class ChebSpec(NamedTuple):
    """What the functions of one bandit share: the interval of contexts, the number of arms and the degree."""

    low: jax.Array
    high: jax.Array
    arms: int
    degree: int


class ChebState(NamedTuple):
    """What the next round starts from; m = degree + 1.

    Attributes:
      factors: [arms, m + 1, m + 1], R of the QR of each arm's rows (Chebyshev features, loss - 1).
      weights: [arms, m], coefficients of each arm's fit to loss - 1.
      misfits: [arms], sum of squares that each fit leaves.
      errors: sum of the squared errors of the predictions, made before each loss was known.
      least: least loss so far, infinite before the first.
      most: greatest loss so far, 1 before the first.
      rounds: int32 scalar, rounds that have ended.
      arm: int32 scalar, the arm sampled last.
      features: [m], of the last context.
      probabilities: [arms], what the arm was sampled from.
    """

    factors: jax.Array
    weights: jax.Array
    misfits: jax.Array
    errors: jax.Array
    least: jax.Array
    most: jax.Array
    rounds: jax.Array
    arm: jax.Array
    features: jax.Array
    probabilities: jax.Array


def cheb_cb(n_arms: int, low: float | jax.Array, high: float | jax.Array, *, degree: int = 5) -> Bandit:
    """ChebCB over n arms whose losses >= 1, such as counts of steps, depend smoothly on a context in [low, high].

    Each arm's loss above 1 is fitted by f(c) = sum_j w_j T_j(x), x = 2 (c - low) / (high - low) - 1, j = 0 .. degree,
    in least squares over the rounds it was drawn in, with |w_0| <= K, the greatest loss, and |w_j| <= 2 D / j, D the
    range of the losses. (A loss of Lipschitz constant L has |w_j| <= L (high - low) / (2 j), by parts; D guesses L
    (high - low), and 4 is slack.) The draw is inverse in the gap: p_i = 1 / (n + eta (f_i - min f) / s) and the rest to
    the best arm, s = 2 K + 4 D (1 + log m), m = degree + 1, so that no fit spans more than s. In round t > 1, with q =
    t - 1, eta = 2 q sqrt(n q / (E / s^2 + 2 q alpha^2)), E the squared errors of the predictions so far less what the
    fits leave, and alpha = (pi + 2 log(2 m - 1) / pi) D / (2 m s) bounds the error of truncation, from Jackson's
    theorem.

    Args:
      n_arms: Python int >= 1.
      low: real scalar, least context; those below count as low.
      high: real scalar above low, greatest context.
      degree: Python int >= 1 of the polynomials.

    Returns:
      A `Bandit`: `init() -> state`, `sample(state, key, context) -> (arm, state)`, `update(state, loss) -> state`,
      which fit a `lax.scan`. `state.probabilities` is the last p.

    Raises:
      ValueError: n_arms or degree below 1, high not above low, a context left out or no scalar.

    Cost: a round is one QR [m + 2, m + 1] and a few least-squares problems [m, m]; a new greatest or least loss refits
      every arm.

    Numerics: the past is kept as a triangular factor, not as moments, whose condition would be squared; the fits are
      those of all the past rounds to rounding. Among equally good fits the shortest is taken, 0 for an arm not drawn
      yet, so that every arm is drawn early on. The proof of a regret has eta without the factor q, which is its
      authors' too: on a thousand shifted Laplacians the draw without it cost 3.0 times as many steps.

    Source: Khodak, Chow, Balcan & Talwalkar, "Learning to Relax" (2024), arXiv 2310.02246, algorithm 2, and their
      programs, which take E from losses and predictions of unlike offsets and scales, leave out most arms' remainders,
      and put m for the degree in alpha; here it is as derived. Foster & Rakhlin, "Beyond UCB" (2020), algorithm 1;
      Stark & Parker, "Bounded-variable least squares" (1995).

    Example:
      >>> import jax, jaxnum
      >>> init, sample, update = jaxnum.solvers.cheb_cb(2, 0.0, 1.0)
      >>> arm, state = sample(init(), jax.random.key(0), 0.3)
      >>> state.probabilities.tolist(), int(update(state, 7.0).most)
      ([0.5, 0.5], 7)
    """
    for name, count in (("n_arms", n_arms), ("degree", degree)):
        ok = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        checks.value("cheb_cb", name, ok, "be a Python int >= 1", count)
    checks.shape("cheb_cb", low=(low, ""), high=(high, ""))
    if not checks.traced(low) and not checks.traced(high):
        checks.value("cheb_cb", "high", bool(high > low), f"be above low = {low}", high)
    spec = ChebSpec(jnp.asarray(low), jnp.asarray(high), n_arms, degree)
    return Bandit(partial(_init, spec), partial(_sample, spec), _update)


def _init(spec: ChebSpec) -> ChebState:
    m = spec.degree + 1
    weights, zero, none = jnp.zeros((spec.arms, m)), jnp.zeros(()), jnp.int32(0)
    return ChebState(
        factors=jnp.zeros((spec.arms, m + 1, m + 1)),
        weights=weights,
        misfits=weights[:, 0],
        errors=zero,
        least=zero + jnp.inf,
        most=zero + 1,
        rounds=none,
        arm=none,
        features=weights[0],
        probabilities=jnp.full_like(weights[:, 0], 1 / spec.arms),
    )


def _sample(spec: ChebSpec, state: ChebState, key: jax.Array, context: Any = None) -> tuple[jax.Array, ChebState]:
    given = context is not None
    checks.value("cheb_cb", "context", given, "be given", context, "A fit is a function of it: sample(state, key, c).")
    checks.shape("cheb_cb", context=(context, ""))
    features = _features(spec, jnp.asarray(context).astype(state.weights.dtype))
    fits = state.weights @ features
    best = jnp.argmin(fits)
    others = 1 / (spec.arms + _greed(state) * (fits - fits[best]))
    others = others.at[best].set(0)
    p = others.at[best].set(1 - jnp.sum(others))
    arm = jax.random.categorical(key, jnp.log(p)).astype(jnp.int32)
    return arm, state._replace(arm=arm, features=features, probabilities=p)


def _features(spec: ChebSpec, context: jax.Array) -> jax.Array:
    x = jnp.clip(2 * (context - spec.low) / (spec.high - spec.low) - 1, -1, 1)
    return jnp.cos(jnp.arange(spec.degree + 1) * jnp.arccos(x)).astype(context.dtype)


def _spread(state: ChebState) -> jax.Array:
    """The range D of the losses, 0 before the first."""
    return jnp.where(state.rounds > 0, state.most - state.least, 0)


def _greed(state: ChebState) -> jax.Array:
    """Eta / s."""
    arms, m = state.weights.shape
    t, spread = state.rounds.astype(state.errors.dtype), _spread(state)
    scale = 2 * state.most + 4 * spread * (1 + math.log(m))
    bias = (math.pi + 2 / math.pi * math.log(2 * m - 1)) * spread / (2 * m)
    excess = jnp.maximum(state.errors - jnp.sum(state.misfits), 0) + 2 * t * bias**2
    # E and alpha s are in the losses' unit, so eta / s is without s but for the guard, which bounds eta by 2 t sqrt(n)
    # / eps: nothing was mispredicted and no loss differed, so there is nothing to learn either.
    floor = t * (jnp.finfo(t.dtype).eps * scale) ** 2
    return 2 * t * jnp.sqrt(arms * t / jnp.maximum(excess + floor, jnp.finfo(t.dtype).tiny))


def _update(state: ChebState, loss: jax.Array) -> ChebState:
    loss = jnp.asarray(loss).astype(state.errors.dtype)
    arm, above = state.arm, loss - 1
    error = state.weights[arm] @ state.features - above
    row = jnp.append(state.features, above)[None]
    factor = jnp.linalg.qr(jnp.concatenate([state.factors[arm], row]), mode="r")
    new = state._replace(
        factors=state.factors.at[arm].set(factor),
        errors=state.errors + error**2,
        least=jnp.minimum(state.least, loss),
        most=jnp.maximum(state.most, loss),
        rounds=state.rounds + 1,
    )
    moved = (new.least != state.least) | (new.most != state.most)
    bound = jnp.append(new.most, 2 * _spread(new) / jnp.arange(1, state.features.size))

    def refit(i: jax.Array, fits: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weights, misfits = fits
        factor = new.factors[i]
        w = box_least_squares(factor[:-1, :-1], factor[:-1, -1], bound)
        left = jnp.append(factor[:-1, :-1] @ w - factor[:-1, -1], factor[-1, -1])
        return weights.at[i].set(w), misfits.at[i].set(left @ left)

    # One arm has a new loss; new bounds are every arm's.
    first, last = jnp.where(moved, 0, arm), jnp.where(moved, state.misfits.size, arm + 1)
    weights, misfits = jax.lax.fori_loop(first, last, refit, (state.weights, state.misfits))
    return new._replace(weights=weights, misfits=misfits)


class Fit(NamedTuple):
    """An iterate of `box_least_squares`: a point, which coordinates no bound holds, and whether to stop."""

    w: jax.Array
    free: jax.Array
    done: jax.Array
    steps: jax.Array


def box_least_squares(R: jax.Array, z: jax.Array, bound: jax.Array) -> jax.Array:
    """The w that minimises ||R w - z|| over |w_j| <= bound_j, by Stark & Parker's active sets; R [m, m], m small.

    Every step either goes to the minimum over the free coordinates or holds one more at its bound; at such a minimum
    the coordinate whose bound costs most is set free.
    """
    m = bound.size
    norms = jnp.linalg.norm(R, axis=0)
    rounding = 8 * m * jnp.finfo(R.dtype).eps * norms * jnp.linalg.norm(z)

    def step(fit: Fit) -> Fit:
        held = jnp.where(fit.free, 0, fit.w)
        target = jnp.where(fit.free, jnp.linalg.lstsq(R * fit.free, z - R @ held)[0], held)
        beyond = fit.free & (jnp.abs(target) > bound)
        # How far each coordinate may go towards the target.
        reach = jnp.where(beyond, (jnp.sign(target) * bound - fit.w) / (target - fit.w), 1)
        first = jnp.argmin(jnp.where(beyond, reach, jnp.inf))
        stopped = jnp.clip(fit.w + reach[first] * (target - fit.w), -bound, bound)
        stopped = stopped.at[first].set(jnp.sign(target[first]) * bound[first])
        # How much the sum of squares would fall on the way into the box.
        gain = jnp.where(fit.free, -jnp.inf, -jnp.sign(target) * ((z - R @ target) @ R) - rounding)
        worst = jnp.argmax(gain)
        blocked, wants = jnp.any(beyond), gain[worst] > 0
        changed = fit.free.at[jnp.where(blocked, first, worst)].set(~blocked)
        w = jnp.where(blocked, stopped, target)
        return Fit(w, jnp.where(blocked | wants, changed, fit.free), ~blocked & ~wants, fit.steps + 1)

    start = Fit(jnp.zeros_like(bound), jnp.ones(m, bool), jnp.bool_(False), jnp.int32(0))
    # Each step lowers the sum of squares; the limit is for rounding alone.
    return jax.lax.while_loop(lambda fit: ~fit.done & (fit.steps < 8 * m), step, start).w
