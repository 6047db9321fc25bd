"""Linear recurrences in steps that double, for accelerators without a kernel (Blelloch 1990)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def times(a: jax.Array, h: jax.Array) -> jax.Array:
    """The product, in which a zero a forgets h whatever it is: infinite, NaN, or a zero with a sign."""
    return jnp.where(a == 0, 0, a * h)


def doubling(a: jax.Array, b: jax.Array, initial: jax.Array, *, reverse: bool) -> jax.Array:
    """h_t = a_t h_{t-1} + b_t along axis 1; with `reverse` from the end.

    Args:
      a: [B, T, ...].
      b: like a.
      initial: [B, ...].
      reverse: whether to run from the end.
    """

    def then(first: tuple, second: tuple) -> tuple:
        return times(second[0], first[0]), times(second[0], first[1]) + second[1]

    product, h = lax.associative_scan(then, (a, b), axis=1, reverse=reverse)
    return times(product, initial[:, None]) + h
