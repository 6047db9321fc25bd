"""What the transforms of this folder share: checks of hyperparameters and moving averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnum.core import trees
from jaxnum.core.precision import accumulator
from kernels_pallas import checks

_SMALL = 1e-15


def check_numbers(function: str, wanted: str, inside: Callable[[float], bool], numbers: Mapping[str, Any]) -> None:
    """Check hyperparameters that are single numbers and not traced; functions are schedules.

    Raises:
      ValueError: naming the first that is not `inside`.
    """
    for name, got in numbers.items():
        if not callable(got):
            checks.number(function, name, inside, wanted, got)


def average(decay: Any, old: jax.Array, new: jax.Array) -> jax.Array:
    """The average decay * old + (1 - decay) * new, in at least float32 whatever the dtype of decay."""
    wide = accumulator(old.dtype)
    return (decay * old.astype(wide) + (1 - decay) * new.astype(wide)).astype(wide)


def one_minus_power(decay: Any, count: jax.Array) -> jax.Array:
    """1 - decay^count without cancellation: 0.98 rounded to float32 loses two digits of 1 - 0.98."""
    if isinstance(decay, int | float):
        logarithm = math.log(decay) if decay else -math.inf
    else:
        logarithm = jnp.log(decay)
    return -jnp.expm1(count * logarithm)


def after(count: jax.Array, value: jax.Array, read: jax.Array) -> jax.Array:
    """The value, which is put into a donated buffer only after `read`, of its shape, has been made from the old one.

    Left to itself XLA writes first and copies the buffer before, which takes as long as a step or memory for a window.
    The count is never below 0, but XLA does not know; an optimisation barrier is gone when copies are decided on.
    """
    return jnp.where(count >= 0, value, read.astype(value.dtype))


def norm_or_one(tree: Any) -> jax.Array:
    """Euclidean norm of a whole tree as a divisor: 1 where it is 0, and NaN, not what makes all else 0, where it is so
    large that its inverse vanishes (in float32 from 2e37 on).
    """
    norm = safe_norm(tree)
    return jnp.where(norm == 0, 1.0, jnp.where(norm > jnp.finfo(norm.dtype).max / 16, jnp.nan, norm))


@jax.jit  # or an eager step compiles the branches anew
def safe_norm(tree: Any) -> jax.Array:
    """`trees.safe_norm`, whose two passes are paid only where one may not do: norms are taken at every step."""
    norm = trees.norm(tree)
    # Squares below the range are of entries too small to count, as those above have made the norm inf.
    good = (norm > _SMALL) & (norm < 1 / _SMALL)
    return jax.lax.cond(good, lambda: norm, lambda: trees.safe_norm(tree))


def clip_by_norm(limit: Any) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` whose norm does not overflow: there gradients of 1e20 become 0 without a word.

    A norm that is inf or NaN makes everything NaN.
    """

    def clip(updates: Any, params: Any) -> Any:
        del params
        norm = norm_or_one(updates)
        # A product, which XLA repeats wherever it is read; it would store a quotient.
        scale = jnp.where(norm < limit, 1, limit / norm)

        def leaf(u: jax.Array) -> jax.Array:
            # The norm may be beyond the range of a smaller dtype.
            return (u.astype(accumulator(u.dtype)) * scale).astype(u.dtype)

        return jax.tree.map(leaf, updates)

    return optax.stateless(clip)


def states(tree: Any, kind: type) -> list[Any]:
    """Every state of a kind in the state of an optimiser, however it is nested."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]
