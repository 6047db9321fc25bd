"""Products with the generalised Gauss-Newton matrix of a loss of a model's outputs: never indefinite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxnum.curvature import arguments, products
from kernels_pallas import checks

PyTree = Any


def gauss_newton_product(
    model: Callable[[PyTree], PyTree],
    loss: Callable[[PyTree], jax.Array],
    params: PyTree,
    *,
    mode: str = "auto",
) -> Callable[[PyTree], PyTree]:
    """The linear map v -> G v, G = Jᵀ H J the generalised Gauss-Newton matrix of loss(model(params)).

    J is the Jacobian of the model, H the Hessian of the loss with respect to the outputs. G is positive semidefinite
    where the loss is convex in the outputs, equals the Hessian where the model is linear in its parameters, and equals
    the Fisher matrix where the loss is the negative log-likelihood of an exponential family in its natural parameters
    (cross-entropy of logits, squared error of unit variance).

    Args:
      model: params -> outputs, any tree of floating-point arrays, with the inputs closed over.
      loss: outputs -> [] floating, with the labels closed over; its mean or sum over the batch scales G alike.
      params: pytree of floating-point arrays.
      mode: how derivatives are taken; see `hessian_product`. "reverse" forms J v as the pull-back of a pull-back.

    Returns:
      A function of v, a tree like params, that returns G v, a tree like params.

    Raises:
      ValueError: an unknown mode.
      DtypeError: a leaf of params is not real floating-point.
      ShapeError: at the call, the loss is not one real scalar.
      TreeError: at the call, v is not a tree like params.
      NotImplementedError: at the call, no mode can differentiate the model or the loss as often as needed.

    Cost: about two gradients a product (a push-forward, a Hessian product of the loss alone, a pull-back); in mode
      "reverse" one more pull-back.

    Numerics: in the dtypes of params. The rank is at most the number of outputs.

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent" (2002), section 3.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([1.0, 2.0])
      >>> product = gauss_newton_product(lambda w: x * w, lambda z: 0.5 * jnp.sum(z**2), jnp.float32(3.0))
      >>> float(product(jnp.float32(1.0)))
      5.0
    """
    checks.choice("gauss_newton_product", "mode", mode, products.MODES)
    arguments.parameters("gauss_newton_product", params)

    def product(v: PyTree) -> PyTree:
        checks.same_tree("gauss_newton_product", ("params", params), dtypes=True, v=v)
        outputs, pull_back = jax.vjp(model, params)
        tangent = products.jacobian_vector("gauss_newton_product", "model", model, params, v, mode)
        curved = products.hessian_vector("gauss_newton_product", "loss", loss, outputs, tangent, mode)
        return pull_back(curved)[0]

    return product
