"""An output layer whose step of gradient descent costs the same for any number of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.training._spherical_z_loss import labels_outside, spherical_z_loss_from_statistics
from kernels_pallas import checks

_HIGHEST = jax.lax.Precision.HIGHEST

# From the logits of the labels, and the mean and variance of all, to losses, one an example.
SphericalLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class FactoredOutput(NamedTuple):
    """Weights W = V U + 1 ωᵀ of D classes and d features, and what is kept of them; of at least float32."""

    v: jax.Array  # [D, d], of which a step touches the rows of its labels
    u: jax.Array  # [d, d]
    u_inverse: jax.Array  # [d, d]
    omega: jax.Array  # [d]
    scatter: jax.Array  # [d, d], (W - 1 meanᵀ)ᵀ (W - 1 meanᵀ)
    mean: jax.Array  # [d], of the rows of W


def factored_output(weights: jax.Array) -> FactoredOutput:
    """Weights of an output layer in factors that `factored_output_step` changes without touching all classes.

    Logits are W h. A spherical loss depends on them through the label's, their mean m̄ᵀh and their variance hᵀ S h / D,
    where m̄ is the mean row of W and S the scatter matrix of the rows: a product with d x d instead of D x d.

    Args:
      weights: [D, d] floating-point, D >= 2; random, not all equal.

    Returns:
      A `FactoredOutput` with V = W, U = I, ω = 0. That of `factored_output_weights` of a state has its drift taken out:
      `factored_output_stabilise` sees when that is needed.

    Raises:
      ShapeError: weights that are not a matrix, or fewer than two rows.
      DtypeError: weights that are not floating-point.

    Cost: 2 D d² operations, once. Memory: D d + 3 d².

    Numerics: at least float32. The paper carries WᵀW and the sum of the rows; the scatter matrix is centred, so that
    the variance does not cancel where logits share an offset.

    Source: P. Vincent, A. de Brébisson, X. Bouthillier, "Efficient Exact Gradient Update for training Deep Networks
    with Very Large Sparse Targets", 2015, arXiv 1412.7091; A. de Brébisson, P. Vincent, 2016, arXiv 1604.08859.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = factored_output(jax.random.normal(jax.random.key(0), (1000, 8)))
      >>> layer.v.shape, layer.scatter.shape
      ((1000, 8), (8, 8))
    """
    checks.arrays("factored_output", weights=weights)
    checks.dtype("factored_output", "floating", weights=weights)
    classes, width = checks.shape("factored_output", weights=(weights, "D d")).values()
    checks.value("factored_output", "weights", classes >= 2, "have at least 2 rows", classes, error=checks.ShapeError)
    v = jnp.array(weights, accumulator(weights.dtype))
    mean = jnp.mean(v, axis=0)
    centred = v - mean
    # Two arrays: a donated state must not hold the same one twice.
    u, u_inverse = jnp.eye(width, dtype=v.dtype), jnp.eye(width, dtype=v.dtype)
    return FactoredOutput(v, u, u_inverse, jnp.zeros(width, v.dtype), _dot(centred.T, centred), mean)


def factored_output_step(
    state: FactoredOutput,
    h: jax.Array,
    labels: jax.Array,
    learning_rate: float | jax.Array,
    *,
    weight_decay: float | jax.Array = 0.0,
    loss: SphericalLoss = spherical_z_loss_from_statistics,
) -> tuple[FactoredOutput, jax.Array, jax.Array]:
    """One step of gradient descent on the output weights, exactly, without forming a logit but the labels'.

    Let L be the mean of the losses of m examples, the rows of H, and g_c, g_μ and g_v its gradients with respect to the
    label's logit, the mean and the variance of each. W moves to (1 - ηλ) W - η dL/dW, that is to

        W A - 1 uᵀ - η E diag(g_c) H,    A = (1 - ηλ) I - Hᵀ diag(2 η g_v / D) H,

    where the columns of E pick the labels' rows. U becomes U A, U⁻¹ follows by Woodbury's identity on m x m, ω absorbs
    u, and V changes in the labels' rows alone. Momentum and Adam have no such form.

    In a network, `h, pull = jax.vjp(body, params)` before this step and `pull(grad_h)` after it give the gradient of
    the rest. Compile with the state donated: else each step copies V, and nothing is gained.

        step = jax.jit(factored_output_step, donate_argnums=0)

    Args:
      state: of `factored_output`.
      h: [m, d] floating-point, the last hidden layer.
      labels: [m] integer in 0..D-1, or [m, K] for K targets an example; others make everything NaN.
      learning_rate: η >= 0, of a mean over examples. A step gains or loses features where it is so large that A is
        nearly singular: one example needs 2 η g_v hᵀh / D < 1, which falls short first where variances are small.
      weight_decay: λ >= 0, ηλ < 1.
      loss: from the logits of the labels, of the shape of `labels`, and the mean and variance of all [m] to losses [m];
        any spherical loss.

    Returns:
      The next state; the mean loss before the step []; its gradient with respect to h [m, d], in h's dtype.

    Raises:
      ShapeError: h or labels that do not fit the state, losses that are not one an example.
      DtypeError: h that is not floating-point, labels that are not integers.
      ValueError: a rate or decay out of range, unless traced; several labels an example and no loss of them.

    Cost: about 16 m d² operations for small m, whatever D; a row of V read and written for each label.

    Numerics: everything in the state's dtype. Left alone, U⁻¹, S and V drift apart, and where labels are hard to fit
    exponentially: in float32, of D = 100 and d = 16 with random labels, errors have reached 2e-3 of the weights after
    500 steps and 4e-1 after 2,000. With `factored_output_stabilise` every 100 steps they stayed below 5e-5 in all of a
    dozen problems but one: with features of a common offset and first weights of size 0.1, U stretches within the first
    100 steps and errors reach 3e-4, or 5e-6 where it is called every 10. Non-finite h or losses, and labels outside the
    classes, make the state NaN.

    Source: P. Vincent, A. de Brébisson, X. Bouthillier, 2015, arXiv 1412.7091, section 5 and its mini-batch version.
    Here the matrix S is centred, and u loses the terms that cancel: with the weights' common offset gone, ω changes by
    -Hᵀ (2 η g_v (ωᵀh - μ) + η g_μ) / D, and m̄ by -η Hᵀ (g_μ + g_c) / D, which is 0 where a loss is invariant to
    shifts.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = factored_output(jax.random.normal(jax.random.key(0), (1000, 8)))
      >>> h, labels = jax.random.normal(jax.random.key(1), (4, 8)), jnp.array([3, 1, 4, 1])
      >>> step, losses = jax.jit(factored_output_step, donate_argnums=0), []
      >>> for _ in range(100):
      ...     layer, loss, grad_h = step(layer, h, labels, 100.0)
      ...     losses.append(float(loss))
      >>> losses[-1] < 0.1 * losses[0]
      True
    """
    wide, picked, classes = _checked(state, h, labels, learning_rate, weight_decay)
    fits = labels.ndim == 1 or loss is not spherical_z_loss_from_statistics
    remedy = "Pass loss=, from the logits [m, K], the means [m] and the variances [m] to losses [m]."
    checks.value("factored_output_step", "loss", fits, "be one of several labels an example", "the Z-loss", remedy)
    rows = _dot(state.v.at[picked].get(mode="fill", fill_value=jnp.nan), state.u) + state.omega  # [m, K, d]
    spread = _dot(wide, state.scatter)  # [m, d]
    chosen = jnp.sum(rows * wide[:, None], axis=-1).reshape(labels.shape)
    mean = _dot(wide, state.mean)
    variance = jnp.sum(spread * wide, axis=-1) / classes

    def total(chosen: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
        losses = loss(chosen, mean, variance)
        remedy = "Return one loss an example."
        checks.shape("factored_output_step", remedy=remedy, h=(wide, "m d"), **{"loss(...)": (losses, "m")})
        return jnp.mean(losses)

    value, (g_c, g_mean, g_variance) = jax.value_and_grad(total, argnums=(0, 1, 2))(chosen, mean, variance)
    g_c = g_c.reshape(picked.shape)
    pulled = jnp.sum(g_c[..., None] * rows, axis=1)  # [m, d]
    grad_h = 2 / classes * g_variance[:, None] * spread + g_mean[:, None] * state.mean + pulled
    moved = _moved(state, wide, picked, (g_c, g_mean, g_variance), pulled, spread, learning_rate, weight_decay)
    return moved, value, grad_h.astype(h.dtype)


def factored_output_weights(state: FactoredOutput) -> jax.Array:
    """The weights W = V U + 1 ωᵀ as one matrix.

    Args:
      state: of `factored_output`.

    Returns:
      [D, d]: for logits of all classes `h @ weights.T`.

    Raises:
      ShapeError: a state whose arrays do not fit each other.

    Cost: 2 D d² operations.

    Source: as `factored_output`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(factored_output_weights(factored_output(jnp.eye(2))).tolist())
      [[1.0, 0.0], [0.0, 1.0]]
    """
    _fits("factored_output_weights", state)
    return _dot(state.v, state.u) + state.omega


def factored_output_stabilise(state: FactoredOutput, *, low: float = 1e-2, high: float = 1e2) -> FactoredOutput:
    """The same weights, with V = W, U = I and all the rest computed anew where factors have drifted or U is stretched.

    Where z < 0 a step makes A expand. Rounding errors of the scatter matrix S expand with it, and since the next step
    takes its variances from S, not from the weights, nothing pulls them back: between two fresh starts they grow with
    the square of the largest singular value of U. With signs r the test is whether, for the four x = Uᵀ r, which lie
    where U stretches most, xᵀ S x / D is the variance of V U x + ωᵀx up to 64 roundings.

    Args:
      state: of `factored_output`.
      low: least singular value of U that stays, > 0; a step with weight decay shrinks all.
      high: largest, > low.

    Returns:
      A `FactoredOutput`; the same but for U⁻¹, which is computed from U, where there was no need.

    Raises:
      ShapeError: a state whose arrays do not fit each other.
      ValueError: 0 < low < high does not hold.

    Cost: an SVD of d x d and 8 D d operations; 4 D d² where it starts afresh.

    Numerics: a U that has become exactly singular has lost what it multiplied; its inverse is not finite already. A
    state that is NaN stays so.

    Source: P. Vincent, A. de Brébisson, X. Bouthillier, 2015, arXiv 1412.7091, section on numerical stability, which
    brings back singular values alone; the test of S and the fresh start are ours.

    Example:
      >>> import jax.numpy as jnp
      >>> state = factored_output(jnp.eye(2))._replace(u=jnp.diag(jnp.array([1.0, 1e3])))
      >>> print([f"{float(x):.2f}" for x in factored_output_stabilise(state).v.ravel()])
      ['1.00', '0.00', '0.00', '1000.00']
    """
    _fits("factored_output_stabilise", state)
    checks.value("factored_output_stabilise", "low", 0 < low < high, f"be in (0, high), high = {high}", low)
    left, s, right = jnp.linalg.svd(state.u)
    kept = state._replace(u_inverse=_dot(right.T / s, left.T))
    gone = jnp.any((s < low) | (s > high)) | _drifted(state)
    return jax.lax.cond(gone, lambda: factored_output(factored_output_weights(state)), lambda: kept)


def _drifted(state: FactoredOutput) -> jax.Array:
    """Whether the variances that S gives are not those of the weights, for a few combinations of the features."""
    classes, width = state.v.shape
    signs = jax.random.rademacher(jax.random.key(0), (4, width), state.v.dtype)
    x = _dot(signs, state.u)  # [4, d]
    logits = _dot(state.v, _dot(state.u, x.T)) + _dot(state.omega, x.T)  # [D, 4]
    variance = jnp.var(logits, axis=0)
    claimed = jnp.sum(_dot(x, state.scatter) * x, axis=1) / classes
    # Rounding of logits that share an offset counts for as much as the offset is larger than their spread.
    scale = jnp.sqrt(variance * jnp.mean(jnp.square(logits), axis=0))
    return jnp.any(jnp.abs(claimed - variance) > 64 * jnp.finfo(scale.dtype).eps * scale)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=_HIGHEST)


def _fits(function: str, state: FactoredOutput) -> dict[str, int]:
    shapes = ("D d", "d d", "d d", "d", "d d", "d")
    pairs = zip(FactoredOutput._fields, state, shapes, strict=True)
    named = {f"state.{name}": (array, spec) for name, array, spec in pairs}
    return checks.shape(function, remedy="Pass what factored_output returned.", **named)


def _checked(
    state: FactoredOutput,
    h: jax.Array,
    labels: jax.Array,
    learning_rate: float | jax.Array,
    weight_decay: float | jax.Array,
) -> tuple[jax.Array, jax.Array, int]:
    """The hidden layer in the state's dtype, labels [m, K] with those outside sent beyond the end, the classes."""
    function = "factored_output_step"
    checks.arrays(function, h=h, labels=labels)
    checks.dtype(function, "floating", h=h)
    checks.dtype(function, "integer", labels=labels)
    sizes = _fits(function, state)
    remedy = "One hidden layer a row, and its label or labels."
    given = {"state.mean": (state.mean, "d"), "h": (h, "m d"), "labels": (labels, "m *K")}
    checks.shape(function, remedy=remedy, **given)
    ok, wanted = labels.ndim <= 2, "have shape (m,) or (m, K)"
    checks.value(function, "labels", ok, wanted, labels.shape, error=checks.ShapeError)
    for name, got in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        checks.number(function, name, lambda x: x >= 0, "be at least 0", got)
    if not checks.traced(learning_rate) and jnp.size(learning_rate) == 1:
        rate = float(learning_rate)
        wanted = f"be less than 1 / learning_rate, learning_rate = {rate}"
        checks.number(function, "weight_decay", lambda x: rate * x < 1, wanted, weight_decay)
    checks.value(function, "h", h.shape[0] >= 1, "have at least one row", h.shape, error=checks.ShapeError)
    picked = labels_outside(jnp.asarray(labels), sizes["D"]).reshape(h.shape[0], -1)
    return h.astype(state.v.dtype), picked, sizes["D"]


