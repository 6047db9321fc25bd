"""Linear operators on trees as what a jitted function takes: traced once, captured arrays hoisted to leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core import functions
from jaxnum.core.functions import Function
from jaxnum.core.precision import accumulator
from kernels_pallas import checks

PyTree = Any


def operator(function: str, op: Any, like: PyTree, argument: str = "like") -> Function:
    """A linear map as a traced `Function`, after a check that it returns trees like `like`.

    Args:
      function: name of the public function, first word of errors.
      op: linear function on trees like `like`, or an array [n, n].
      like: pytree of floating-point arrays.
      argument: what the public function calls it.

    Raises:
      TypeError: op is neither a function nor an array.
      ShapeError, TreeError: op(like) is not a tree like `like`.
      DtypeError: a leaf of `like` is not real floating-point.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        checks.dtype(function, "floating", **{argument + jax.tree_util.keystr(path): leaf})
    matrix = hasattr(op, "shape") and hasattr(op, "dtype")
    wanted = "be a linear function v -> A v or an array [n, n]"
    checks.value(function, "op", matrix or callable(op), wanted, type(op).__name__, error=TypeError)
    if matrix:
        checks.shape(function, **{"op": (op, "N N"), argument: (like, "N")})
        array = jnp.asarray(op)
        wrapped = Function(lambda v: jnp.matmul(array, v, precision="highest").astype(v.dtype))
    else:
        wrapped = Function(op)
    image = jax.eval_shape(wrapped, like)
    checks.same_tree(function, (argument, like), **{f"op({argument})": image})
    return functions.trace(wrapped, like)  # pyright: ignore[reportReturnType]  # None only for None


def apply(op: Function, v: PyTree, like: PyTree) -> PyTree:
    """The image of a vector kept in accumulators, which `op` sees in the dtypes of `like`."""
    image = op(jax.tree.map(lambda x, to: x.astype(to.dtype), v, like))
    return wide(image)


def wide(tree: PyTree) -> PyTree:
    """Leaves in float32 at least."""
    return jax.tree.map(lambda x: x.astype(accumulator(x.dtype)), tree)
