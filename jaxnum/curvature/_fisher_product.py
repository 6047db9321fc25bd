"""Products with the Fisher matrix, labels drawn from the model, and with the empirical one, labels of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.curvature import arguments, products, scores
from kernels_pallas import checks

PyTree = Any


def fisher_product(
    logits_fn: Callable[[PyTree], jax.Array],
    params: PyTree,
    key: jax.Array,
    *,
    likelihood: str = "categorical",
    num_samples: int = 1,
    mode: str = "auto",
) -> Callable[[PyTree], PyTree]:
    """The linear map v -> F v, F an unbiased sample of the Fisher matrix of a model's likelihood.

    With logits z_b = f(params, x_b), b = 1..B, labels y_bs drawn from the model's own p(. | z_b), s = 1..S, and scores
    g_bs = d/dz_b (-log p(y_bs | z_b)),

        F = 1/(B S) sum_b sum_s (Jᵀ_b g_bs) (Jᵀ_b g_bs)ᵀ.

    Its mean over the labels is the Fisher matrix, which for these likelihoods is `gauss_newton_product` of the mean
    negative log-likelihood: exact, and the better choice where its cost is no matter. The labels are drawn once: F is
    one fixed matrix, symmetric and positive semidefinite, of rank at most B S.

    Args:
      logits_fn: params -> [*B, K] floating, the model with the inputs closed over.
      params: pytree of floating-point arrays.
      key: [] typed random key of the labels.
      likelihood: "categorical" (softmax of the logits) or "gaussian" (unit variance about the outputs).
      num_samples: labels S drawn for each position, at least 1.
      mode: how J v is formed; see `gauss_newton_product`.

    Returns:
      A function of v, a tree like params, that returns F v, a tree like params.

    Raises:
      ValueError: an unknown option, or num_samples below 1.
      DtypeError: `key` is not a typed key, or params or the logits are not real floating-point.
      ShapeError: `key` is an array of keys, or the logits are a scalar.
      TreeError: at the call, v is not a tree like params.

    Cost: a push-forward and a pull-back of the model a product, whatever S.

    Numerics: scores and their products in float32 at least.

    Source: Martens, "New insights and perspectives on the natural gradient method" (2020), sections 5 and 9.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.eye(3)
      >>> product = fisher_product(lambda w: x @ w, jnp.zeros((3, 2)), jax.random.key(0))
      >>> image = product(jnp.array([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]))
      >>> (6 * image[0]).round().tolist()
      [1.0, -1.0]
    """
    checks.choice("fisher_product", "likelihood", likelihood, tuple(scores.SCORES))
    checks.choice("fisher_product", "mode", mode, products.MODES)
    checks.value("fisher_product", "num_samples", num_samples >= 1, "be at least 1", num_samples)
    arguments.typed_key("fisher_product", key)
    arguments.parameters("fisher_product", params)

    def product(v: PyTree) -> PyTree:
        checks.same_tree("fisher_product", ("params", params), dtypes=True, v=v)
        logits, pull_back = jax.vjp(logits_fn, params)
        scores.check_logits("fisher_product", logits)
        tangent = products.jacobian_vector("fisher_product", "logits_fn", logits_fn, params, v, mode)
        wide = logits.astype(accumulator(logits.dtype))
        weight = 1 / (num_samples * max(1, wide.size // wide.shape[-1]))

        def add(total: jax.Array, sample_key: jax.Array) -> tuple[jax.Array, None]:
            score = scores.SCORES[likelihood](sample_key, wide)
            along = jnp.sum(score * tangent.astype(wide.dtype), axis=-1, keepdims=True)
            return total + weight * along * score, None

        # One sample at a time, in the memory of one.
        total, _ = jax.lax.scan(add, jnp.zeros_like(wide), jax.random.split(key, num_samples))
        return pull_back(total.astype(logits.dtype))[0]

    return product


def empirical_fisher_product(
    losses_fn: Callable[[PyTree], jax.Array], params: PyTree, *, mode: str = "auto"
) -> Callable[[PyTree], PyTree]:
    """The linear map v -> F v, F = 1/B sum_b g_b g_bᵀ over the gradients of the losses of B examples.

    It is formed from one push-forward and one pull-back of the vector of losses: no gradient of a single example is
    ever stored. With the labels of the data it is not the Fisher matrix, and far from the minimum it need not resemble
    the Hessian: for curvature take `gauss_newton_product`; for the noise of stochastic gradients take this.

    Args:
      losses_fn: params -> [B] floating, the loss of every example, with the batch closed over.
      params: pytree of floating-point arrays.
      mode: how the push-forward is formed; see `gauss_newton_product`.

    Returns:
      A function of v, a tree like params, that returns F v, a tree like params.

    Raises:
      ValueError: an unknown mode.
      DtypeError: a leaf of params is not real floating-point.
      ShapeError: at the call, losses_fn does not return one axis of losses.
      TreeError: at the call, v is not a tree like params.

    Cost: about two gradients a product. Memory: that of a gradient.

    Numerics: in the dtypes of params and losses. The rank is at most B.

    Source: Kunstner, Balles & Hennig, "Limitations of the empirical Fisher approximation for natural gradient descent"
      (2019), equations 3 and 5.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([1.0, 3.0])
      >>> product = empirical_fisher_product(lambda w: x * w, jnp.float32(1.0))
      >>> float(product(jnp.float32(1.0)))
      5.0
    """
    checks.choice("empirical_fisher_product", "mode", mode, products.MODES)
    arguments.parameters("empirical_fisher_product", params)

    def product(v: PyTree) -> PyTree:
        checks.same_tree("empirical_fisher_product", ("params", params), dtypes=True, v=v)
        losses, pull_back = jax.vjp(losses_fn, params)
        remedy = "Return one loss an example, not their mean."
        checks.shape("empirical_fisher_product", remedy=remedy, **{"losses_fn(params)": (losses, "B")})
        along = products.jacobian_vector("empirical_fisher_product", "losses_fn", losses_fn, params, v, mode)
        return pull_back(along / max(1, losses.size))[0]

    return product
