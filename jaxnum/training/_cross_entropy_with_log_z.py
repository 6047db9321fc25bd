"""Cross-entropy with a penalty on log Z of the output logits, known as the z-loss, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core.precision import accumulator
from kernels_pallas import checks


class LossWithLogZ(NamedTuple):
    """What `cross_entropy_with_log_z` returns, for each position, in float32 at least.

    Attributes:
      loss: [...], cross_entropy + penalty: what to differentiate.
      cross_entropy: [...], log Z minus the label's logit, weighted.
      penalty: [...], coefficient (log Z)^2, weighted.
      log_z: [...], log Z, not weighted; 0 where the weight is 0.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    penalty: jax.Array
    log_z: jax.Array


def cross_entropy_with_log_z(
    logits: jax.Array,
    labels: jax.Array,
    *,
    coefficient: float | jax.Array = 1e-4,
    axis: int = -1,
    where: jax.Array | None = None,
) -> LossWithLogZ:
    """Softmax cross-entropy of integer labels plus coefficient (log Z)^2, Z the sum of exponentials of the logits.

    The cross-entropy does not change when all logits are shifted by c, and under large learning rates they drift; the
    penalty, coefficient (log Z + c)^2, holds them. Its gradient in the logits is 2 coefficient log Z softmax. The loss
    called Z-loss that replaces the softmax is another one.

    Args:
      logits: [..., V, ...] floating-point, V classes at `axis`.
      labels: [...] integers in [0, V).
      coefficient: >= 0; the paper has 1e-4.
      axis: of the classes.
      where: [...] bool, or real weights. They multiply cross-entropy and penalty alike; where 0, logits and label may
        hold anything, NaN included, and have no part in values and gradients. A batch's mean is then
        `sum(result.loss) / sum(where)`.

    Returns:
      A `LossWithLogZ` of one number a position.

    Raises:
      ShapeError: labels or `where` do not have the shape of the logits without `axis`.
      DtypeError: logits are not floating-point, labels not integers.
      ValueError: `axis` is not one of the logits' or has no classes, the coefficient is negative.

    Cost: one exponential a logit, forwards; backwards one pass. Kept in between: an array like the logits, in whose
    place the gradient is written.

    Numerics: exponentials and sums in float32 at least, whatever the logits' dtype; what is kept for the gradient is
    rounded to theirs. A label outside [0, V) gives NaN, in the gradient too; so does a logit of NaN or +inf. A logit of
    -inf is a class of probability 0.

    Derivatives: reverse mode, any number of times; forward mode is refused.

    Source: A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv 2204.02311, section 5;
      M. Wortsman et al., 2023, arXiv 2309.14322, section 3.1.2.

    Example:
      >>> import jax.numpy as jnp
      >>> result = cross_entropy_with_log_z(jnp.zeros((1, 4)), jnp.array([2]), coefficient=0.1)
      >>> print(f"{float(result.cross_entropy[0]):.4f} {float(result.penalty[0]):.4f}")  # log 4, 0.1 (log 4)^2
      1.3863 0.1922
    """
    name = "cross_entropy_with_log_z"
    checks.dtype(name, "floating", logits=logits)
    checks.dtype(name, "integer", labels=labels)
    rank = jnp.ndim(logits)
    checks.value(name, "axis", -rank <= axis < rank, f"be an axis of the logits {jnp.shape(logits)}", axis)
    checks.value(name, "logits", jnp.shape(logits)[axis] > 0, "have at least one class", jnp.shape(logits))
    logits = jnp.moveaxis(jnp.asarray(logits), axis, -1)
    wanted = " ".join(map(str, logits.shape[:-1]))
    checks.shape(name, remedy="Labels are integers, without the axis of classes.", labels=(labels, wanted))
    checks.shape(name, where=(where, wanted))
    checks.number(name, "coefficient", lambda c: c >= 0, "be at least 0", coefficient)
    if where is not None:
        counts = jnp.asarray(where) != 0
        logits, labels = jnp.where(counts[..., None], logits, 0), jnp.where(counts, labels, 0)
    # Short integers might not count the classes.
    labels = jnp.asarray(labels, jnp.promote_types(jnp.result_type(labels), jnp.int32))
    cross_entropy, log_z = _cross_entropy(logits, labels)
    penalty = coefficient * jnp.square(log_z)
    if where is not None:
        cross_entropy, penalty = (jnp.asarray(where).astype(log_z.dtype) * part for part in (cross_entropy, penalty))
        log_z = jnp.where(counts, log_z, 0)
    return LossWithLogZ(cross_entropy + penalty, cross_entropy, penalty, log_z)


@jax.custom_vjp
def _cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and log Z over the last axis."""
    return _forward(logits, labels)[0]


def _forward(logits: jax.Array, labels: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    wide = logits.astype(accumulator(logits.dtype))
    # Where every logit is -inf, the difference would be NaN before log Z can be -inf. A constant to derivatives, since
    # no result depends on it.
    top = jax.lax.stop_gradient(jnp.max(wide, axis=-1))
    top = jnp.where(top == -jnp.inf, 0, top)
    powers = jnp.exp(wide - top[..., None])
    total = jnp.sum(powers, axis=-1)
    log_z = top + jnp.log(total)
    inside = _inside(logits, labels)
    chosen = jnp.take_along_axis(wide, jnp.where(inside, labels, 0)[..., None], axis=-1)[..., 0]
    # Backwards, the gradient can take the place of the powers: they cost no memory, and no second exponential.
    return (jnp.where(inside, log_z - chosen, jnp.nan), log_z), (powers.astype(logits.dtype), total, labels)


def _backward(saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, np.ndarray]:
    """softmax (g + h) - onehot g, for cotangents g of the cross-entropy and h of log Z."""
    powers, total, labels = saved
    g, h = cotangents
    g = jnp.where(_inside(powers, labels), g, jnp.nan)
    here = jax.lax.broadcasted_iota(labels.dtype, powers.shape, powers.ndim - 1) == labels[..., None]
    gradient = powers * ((g + h) / total)[..., None] - jnp.where(here, g[..., None], 0)
    return gradient.astype(powers.dtype), np.zeros(labels.shape, jax.dtypes.float0)


def _inside(classes: jax.Array, labels: jax.Array) -> jax.Array:
    return (labels >= 0) & (labels < classes.shape[-1])


_cross_entropy.defvjp(_forward, _backward)
