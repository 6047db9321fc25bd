"""The fast Walsh-Hadamard transform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import checks

_BLOCK = 32


def fwht(x: jax.Array, *, axis: int = -1, normalize: bool = False) -> jax.Array:
    """The Walsh-Hadamard transform H x along an axis, without the matrix.

    H_1 = 1, H_2L = [[H_L, H_L], [H_L, -H_L]]: the order of Sylvester, which is that of `scipy.linalg.hadamard`. H is
    symmetric and H H = L I, so that H / sqrt(L) is its own inverse, and the transform its own adjoint.

    Args:
      x: floating-point or complex; its length L along `axis` is a power of two.
      axis: the axis that is transformed.
      normalize: divide by sqrt(L).

    Returns:
      Array of the shape and dtype of x.

    Raises:
      ShapeError: no such axis, or a length that is not a power of two. DtypeError: x is of integers.

    Cost: 32 L multiplications by ±1 as a matrix product, then 2 L additions each four-fold step, log4(L / 32) of them;
      the memory of two copies of x. A derivative costs as much.

    Numerics: sums in at least float32; whole numbers below 2^24 / L are exact there. A NaN fills its line. Divides
      first, so that the normalised transform overflows for no input that the result does not.

    Derivatives: of every order and mode.

    Source: B. Fino, V. Algazi, "Unified matrix treatment of the fast Walsh-Hadamard transform", IEEE Trans. Comput.
      C-25, 1976.

    Example:
      >>> import jax.numpy as jnp
      >>> print(fwht(jnp.array([1.0, 0, 1, 0, 0, 1, 1, 0])).astype(int).tolist())
      [4, 2, 0, -2, 0, 2, 0, 2]
    """
    checks.arrays("fwht", x=x)
    x = jnp.asarray(x)
    checks.dtype("fwht", "inexact", x=x)
    inside = -x.ndim <= axis < x.ndim
    checks.value("fwht", "axis", inside, f"be an axis of `x` {x.shape}", axis, error=checks.ShapeError)
    size = x.shape[axis]
    remedy = "Pad it with zeros by jnp.pad."
    wanted = f"have a power of two along axis {axis}"
    checks.value("fwht", "x", size > 0 and size & (size - 1) == 0, wanted, size, remedy, checks.ShapeError)
    y = jnp.moveaxis(x, axis, -1).astype(accumulator(x.dtype))
    y = _transform(y / size**0.5 if normalize else y)
    return jnp.moveaxis(y, -1, axis).astype(x.dtype)


@jax.jit
def _transform(x: jax.Array) -> jax.Array:
    """H x along the last axis: a product with the matrix of the shortest blocks, then butterflies.

    Neighbours a short way apart make poor vectors, and a product of 32 adds no slower than the processor reads. The
    butterflies are four-fold where they can be: half of the passes of two-fold ones, in reverse mode too.
    """
    *lead, size = x.shape
    half = min(size, _BLOCK)
    rows = jnp.arange(half)
    hadamard = 1 - 2 * (jax.lax.population_count(rows[:, None] & rows) % 2)
    blocks = x.reshape(*lead, size // half, half)
    x = jnp.matmul(blocks, hadamard.astype(x.dtype), precision=jax.lax.Precision.HIGHEST).reshape(x.shape)
    while half < size:
        fold = 4 if 4 * half <= size else 2
        parts = x.reshape(*lead, size // (fold * half), fold, half)
        a, b = parts[..., 0, :] + parts[..., 1, :], parts[..., 0, :] - parts[..., 1, :]
        if fold == 4:
            c, d = parts[..., 2, :] + parts[..., 3, :], parts[..., 2, :] - parts[..., 3, :]
            butterflies = [a + c, b + d, a - c, b - d]
        else:
            butterflies = [a, b]
        x = jnp.stack(butterflies, axis=-2).reshape(*lead, size)
        half *= fold
    return x
