"""What the transforms of this folder share: checks of hyperparameters and moving averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import checks


def check_numbers(function: str, wanted: str, inside: Callable[[float], bool], numbers: Mapping[str, Any]) -> None:
    """Check hyperparameters that are Python numbers; arrays may be traced, and functions are schedules.

    Raises:
      ValueError: naming the first that is not `inside`.
    """
    for name, got in numbers.items():
        if isinstance(got, int | float):
            checks.value(function, name, inside(got), wanted, got)


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


def norm_or_one(tree: Any) -> jax.Array:
    """Euclidean norm of a whole tree, and 1 where it is 0: a divisor."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
    return jnp.where(norm == 0, 1.0, norm)


def states(tree: Any, kind: type) -> list[Any]:
    """Every state of a kind in the state of an optimiser, however it is nested."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]
