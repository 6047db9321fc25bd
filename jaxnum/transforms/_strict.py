"""Argument checks for any optax transformation.

optax broadcasts a (1,) gradient into (3,) parameters without a word and lets integer parameters through;
`strict` turns both, and every other mismatch, into one sentence.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kernels_pallas import checks

PyTree = Any


def strict(inner: optax.GradientTransformation, *, name: str = "strict") -> optax.GradientTransformationExtraArgs:
    """Wrap a transformation so that it refuses updates that do not match the parameters.

    At `init` and `update` every leaf of `params` must be floating-point or complex; at `update`, `params`
    must be given and `updates` must have its tree structure and its leaves' shapes and dtypes. The checks
    read shapes and dtypes only: they run while tracing and cost nothing in compiled code. State and results
    are those of `inner`, so a checkpoint of one loads into the other.

    Args:
      inner: any optax transformation; extra arguments of `update` reach it if it takes them.
      name: first word of the error sentences, say "adam".

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state of `inner`.

    Raises:
      TypeError: `inner` is not an optax transformation.
      ValueError: at update, `params` is missing, though `inner` may not need it.
      TreeError: at update, another tree structure.
      ShapeError: at update, a leaf of another shape; names its path.
      DtypeError: integer or bool parameters; at update, a leaf of another dtype; names its path.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> safe = strict(optax.sgd(0.1), name="sgd")
      >>> params = jnp.zeros(3)
      >>> try:
      ...     safe.update(jnp.zeros(1), safe.init(params), params)
      ... except ValueError as error:
      ...     print(str(error)[:71])
      sgd: `updates` must have shape (3,) to match `params`; got (1,). Pass t
    """
    transformation(name, "inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PyTree:
        parameters(name, params)
        return inner.init(params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, PyTree]:
        matching(name, updates, params)
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def in_dtypes_of_params(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same with updates in the parameters' dtypes, which a rate or a decay that is a float32 array may widen."""
    inner = optax.with_extra_args_support(inner)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, PyTree]:
        moved, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda u, p: u.astype(jnp.result_type(p)), moved, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def transformation(function: str, argument: str, got: Any) -> None:
    """Check that an argument is an optax transformation.

    Raises:
      TypeError: for anything else.
    """
    ok = isinstance(got, optax.GradientTransformation)
    remedy = "Call its factory first." if callable(got) else ""
    shown = type(got).__name__
    checks.value(function, argument, ok, "be an optax gradient transformation", shown, remedy, TypeError)


def parameters(function: str, params: PyTree, kind: str = "inexact") -> None:
    """Check that every leaf of `params` has a dtype that can be optimised.

    Raises:
      DtypeError: with the path of the first leaf that has not.
    """
    remedy = "Leave such leaves out with optax.masked or optax.multi_transform."
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        checks.dtype(function, kind, remedy=remedy, **{"params" + jax.tree_util.keystr(path): leaf})


def matching(function: str, updates: PyTree, params: PyTree, kind: str = "inexact") -> None:
    """Check that `params` was given and that `updates` match it in structure, shapes and dtypes.

    Raises:
      ValueError: `params` is None.
      TreeError: another tree structure.
      ShapeError: a leaf of another shape; names its path.
      DtypeError: a leaf of `params` that cannot be optimised, or a leaf of another dtype; names its path.
    """
    remedy = "Call update(updates, state, params)."
    checks.value(function, "params", params is not None, "be given", params, remedy)
    parameters(function, params, kind)
    remedy = "Pass the gradient of the loss with respect to params."
    checks.same_tree(function, ("params", params), dtypes=True, remedy=remedy, updates=updates)
