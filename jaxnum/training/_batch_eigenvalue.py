"""What sampling a batch does to an eigenvalue of the Hessian, by the theory of spiked random matrices."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import checks


class BatchEigenvalue(NamedTuple):
    """What `batch_eigenvalue` returns."""

    value: jax.Array  # where the batch's Hessian has it
    overlap: jax.Array  # in [0, 1], squared cosine between its eigenvector there and the true one


def batch_eigenvalue(
    eigenvalue: float | jax.Array,
    noise: float | jax.Array,
    batch_size: float | jax.Array,
    *,
    num_examples: float | jax.Array | None = None,
) -> BatchEigenvalue:
    """Where an outlying eigenvalue of the Hessian lies in the Hessian of a batch.

    The batch's Hessian is the full one plus noise, modelled as a symmetric matrix of independent entries of variance
    σ² / b, P x P, with b = B, or b = B / (1 - B / N) for batches drawn without replacement. With s = P σ² / b and an
    eigenvalue λ apart from the rest of the spectrum, for large P

        λ -> λ + s / λ              with overlap 1 - s / λ²    where |λ| > sqrt(s),
        λ -> ± 2 sqrt(s)            with overlap 0             elsewhere: it is lost in the noise.

    A batch's largest eigenvalue is therefore too large, and the larger the smaller the batch: of rates from different
    batch sizes compare what `batch_learning_rate` says. At B = P σ² / λ² the outlier leaves the noise.

    Args:
      eigenvalue: λ, real, of the full Hessian.
      noise: P σ² >= 0, as of `hessian_noise`.
      batch_size: B >= 1.
      num_examples: N >= B of which batches are drawn without replacement; None for replacement, or endless data.

    Returns:
      A `BatchEigenvalue` in the broadcast shape of the arguments.

    Raises:
      ValueError: a single number out of range, unless traced.

    Cost: a few operations.

    Numerics: in the dtype of the arguments. NaN stays NaN.

    Source: D. Granziol, S. Zohren, S. Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix Theory
      Approach to Neural Network Training", 2022, arXiv 2006.09092, theorem 1; the overlap from F. Benaych-Georges,
      R. R. Nadakuditi, "The eigenvalues and eigenvectors of finite, low rank perturbations of large random matrices",
      2011.

    Example:
      >>> print(*(f"{x:.3f}" for x in batch_eigenvalue(6.0, noise=96.0, batch_size=16)))
      7.000 0.833
    """
    s = sampled("batch_eigenvalue", noise, batch_size, num_examples)
    eigenvalue = jnp.asarray(eigenvalue)
    size = jnp.abs(eigenvalue)
    outside = size > jnp.sqrt(s)
    divisor = jnp.where(outside, eigenvalue, 1)
    # Not a plain sign, which is 0 at 0; it keeps NaN.
    sign = jnp.where(eigenvalue == 0, 1, jnp.sign(eigenvalue))
    # The root of 0 has no derivative, not even where another branch counts.
    edge = 2 * jnp.sqrt(jnp.where(outside, 1, s))
    value = jnp.where(outside, eigenvalue + s / divisor, sign * edge)
    overlap = jnp.where(outside, 1 - s / divisor / divisor, 0 * (size + s))
    return BatchEigenvalue(value, overlap)


def sampled(function: str, noise: Any, batch_size: Any, num_examples: Any) -> jax.Array:
    """Check what describes the sampling, and return P σ² / b."""
    at_least(function, "noise", noise, 0)
    at_least(function, "batch_size", batch_size, 1)
    if not checks.traced(batch_size) and jnp.size(batch_size) == 1:
        at_least(function, "num_examples", num_examples, np.asarray(batch_size).item(), "`batch_size`")
    share = 1 / batch_size if num_examples is None else 1 / batch_size - 1 / num_examples
    return jnp.asarray(noise * share)


def at_least(function: str, argument: str, given: Any, least: Any, words: str = "") -> None:
    """Check a number; NaN in an array, which somebody measured, passes and shows in the result."""
    measured = not isinstance(given, float)
    inside = lambda x: x >= least or (measured and x != x)  # noqa: E731
    checks.number(function, argument, inside, f"be at least {words or least}", given)
