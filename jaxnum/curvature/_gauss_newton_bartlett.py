"""Gauss-Newton-Bartlett estimator of the diagonal of a Gauss-Newton matrix: one gradient, never negative.

For losses that are negative log-likelihoods of a model's logits; `hutchinson` serves any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.core.precision import accumulator
from jaxnum.curvature import arguments, scores
from kernels_pallas import checks

PyTree = Any


class GaussNewtonBartlettState(NamedTuple):
    """State of `gauss_newton_bartlett`."""

    count: jax.Array  # [] int32, estimates made so far; the next one draws from fold_in(key, count)


def gauss_newton_bartlett(key: jax.Array, *, likelihood: str = "categorical") -> optax.GradientTransformationExtraArgs:
    """Estimate the diagonal of the Gauss-Newton matrix of a mean negative log-likelihood.

    With logits z_b = f(params, x_b), b = 1..B, weights w_b and W = sum of w_b, the loss is
    sum_b w_b/W * -log p(y_b | z_b). Draw y_b from the model's own p(. | z_b), let
    s_b = (d z_b / d params)ᵀ d/dz_b (-log p(y_b | z_b)) be its score and return

        (sum_b sqrt(w_b / W) s_b)²   elementwise.

    Scores of separate examples are independent with mean zero and E[s_b s_bᵀ] = Jᵀ_b H_b J_b (Bartlett's
    second identity), so the cross terms vanish and the mean is exactly the diagonal of
    sum_b w_b/W Jᵀ_b H_b J_b, which is the Hessian where f is linear. With weights in {0, 1} this is the
    paper's B * g² with B the number of positions counted; the square roots make it hold for any weights >= 0.
    Labels of the data never enter: with them it would be the empirical Fisher matrix.

    `update(updates, state, params, *, logits_fn, weights=None)` ignores `updates` and returns the estimate.

    Args:
      key: [] typed random key. Estimate number n draws from `fold_in(key, n)`.
      likelihood: "categorical" (y drawn from softmax(z), cross-entropy) or "gaussian" (y = z + N(0, I), loss
        0.5 * |z - y|² summed over the last axis, mean over the others).

    Returns:
      An `optax.GradientTransformationExtraArgs`. `update` takes
        logits_fn: params -> [*B, K] floating, the model with the batch closed over,
        weights: [*B] floating, integer or bool, >= 0, how much each position counts; None counts all alike,
      and returns a tree like `params`, each leaf in at least float32, entries >= 0. Weights that are all zero
      give zero; a negative weight gives NaN.

    Raises:
      ValueError: an unknown `likelihood`; at update, `params` or `logits_fn` is missing.
      DtypeError: `key` is not a typed key; at update, `params` or the logits are not real floating-point.
      ShapeError: `key` is an array of keys; at update, the logits are a scalar or `weights` do not fit them.

    Cost: one evaluation and one pull-back of `logits_fn`, the price of a gradient; no second derivative, so
    every attention implementation serves.

    Numerics: probabilities, scores and squares are in float32 at least; the pull-back runs in the model's
    dtypes. Under `jax.jit` with sharded arrays B is the global count. Under `shard_map` average local
    estimates over replicas (each with its own key): unbiased, with more variance than one global square.
    Inside `optax.masked` or `optax.multi_transform`, `logits_fn` is called with the masked tree and has to
    fill in the leaves it lacks.

    Source: H. Liu, Z. Li, D. Hall, P. Liang, T. Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for
    Language Model Pre-training", 2023, arXiv 2305.14342, Algorithm 2 and section 2.3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> estimator = gauss_newton_bartlett(jax.random.key(0))
      >>> w = jnp.zeros((3, 2))
      >>> model = lambda w: jnp.ones((5, 3)) @ w
      >>> estimate, state = estimator.update(w, estimator.init(w), w, logits_fn=model)
      >>> estimate.shape, bool((estimate >= 0).all())
      ((3, 2), True)
    """
    arguments.typed_key("gauss_newton_bartlett", key)
    checks.choice("gauss_newton_bartlett", "likelihood", likelihood, tuple(scores.SCORES))

    def init(params: PyTree) -> GaussNewtonBartlettState:
        arguments.parameters("gauss_newton_bartlett", params)
        return GaussNewtonBartlettState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: PyTree,
        state: GaussNewtonBartlettState,
        params: PyTree = None,
        *,
        logits_fn: Callable[[PyTree], jax.Array] | None = None,
        weights: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, GaussNewtonBartlettState]:
        del updates, extra_args
        arguments.parameters("gauss_newton_bartlett", params)
        model = arguments.required("gauss_newton_bartlett", "logits_fn", logits_fn, "lambda params: model(params, x)")
        logits, pull_back = jax.vjp(model, params)
        logits_name = {"logits_fn(params)": logits}
        checks.dtype("gauss_newton_bartlett", "floating", **logits_name)
        checks.shape(
            "gauss_newton_bartlett",
            remedy="Logits end in the axis of classes; weights have one entry a position.",
            **{"logits_fn(params)": (logits, "*B K"), "weights": (weights, "*B")},
        )
        wide = logits.astype(accumulator(logits.dtype))
        score = scores.SCORES[likelihood](jax.random.fold_in(key, state.count), wide)
        score = score * jnp.sqrt(_shares(weights, wide))[..., None]
        (root,) = pull_back(score.astype(logits.dtype))
        estimate = jax.tree.map(lambda g: jnp.square(g.astype(accumulator(g.dtype))), root)
        return estimate, GaussNewtonBartlettState(count=jnp.asarray(optax.safe_increment(state.count)))

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _shares(weights: jax.Array | None, logits: jax.Array) -> jax.Array:
    """w_b / W at every position, zero where W is zero.  [*B]"""
    positions = logits.shape[:-1]
    given = jnp.ones(positions, logits.dtype) if weights is None else jnp.asarray(weights).astype(logits.dtype)
    total = jnp.sum(given)
    return given / jnp.where(total == 0, 1, total)
