"""Simple RMS norm: what TransNormer puts in the place of the denominator of linear attention."""

from __future__ import annotations

import jax

from jaxnum.sequence import layer
from kernels_pallas import checks


def srmsnorm(x: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """Divide by the root mean square along the last axis: x / sqrt(mean(x^2) + eps), without a weight.

    Args:
      x: [..., D], floating point. TransNormer norms the heads of a token together: [..., heads * dim].
      eps: >= 0, of the mean.

    Returns:
      [..., D] in the dtype of x.

    Raises:
      DtypeError: x is not floating-point.
      ValueError: eps is negative.

    Numerics: the mean in float32 at least. At x = 0 the result is 0 and the derivative eps ** -0.5.

    Source: Z. Qin et al., "The devil in linear transformer", 2022, arXiv 2210.10340; Z. Qin et al., "TransNormerLLM",
      2023, arXiv 2307.14995, equation 9.

    Example:
      >>> import jax.numpy as jnp
      >>> srmsnorm(jnp.array([3.0, -3.0, 3.0, 3.0]), eps=0.0).tolist()
      [1.0, -1.0, 1.0, 1.0]
    """
    checks.dtype("srmsnorm", "floating", x=x)
    layer.check_eps("srmsnorm", eps)
    return layer.rms_norm(x, eps=eps)
