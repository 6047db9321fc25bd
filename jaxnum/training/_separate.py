"""Linear separation of two classes by full-batch steps: logistic regression with large steps, and perceptrons.

Why a loss is a bad measure of progress: the larger the step, the larger the loss at which the data are separated, and
the sooner.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import checks

MODES = ("normalized", "plain", "normalized_perceptron", "batch_perceptron")


class Separation(NamedTuple):
    """What `separate` returns."""

    theta: jax.Array  # [d], the last iterate
    steps: jax.Array  # [] int32, steps taken
    solved: jax.Array  # [] bool, all margins of theta are greater than 0


def separate(
    features: jax.Array,
    labels: jax.Array,
    rate: float | jax.Array = 1.0,
    *,
    mode: str = "normalized",
    max_steps: int | jax.Array = 10_000,
) -> Separation:
    """Steps from 0 until a hyperplane through the origin separates the classes.

    With margins z_i = y_i a_iᵀ θ, p_i = 1 / (1 + exp(z_i)) and h_i = 1 where z_i < 0, 1/2 where z_i = 0, else 0,

        θ <- θ + γ sum_i w_i y_i a_i,
        w = p / n              "plain": gradient descent on the mean logistic loss,
        w = p / sum_i p_i      "normalized": the same divided by the mean probability of error,
        w = h / n              "batch_perceptron": limit of "plain" for γ -> ∞, θ measured in units of γ,
        w = h / sum_i h_i      "normalized_perceptron": limit of "normalized".

    With |a_i| <= R and margin μ of the best unit vector, "normalized_perceptron" takes at most R²/μ² steps after the
    first, "batch_perceptron" n times that, "normalized" R²/μ² + 1.12 (n - 1) / (γ μ²). On easy data "plain" with a
    large γ needs the fewest.

    Args:
      features: a [n, d] floating, one example a row; append a column of ones for an offset.
      labels: y [n], each -1 or 1.
      rate: γ > 0. The perceptrons' paths only scale with it.
      mode: "normalized", "plain", "normalized_perceptron" or "batch_perceptron".
      max_steps: the most steps to take, at least 0.

    Returns:
      `Separation(theta, steps, solved)`, theta in float32 at least. On data that cannot be separated `solved` is False
      and `steps` is `max_steps`.

    Raises:
      ShapeError: features are no matrix, or labels have another length.
      DtypeError: features are not real floating-point.
      ValueError: an option out of range.

    Cost: two passes over the features a step.

    Numerics: the weights are sigmoids and softmaxes of log p_i, so that neither γ = 1e6 overflows nor a sum of
    underflowed probabilities is divided by; products at the highest matmul precision. The loop stops at the first θ
    that is not finite, with `solved` False. A label of 0, or any other, is a weight of its example, unchecked.

    Source: A. Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step
    Sizes", AAAI 2025, arXiv 2412.08424; A. Novikoff, "On convergence proofs on perceptrons", 1962.

    Example:
      >>> import jax.numpy as jnp
      >>> features, labels = jnp.array([[2.0, 1.0], [1.0, 2.0], [-1.0, -1.0]]), jnp.array([1.0, 1.0, -1.0])
      >>> separation = separate(features, labels)
      >>> int(separation.steps), bool(separation.solved)
      (1, True)
    """
    checks.choice("separate", "mode", mode, MODES)
    checks.arrays("separate", features=features, labels=labels)
    checks.shape("separate", features=(features, "N D"), labels=(labels, "N"))
    checks.dtype("separate", "floating", features=features)
    checks.number("separate", "rate", lambda rate: rate > 0, "be greater than 0", rate)
    checks.number("separate", "max_steps", lambda steps: steps >= 0, "be at least 0", max_steps)
    return _run(mode, jnp.asarray(features), jnp.asarray(labels), rate, max_steps)


@partial(jax.jit, static_argnums=0)
def _run(mode: str, features: jax.Array, labels: jax.Array, rate: Any, max_steps: Any) -> Separation:
    wide = accumulator(features.dtype)
    signed = features.astype(wide) * labels.astype(wide)[:, None]

    def margins(theta: jax.Array) -> jax.Array:
        return jnp.matmul(signed, theta, precision=jax.lax.Precision.HIGHEST)

    def unsolved(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        theta, z, step = carry
        return (step < max_steps) & ~jnp.all(z > 0) & jnp.isfinite(theta).all()

    def advance(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        theta, z, step = carry
        move = jnp.matmul(_weights(mode, z), signed, precision=jax.lax.Precision.HIGHEST)
        theta = (theta + rate * move).astype(wide)
        return theta, margins(theta), step + 1

    start = jnp.zeros_like(signed, shape=signed.shape[1:])
    theta, z, steps = jax.lax.while_loop(unsolved, advance, (start, margins(start), jnp.int32(0)))
    return Separation(theta, steps, jnp.all(z > 0) & jnp.isfinite(theta).all())


def _weights(mode: str, z: jax.Array) -> jax.Array:
    """The weights w [n] of one step, for margins z [n]."""
    if mode == "normalized":
        return jax.nn.softmax(jax.nn.log_sigmoid(-z))
    if mode == "plain":
        return jax.nn.sigmoid(-z) / z.size
    wrong: Any = jnp.where(z < 0, 1.0, jnp.where(z == 0, 0.5, 0.0)).astype(z.dtype)
    # The loop steps only while a margin is not positive: the sum is 1/2 at least, or NaN is on its way.
    return wrong / (z.size if mode == "batch_perceptron" else jnp.sum(wrong))
