"""The one function that every test takes its tolerances from."""

import math

import jax.numpy as jnp


def tolerance(dtype, size: int = 1, *, condition: float = 1.0) -> float:
    """Relative error that `size` accumulated operations at this dtype may leave: 8 eps sqrt(size) condition.

    Rounding errors of a reduction over `size` terms grow like a random walk; `condition` is what the problem
    multiplies them by (condition number, number of passes). bf16 results come from float32 accumulation, so
    their error is one rounding of the result and does not grow with `size`.
    """
    dtype = jnp.dtype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    if dtype.itemsize < 4:
        return 4.0 * eps * condition
    return 8.0 * eps * math.sqrt(max(size, 1)) * condition
