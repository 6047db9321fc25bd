"""Hessian-vector products, in whichever mode of differentiation the function allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxnum.curvature import arguments, products
from kernels_pallas import checks

PyTree = Any


def hessian_product(
    f: Callable[[PyTree], jax.Array], params: PyTree, *, mode: str = "auto"
) -> Callable[[PyTree], PyTree]:
    """The linear map v -> H v, H the Hessian of a scalar function at params.

    Args:
      f: params -> [] floating, the function whose curvature is asked, with the batch closed over. (What
        `jaxnum.curvature` does with the product hoists arrays that f captures; a jit of your own should take the batch
        as an argument.)
      params: pytree of floating-point arrays, where the Hessian is taken.
      mode: "forward" is forward over reverse, d/dt grad f(params + t v). "reverse" is reverse over reverse, grad of
        <grad f, v>. "auto" takes "forward", and "reverse" where something inside f refuses forward mode, as the kernels
        of `kernels_pallas` do; both give the same product.

    Returns:
      A function of v, a tree like params, that returns H v, a tree like params.

    Raises:
      ValueError: an unknown mode.
      DtypeError: a leaf of params is not real floating-point.
      ShapeError: at the call, f does not return one real scalar.
      TreeError: at the call, v is not a tree like params.
      NotImplementedError: at the call, no mode can differentiate f twice.

    Cost: about two gradients a product in mode "forward", three in mode "reverse"; memory of a gradient.

    Numerics: in the dtypes of params. Kinks of f, as of ReLU, are ignored.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian" (1994).

    Example:
      >>> import jax.numpy as jnp
      >>> product = hessian_product(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 2.0]))
      >>> product(jnp.array([1.0, 0.0])).tolist()
      [4.0, 2.0]
    """
    checks.choice("hessian_product", "mode", mode, products.MODES)
    arguments.parameters("hessian_product", params)

    def product(v: PyTree) -> PyTree:
        checks.same_tree("hessian_product", ("params", params), dtypes=True, v=v)
        return products.hessian_vector("hessian_product", "f", f, params, v, mode)

    return product
