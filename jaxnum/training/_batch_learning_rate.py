"""The largest stable learning rate as a function of batch size."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnum.training import _batch_eigenvalue
from kernels_pallas import checks


def batch_learning_rate(
    eigenvalue: float | jax.Array,
    noise: float | jax.Array,
    batch_size: float | jax.Array,
    *,
    num_examples: float | jax.Array | None = None,
) -> jax.Array:
    """The largest stable learning rate of SGD with batches of a size.

    It is two over the eigenvalue that a batch shows, continued below the noise:

        η = 2 / (|λ| + s / |λ|),  s = P σ² / b,  b = B or B / (1 - B / N):

    linear in B while s > λ², level at 2 / |λ| beyond; the bend is at b = P σ² / λ². Where the outlier is lost in the
    noise, at s > λ², the model itself (`batch_eigenvalue`) has the smaller 2 sqrt(s), so that this rate is the more
    careful one: the linear law holds where a single example's curvature decides, which independent entries do not
    model. `noise` is an order of magnitude there, and best fitted to two rates found by trial.

    Args:
      eigenvalue: λ, real, the one of largest magnitude of the full Hessian.
      noise: P σ² >= 0, as of `hessian_noise`.
      batch_size: B >= 1.
      num_examples: N >= B of which batches are drawn without replacement; None for replacement, or endless data.

    Returns:
      η in the broadcast shape of the arguments.

    Raises:
      ValueError: a single number out of range, unless traced.

    Cost: a few operations.

    Numerics: in the dtype of the arguments. NaN stays NaN; no curvature and no noise give NaN, too.

    Source: D. Granziol, S. Zohren, S. Roberts, 2022, arXiv 2006.09092, section 5.

    Example:
      >>> import jax.numpy as jnp
      >>> rates = batch_learning_rate(2.0, noise=40.0, batch_size=jnp.array([1, 10, 1000]))
      >>> print(*(f"{rate:.3f}" for rate in rates))
      0.091 0.500 0.990
    """
    s = _batch_eigenvalue.sampled("batch_learning_rate", noise, batch_size, num_examples)
    size = jnp.abs(jnp.asarray(eigenvalue))
    none = size == 0
    # Not size**2, which overflows and vanishes too early.
    bent = 2 / (size + s / jnp.where(none, 1, size))
    return jnp.where(none, 2 * size / jnp.where(none, s, 1), bent)


def rescale_batch_learning_rate(
    learning_rate: float | jax.Array,
    old_size: float | jax.Array,
    new_size: float | jax.Array,
    *,
    optimizer: str = "sgd",
    eigenvalue: float | jax.Array | None = None,
    noise: float | jax.Array | None = None,
    num_examples: float | jax.Array | None = None,
) -> jax.Array:
    """A learning rate that was good at one batch size, for another.

    For SGD it is multiplied by the ratio r of the two `batch_learning_rate`, or r = new_size / old_size where the
    curvature is not known and noise is taken to dominate; for Adam and its relatives by sqrt(r), as dividing by the
    root of squared gradients takes the root of the curvature that noise adds. Weight decay that is multiplied with
    the rate, as in `optax.adamw`, changes with it; a decay of its own does not.

    Args:
      learning_rate: at least 0.
      old_size: at least 1, the batch size it was found at.
      new_size: at least 1.
      optimizer: "sgd" or "adam".
      eigenvalue: as of `batch_learning_rate`; given with `noise` or not at all.
      noise: likewise.
      num_examples: likewise, optional.

    Returns:
      The new rate.

    Raises:
      ValueError: a single number out of range, unless traced; an unknown optimizer; one of eigenvalue and noise without
        the other.

    Cost: a few operations.

    Numerics: as `batch_learning_rate`.

    Source: D. Granziol, S. Zohren, S. Roberts, 2022, arXiv 2006.09092, section 5; the root of the saturating ratio
      is ours.

    Example:
      >>> print(f'{rescale_batch_learning_rate(1e-3, 64, 256, optimizer="adam"):.4f}')
      0.0020
    """
    name = "rescale_batch_learning_rate"
    checks.choice(name, "optimizer", optimizer, ("sgd", "adam"))
    paired = (eigenvalue is None) == (noise is None)
    checks.value(name, "noise", paired, "be given with `eigenvalue` or not at all", noise, "See hessian_noise.")
    for argument, given, least in (
        ("learning_rate", learning_rate, 0),
        ("old_size", old_size, 1),
        ("new_size", new_size, 1),
    ):
        _batch_eigenvalue.at_least(name, argument, given, least)
    if eigenvalue is None or noise is None:
        ratio = jnp.asarray(new_size / old_size)
    else:
        new, old = (
            batch_learning_rate(eigenvalue, noise, size, num_examples=num_examples) for size in (new_size, old_size)
        )
        ratio = new / old
    return learning_rate * (ratio if optimizer == "sgd" else jnp.sqrt(ratio))
