"""Mean loss and winsorised mean of per-example gradients, which are never all in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.transforms import _strict, per_example
from kernels_pallas import checks

PyTree = Any


class _Kept(NamedTuple):
    """What the examples so far leave of one leaf of the gradient."""

    low: jax.Array  # [c, ...], the smallest values, in order; infinite where there are fewer
    high: jax.Array  # [c, ...], the largest ones, negated, in order
    least: jax.Array  # [...], smallest of the others, x_(c+1) once all are seen
    most: jax.Array  # [...], largest of the others, x_(m-c)
    total: jax.Array  # [...], sum of the others, at least float32


def winsorized_value_and_grad(
    loss: Callable[[PyTree, PyTree], jax.Array], c: int, *, batch_size: int | None = None
) -> Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]:
    """As `jax.value_and_grad` of the mean loss, with the gradient of `winsorized_mean(c)` in the place of the mean's.

    Of every coordinate the c largest and the c smallest values so far are kept, and of what they push out the sum, the
    smallest and the largest. These are all that the winsorised mean needs: (sum + c (smallest + largest)) / m.

    Args:
      loss: `(params, example) -> []`, of one example. Layers that couple examples, as batch normalisation does in
        training, have no such loss.
      c: values pulled in at each end of each coordinate, an integer >= 0.
      batch_size: gradients side by side, >= 1; None is all of them. The result does not depend on it.

    Returns:
      `(params, data) -> (value, gradient)` for `data` a pytree of arrays [m, ...], examples first, m >= 2 c + 1: the
      mean loss, and a gradient like `params` for any optimiser.

    Raises:
      ValueError: c or batch_size are no integers in range; when called, fewer than 2 c + 1 examples.
      ShapeError: when called, leaves of `data` with different numbers of examples, a loss that is no scalar.
      DtypeError: when called, parameters that are not floating-point or complex.

    Cost: a gradient of each example, and 6 c + 2 comparisons of each coordinate. Memory: 2 c + 3 gradients, twice while
      they are updated, and gradients and activations of `batch_size` examples.

    Numerics: as `winsorized_mean`; a loss that is not finite shows in the value.

    Source: S. Chatterjee, P. Zielinski, "On the Generalization Mystery in Deep Learning", 2022, arXiv 2203.10036; the
      single pass is ours.

    Example:
      >>> import jax.numpy as jnp
      >>> data = jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0])
      >>> value, gradient = winsorized_value_and_grad(lambda w, x: w * x, 1, batch_size=2)(2.0, data)
      >>> float(value), float(gradient)
      (404.0, 3.0)
    """
    name = "winsorized_value_and_grad"
    c = per_example.count(name, "c", c, 0)
    if batch_size is not None:
        batch_size = per_example.count(name, "batch_size", batch_size, 1, ", or None")
    values_and_grads = per_example.values_and_grads(name, loss)

    def value_and_grad(params: PyTree, data: PyTree) -> tuple[jax.Array, PyTree]:
        _strict.parameters(name, params)
        size = per_example.leading(name, "data", data)
        fewest = 2 * c + 1
        checks.value(name, "data", size >= fewest, f"have at least {fewest} examples", size, "Take a larger batch.")

        def one_more(carry: tuple, row: list) -> tuple[tuple, None]:
            count, kept = carry
            return (count + 1, [_take(k, x, count) for k, x in zip(kept, row, strict=True)]), None

        def step(carry: tuple, batch: PyTree) -> tuple:
            seen, total = carry
            values, gradients = values_and_grads(params, batch)
            seen, _ = jax.lax.scan(one_more, seen, jax.tree.leaves(per_example.parts(gradients)))
            return seen, total + jnp.sum(values, dtype=total.dtype)

        leaves, structure = jax.tree.flatten(per_example.parts(params))
        dtype = jax.eval_shape(values_and_grads, params, data)[0].dtype
        start = (jnp.int32(0), [_empty(leaf, c) for leaf in leaves]), jnp.zeros([], accumulator(dtype))
        (_, kept), total = per_example.fold(step, start, data, size, batch_size)
        means = jax.tree.unflatten(structure, [_mean(k, size) for k in kept])
        return (total / size).astype(dtype), per_example.joined(params, means)

    return value_and_grad


def _empty(leaf: jax.Array, c: int) -> _Kept:
    dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
    high = jnp.full(shape, jnp.inf, dtype)
    ends = jnp.full((c, *shape), jnp.inf, dtype)
    return _Kept(ends, ends, high, -high, jnp.zeros(shape, accumulator(dtype)))


def _take(kept: _Kept, value: jax.Array, count: jax.Array) -> _Kept:
    """The same with one value more of every coordinate, `count` being those before."""
    low, high = kept.low, kept.high
    c = len(low)
    if c:
        low, value = _place(low, value)
        # What the first c values push out is the infinity that they stand for, and no value.
        high, value = _place(high, jnp.where(count < c, jnp.inf, -value))
        value = -value
    other = count >= 2 * c
    return _Kept(
        low,
        high,
        jnp.where(other, jnp.minimum(kept.least, value), kept.least),
        jnp.where(other, jnp.maximum(kept.most, value), kept.most),
        kept.total + jnp.where(other, value, 0).astype(kept.total.dtype),
    )


def _place(ordered: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Insert a value into an ordered array along its first axis, and return it with what falls off its end."""
    before = jnp.concatenate([jnp.full_like(ordered[:1], -jnp.inf), ordered[:-1]])
    return jnp.minimum(ordered, jnp.maximum(before, value)), jnp.maximum(ordered[-1], value)


def _mean(kept: _Kept, size: int) -> jax.Array:
    total, c = kept.total, len(kept.low)
    if c:  # else 0 times what may be infinite
        total = total + c * (kept.least.astype(total.dtype) + kept.most.astype(total.dtype))
    return (total / size).astype(kept.least.dtype)
