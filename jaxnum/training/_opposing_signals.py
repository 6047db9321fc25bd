"""Opposing signals: groups of examples that share a large feature and pull the network opposite ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core import trees
from jaxnum.core.precision import accumulator
from kernels_pallas import checks

PyTree = Any


class OpposingGroups(NamedTuple):
    """The k examples whose loss a step raised most and the k whose loss it lowered most, the extreme ones first.

    Attributes:
      up: [k] int32 indices.
      down: [k] int32 indices.
      up_change: [k], their changes of loss.
      down_change: [k], likewise.
    """

    up: jax.Array
    down: jax.Array
    up_change: jax.Array
    down_change: jax.Array


class OpposingEvent(NamedTuple):
    """A step at which the mean loss rose.

    Attributes:
      step: index of the losses after it; the losses before it are those of step - 1.
      rise: of the mean loss, relative to the mean before.
      groups: who rose and who fell.
    """

    step: int
    rise: float
    groups: OpposingGroups


class OpposingScore(NamedTuple):
    """What `opposing_signals_score` returns, scalars.

    Attributes:
      cosine: of the mean gradients of the two groups, near -1 where they oppose each other.
      up_ratio: norm of the mean gradient of the group `up` over the mean norm of one example's gradient.
      down_ratio: likewise of `down`.
      share: of the sum of all examples' gradient norms, what the 2 k have.
    """

    cosine: jax.Array
    up_ratio: jax.Array
    down_ratio: jax.Array
    share: jax.Array


def opposing_signals(losses: Iterable[Any], k: int, *, min_rise: float = 1e-4) -> list[OpposingEvent]:
    """Find the steps at which the mean loss rises, and who pays and who gains.

    With losses l_i(t) of a fixed probe set, a step whose mean loss rises by more than min_rise of itself is an event.
    Its groups are the k largest and the k most negative of l_i(t + 1) - l_i(t). Around a loss spike they are often
    examples with one large feature in common and opposite targets, which swap roles from step to step;
    `opposing_signals_score` and `opposing_signals_feature` say whether they are.

    Args:
      losses: [T, n], or any iterable of [n] losses, one a step, as of `per_example_losses`: a generator that trains
        keeps two of them. The same examples throughout: losses of the steps' own batches are confounded by them.
      k: examples in a group, 1 <= k <= n / 2.
      min_rise: > 0; at convergence losses go up and down by rounding, which means nothing.

    Returns:
      A list of `OpposingEvent`, in the order of steps, with NumPy arrays.

    Raises:
      ShapeError: losses of one step are not [n]; ValueError: k or min_rise out of range, or a traced loss.

    Warns:
      RuntimeWarning: losses of a step are not all finite; it and what follows is left out.

    Cost: on the host, one pass over the losses, two partial sorts an event.

    Numerics: means and changes in float64. Ties go to the smaller index.

    Source: E. Rosenfeld, A. Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network
      Optimization", 2023, arXiv 2311.04163, section 2.

    Example:
      >>> events = opposing_signals([[1.0, 1.0, 1.0], [1.0, 3.0, 0.5], [1.0, 0.9, 0.6]], k=1)
      >>> [(event.step, event.groups.up.tolist(), event.groups.down.tolist()) for event in events]
      [(1, [1], [2])]
    """
    name = "opposing_signals"
    checks.value(name, "min_rise", min_rise > 0, "be greater than 0", min_rise)
    events: list[OpposingEvent] = []
    before = None
    for step, given in enumerate(losses):
        checks.value(name, "losses", not checks.traced(given), "be concrete", "a tracer", "Call it outside jax.jit.")
        after = np.asarray(given, np.float64)
        wanted = "n" if before is None else str(before.size)
        checks.shape(name, remedy="Give one vector a step.", losses=(after, wanted))
        _check_k(name, k, after.size)
        if not np.isfinite(after).all():
            message = f"{name}: losses of step {step} are not all finite; it and what follows is left out."
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            break
        if before is not None and after.mean() - before.mean() > min_rise * abs(before.mean()):
            rise = float((after.mean() - before.mean()) / abs(before.mean())) if before.mean() else np.inf
            events.append(OpposingEvent(step, rise, _extremes(after - before, k)))
        before = after
    return events


def opposing_signals_groups(before: jax.Array, after: jax.Array, k: int) -> OpposingGroups:
    """The groups of one step from the losses of the same examples before and after it, under `jax.jit` too.

    Args:
      before: [n] losses.
      after: [n] losses.
      k: examples in a group, 1 <= k <= n / 2.

    Returns:
      `OpposingGroups`.

    Raises:
      ShapeError: not two vectors of one length; DtypeError: not floating-point; ValueError: k out of range.

    Cost: two partial sorts.

    Numerics: ties go to the smaller index. A change of NaN, a diverged example's, comes first in `up`, and shows in
    `up_change`.

    Source: as `opposing_signals`.

    Example:
      >>> import jax.numpy as jnp
      >>> groups = opposing_signals_groups(jnp.zeros(4), jnp.array([0.5, -2.0, 3.0, -0.5]), 1)
      >>> int(groups.up[0]), int(groups.down[0])
      (2, 1)
    """
    name = "opposing_signals_groups"
    size = checks.shape(name, before=(before, "n"), after=(after, "n"))["n"]
    checks.dtype(name, "floating", before=before, after=after)
    _check_k(name, k, size)
    change = jnp.asarray(after) - jnp.asarray(before)
    up_change, up = jax.lax.top_k(change, k)
    fall, down = jax.lax.top_k(jnp.where(jnp.isnan(change), -jnp.inf, -change), k)
    return OpposingGroups(up, down, up_change, -fall)


def opposing_signals_score(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    data: PyTree,
    groups: OpposingGroups,
    *,
    batch_size: int | None = None,
) -> OpposingScore:
    """How far two groups' gradients oppose each other, and how large they are beside everybody's.

    Args:
      loss: `(params, example) -> []`, of one example, as in `per_example_losses`.
      params: pytree of floating-point parameters, at the step before the event.
      data: pytree of arrays [n, ...], examples first.
      groups: of `opposing_signals` or `opposing_signals_groups`.
      batch_size: gradients side by side, >= 1; None is all.

    Returns:
      An `OpposingScore`. Opposing signals have a cosine near -1, ratios of many, and a share far above 2 k / n.

    Raises:
      ValueError: batch_size below 1, `data` is empty, groups of other data, as far as indices that are not traced tell;
      ShapeError: leaves of `data` have different numbers of examples.

    Cost: one gradient of each example, of which the norm is kept, and 2 k that are kept.

    Numerics: sums in float32 at least. A group whose gradient is 0 has a cosine of NaN; so has one that is not finite.

    Source: as `opposing_signals`.

    Example:
      >>> import jax.numpy as jnp
      >>> data = (jnp.array([1.0, 1.0, 0.1, 0.1]), jnp.array([1.0, -1.0, 0.0, 0.0]))
      >>> loss = lambda w, one: 0.5 * (w * one[0] - one[1]) ** 2
      >>> groups = opposing_signals_groups(jnp.zeros(4), jnp.array([1.0, -1.0, 0.0, 0.0]), 1)
      >>> score = opposing_signals_score(loss, 0.1, data, groups)
      >>> print(f"{float(score.cosine):.2f} {float(score.share):.3f}")
      -1.00 0.999
    """
    name = "opposing_signals_score"
    checks.value(name, "data", bool(jax.tree.leaves(data)), "have leaves", "an empty tree")
    if batch_size is not None:
        checks.value(name, "batch_size", batch_size >= 1, "be at least 1", batch_size)

    def gradient(example: PyTree) -> PyTree:
        return jax.tree.map(lambda g: g.astype(accumulator(g.dtype)), jax.grad(loss)(params, example))

    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(data)]
    alike = all(shape[:1] == shapes[0][:1] != () for shape in shapes)
    checks.value(
        name, "data", alike, "have an axis of examples, as long in every leaf", shapes, error=checks.ShapeError
    )
    size = shapes[0][0]
    _check_groups(name, groups, size)
    norms = jax.lax.map(lambda example: trees.safe_norm(gradient(example)), data, batch_size=batch_size or size)

    def mean_of(index: jax.Array) -> PyTree:
        chosen = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], data)
        gradients = jax.lax.map(gradient, chosen, batch_size=batch_size or index.size)
        return jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)

    up, down = mean_of(groups.up), mean_of(groups.down)
    lengths = trees.safe_norm(up), trees.safe_norm(down)
    units = (
        jax.tree.map(lambda g, n=n: g / n.astype(g.dtype), group) for group, n in zip((up, down), lengths, strict=True)
    )
    both = jnp.concatenate([groups.up, groups.down])
    return OpposingScore(
        cosine=trees.vdot(*units),
        up_ratio=lengths[0] / norms.mean(),
        down_ratio=lengths[1] / norms.mean(),
        share=norms[both].sum() / norms.sum(),
    )


def opposing_signals_feature(features: jax.Array, groups: OpposingGroups) -> tuple[jax.Array, jax.Array]:
    """The feature that both groups share: the first singular direction of their rows, and how much of them it is.

    Args:
      features: [n, d] floating-point, inputs or penultimate activations of all examples.
      groups: of `opposing_signals` or `opposing_signals_groups`.

    Returns:
      `(share, direction)`: the share of the 2 k rows' sum of squares along `direction`, [d] of unit norm and arbitrary
      sign. Opposing signals have a share near 1.

    Raises:
      ShapeError: features are not [n, d]; DtypeError: not floating-point; ValueError: groups of other data, as far as
      indices that are not traced tell.

    Cost: a singular value decomposition of [2 k, d].

    Numerics: in float32 at least; NaN where a row is not finite, and where all are 0.

    Source: as `opposing_signals`.

    Example:
      >>> import jax.numpy as jnp
      >>> groups = opposing_signals_groups(jnp.zeros(3), jnp.array([1.0, -1.0, 0.0]), 1)
      >>> share, direction = opposing_signals_feature(jnp.array([[0.0, 3.0], [0.0, 4.0], [1.0, 0.0]]), groups)
      >>> print(f"{float(share):.3f}", abs(direction).round(3).tolist())
      1.000 [0.0, 1.0]
    """
    name = "opposing_signals_feature"
    size = checks.shape(name, features=(features, "n d"))["n"]
    checks.dtype(name, "floating", features=features)
    _check_groups(name, groups, size)
    rows = jnp.asarray(features)[jnp.concatenate([groups.up, groups.down])]
    _, sizes, directions = jnp.linalg.svd(rows.astype(accumulator(rows.dtype)), full_matrices=False)
    return sizes[0] ** 2 / jnp.sum(sizes**2), directions[0]


def _check_k(function: str, k: int, size: int) -> None:
    ok = isinstance(k, int) and k >= 1 and 2 * k <= size
    checks.value(function, "k", ok, f"be an int from 1 to half of the {size} examples", k)


def _check_groups(function: str, groups: OpposingGroups, size: int) -> None:
    """Indices of other data would be clamped without a word."""
    for field in ("up", "down"):
        index = getattr(groups, field)
        fits, got = 2 * jnp.size(index) <= size, f"{jnp.size(index)} indices"
        if not checks.traced(index):
            given = np.asarray(index)
            fits = fits and bool(((given >= 0) & (given < size)).all())
            got += f" from {given.min()} to {given.max()}" if given.size else ""
        wanted = f"be at most half of the {size} examples, by indices from 0 to {size - 1}"
        checks.value(function, f"groups.{field}", fits, wanted, got, "Pass groups of the losses of the same data.")


def _extremes(change: np.ndarray, k: int) -> OpposingGroups:
    up = np.argsort(-change, kind="stable")[:k].astype(np.int32)
    down = np.argsort(change, kind="stable")[:k].astype(np.int32)
    # Arrays of NumPy do where arrays of JAX are declared.
    return OpposingGroups(up, down, change[up], change[down])  # pyright: ignore[reportArgumentType]
