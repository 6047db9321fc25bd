"""Gradient coding: each worker sends one combination of a few chunks' gradients, and most workers' are enough."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core.precision import accumulator
from jaxnum.curvature import arguments
from jaxnum.training import codes
from jaxnum.training.coding import CodingScheme, boolean, integers
from kernels_pallas import checks

PyTree = Any


class GradientCode(NamedTuple):
    """A code of `gradient_coding`."""

    matrix: np.ndarray  # [n, n] float64, row i the weights of the chunks in the result of worker i
    stragglers: int  # s, workers whose results may be missing
    kind: str


def gradient_coding(
    workers: int, stragglers: int, *, kind: str = "cyclic", key: jax.Array | None = None
) -> GradientCode:
    """A code for n workers of which any s may fail to answer.

    The data are in n chunks. Worker i sends sum_j B_ij g_j over s + 1 chunks, so that each chunk is computed s + 1
    times, the least that survives s failures; the rows of any n - s workers span the row of ones:

    - "cyclic": chunks i..i+s (mod n). Rows are in the null space of a random s x n matrix H whose rows sum to 0:
      B_ii = 1, B_i,i+1..i+s = -H_i+1..i+s^-1 H_i.
    - "roots": the same chunks; rows are the coefficients of a polynomial with s neighbouring n-th roots of unity around
      -1. Where n - s is even these do not come in conjugate pairs: the roots of x^n = -1 do, and columns are divided by
      a positive word of that code. Rows are real in both cases.
    - "fractional": s + 1 must divide n; groups of s + 1 workers compute the same sum of s + 1 chunks.

    A piece is the gradient of the weighted loss sum_j B_ij loss_j: one backward pass.

    Args:
      workers: n >= 1.
      stragglers: s in [0, n - 1]. 0 is the uncoded identity.
      kind: one of the three.
      key: typed random key for "cyclic"; None takes a fixed one, since almost any draw serves.

    Returns:
      A `GradientCode`, on the host.

    Raises:
      ValueError: a number out of range; s + 1 does not divide n for "fractional"; a "roots" code that float64 cannot
        decode.
      DtypeError: a `key` that is not typed.

    Cost: n solves of s equations.

    Numerics: in float64. Rounding errors of the results grow by sum_i |a_i B_ij| on decoding: 1 for "fractional"; for
    (n, s) = (8, 2) at worst 10 for "roots" and 4e3 for "cyclic". For (64, 6) it is 2e4 for most patterns of "roots" and
    2e6 for neighbours that fail together; for "cyclic" 4e2 for most, but 3e4 for one in a hundred and 5e5 for the worst
    of 3,000 random patterns, with other keys up to 4e6. For (256, 27) "cyclic" has 3e4 for most and 2e6 for the worst
    of 60. In float32 take "fractional", or "roots" for few workers.

    Source: R. Tandon, Q. Lei, A. Dimakis, N. Karampatziakis, "Gradient Coding", 2017, arXiv 1612.03301, algorithms 1
    and 2; roots of unity: N. Raviv, I. Tamo, R. Tandon, A. Dimakis, "Gradient Coding from Cyclic MDS Codes and Expander
    Graphs", 2018, arXiv 1707.03858. The real code for even n - s is ours.

    Example:
      >>> import numpy as np, jax.numpy as jnp
      >>> code = gradient_coding(4, 1, kind="fractional")
      >>> results = gradient_coding_encode(code.matrix, jnp.array([1.0, 2.0, 3.0, 4.0]))
      >>> vector = gradient_coding_vector(code, np.array([False, True, True, True]))
      >>> print(results.tolist(), vector.tolist(), float(gradient_coding_decode(vector, results)))
      [3.0, 3.0, 7.0, 7.0] [0.0, 1.0, 1.0, 0.0] 10.0
    """
    name = "gradient_coding"
    (n,) = integers(name, dict(workers=(workers, 1, 2**16)))
    (s,) = integers(name, dict(stragglers=(stragglers, 0, n - 1)))
    check_code(name, "stragglers", n, s, kind, key)
    if kind == "fractional":
        matrix = np.kron(np.eye(n // (s + 1)), np.ones((s + 1, s + 1)))
    elif s == 0:
        matrix = np.eye(n)
    elif kind == "cyclic":
        matrix = codes.random_rows(n, s, jax.random.key(0) if key is None else key)
    else:
        matrix = codes.roots_of_unity(n, s)
        # Neighbours that fail together are the hardest.
        worst = max(codes.error(matrix, np.roll(np.arange(n) >= s, shift)) for shift in (0, n // 2))
        wanted = f"be fewer for {workers} workers and kind='roots', whose errors reach {worst:.0e}"
        checks.value(name, "stragglers", worst < 1e-9, wanted, s, "Take kind='cyclic'.")
    return GradientCode(matrix, s, kind)


def gradient_coding_encode(matrix: Any, gradients: PyTree) -> PyTree:
    """What workers send: combinations of the chunks' gradients.

    Args:
      matrix: [p, k] weights, `code.matrix`, or some of its rows, or the block of it that one worker needs.
      gradients: tree of [k, ...], a gradient for each chunk, floating-point.

    Returns:
      A tree of [p, ...].

    Raises:
      ShapeError, DtypeError: gradients without the axis of chunks, or not floating-point.

    Cost: a matrix product, for all chunks and workers; jit-able.

    Numerics: sums in at least float32, at full precision on TPU. A gradient that is inf or NaN makes every result NaN,
    weights of 0 included.

    Source: as `gradient_coding`.

    Example:
      >>> import jax.numpy as jnp
      >>> gradient_coding_encode(jnp.array([[1.0, 0.5]]), {"w": jnp.array([[2.0], [4.0]])})["w"].tolist()
      [[4.0]]
    """
    chunks = checks.shape("gradient_coding_encode", matrix=(matrix, "P K"))["K"]
    return _combine("gradient_coding_encode", "gradients", matrix, gradients, chunks)


def gradient_coding_vector(code: GradientCode, alive: Any) -> np.ndarray:
    """The weights that decode the results of those workers that answered: a with a^T B = 1^T.

    Args:
      code: of `gradient_coding`.
      alive: [n] bool, concrete, the workers that answered.

    Returns:
      float64 [n], 0 for the others. It depends on no data: keep those of patterns that come again.

    Raises:
      ValueError: more than s workers are missing, or, for "fractional", whole groups are; the code is too
        ill-conditioned for this pattern.
      ShapeError, DtypeError: `alive` is not [n] bool.

    Cost: a least-squares problem of n equations; a search for "fractional".

    Numerics: float64, of least norm. Refused where a^T B is off 1 by more than 1e-6.

    Source: as `gradient_coding`, algorithm 1; solved for the pattern at hand instead of tabulated.

    Example:
      >>> import numpy as np
      >>> code = gradient_coding(3, 1)
      >>> vector = gradient_coding_vector(code, np.array([True, False, True]))
      >>> print(np.allclose(vector @ code.matrix, 1), float(vector[1]))
      True 0.0
    """
    name = "gradient_coding_vector"
    alive = boolean(name, "alive", alive, len(code.matrix))
    if code.kind == "fractional":
        wanted = f"have one of each {code.stragglers + 1} workers that share their chunks"
    else:
        wanted = f"have at least {len(alive) - code.stragglers} of {len(alive)} workers"
    ok = bool(codes.decodable(code.stragglers, code.kind, alive))
    checks.value(name, "alive", ok, wanted, f"{alive.sum()}", "Wait for more, or take a code for more stragglers.")
    if code.kind == "fractional":
        groups = alive.reshape(-1, code.stragglers + 1)
        first = np.arange(code.stragglers + 1) == groups.argmax(axis=1)[:, None]
        return first.astype(np.float64).ravel()
    vector = codes.solve(code.matrix, alive)
    error = float(np.abs(vector @ code.matrix - 1).max())
    remedy = "Take kind='fractional', another key or fewer stragglers."
    checks.value(name, "code", error < 1e-6, "be well conditioned for this pattern", f"an error of {error:.0e}", remedy)
    return vector


def gradient_coding_decode(vector: Any, results: PyTree) -> PyTree:
    """The sum of all chunks' gradients from the results that came.

    Args:
      vector: [p] of `gradient_coding_vector`, or of a scheme's `vector`.
      results: tree of [p, ...]; rows of weight 0 may hold anything, NaN included.

    Returns:
      A tree of [...]: the sum over chunks, the mean times the number of chunks where they are of one size.

    Raises:
      ShapeError, DtypeError: results without the axis of pieces, or not floating-point.

    Cost: one pass; jit-able, one program for all patterns.

    Numerics: sums in at least float32. A result of nonzero weight that is inf or NaN shows.

    Source: as `gradient_coding`.

    Example:
      >>> import jax.numpy as jnp
      >>> float(gradient_coding_decode(jnp.array([2.0, 0.0, -1.0]), jnp.array([3.0, jnp.nan, 1.0])))
      5.0
    """
    pieces = checks.shape("gradient_coding_decode", vector=(vector, "P"))["P"]
    used = jnp.asarray(vector) != 0

    def passed_over(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return jnp.where(used.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, 0)

    _check_rows("gradient_coding_decode", "results", results, pieces)
    masked = jax.tree.map(passed_over, results)
    summed = _combine("gradient_coding_decode", "results", jnp.asarray(vector)[None], masked, pieces)
    return jax.tree.map(lambda leaf: leaf[0], summed)


def gradient_coding_scheme(
    workers: int, stragglers: int, *, kind: str = "cyclic", key: jax.Array | None = None
) -> CodingScheme:
    """Gradient coding as a scheme of one round a job: load (s + 1) / n, no delay.

    Args, raises and source: see `gradient_coding`. With s = 0 it is the uncoded scheme, which waits for everybody.

    Args:
      workers: n >= 1.
      stragglers: s.
      kind: as there.
      key: as there.

    Returns:
      A `CodingScheme` with n chunks and n pieces; it tolerates any s stragglers in every round.

    Raises:
      ValueError: as there, when the code is first needed.

    Cost: the code is made when its encoding or a decoding vector is first asked for.

    Source: as `gradient_coding`.

    Example:
      >>> scheme = gradient_coding_scheme(4, 1, kind="fractional")
      >>> state, done = scheme.observe(scheme.init(jobs=5), [True, True, False, True])
      >>> print(scheme.load, [(job, scheme.vector(delivered).tolist()) for job, delivered in done])
      0.5 [(0, [1.0, 0.0, 0.0, 1.0])]
    """
    (n,) = integers("gradient_coding_scheme", dict(workers=(workers, 1, 2**16)))
    (s,) = integers("gradient_coding_scheme", dict(stragglers=(stragglers, 0, n - 1)))
    code = lazy_code("gradient_coding_scheme", "stragglers", n, s, kind, key)
    own = np.arange(n)
    return CodingScheme(
        name="gradient_coding_scheme",
        workers=n,
        load=(s + 1) / n,
        delay=0,
        units=np.ones(n, np.int64),
        encoding=lambda: code().matrix,
        vector=lambda delivered: gradient_coding_vector(code(), delivered),
        assign=lambda delivered: (own, np.zeros(n, np.int64), own),
        decodable=lambda delivered: codes.decodable(s, kind, delivered),
    )


def check_code(function: str, argument: str, n: int, s: int, kind: str, key: Any) -> None:
    """Check what a code for n and s is made of; `argument` is what s is called."""
    checks.choice(function, "kind", kind, codes.KINDS)
    if key is not None:
        arguments.typed_key(function, key)
        checks.value(function, "key", not checks.traced(key), "be concrete", "a traced key", "Make codes outside jit.")
    wanted = f"lead to groups of workers that divide {n} for kind='fractional'"
    ok = kind != "fractional" or n % (s + 1) == 0
    checks.value(function, argument, ok, wanted, f"groups of {s + 1}", "Take kind='cyclic'.")


def lazy_code(function: str, argument: str, n: int, s: int, kind: str, key: Any) -> Callable[[], GradientCode]:
    """Check as `check_code` and return a function that makes the code when first called; simulations never do."""
    check_code(function, argument, n, s, kind, key)
    return functools.cache(lambda: gradient_coding(n, s, kind=kind, key=key))


def _check_rows(function: str, argument: str, tree: PyTree, rows: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        at = argument + jax.tree_util.keystr(path)
        checks.dtype(function, "inexact", **{at: leaf})
        remedy = "The first axis of every leaf is that of chunks or pieces."
        checks.shape(function, remedy=remedy, **{at: (leaf, f"{rows} *_")})


def _combine(function: str, argument: str, matrix: Any, tree: PyTree, rows: int) -> PyTree:
    """Rows of the matrix times the first axis of each leaf."""
    _check_rows(function, argument, tree, rows)

    def leaf(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        wide = accumulator(x.dtype)
        weights = jnp.asarray(matrix, jnp.finfo(wide).dtype).astype(wide)
        return jnp.tensordot(weights, x.astype(wide), axes=1, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)

    return jax.tree.map(leaf, tree)
