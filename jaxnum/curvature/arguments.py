"""Checks that the curvature estimators share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from kernels_pallas import checks

PyTree = Any


def typed_key(function: str, key: jax.Array) -> None:
    """Check that `key` is one typed random key.

    Raises:
      DtypeError: for anything but a typed key, raw `uint32` keys included.
      ShapeError: for an array of keys.
    """
    typed = jnp.issubdtype(getattr(key, "dtype", None) or type(key), jax.dtypes.prng_key)
    got = getattr(key, "dtype", type(key).__name__)
    remedy = "Make one with jax.random.key(seed)."
    checks.value(function, "key", typed, "be a typed random key", got, remedy, checks.DtypeError)
    got_shape = tuple(key.shape)
    checks.value(function, "key", got_shape == (), "have shape ()", got_shape, remedy, checks.ShapeError)


def parameters(function: str, params: PyTree) -> None:
    """Check that `params` was given and holds real floating-point leaves.

    Raises:
      ValueError: `params` is None.
      DtypeError: a leaf is not floating-point; names its path.
    """
    remedy = "Call update(updates, state, params, ...)."
    checks.value(function, "params", params is not None, "be given", params, remedy)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        checks.dtype(function, "floating", **{"params" + jax.tree_util.keystr(path): leaf})


def required(function: str, argument: str, got: Callable[..., Any] | None, example: str) -> Callable[..., Any]:
    """The extra argument of `update` that must have been given and can be called.

    Raises:
      ValueError: the argument is missing or cannot be called.
    """
    remedy = f"Pass update(updates, state, params, {argument}={example})."
    checks.value(function, argument, callable(got), "be given, a function of params", got, remedy)
    return cast(Callable[..., Any], got)
