"""Tsallis-INF: choose among a few settings by what the chosen ones cost, as well as the best one in the long run.

Cost: O(arms) and a bisection a round; memory O(arms). Source: Zimmert & Seldin 2021; for solvers: Khodak et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import checks


class Bandit(NamedTuple):
    """A rule that chooses one of a few arms and learns from its loss, as three pure functions.

    Attributes:
      init: `() -> state`.
      sample: `(state, key) -> (arm, state)`, or `(state, key, context) -> (arm, state)` of a contextual bandit; arm an
        int32 scalar, context a real one.
      update: `(state, loss) -> state`, loss a real scalar: of the arm sampled last.
    """

    init: Callable[[], Any]
    sample: Callable[..., tuple[jax.Array, Any]]
    update: Callable[[Any, Any], Any]


class TsallisState(NamedTuple):
    """What the next round starts from.

    Attributes:
      totals: [arms], the losses above 1, each divided by the probability with which its arm was chosen, summed by arm.
      seen: sum of the losses above 1.
      rounds: int32 scalar, rounds that have ended.
      arm: int32 scalar, the arm sampled last.
      probabilities: [arms], what it was sampled from.
    """

    totals: jax.Array
    seen: jax.Array
    rounds: jax.Array
    arm: jax.Array
    probabilities: jax.Array


class BinnedState(NamedTuple):
    """What the next round of a bandit with bins starts from.

    Attributes:
      bandits: a `TsallisState` with a leading axis over the bins.
      bin: int32 scalar, the bin of the last context.
    """

    bandits: TsallisState
    bin: jax.Array


def tsallis_inf(n_arms: int, *, context_bins: jax.Array | None = None) -> Bandit:
    """Tsallis-INF over n arms, for losses >= 1 such as counts of steps.

    Round t draws the arm from the p that minimises <p, k / s> - (4 / eta) sum_i sqrt(p_i) over the simplex, eta = 2 /
    sqrt(t), k the importance-weighted losses above 1 and s the mean loss above 1, both of the rounds before. Then p_i =
    4 / (eta (k_i / s - x))^2 with x below the least k_i / s. For losses in [0, 1] above 1 and s = 1 the regret against
    the best arm is at most 4 sqrt(n T) + 1; s makes the rule free of the losses' unit.

    With bins, rounds are told apart by a context: each bin has a bandit of its own, which no round of another bin
    teaches, so that in the long run a round costs what the best arm of its bin does. k edges need k + 1 times the
    rounds; where the loss varies smoothly, `cheb_cb` needs fewer.

    Args:
      n_arms: Python int >= 1.
      context_bins: None, or the edges between bins of contexts, real [k], increasing. A context on an edge belongs to
        the bin above.

    Returns:
      A `Bandit`: `init() -> state`, `sample(state, key) -> (arm, state)`, `update(state, loss) -> state`, which fit a
      `lax.scan`. `state.probabilities` is the last p. With bins, `sample(state, key, context)`, and `state.bandits`
      holds such a state for each.

    Raises:
      ValueError: n_arms below 1, edges not increasing, a context not wanted or missing.

    Cost: O(n) and 64 halvings of [1, sqrt(n)] a round.

    Numerics: x is found by bisection: sum p is at least 1 where the likeliest arm alone has 1, at most 1 where it has 1
      / n, and Newton's method may leave that bracket. p is divided by its sum.

    Source: Zimmert & Seldin, "Tsallis-INF: An Optimal Algorithm for Stochastic and Adversarial Bandits" (2021),
      algorithm 1; Khodak, Chow, Balcan & Talwalkar, "Learning to Relax" (2024), arXiv 2310.02246, algorithm 1.

    Example:
      >>> import jax, jaxnum
      >>> init, sample, update = jaxnum.solvers.tsallis_inf(2)
      >>> arm, state = sample(init(), jax.random.key(0))
      >>> state.probabilities.tolist(), update(state, 7.0).totals.sum().item()
      ([0.5, 0.5], 12.0)
    """
    ok = isinstance(n_arms, int) and not isinstance(n_arms, bool) and n_arms >= 1
    checks.value("tsallis_inf", "n_arms", ok, "be a Python int >= 1", n_arms)
    if context_bins is None:
        return Bandit(partial(_init, n_arms), _blind_sample, _update)
    edges = jnp.asarray(context_bins)
    checks.shape("tsallis_inf", context_bins=(edges, "k"))
    if not checks.traced(edges):
        checks.value("tsallis_inf", "context_bins", bool(jnp.all(edges[1:] > edges[:-1])), "increase", edges)
    return Bandit(partial(_binned_init, n_arms, edges.size + 1), partial(_binned_sample, edges), _binned_update)


def _blind_sample(state: TsallisState, key: jax.Array, context: Any = None) -> tuple[jax.Array, TsallisState]:
    remedy = "Give context_bins to look at it."
    checks.value("tsallis_inf", "context", context is None, "be left out", "one", remedy)
    return _sample(state, key)


def _init(n_arms: int) -> TsallisState:
    zeros, none = jnp.zeros(n_arms), jnp.int32(0)
    return TsallisState(zeros, jnp.zeros_like(zeros, shape=()), none, none, jnp.full_like(zeros, 1 / n_arms))


def _sample(state: TsallisState, key: jax.Array) -> tuple[jax.Array, TsallisState]:
    mean = state.seen / jnp.maximum(state.rounds, 1)
    # Before any loss above 1 there is nothing to scale.
    scaled = state.totals / jnp.where(mean > 0, mean, 1)
    eta = 2 / jnp.sqrt((state.rounds + 1).astype(scaled.dtype))
    p = _probabilities(scaled, eta)
    arm = jax.random.categorical(key, jnp.log(p)).astype(jnp.int32)
    return arm, state._replace(arm=arm, probabilities=p)


def _probabilities(losses: jax.Array, eta: jax.Array) -> jax.Array:
    """The minimiser over the simplex: p_i = 1 / (g_i + v)^2, g_i = eta (losses_i - least) / 2, v in [1, sqrt(n)]."""
    gaps = eta * (losses - jnp.min(losses)) / 2

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = (low + high) / 2
        above = jnp.sum((gaps + middle) ** -2) > 1
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    one = jnp.ones((), gaps.dtype)
    low, high = jax.lax.fori_loop(0, 64, halve, (one, one * gaps.size**0.5))
    p = (gaps + (low + high) / 2) ** -2
    return p / jnp.sum(p)


def _update(state: TsallisState, loss: jax.Array) -> TsallisState:
    above = jnp.asarray(loss).astype(state.totals.dtype) - 1
    weighted = above / state.probabilities[state.arm]
    return state._replace(
        totals=state.totals.at[state.arm].add(weighted), seen=state.seen + above, rounds=state.rounds + 1
    )


def _binned_init(n_arms: int, bins: int) -> BinnedState:
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], bins, axis=0), _init(n_arms))
    return BinnedState(repeated, jnp.int32(0))


def _binned_sample(
    edges: jax.Array, state: BinnedState, key: jax.Array, context: Any = None
) -> tuple[jax.Array, BinnedState]:
    remedy = "Bins tell rounds apart by it: sample(state, key, context)."
    checks.value("tsallis_inf", "context", context is not None, "be given", context, remedy)
    checks.shape("tsallis_inf", context=(context, ""))
    bin = jnp.searchsorted(edges, context, side="right").astype(jnp.int32)
    arm, bandit = _sample(_of_bin(state.bandits, bin), key)
    return arm, BinnedState(_with_bin(state.bandits, bin, bandit), bin)


def _binned_update(state: BinnedState, loss: jax.Array) -> BinnedState:
    bandit = _update(_of_bin(state.bandits, state.bin), loss)
    return state._replace(bandits=_with_bin(state.bandits, state.bin, bandit))


def _of_bin(bandits: TsallisState, bin: jax.Array) -> TsallisState:
    return jax.tree.map(lambda leaf: leaf[bin], bandits)


def _with_bin(bandits: TsallisState, bin: jax.Array, bandit: TsallisState) -> TsallisState:
    return jax.tree.map(lambda leaf, new: leaf.at[bin].set(new), bandits, bandit)