def _moved(
    state: FactoredOutput,
    h: jax.Array,
    picked: jax.Array,
    gradients: tuple[jax.Array, jax.Array, jax.Array],
    pulled: jax.Array,
    spread: jax.Array,
    rate: float | jax.Array,
    decay: float | jax.Array,
) -> FactoredOutput:
    """The state after the step; every change has a factor H on one side, so that it costs m d² at most."""
    g_c, g_mean, g_variance = gradients
    classes, dtype = state.v.shape[0], state.v.dtype
    rate = jnp.asarray(rate, dtype)
    keep = 1 - rate * jnp.asarray(decay, dtype)
    bend = 2 * rate * g_variance / classes  # [m], A = keep I - Hᵀ diag(bend) H
    gram = _dot(h, h.T)  # [m, m]
    solved = jnp.linalg.solve(jnp.eye(h.shape[0], dtype=dtype) - gram * (bend / keep), _dot(h, state.u_inverse))
    u = keep * state.u - _dot(_dot(state.u, h.T) * bend, h)
    u_inverse = (state.u_inverse + _dot(h.T * (bend / keep), solved)) / keep
    v = state.v.at[picked].add(-rate / keep * g_c[..., None] * solved[:, None], mode="drop")
    omega = keep * state.omega - _dot(bend * (_dot(h, state.omega) - _dot(h, state.mean)) + rate / classes * g_mean, h)
    drawn = jnp.sum(g_c, axis=1)
    mean = keep * state.mean - rate / classes * _dot(g_mean + drawn, h)
    # The scatter matrix of W A - 1 uᵀ - η E diag(g_c) H is keep² S - (Hᵀ X + Xᵀ H); shifts of all rows leave it alone.
    apart = pulled - drawn[:, None] * state.mean
    same = picked.reshape(-1, 1) == picked.reshape(-1)
    weights = (jnp.where(same, g_c.reshape(-1, 1) * g_c.reshape(-1), 0)).reshape(picked.shape * 2).sum(axis=(1, 3))
    quadratic = bend[:, None] * _dot(spread, h.T) * bend + rate**2 * (weights - drawn[:, None] * drawn / classes)
    inner = quadratic / 2 + rate * _dot(apart, h.T) * bend
    change = _dot(h.T, keep * (bend[:, None] * spread + rate * apart) - _dot(inner, h))
    return FactoredOutput(v, u, u_inverse, omega, keep**2 * state.scatter - (change + change.T), mean)
