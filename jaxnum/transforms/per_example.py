"""What the aggregators of per-example gradients share: their frame, their checks, and order statistics."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.experimental import aggregating

from jaxnum.core import trees
from jaxnum.core.precision import accumulator
from kernels_pallas import checks
from kernels_pallas.checks import ShapeError

PyTree = Any
_INSERTED = 64
_REMEDY = "Pass jax.vmap(jax.grad(loss), (None, 0))(params, batch)."


def aggregator(
    function: str, fewest: int, combine: Callable[[PyTree, int], PyTree], axis: int = 0
) -> aggregating.Aggregator:
    """An aggregator from a function of the tree of per-example gradients, examples first, and their number.

    It demands `params`: a gradient of the batch, which has no axis of examples, shows in nothing but its shape. The
    real and imaginary parts of a complex gradient reach `combine` as two real leaves.
    """

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        del extra_args
        remedy = "Call update(updates, state, params)."
        checks.value(function, "params", params is not None, "be given", params, remedy)
        size = examples(function, updates, axis, params)
        wanted = f"have at least {fewest} examples"
        checks.value(function, "updates", size >= fewest, wanted, size, "Take a larger batch.")
        first = jax.tree.map(lambda g: jnp.moveaxis(g, axis, 0), updates)
        return joined(first, combine(parts(first), size)), state

    return aggregating.Aggregator(optax.init_empty_state, update)  # pyright: ignore[reportArgumentType]


def examples(function: str, updates: PyTree, axis: int, params: PyTree = None) -> int:
    """The number of examples, the same in every leaf.

    Raises:
      DtypeError: a leaf is not floating-point.
      ShapeError: a leaf without the axis, or with another number; one that does not fit its parameter.
      TreeError: another tree structure than `params`.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        checks.dtype(function, "inexact", **{"updates" + jax.tree_util.keystr(path): leaf})
    first = leading(function, "updates", updates, axis, _REMEDY)
    if params is not None:
        one = jax.eval_shape(lambda tree: jax.tree.map(lambda g: jnp.take(g, 0, axis), tree), updates)
        checks.same_tree(function, ("params", params), dtypes=False, remedy=_REMEDY, updates=one)
    return first


def leading(function: str, argument: str, tree: PyTree, axis: int = 0, remedy: str = "") -> int:
    """The length of an axis, the same in every leaf.

    Raises:
      ShapeError: a leaf without the axis, or of another length; ValueError: no leaves.
    """
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, shape = argument + jax.tree_util.keystr(path), jnp.shape(leaf)
        inside = -len(shape) <= axis < len(shape)
        checks.value(function, name, inside, f"have an axis {axis} of examples", f"shape {shape}", remedy, ShapeError)
        sizes[name] = shape[axis]
    checks.value(function, argument, bool(sizes), "have leaves", "an empty tree")
    first = next(iter(sizes.values()))
    for name, size in sizes.items():
        checks.value(function, name, size == first, f"have {first} examples", size, remedy, ShapeError)
    return first


def values_and_grads(function: str, loss: Callable[[PyTree, PyTree], jax.Array]) -> Callable[[PyTree, PyTree], Any]:
    """Losses and gradients of all examples of a batch, from the loss of one."""

    def one(params: PyTree, example: PyTree) -> jax.Array:
        value = loss(params, example)
        checks.shape(function, remedy="`loss` takes one example and returns a scalar.", loss=(value, ""))
        return value

    return jax.vmap(jax.value_and_grad(one), (None, 0))


def fold(step: Callable[[Any, PyTree], Any], carry: Any, data: PyTree, size: int, batch_size: int | None) -> Any:
    """Fold `step(carry, batch) -> carry` over `size` examples, `batch_size` at a time, and then over the rest."""
    batch_size = min(batch_size or size, size)
    whole = size // batch_size * batch_size
    data = jax.tree.map(jnp.asarray, data)
    batches = jax.tree.map(lambda x: x[:whole].reshape(-1, batch_size, *x.shape[1:]), data)
    carry, _ = jax.lax.scan(lambda carry, batch: (step(carry, batch), None), carry, batches)
    return carry if whole == size else step(carry, jax.tree.map(lambda x: x[whole:], data))


def count(function: str, argument: str, given: Any, least: int, otherwise: str = "") -> int:
    """An integer of Python, NumPy or JAX that is no bool and at least `least`.

    Raises:
      ValueError: anything else; `otherwise` is what else the sentence allows.
    """
    try:
        whole = least - 1 if isinstance(given, (bool, np.bool_)) else operator.index(given)
    except TypeError:
        whole = least - 1
    checks.value(function, argument, whole >= least, f"be an integer of at least {least}{otherwise}", given)
    return whole


def parts(tree: PyTree) -> PyTree:
    """The same with a pair of real and imaginary part, of which either can be ordered, for every complex leaf."""
    return jax.tree.map(lambda x: (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else x, tree)


def joined(like: PyTree, tree: PyTree) -> PyTree:
    """The inverse of `parts`, told by `like` which leaves are complex."""
    return jax.tree.map(lambda x, part: jax.lax.complex(*part) if jnp.iscomplexobj(x) else part, like, tree)


def total(values: jax.Array) -> jax.Array:
    """Sum over the first axis in at least float32: a product with ones, as XLA adds rows slowly on a CPU."""
    wide = accumulator(values.dtype)
    if trees.explicitly_sharded(values):
        # tensordot raises ShardingTypeError on a contracted axis that is sharded.
        return jnp.sum(values, axis=0, dtype=wide)
    ones, highest = jnp.ones(values.shape[0], values.dtype), jax.lax.Precision.HIGHEST
    return jnp.tensordot(ones, values, 1, precision=highest, preferred_element_type=wide)


def mean(values: jax.Array) -> jax.Array:
    """Mean over the first axis, summed in at least float32, in the dtype given."""
    return (total(values) / values.shape[0]).astype(values.dtype)


def smallest(values: jax.Array, count: int) -> jax.Array:
    """The `count` smallest values along the first axis, in order: [count, ...]; NaN where any value is NaN.

    Each value is inserted by comparisons of whole arrays: on a CPU a hundred times faster than `jnp.sort` along the
    first axis for 5 of 32. A program of very many comparisons would take long to compile.
    """
    if count > _INSERTED:
        ordered = jnp.sort(values, axis=0)  # NaN last
        return jnp.where(jnp.isnan(ordered[-1]), jnp.nan, ordered[:count])

    def insert(kept: tuple[jax.Array, ...], value: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        row = []
        for held in kept:
            row.append(jnp.minimum(held, value))
            value = jnp.maximum(held, value)
        return tuple(row), None

    empty = tuple(jnp.full_like(values[0], jnp.inf) for _ in range(count))
    return jnp.stack(jax.lax.scan(insert, empty, values)[0])
