"""The form of a feature map, which turns queries and keys into what linear attention multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import checks

PyTree = Any


class FeatureMap(NamedTuple):
    """A map of a head's queries or keys to features, as pure functions.

    Attributes:
      init: `init(key) -> params`, a dict of arrays; an empty one where nothing is learned.
      apply: `apply(params, x) -> features`, x [*B, heads, dim] to [*B, heads, width], in the dtype of x.
      width: features a head.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array], jax.Array]
    width: int


def enter(name: str, x: jax.Array, heads: int | None, dim: int) -> jax.Array:
    """What a map is applied to, checked, in the dtype of sums."""
    remedy = "The layout is [*batch, heads, dim]."
    checks.shape(name, remedy=remedy, x=(x, f"*B {'H' if heads is None else heads} {dim}"))
    checks.dtype(name, "floating", x=x)
    return x.astype(accumulator(x.dtype))


def project(params: PyTree, x: jax.Array) -> jax.Array:
    """A linear map a head, x [*B, H, D] by params["weight"] [H, D, F], plus params["bias"] [H, F] if there is one."""
    weight = params["weight"].astype(x.dtype)
    y = jnp.einsum("...hd,hdf->...hf", x, weight, precision=jax.lax.Precision.HIGHEST)
    return y + params["bias"].astype(x.dtype) if "bias" in params else y
