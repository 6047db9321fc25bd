"""Warm-up, stable phase, decay: schedules for runs whose length is not fixed beforehand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kernels_pallas import checks

# From progress 0..1 and the ratio of the last to the first rate, to the share of the first rate.
_SHAPES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "inverse": lambda u, r: 1 / (1 + (1 / r - 1) * u),
    "exponential": lambda u, r: r**u,
    "linear": lambda u, r: 1 - (1 - r) * u,
    "sqrt": lambda u, r: 1 - (1 - r) * jnp.sqrt(u),
    "cosine": lambda u, r: r + (1 - r) * (1 + jnp.cos(jnp.pi * u)) / 2,
}

# Sums of two fit 32 bits.
_MOST = 2**30


class Cycles(NamedTuple):
    """A rise, a stable phase and a decay, several times over; int32 arrays with one entry a cycle."""

    starts: np.ndarray
    rises: np.ndarray
    decays: np.ndarray
    ends: np.ndarray


def wsd(
    peak: float | jax.Array,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int,
    *,
    end_ratio: float = 0.1,
    decay: str = "inverse",
    init_value: float | jax.Array = 0.0,
) -> optax.Schedule:
    """Warm up linearly, stay at the peak, decay over the last steps.

    With u = (step - total_steps + decay_steps) / decay_steps in the decay and r = end_ratio the rate is `peak` times

        1 / (1 + (1/r - 1) u)  "inverse": 1 / rate is linear, as greedy steps on a noisy quadratic want it
        r^u                    "exponential"
        1 - (1 - r) u          "linear"
        1 - (1 - r) sqrt(u)    "sqrt"
        r + (1 - r) (1 + cos(pi u)) / 2   "cosine".

    The stable phase follows the river of the valley; the decay drops to its ground, and is thrown away when a run goes
    on: see `wsd_branch`, which decays from a checkpoint, and `wsd_s`, which keeps it.

    Args:
      peak: rate of the stable phase, > 0.
      total_steps: steps of the run; the rate is end_ratio * peak from this step on.
      warmup_steps: steps of the rise from `init_value`, >= 0; the rate is `peak` at this step.
      decay_steps: steps of the decay, >= 1, of which the first still has the peak.
      end_ratio: r in [0, 1], greater than 0 for "inverse" and "exponential".
      decay: one of the five shapes.
      init_value: rate of step 0 where there is a warm-up, >= 0.

    Returns:
      An `optax.Schedule`: step, an integer or an array of them, -> rate. Asked beyond its horizon it holds its ends:
      from step `total_steps` on the rate is end_ratio * peak, below step 0 that of step 0.

    Raises:
      ValueError: an argument out of range, or warm-up and decay longer than the run.

    Cost: a few operations on scalars.

    Numerics: steps are subtracted as integers, so that counts above 2^24 lose none.

    Source: K. Wen, Z. Li, J. Wang, D. Hall, P. Liang, T. Ma, "Understanding Warmup-Stable-Decay Learning Rates: A River
    Valley Loss Landscape Perspective", 2024, arXiv 2410.05192, section 4; the schedule itself: S. Hu et al., "MiniCPM",
    2024.

    Example:
      >>> import jax.numpy as jnp
      >>> schedule = wsd(1.0, 14, 2, 9)
      >>> print([f"{float(schedule(step)):.2f}" for step in (0, 1, 2, 5, 6, 13, 14, 99)])
      ['0.00', '0.50', '1.00', '1.00', '0.50', '0.11', '0.10', '0.10']
    """
    total, warmup, length = _steps(
        "wsd", dict(total_steps=total_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)
    )
    wanted = f"leave room for warm-up and decay, {warmup + length} steps"
    checks.value("wsd", "total_steps", total >= warmup + length, wanted, total)
    checks.value("wsd", "decay_steps", length >= 1, "be at least 1", length)
    cycles = _cycles([0], [warmup], [length], [total])
    return _schedule("wsd", cycles, peak, end_ratio, decay, init_value)


def wsd_s(
    peak: float | jax.Array,
    endpoints: Sequence[int],
    warmup_steps: int,
    *,
    decay_fraction: float = 0.1,
    end_ratio: float = 0.1,
    decay: str = "inverse",
    init_value: float | jax.Array = 0.0,
    rewarmup_steps: int = 0,
) -> optax.Schedule:
    """Decay before every endpoint and go on from there at the peak: several finished models from one run.

    Between endpoints T_{j-1} and T_j the rate is the peak, and falls during the last decay_fraction (T_j - T_{j-1})
    steps, as in `wsd`. Step T_j is the first of the next cycle: the run goes on from the decayed parameters, with the
    optimiser's state as it is. Only the first cycle has the warm-up.

    Args:
      peak: rate of the stable phases, > 0.
      endpoints: increasing steps T_1 < T_2 < ... at which a finished model is wanted.
      warmup_steps: steps of the first rise, >= 0.
      decay_fraction: share of each cycle that decays, in (0, 1]; rounded, at least one step.
      end_ratio: as in `wsd`.
      decay: as in `wsd`.
      init_value: as in `wsd`.
      rewarmup_steps: steps of the linear rise from the decayed rate at the start of later cycles, >= 0; 0 jumps.

    Returns:
      An `optax.Schedule`; from the last endpoint on it stays at end_ratio * peak, below step 0 at the rate of step 0.

    Raises:
      ValueError: an argument out of range, or a cycle too short for its rise and its decay.

    Cost: a search among the endpoints and a few operations on scalars.

    Source: as `wsd`, section 5.

    Example:
      >>> schedule = wsd_s(1.0, [10, 30], 2)
      >>> print([f"{float(schedule(step)):.2f}" for step in (1, 2, 9, 10, 28, 29, 30)])
      ['0.50', '1.00', '1.00', '1.00', '1.00', '0.18', '0.10']
    """
    warmup, again = _steps("wsd_s", dict(warmup_steps=warmup_steps, rewarmup_steps=rewarmup_steps))
    ends = _steps("wsd_s", {f"endpoints[{i}]": end for i, end in enumerate(endpoints)})
    starts = [0, *ends[:-1]]
    rises = [warmup] + [again] * (len(ends) - 1)
    increasing = bool(ends) and all(a < b for a, b in zip(starts, ends, strict=True))
    checks.value("wsd_s", "endpoints", increasing, "be positive and increase", list(endpoints))
    checks.value("wsd_s", "decay_fraction", 0 < decay_fraction <= 1, "be in (0, 1]", decay_fraction)
    lengths = [max(1, round(decay_fraction * (end - start))) for start, end in zip(starts, ends, strict=True)]
    for start, rise, length, end in zip(starts, rises, lengths, ends, strict=True):
        wanted = f"leave room for a rise of {rise} and a decay of {length} after step {start}"
        checks.value("wsd_s", "endpoints", end - start >= rise + length, wanted, end)
    return _schedule("wsd_s", _cycles(starts, rises, lengths, ends), peak, end_ratio, decay, init_value)


def wsd_branch(
    peak: float | jax.Array, start_step: int, decay_steps: int, *, end_ratio: float = 0.1, decay: str = "inverse"
) -> optax.Schedule:
    """The decay alone, for a branch off a checkpoint of the stable phase.

    To finish a run of `wsd` at another budget, restore parameters and optimiser of step `budget - decay_steps` and go
    on with this schedule from there: its counts are those of the run. The rates are those of
    `wsd(peak, start_step + decay_steps, ...)`.

    Args:
      peak: rate of the stable phase, > 0.
      start_step: step of the checkpoint, >= 0; the rate is `peak` before it too.
      decay_steps: as in `wsd`.
      end_ratio: as in `wsd`.
      decay: as in `wsd`.

    Returns:
      An `optax.Schedule`; from step `start_step + decay_steps` on it stays at end_ratio * peak.

    Raises:
      ValueError: an argument out of range.

    Cost: as `wsd`.

    Source: as `wsd`.

    Example:
      >>> branch, whole = wsd_branch(1.0, 5, 9), wsd(1.0, 14, 2, 9)
      >>> all(float(branch(step)) == float(whole(step)) for step in range(2, 20))
      True
    """
    start, length = _steps("wsd_branch", dict(start_step=start_step, decay_steps=decay_steps))
    checks.value("wsd_branch", "decay_steps", length >= 1, "be at least 1", length)
    cycles = _cycles([0], [0], [length], [start + length])
    return _schedule("wsd_branch", cycles, peak, end_ratio, decay, 0.0)


def _steps(function: str, numbers: Mapping[str, Any]) -> list[int]:
    """Numbers of steps as Python integers."""
    for name, got in numbers.items():
        whole = hasattr(got, "__index__") and not checks.traced(got)
        checks.value(function, name, whole and operator.index(got) >= 0, "be an integer of at least 0", got)
        checks.value(function, name, operator.index(got) < _MOST, "be below 2^30", got)
    return [operator.index(got) for got in numbers.values()]


def _cycles(starts: list[int], rises: list[int], lengths: list[int], ends: list[int]) -> Cycles:
    return Cycles(*(np.asarray(column, np.int32) for column in (starts, rises, lengths, ends)))


def _schedule(
    function: str, cycles: Cycles, peak: Any, end_ratio: float, decay: str, init_value: Any
) -> optax.Schedule:
    checks.choice(function, "decay", decay, tuple(_SHAPES))
    least = "greater than 0 and at most 1" if decay in ("inverse", "exponential") else "in [0, 1]"
    remedy = "It shapes the schedule: give a number."
    checks.value(function, "end_ratio", not checks.traced(end_ratio), "be concrete", "a tracer", remedy)
    inside = 0 <= end_ratio <= 1 and (end_ratio > 0 or "greater" not in least)
    checks.value(function, "end_ratio", inside, f"be {least} for decay={decay!r}", end_ratio)
    checks.number(function, "peak", lambda x: x > 0, "be greater than 0", peak)
    checks.number(function, "init_value", lambda x: x >= 0, "be at least 0", init_value)
    shape = _SHAPES[decay]

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.maximum(jnp.asarray(count), 0)
        cycle = jnp.minimum(jnp.searchsorted(cycles.ends, count, side="right"), cycles.ends.size - 1)
        start, rise, length, end = (jnp.asarray(column)[cycle] for column in cycles)
        progress = jnp.clip((count - (end - length)) / length, 0.0, 1.0)
        risen = jnp.clip((count - start) / jnp.maximum(rise, 1), 0.0, 1.0)
        lowest = jnp.where(cycle == 0, init_value, end_ratio * peak)
        rising = jnp.where(count - start < rise, lowest + (peak - lowest) * risen, peak)
        return jnp.where(progress > 0, peak * shape(progress, end_ratio), rising)

    return schedule
