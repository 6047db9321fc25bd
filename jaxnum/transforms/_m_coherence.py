"""m-coherence: how far the gradients of single examples agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.transforms import _strict, per_example

PyTree = Any


class CoherenceState(NamedTuple):
    """What `m_coherence_stream` has seen."""

    count: jax.Array  # [] int32, examples
    unit: PyTree  # largest entry of each leaf's gradients, [] each, at least float32
    total: PyTree  # sum of gradients in that unit, like params, at least float32
    squares: PyTree  # sum of squared norms of each leaf in the unit's square, [] each


def m_coherence(
    per_example_gradients: PyTree, *, axis: int = 0, by_leaf: bool = False, unbiased: bool = False
) -> jax.Array | PyTree:
    """The number of examples that the gradient of one example helps, on average.

    For gradients g_1..g_m it is ||sum_i g_i||^2 / sum_i ||g_i||^2: 1 where they are orthogonal, m where they are alike,
    0 where they cancel. Divided by m it is alpha = ||mean g||^2 / mean ||g||^2. Early in training it is several times
    larger for true labels than for random ones.

    Args:
      per_example_gradients: tree of [m, ...], as from `jax.vmap(jax.grad(loss), (None, 0))(params, batch)`. Layers that
        couple examples, as batch normalisation does in training, have no such gradients.
      axis: the axis of examples.
      by_leaf: a value for each leaf instead of one. Numerators and denominators add over leaves; ratios do not.
      unbiased: estimate alpha of the population instead, from pairs of different examples: (c - 1) / (m - 1) for
        m-coherence c, without the upward bias 1/m of alpha.

    Returns:
      A real scalar in [0, m], or a tree of them; at most 1 where `unbiased`, and negative where examples oppose each
      other. NaN where all gradients are 0, and for one example where `unbiased`.

    Raises:
      ShapeError, DtypeError: gradients without the axis of examples.

    Cost: one pass. For gradients that do not fit at once: `m_coherence_from_loss` or `m_coherence_stream`.

    Numerics: sums in at least float32, of squares that neither overflow nor vanish; near 0 the numerator is a
      difference of large numbers.

    Source: S. Chatterjee, P. Zielinski, "On the Generalization Mystery in Deep Learning", 2022, arXiv 2203.10036,
      section 2; the estimate from pairs is ours.

    Example:
      >>> import jax.numpy as jnp
      >>> print([float(m_coherence(g)) for g in (jnp.eye(4), jnp.ones((4, 3)), jnp.array([[1.0], [-1.0]]))])
      [1.0, 4.0, 0.0]
    """
    size = per_example.examples("m_coherence", per_example_gradients, axis)
    first = jax.tree.map(lambda g: jnp.moveaxis(g, axis, 0), per_example_gradients)
    return _value(_seen(first, size), by_leaf, unbiased)


def m_coherence_from_loss(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    data: PyTree,
    *,
    batch_size: int | None = None,
    by_leaf: bool = False,
    unbiased: bool = False,
) -> jax.Array | PyTree:
    """`m_coherence` of the gradients of a loss, of which only `batch_size` are in memory at a time.

    Args:
      loss: `(params, example) -> []`, of one example, with batch normalisation in evaluation.
      params: pytree of floating-point or complex parameters.
      data: pytree of arrays [m, ...], examples first.
      batch_size: gradients side by side, >= 1; None is all of them.
      by_leaf: as there.
      unbiased: as there.

    Returns:
      As there.

    Raises:
      ValueError: batch_size is no integer of at least 1, or `data` empty; DtypeError: integer parameters.
      ShapeError: leaves of `data` without examples or with different numbers, a loss that is no scalar.

    Cost: a gradient of each example. Memory: two gradients, and gradients and activations of `batch_size` examples.

    Numerics: as there.

    Source: as there.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda w, one: jnp.sum(w * one)
      >>> float(m_coherence_from_loss(loss, jnp.zeros(3), jnp.ones((8, 3)), batch_size=3))
      8.0
    """
    name = "m_coherence_from_loss"
    if batch_size is not None:
        batch_size = per_example.count(name, "batch_size", batch_size, 1, ", or None")
    _strict.parameters(name, params)
    size = per_example.leading(name, "data", data)
    values_and_grads = per_example.values_and_grads(name, loss)

    def step(state: CoherenceState, batch: PyTree) -> CoherenceState:
        values, gradients = values_and_grads(params, batch)
        return _both(state, _seen(gradients, len(values)))

    return _value(per_example.fold(step, _none(params), data, size, batch_size), by_leaf, unbiased)


def m_coherence_stream(
    *, by_leaf: bool = False, unbiased: bool = False
) -> tuple[Callable[[PyTree], CoherenceState], Callable[[CoherenceState, PyTree], CoherenceState], Callable]:
    """`m_coherence` of examples that come in pieces.

    Args:
      by_leaf: as there.
      unbiased: as there.

    Returns:
      `(init, add, value)`: `init(params)` is an empty `CoherenceState`, `add(state, per_example_gradients)` takes in
      gradients [k, ...] of any k, examples first, `value(state)` is the m-coherence of all so far; NaN before any.

    Raises:
      ShapeError, DtypeError: as there, by `add`.

    Cost: one pass over each piece; a state of the size of the parameters.

    Source: as there.

    Example:
      >>> import jax.numpy as jnp
      >>> init, add, value = m_coherence_stream()
      >>> state = init(jnp.zeros(3))
      >>> for _ in range(2):
      ...     state = add(state, jnp.ones((4, 3)))
      >>> float(value(state))
      8.0
    """

    def add(state: CoherenceState, per_example_gradients: PyTree) -> CoherenceState:
        size = per_example.examples("m_coherence_stream", per_example_gradients, 0, state.total)
        return _both(state, _seen(per_example_gradients, size))

    def value(state: CoherenceState) -> jax.Array | PyTree:
        return _value(state, by_leaf, unbiased)

    return _none, add, value


def _none(params: PyTree) -> CoherenceState:
    """The state of no example."""
    total = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=accumulator(jnp.result_type(p))), params)
    zero = jax.tree.map(lambda t: jnp.zeros([], jnp.finfo(t.dtype).dtype), total)
    return CoherenceState(jnp.int32(0), zero, total, zero)


def _seen(gradients: PyTree, size: int) -> CoherenceState:
    """The state of some examples alone."""
    wide = jax.tree.map(lambda g: g.astype(accumulator(g.dtype)), gradients)
    unit = jax.tree.map(lambda g: jnp.max(jnp.abs(g), initial=0), wide)
    # What is not finite makes the sums so.
    unit = jax.tree.map(lambda u: jnp.where(jnp.isfinite(u), u, 0), unit)
    scaled = jax.tree.map(lambda g, u: g / _divisor(u).astype(g.dtype), wide, unit)
    total = jax.tree.map(lambda g: jnp.sum(g, axis=0), scaled)
    return CoherenceState(jnp.int32(size), unit, total, jax.tree.map(lambda g: jnp.sum(jnp.abs(g) ** 2), scaled))


def _both(a: CoherenceState, b: CoherenceState) -> CoherenceState:
    """The state of two sets of examples."""
    unit = jax.tree.map(jnp.maximum, a.unit, b.unit)

    def moved(state: CoherenceState) -> tuple[PyTree, PyTree]:
        share = jax.tree.map(lambda old, new: old / _divisor(new), state.unit, unit)
        total = jax.tree.map(lambda t, s: t * s.astype(t.dtype), state.total, share)
        return total, jax.tree.map(lambda q, s: q * s**2, state.squares, share)

    total, squares = jax.tree.map(jnp.add, moved(a), moved(b))
    return CoherenceState(a.count + b.count, unit, total, squares)


def _divisor(unit: jax.Array) -> jax.Array:
    return jnp.where(unit > 0, unit, 1)


def _value(state: CoherenceState, by_leaf: bool, unbiased: bool) -> jax.Array | PyTree:
    tops = jax.tree.map(lambda t: jnp.sum(jnp.abs(t) ** 2), state.total)
    squares = state.squares
    if not by_leaf:
        units = jnp.stack(jax.tree.leaves(state.unit))
        shares = (units / _divisor(units.max())) ** 2
        tops, squares = (jnp.sum(shares * jnp.stack(jax.tree.leaves(tree))) for tree in (tops, squares))
    values = jax.tree.map(jnp.divide, tops, squares)
    return jax.tree.map(lambda v: (v - 1) / (state.count - 1), values) if unbiased else values
