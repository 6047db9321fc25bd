"""Random maps from n rows to a few that keep the norms of a subspace.

Cost: gaussian n d rows; srht n d log2(n); countsketch n d. Source: Woodruff 2014.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas import checks

KINDS = ("gaussian", "srht", "countsketch")


def sketch(key: jax.Array, A: jax.Array, rows: int, *, kind: str = "srht") -> jax.Array:
    """S A for a random S [rows, n] with E S^T S = I. The same key, n, rows and kind give the same S.

    All ||S A x|| are within 1 +- eps of ||A x|| with fixed probability, for A with d columns, when `rows` is about
    d / eps^2 (gaussian), d log(d) / eps^2 (srht), d^2 / eps^2 (countsketch; on matrices without heavy rows far fewer).

    Args:
      key: a PRNG key.
      A: [n] or [n, d], floating point.
      rows: Python int >= 1.
      kind: "gaussian": independent normal entries. "srht": random signs, a Walsh-Hadamard transform over n padded to
        a power of two, rows drawn without replacement. "countsketch": every row of A is added to one of S A, with a
        random sign.

    Returns:
      [rows] or [rows, d].

    Raises:
      ShapeError, DtypeError: A is not a real vector or matrix. ValueError: rows below 1, an unknown kind, or more rows
        than the transform of "srht" has.

    Cost: memory rows n for gaussian, 2 n d for srht, n d for countsketch.

    Source: Woodruff, "Sketching as a tool for numerical linear algebra" (2014), theorems 2.3, 2.4 and 2.5.

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> jaxnum.solvers.sketch(jax.random.key(0), jnp.ones((1000, 3)), 20).shape
      (20, 3)
    """
    checks.arrays("sketch", A=A)
    A = jnp.asarray(A)
    checks.shape("sketch", A=(A, "N" if A.ndim == 1 else "N D"))
    checks.dtype("sketch", "floating", A=A)
    checks.choice("sketch", "kind", kind, KINDS)
    ok = isinstance(rows, int) and not isinstance(rows, bool) and rows >= 1
    checks.value("sketch", "rows", ok, "be a Python int >= 1", rows)
    n = _transform_rows(A)
    remedy = "A transform of n rows has no more; sketch fewer."
    checks.value("sketch", "rows", kind != "srht" or rows <= n, f"be at most {n} for srht", rows, remedy)
    return _made(key, A, rows, kind)


@partial(jax.jit, static_argnames=("rows", "kind"))
def _made(key: jax.Array, A: jax.Array, rows: int, kind: str) -> jax.Array:
    matrix = A.reshape(A.shape[0], -1)
    made = {"gaussian": _gaussian, "srht": _srht, "countsketch": _countsketch}[kind](key, matrix, rows)
    return made.reshape(rows, *A.shape[1:])


def _gaussian(key: jax.Array, A: jax.Array, rows: int) -> jax.Array:
    S = jax.random.normal(key, (rows, A.shape[0]), A.dtype)
    return jnp.matmul(S, A, precision="highest") / jnp.asarray(rows, A.dtype) ** 0.5


def _srht(key: jax.Array, A: jax.Array, rows: int) -> jax.Array:
    n = _transform_rows(A)
    signs_key, rows_key = jax.random.split(key)
    signs = jax.random.rademacher(signs_key, (A.shape[0], 1), A.dtype)
    x = jnp.pad(A * signs, ((0, n - A.shape[0]), (0, 0)))
    half = 1
    while half < n:
        pairs = x.reshape(n // (2 * half), 2, half, -1)
        x = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(n, -1)
        half *= 2
    drawn = jax.random.choice(rows_key, n, (rows,), replace=False)
    return x[drawn] / jnp.asarray(rows, A.dtype) ** 0.5


def _transform_rows(A: jax.Array) -> int:
    """The next power of two."""
    return 1 << (A.shape[0] - 1).bit_length()


def _countsketch(key: jax.Array, A: jax.Array, rows: int) -> jax.Array:
    signs_key, rows_key = jax.random.split(key)
    signs = jax.random.rademacher(signs_key, (A.shape[0], 1), A.dtype)
    place = jax.random.randint(rows_key, (A.shape[0],), 0, rows)
    return jax.ops.segment_sum(A * signs, place, num_segments=rows)
