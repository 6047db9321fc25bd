"""What is static about a call of the linear scan, and the arrays that every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Config:
    """The static part of a call; hashable, so that it can be a parameter of a primitive."""

    reverse: bool


class Operands(NamedTuple):
    """The arrays of a call, all with the batch first. Padding has a = 1 and b = 0; a = 0 restarts the state.

    Attributes:
      a: [B, T, D].
      b: [B, T, D].
      initial: [B, D], in the accumulator's dtype.
    """

    a: Any
    b: Any
    initial: Any


def times(a: jax.Array, h: jax.Array) -> jax.Array:
    """The product, in which a zero a forgets h whatever it is: infinite, NaN, or a zero with a sign."""
    return jnp.where(a == 0, 0, a * h)
