"""The Z-loss of the spherical family: logits are standardised, and the label's must stand out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import checks


def spherical_z_loss(
    logits: jax.Array, labels: jax.Array, *, a: float | jax.Array = 1.0, b: float | jax.Array = 0.0
) -> jax.Array:
    """The Z-loss: by how much the label's logit, in standard deviations, falls short of the mean of all plus b.

    With the mean μ and the standard deviation σ of the D logits of an example, and the label c,

        z = (o_c - μ) / σ,    L = softplus(a (b - z)) / a.

    It does not change when all logits are shifted by a number or scaled by a positive one: its gradient sums to 0 and
    is orthogonal to o - μ. Since z <= sqrt(D - 1), which a single logit above all others reaches, it cannot fall below
    softplus(a (b - sqrt(D - 1))) / a. It depends on o through o_c, μ and σ alone, which is what makes an output layer
    whose cost does not grow with D: see `factored_output`. It is no relation of the z-loss that is added to a softmax
    for stability, the squared log-partition.

    Args:
      logits: [*B, D] floating-point, D >= 2.
      labels: [*B] integer, in 0..D-1; others give NaN.
      a: steepness > 0, to be tuned.
      b: standard deviations that the label must be above the mean, to be tuned.

    Returns:
      [*B] losses, at least float32.

    Raises:
      ShapeError: labels that are not one a row of logits, or fewer than two logits.
      DtypeError: logits that are not floating-point, labels that are not integers.
      ValueError: a <= 0.

    Cost: two passes over the logits.

    Numerics: μ, σ and z in at least float32, σ from centred logits. Logits that are equal, up to four roundings of
    their mean, have no z: it counts as 0 with gradient 0, so that weights must not all start from 0. Centred logits are
    divided by the largest before they are squared, so that all that is finite up to 1 / D of the largest number has its
    z. Non-finite logits give NaN.

    Source: A. de Brébisson, P. Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
    Spherical Family", 2016, arXiv 1604.08859, equation 6.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([[0.0, 0.0, 3.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
      >>> print([f"{float(loss):.4f}" for loss in spherical_z_loss(logits, jnp.array([2, 2]))])
      ['0.1269', '0.6931']
    """
    checks.arrays("spherical_z_loss", logits=logits, labels=labels)
    checks.dtype("spherical_z_loss", "floating", logits=logits)
    checks.dtype("spherical_z_loss", "integer", labels=labels)
    sizes = checks.shape("spherical_z_loss", logits=(logits, "*B D"), labels=(labels, "*B"))
    checks.value(
        "spherical_z_loss", "logits", sizes["D"] >= 2, "have at least 2 classes", sizes["D"], error=checks.ShapeError
    )
    logits = logits.astype(accumulator(logits.dtype))
    mean = jnp.mean(logits, axis=-1)
    centred = logits - mean[..., None]
    # A constant to derivatives, since z does not change with it. Squares of larger or smaller logits leave the range.
    unit = jax.lax.stop_gradient(jnp.max(jnp.abs(centred), axis=-1))
    unit = jnp.where(unit == 0, 1, unit)
    centred = centred / unit[..., None]
    outside = labels_outside(jnp.asarray(labels), sizes["D"])
    above = jnp.take_along_axis(centred, outside[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    return _loss("spherical_z_loss", above, jnp.mean(jnp.square(centred), axis=-1), mean / unit, a, b)


def spherical_z_loss_from_statistics(
    chosen: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    *,
    a: float | jax.Array = 1.0,
    b: float | jax.Array = 0.0,
) -> jax.Array:
    """The loss of `spherical_z_loss` from the three numbers that it depends on.

    Mean and variance stand for the sums s = D μ and q = D (σ² + μ²) of the logits and of their squares in the paper;
    unlike q, σ² loses no digits where logits share an offset.

    Args:
      chosen: [*B] logit of the label, floating-point.
      mean: [*B] mean of the D logits.
      variance: [*B] their variance, divided by D.
      a: as in `spherical_z_loss`.
      b: as in `spherical_z_loss`.

    Returns:
      [*B] losses, at least float32.

    Raises:
      ShapeError: arrays of different shapes.
      DtypeError: an array that is not floating-point.
      ValueError: a <= 0.

    Cost: a few operations an example.

    Numerics: as `spherical_z_loss`; a variance that rounding has made negative counts as 0. So does one that has
    underflowed; one that has overflowed gives NaN. `spherical_z_loss` has the whole range.

    Source: as `spherical_z_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = spherical_z_loss_from_statistics(jnp.array([3.0]), jnp.array([0.6]), jnp.array([1.44]))
      >>> print(f"{float(loss[0]):.4f}")
      0.1269
    """
    function = "spherical_z_loss_from_statistics"
    checks.arrays(function, chosen=chosen, mean=mean, variance=variance)
    checks.dtype(function, "floating", chosen=chosen, mean=mean, variance=variance)
    checks.shape(function, chosen=(chosen, "*B"), mean=(mean, "*B"), variance=(variance, "*B"))
    wide = accumulator(chosen.dtype)
    mean = mean.astype(wide)
    return _loss(function, chosen.astype(wide) - mean, variance.astype(wide), mean, a, b)


def labels_outside(labels: jax.Array, classes: int) -> jax.Array:
    """Labels with the negative ones, which would be counted from the end, sent beyond the last class."""
    # A short dtype need not hold the number of classes.
    wide = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    return jnp.where(wide < 0, classes, wide)


def _loss(
    function: str,
    above: jax.Array,
    variance: jax.Array,
    mean: jax.Array,
    a: float | jax.Array,
    b: float | jax.Array,
) -> jax.Array:
    checks.number(function, "a", lambda a: a > 0, "be greater than 0", a)
    # A comparison with NaN is false: what is not finite goes the ordinary way, and shows. So does a label outside.
    flat = jnp.sqrt(jnp.maximum(variance, 0)) <= 4 * jnp.finfo(variance.dtype).eps * jnp.abs(mean)
    flat &= ~jnp.isnan(above)
    known = jnp.where(jnp.isinf(variance), jnp.nan, jnp.where(flat, 1.0, variance))
    z = jnp.where(flat, 0.0, above / jnp.sqrt(known))
    return jax.nn.softplus(a * (b - z)) / a
