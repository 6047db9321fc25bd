"""The fewest dimensions in which a problem can be solved."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kernels_pallas import checks

SEARCHES = ("bisect", "all")


class IntrinsicDimension(NamedTuple):
    """What `intrinsic_dimension` found.

    Attributes:
      dimension: the smallest candidate whose mean score reached the threshold; None where none did.
      interval: (low, high): no run at `low` or below reached it, and all runs at `high` and above did; low is 0 and
        high None where there is no such candidate. What lies between is decided by chance, or was not tried.
      monotone: False where a candidate fell short although a smaller one had reached: the search cannot be trusted.
      threshold: the score that counts as a solution.
      scores: the scores of each candidate that was tried, [runs], by dimension, in ascending order.
    """

    dimension: int | None
    interval: tuple[int, int | None]
    monotone: bool
    threshold: float
    scores: dict[int, np.ndarray]


def intrinsic_dimension(
    evaluate: Callable[[int], Any],
    candidates: Sequence[int],
    baseline: float,
    *,
    fraction: float = 0.9,
    search: str = "bisect",
) -> IntrinsicDimension:
    """The smallest dimension of a subspace whose score reaches a share of that of full training.

    With fraction 0.9 it is the d_int90 of the paper. It says how hard a problem is for a given network, and bounds how
    short the network can be described.

    Args:
      evaluate: d -> score, larger is better: trains in d dimensions, as with `random_subspace`, and returns a number or
        [runs] of them, say one for each seed. Tune the rate for each d, or use Adam: a run that stalled looks like a
        dimension that is too small.
      candidates: the dimensions to try, ascending Python ints >= 1.
      baseline: the score of full training, > 0.
      fraction: share of it that counts as a solution, in (0, 1].
      search: "bisect" tries about log2(n) + 2 of n candidates: halves, assuming that scores rise with d, then both
        neighbours of the pair where it ends, for a check; "all" tries all, and sees every dent.

    Returns:
      An `IntrinsicDimension`.

    Raises:
      ValueError: candidates that do not ascend or are below 1; a baseline, fraction or search out of range; scores that
        are neither a number nor a vector of at least one.

    Cost: calls of evaluate, one for each candidate that is tried.

    Numerics: on the host, in float64. A NaN score has not reached, makes the mean of its candidate NaN, and stays in
      `scores`.

    Source: C. Li, H. Farkhoor, R. Liu, J. Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR
      2018, arXiv 1804.08838, section 2; bisection and the interval are ours.

    Example:
      >>> found = intrinsic_dimension(lambda d: min(1.0, d / 12), range(1, 33), baseline=1.0)
      >>> found.dimension, found.interval, found.monotone, len(found.scores)
      (11, (10, 11), True, 6)
    """
    dims = [operator.index(d) for d in candidates]
    ascending = bool(dims) and dims[0] >= 1 and all(a < b for a, b in zip(dims[:-1], dims[1:], strict=True))
    checks.value("intrinsic_dimension", "candidates", ascending, "ascend from at least 1", candidates)
    remedy = "Measure scores from that of a useless model."
    checks.value("intrinsic_dimension", "baseline", baseline > 0, "be greater than 0", baseline, remedy)
    checks.value("intrinsic_dimension", "fraction", 0 < fraction <= 1, "be in (0, 1]", fraction)
    checks.choice("intrinsic_dimension", "search", search, SEARCHES)
    threshold = fraction * float(baseline)
    scores: dict[int, np.ndarray] = {}

    def reached(d: int) -> bool:
        if d not in scores:
            scores[d] = _vector(evaluate(d))
        return bool(scores[d].mean() >= threshold)

    if search == "all":
        for d in dims:
            reached(d)
    else:
        _bisect(dims, reached)
    return _report(dict(sorted(scores.items())), threshold)


def _vector(given: Any) -> np.ndarray:
    got = np.asarray(given, np.float64)
    fits = got.ndim <= 1 and got.size > 0
    checks.value("intrinsic_dimension", "evaluate(d)", fits, "be a number or [runs]", f"shape {got.shape}")
    return np.atleast_1d(got)


def _bisect(dims: list[int], reached: Callable[[int], bool]) -> None:
    """Try the candidates that lead to the first that reaches, and one more on each side of where it ends."""
    low, high = -1, len(dims)  # dims[low] fell short, dims[high] reached, where they are candidates
    while high - low > 1:
        middle = (low + high) // 2
        if reached(dims[middle]):
            high = middle
        else:
            low = middle
    for neighbour in (low - 1, high + 1):
        if 0 <= neighbour < len(dims):
            reached(dims[neighbour])


def _report(scores: dict[int, np.ndarray], threshold: float) -> IntrinsicDimension:
    hits = {d: values.mean() >= threshold for d, values in scores.items()}
    first = next((d for d, hit in hits.items() if hit), None)
    monotone = all(hit for d, hit in hits.items() if first is not None and d >= first)
    low, high = 0, None
    for d, values in scores.items():
        if (values >= threshold).any():
            break
        low = d
    for d, values in reversed(scores.items()):
        if not (values >= threshold).all():
            break
        high = d
    return IntrinsicDimension(first, (low, high), monotone, threshold, scores)
