"""A schedule for the next run from the gradient norms of the last one."""

from __future__ import annotations

import math
import operator
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kernels_pallas import checks

# Below this share of the median, norms count as this share: a run that interpolates its data would get one huge step.
_FLOOR = 1e-3
# Fewer norms than this leave nothing to take a median over.
_FEWEST = 11


def refine_schedule(
    norms: jax.typing.ArrayLike,
    *,
    peak: float | jax.Array = 1.0,
    total_steps: int | None = None,
    p: float = 2.0,
    smoothing: float = 0.1,
    method: str = "median",
) -> optax.Schedule:
    """The schedule that a run's gradient norms ask for in the next run.

    With smoothed norms G_1..G_T and weights w_t = G_t^-p, the rate of step t is proportional to

        w_t (w_{t+1} + ... + w_T),

    scaled so that its maximum is `peak`. It warms up where norms fall and decays to 0 at the end; for constant norms it
    is the linear decay 1 - t / T, which is optimal in the worst case, and which it did not beat in the convex runs of
    the benchmark: it equals it under much noise and loses where norms fall a lot. `jaxnum.transforms.record_norms`
    records norms.

    Args:
      norms: [T] non-negative norms, one a step, of gradients before any clipping, from a finished run at the same batch
        size: Euclidean norms with p = 2 for SGD, sums of absolute values with p = 1 for Adam. Non-finite ones at the
        end are steps that were not taken, and are cut off; others are interpolated from their neighbours. Concrete, not
        traced: the schedule is made on the host.
      peak: largest rate, > 0: tune it as any other.
      total_steps: steps of the next run; None takes T. The values are interpolated linearly and scaled again.
      p: power of the norms, > 0.
      smoothing: share of the run over which norms are smoothed, in (0, 1).
      method: "median": a running median, the paper's; "ewma": exponentially weighted means, forwards and backwards and
        averaged, an addition of ours; "none".

    Returns:
      An `optax.Schedule`: step -> rate. Step 0 has the first value, and steps below it too; steps beyond the last keep
      its value, which is 0: a run that goes on longer stands still.

    Raises:
      ValueError: norms that are traced, negative, not a vector, fewer than two, or all zero; an argument out of range.

    Cost: on the host, T log(T) or so once; a step looks two values up.

    Numerics: sums in float64 from the end. Norms below a thousandth of the median count as a thousandth of it, with a
    warning: a run that fits its data exactly would have all of the schedule in its last steps.

    Source: A. Defazio, A. Cutkosky, H. Mehta, K. Mishchenko, "Optimal Linear Decay Learning Rate Schedules and Further
    Refinements", 2023, arXiv 2310.07831, Algorithm 1 and section 4.

    Example:
      >>> schedule = refine_schedule([4.0, 2.0, 1.0, 1.0, 1.0, 2.0], method="none", peak=0.1)
      >>> print([f"{float(schedule(step)):.4f}" for step in range(7)])
      ['0.0097', '0.0361', '0.1000', '0.0556', '0.0111', '0.0000', '0.0000']
    """
    values = refine_schedule_values(norms, p=p, smoothing=smoothing, method=method, name="refine_schedule")
    whole = total_steps is None or (hasattr(total_steps, "__index__") and not checks.traced(total_steps))
    checks.value("refine_schedule", "total_steps", whole, "be an integer", total_steps)
    total = values.size if total_steps is None else operator.index(total_steps)
    checks.value("refine_schedule", "total_steps", total >= 2, "be at least 2", total_steps)
    checks.number("refine_schedule", "peak", lambda x: x > 0, "be greater than 0", peak)
    table = np.interp(np.linspace(0, values.size - 1, total), np.arange(values.size), values)
    # Fewer steps than norms may pass over the largest value.
    table = (table / table.max()).astype(np.float32)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        return peak * jnp.asarray(table)[jnp.clip(jnp.asarray(count), 0, total - 1)]

    return schedule


def refine_schedule_values(
    norms: jax.typing.ArrayLike,
    *,
    p: float = 2.0,
    smoothing: float = 0.1,
    method: str = "median",
    name: str = "refine_schedule_values",
) -> np.ndarray:
    """The values of `refine_schedule` as an array: to look at, to plot, to keep.

    Args:
      norms: as there.
      p: as there.
      smoothing: as there.
      method: as there.
      name: first word of the error sentences.

    Returns:
      [T] float64, maximum 1, last value 0; T up to the last finite norm.

    Raises:
      ValueError: as there.

    Cost: as there.

    Source: as there.

    Example:
      >>> print(refine_schedule_values([1.0, 1.0, 1.0, 1.0, 1.0], method="none").tolist())
      [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    checks.choice(name, "method", method, ("median", "ewma", "none"))
    checks.value(name, "p", p > 0, "be greater than 0", p)
    checks.value(name, "p", math.isfinite(p), "be finite", p)
    checks.value(name, "smoothing", 0 < smoothing < 1, "be in (0, 1)", smoothing)
    traced = any(map(checks.traced, jax.tree.leaves(norms)))
    checks.value(name, "norms", not traced, "be concrete", "a tracer", "Call it outside jax.jit.")
    given = np.asarray(norms, np.float64)
    checks.value(name, "norms", given.ndim == 1, "be a vector [T]", f"shape {given.shape}")
    finite = given[np.isfinite(given)]
    checks.value(name, "norms", finite.size >= 2, "have at least 2 finite entries", finite.size)
    checks.value(name, "norms", finite.min() >= 0 and finite.max() > 0, "be non-negative, not all 0", finite.min())
    known = np.flatnonzero(np.isfinite(given))
    smooth = _smoothed(np.interp(np.arange(known[-1] + 1), known, finite), smoothing, method)
    least = _FLOOR * np.median(finite[finite > 0])
    if (smooth < least).any():
        message = f"{name}: norms below {least:.3g}, a thousandth of the median, count as that."
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    used = np.maximum(smooth, least)
    weights = (used.min() / used) ** float(p)
    later = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)
    values = weights * later
    return values / values.max()


def _smoothed(norms: np.ndarray, smoothing: float, method: str) -> np.ndarray:
    """Norms without their noise; a run too short for a window is left as it is."""
    half = int(smoothing * norms.size) // 2
    if method == "none" or norms.size < _FEWEST or half == 0:
        return norms
    if method == "ewma":
        return (_average(norms, half) + _average(norms[::-1], half)[::-1]) / 2
    from scipy.ndimage import median_filter

    width = 2 * half + 1
    # On the right, where the schedule's decay is decided, norms are mirrored; on the left the first is repeated.
    mirrored = np.pad(norms, (0, min(2 * width, norms.size - 1)), mode="reflect")
    return median_filter(mirrored, size=width, mode="nearest")[: norms.size]


def _average(norms: np.ndarray, half: int) -> np.ndarray:
    """Exponentially weighted means of all so far, corrected for their start."""
    from scipy.signal import lfilter

    rate = 1.0 / (half + 1)
    raw = lfilter([rate], [1.0, rate - 1.0], norms)
    return raw / (1.0 - (1.0 - rate) ** np.arange(1, norms.size + 1))
