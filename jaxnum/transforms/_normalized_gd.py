"""Gradient descent on the logistic loss, divided by the mean probability of error: no factor n in its worst case.

For linearly separable binary classification, last layers on separable features among them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnum.core.precision import accumulator
from jaxnum.transforms import _strict
from jaxnum.transforms.moments import check_numbers
from kernels_pallas import checks

PyTree = Any


def normalized_gd(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Normalised gradient descent for separable logistic regression, as an optimiser ready for use.

    For labels y_i = ±1, scores s_i(θ) and margins z_i = y_i s_i(θ), with the mean logistic loss f and learning rate γ,

        f(θ) = mean_i log(1 + exp(-z_i)),   β = mean_i 1 / (1 + exp(z_i)),   θ <- θ - (γ / β) ∇f(θ).

    For linear scores a_iᵀ θ the step is γ times a mean of the y_i a_i, weighted by the probability of error: points on
    the right side fall out of it, and for γ -> ∞ it is the batch perceptron's step averaged over the misclassified
    points. With |a_i| <= R and margin μ of the best unit vector it separates in R²/μ² + 1.12 (n - 1) / (γ μ²) steps,
    where gradient descent with large steps needs up to n R²/μ². On easy data, where few steps do, the latter can
    win.

    Args:
      learning_rate: γ >= 0, a number or a schedule; at least n / R² keeps the bound within 2.2 R²/μ².

    Returns:
      An `optax.GradientTransformationExtraArgs` whose `update` takes the extra argument `margins` [n], at the
      parameters where the gradient was taken.

    Raises:
      ValueError: learning_rate below 0; at update, `params` or `margins` is missing.
      ShapeError: at update, `margins` has not one axis, or no entry.
      DtypeError: at update, `margins` are not floating-point.
      TreeError, ShapeError, DtypeError: updates that do not match real floating-point `params`.

    Cost: one sum over the margins and one scaling of the gradient. No state.

    Numerics: β is formed as exp of a log-sum-exp of log p_i, in float32 at least. Where all margins are above 87
    (float32) every p_i underflows, the gradient is 0 or as good as, and so is the step: the data are separated. A
    gradient that lost digits to that underflow before is not repaired: `separate` in `jaxnum.training` forms the
    weights without a division and does not. A margin of +inf is a p_i of 0 and one of -inf a p_i of 1; a NaN makes the
    step NaN, and gradients that are not finite stay so. Stop on the margins, not on the loss: a larger γ separates
    sooner at a larger loss.

    Source: A. Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step
    Sizes", AAAI 2025, arXiv 2412.08424. The bound for finite γ is ours: while a point is misclassified the p_i sum to
    1/2 at least, and p(z) z <= 0.2785.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> features, labels = jnp.array([[1.0, 0.0], [-0.5, 0.1]]), jnp.array([1.0, 1.0])
      >>> margins = lambda x: labels * (features @ x)
      >>> loss = lambda x: jnp.mean(jax.nn.softplus(-margins(x)))
      >>> optimiser = normalized_gd(100.0)
      >>> x, steps = jnp.zeros(2), 0
      >>> while not bool((margins(x) > 0).all()):
      ...     updates, _ = optimiser.update(jax.grad(loss)(x), optimiser.init(x), x, margins=margins(x))
      ...     x, steps = optax.apply_updates(x, updates), steps + 1
      >>> steps < 60
      True
    """
    check_numbers("normalized_gd", "be at least 0", lambda x: x >= 0, dict(learning_rate=learning_rate))
    chain = optax.chain(_scale("normalized_gd"), optax.scale_by_learning_rate(learning_rate))
    return _strict.in_dtypes_of_params(chain)


def scale_by_normalized_gd() -> optax.GradientTransformationExtraArgs:
    """Divide the gradient by β, the mean probability of error.

    Args, errors, cost, numerics (non-finite gradients included) and source: see `normalized_gd`. No state.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates point uphill, as the gradient does; chain it with
      `optax.scale_by_learning_rate`.
    """
    return _scale("scale_by_normalized_gd")


def _scale(function: str) -> optax.GradientTransformationExtraArgs:
    def init(params: PyTree) -> optax.EmptyState:
        _strict.parameters(function, params, "floating")
        return optax.EmptyState()

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, margins: jax.Array | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        del extra_args
        _strict.matching(function, updates, params, "floating")
        remedy = "Pass update(updates, state, params, margins=labels * scores)."
        checks.value(function, "margins", margins is not None, "be given", margins, remedy)
        checks.shape(function, remedy="One margin an example.", margins=(margins, "N"))
        checks.dtype(function, "floating", margins=margins)
        z = jnp.asarray(margins)
        checks.value(function, "margins", z.size > 0, "have an entry", f"shape {z.shape}", remedy, checks.ShapeError)
        z = z.astype(accumulator(z.dtype))
        mass = jnp.exp(jax.nn.logsumexp(jax.nn.log_sigmoid(-z))) / z.size
        # All probabilities underflow together with the gradient, and 1 / mass would overflow; what is not finite must
        # stay so.
        scale = jnp.where(mass < jnp.finfo(mass.dtype).tiny, 1.0, 1 / mass)
        return jax.tree.map(lambda g: (scale * g).astype(g.dtype), updates), state

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
