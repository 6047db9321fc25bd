"""Matrices as operators: sparse ones converted once on the host to diagonals or padded columns.

XLA's own sparse products scatter and are several times slower than scipy's on a CPU. Both formats here are sums of
vectors of length n, which XLA fuses into one loop: DIA reads v at shifted places, ELL at places it looks up.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core import trees
from kernels_pallas import checks

__all__ = ["DiaOperator", "EllOperator", "Operator", "apply", "check_symmetric", "is_sparse", "sparse_operator"]

PyTree = Any

# Unrolled columns become so many terms of one fused loop; wider slices are reduced along an axis instead.
_UNROLL = 64
_SLICES = 6
_MOST_DIAGONALS = 64
# What a format may store in vain, relative to what it must store, before the next one is tried.
_SLACK = 1.3


class Operator:
    """A linear map on vectors, given by arrays; a registered dataclass inherits it."""

    shape: tuple[int, int]
    dtype: Any

    def matvec(self, v: jax.Array) -> jax.Array:
        """A v for v [m]."""
        raise NotImplementedError


class _Sparse(Operator):
    """What the sparse formats share: how they describe themselves."""

    def _stored(self) -> list[jax.Array]:
        raise NotImplementedError

    def _layout(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        name, size = type(self).__name__, " x ".join(map(str, self.shape))
        try:
            stored = sum(int(leaf.size) for leaf in self._stored())
            entries = sum(int(np.count_nonzero(leaf)) for leaf in self._stored())
        except (AttributeError, TypeError, jax.errors.TracerArrayConversionError):
            return f"{name}({size}, {self._layout()})"
        ratio = f"{stored / max(entries, 1):.2f} stored for each"
        return f"{name}({size}, {self.dtype}, {self._layout()}, {entries} entries, {ratio})"


@partial(jax.tree_util.register_dataclass, data_fields=["diagonals"], meta_fields=["offsets", "asymmetric"])
@dataclass(frozen=True, repr=False)
class DiaOperator(_Sparse):
    """A square matrix by its diagonals: A[i, i + offsets[d]] = diagonals[d, i].

    Attributes:
      diagonals: values [d, n], zero where i + offset leaves the matrix; differentiable.
      offsets: increasing tuple of d ints, static.
      asymmetric: whether the matrix it was made of differs from its conjugate transpose, static.
    """

    diagonals: jax.Array
    offsets: tuple[int, ...]
    asymmetric: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        n = self.diagonals.shape[-1]
        return (n, n)

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.diagonals.dtype

    def matvec(self, v: jax.Array) -> jax.Array:
        """A v for v [n]; jax.vmap for several."""
        n = self.shape[0]
        checks.shape("DiaOperator.matvec", remedy="Use jax.vmap for several vectors.", v=(v, f"{n}"))
        before, after = max(0, -min(self.offsets, default=0)), max(0, max(self.offsets, default=0))
        # Otherwise XLA pads anew, with a test of bounds at every entry, inside the sum.
        padded = jax.lax.optimization_barrier(jnp.pad(v, (before, after)))
        terms = (
            row * jax.lax.slice(padded, (before + k,), (before + k + n,))
            for row, k in ((self.diagonals[d], k) for d, k in enumerate(self.offsets))
        )
        return sum(terms, jnp.zeros((), v.dtype))

    def diagonal(self) -> jax.Array:
        """The main diagonal [n]."""
        return self.diagonals[self.offsets.index(0)] if 0 in self.offsets else jnp.zeros_like(self.diagonals[0])

    def _stored(self) -> list[jax.Array]:
        return [self.diagonals]

    def _layout(self) -> str:
        return f"{len(self.offsets)} diagonals"


@partial(
    jax.tree_util.register_dataclass, data_fields=["values", "columns", "place"], meta_fields=["shape", "asymmetric"]
)
@dataclass(frozen=True, repr=False)
class EllOperator(_Sparse):
    """A matrix by padded rows, sorted by length into slices of equal width so that a few long rows cost little.

    Attributes:
      values: for each slice, values [w, k] of its k rows, w entries each; differentiable. Padding is zero.
      columns: for each slice, where they stand: int32 [w, k].
      place: None for one slice in the matrix's own order; else int32 [n], where row i stands among all slices' rows.
      shape: (n, m), static.
      asymmetric: whether the matrix it was made of differs from its conjugate transpose, static.
    """

    values: tuple[jax.Array, ...]
    columns: tuple[jax.Array, ...]
    place: jax.Array | None
    shape: tuple[int, int]
    asymmetric: bool = False

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values[0].dtype

    def matvec(self, v: jax.Array) -> jax.Array:
        """A v for v [m]; jax.vmap for several."""
        # Not left to broadcasting: n vectors at once would be scaled where they should be multiplied.
        checks.shape("EllOperator.matvec", remedy="Use jax.vmap for several vectors.", v=(v, f"{self.shape[1]}"))
        return self._joined([_slice_product(a, c, v) for a, c in zip(self.values, self.columns, strict=True)])

    def diagonal(self) -> jax.Array:
        """The main diagonal [n] of a square matrix."""
        n = self.shape[0]
        rows = jnp.arange(n, dtype=jnp.int32)
        if self.place is not None:
            rows = jnp.zeros_like(rows).at[self.place].set(rows)
        stops = np.cumsum([c.shape[1] for c in self.columns])[:-1]
        parts = [
            jnp.sum(jnp.where(columns == mine, values, 0), axis=0)
            for values, columns, mine in zip(self.values, self.columns, jnp.split(rows, stops), strict=True)
        ]
        return self._joined(parts)

    def _joined(self, parts: list[jax.Array]) -> jax.Array:
        if self.place is None:
            return parts[0]
        return jnp.concatenate(parts).at[self.place].get(mode="promise_in_bounds", unique_indices=True)

    def _stored(self) -> list[jax.Array]:
        return list(self.values)

    def _layout(self) -> str:
        return "rows of " + ", ".join(str(leaf.shape[0]) for leaf in self.values)


def _slice_product(values: jax.Array, columns: jax.Array, v: jax.Array) -> jax.Array:
    """The rows of one slice times v."""

    def read(places: jax.Array) -> jax.Array:
        return jnp.asarray(v).at[places].get(mode="promise_in_bounds")

    if values.shape[0] > _UNROLL:
        return jnp.sum(values * read(columns), axis=0)
    terms = (values[k] * read(columns[k]) for k in range(values.shape[0]))
    return sum(terms, jnp.zeros(values.shape[1:], values.dtype))


def sparse_operator(A: Any, format: str = "auto") -> Any:
    """A sparse matrix as an operator that XLA multiplies fast; done once, on the host.

    `Linear` and `linear_solve` do the same with a sparse A at every call: convert it yourself when it is used again,
    and whenever its values are to be differentiated or batched, which are leaves of the operator. The operator's repr
    reports the conversion: format, entries, and what is stored for each entry.

    Args:
      A: scipy sparse matrix or array [n, m] of any format, or a BCOO or BCSR of `jax.experimental.sparse` with concrete
        entries; floating-point or complex. Duplicates are summed.
      format: "dia" (square only), "ell", or "auto": diagonals when there are at most 64 and they hold at most 1.3
        numbers for each entry, else padded rows. Rows of very different lengths are sorted into at most six slices,
        each padded to its own longest row, at the price of one permutation of the product.

    Returns:
      A `DiaOperator` or an `EllOperator`: a pytree with `matvec(v)`, `diagonal()`, `shape` and `dtype`, linear in its
      values and transposable.

    Raises:
      TypeError: A is not sparse, or is being traced.
      DtypeError: entries that are integers.
      ValueError: another format, or "dia" of a matrix that is not square.

    Cost: O(entries) on the host. A product reads each stored number, and in ELL its column, once.

    Example:
      >>> import numpy as np, scipy.sparse as sp, jaxnum
      >>> A = sp.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(5, 5), dtype=np.float32)
      >>> jaxnum.sparse_operator(A)
      DiaOperator(5 x 5, float32, 3 diagonals, 13 entries, 1.15 stored for each)
    """
    checks.choice("sparse_operator", "format", format, ("auto", "dia", "ell"))
    rows, columns, values, shape = _entries(A)
    remedy = 'Use format="ell".'
    checks.value("sparse_operator", "A", format != "dia" or shape[0] == shape[1], "be square", shape, remedy)
    offsets = np.unique(columns - rows)
    banded = shape[0] == shape[1] and 0 < offsets.size <= _MOST_DIAGONALS
    banded = banded and offsets.size * shape[0] <= _SLACK * values.size
    if format == "dia" or (format == "auto" and banded):
        diagonals = np.zeros((max(offsets.size, 1), shape[0]), values.dtype)
        diagonals[np.searchsorted(offsets, columns - rows), rows] = values
        found = tuple(int(k) for k in offsets) or (0,)
        return DiaOperator(jnp.asarray(diagonals), found, _asymmetric(rows, columns, values, shape))
    return _ell(rows, columns, values, shape)


def _asymmetric(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> bool:
    """Whether a matrix differs from its conjugate transpose by more than rounding."""
    n, m = shape
    if n != m or values.size == 0:
        return n != m
    keys = np.concatenate([rows * m + columns, columns * m + rows])
    places, where = np.unique(keys, return_inverse=True)
    defect = np.zeros(places.size, values.dtype)
    np.add.at(defect, where, np.concatenate([values, -values.conj()]))
    return bool(np.abs(defect).max() > np.finfo(values.dtype).eps ** 0.5 * np.abs(values).max())


def is_sparse(A: Any) -> bool:
    """Whether A is a sparse matrix of scipy or of `jax.experimental.sparse`, found out without importing either."""
    theirs = sys.modules.get("jax.experimental.sparse")
    return hasattr(A, "tocsr") or (theirs is not None and isinstance(A, (theirs.BCOO, theirs.BCSR)))


def _entries(A: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """Rows, columns and values sorted by row and column without duplicates, and the shape."""
    wanted = "be a scipy sparse matrix, or a BCOO or BCSR of jax.experimental.sparse"
    checks.value("sparse_operator", "A", is_sparse(A), wanted, type(A).__name__, error=TypeError)
    checks.value("sparse_operator", "A", len(A.shape) == 2, "have two axes", A.shape, error=checks.ShapeError)
    if hasattr(A, "tocsr"):
        listed = A.tocoo()
        rows, columns, values = listed.row, listed.col, np.asarray(listed.data)
    else:
        A = A.to_bcoo() if hasattr(A, "to_bcoo") else A
        remedy = "Convert it before tracing; the operator may then be traced, batched and differentiated."
        concrete = not (checks.traced(A.data) or checks.traced(A.indices))
        checks.value("sparse_operator", "A", concrete, "be concrete", "a traced matrix", remedy, TypeError)
        plain = A.n_batch == 0 and A.n_dense == 0
        checks.value("sparse_operator", "A", plain, "have neither batch nor dense axes", A.shape)
        rows, columns = np.asarray(A.indices).T
        # BCOO pads with indices beyond the matrix.
        inside = (rows < A.shape[0]) & (columns < A.shape[1])
        rows, columns, values = rows[inside], columns[inside], np.asarray(A.data)[inside]
    checks.dtype("sparse_operator", "inexact", remedy="Use A.astype(float).", A=values)
    n, m = A.shape
    checks.value("sparse_operator", "A", n > 0 and m > 0, "have a row and a column", A.shape)
    key = rows.astype(np.int64) * m + columns
    if np.any(key[1:] <= key[:-1]):
        key, where = np.unique(key, return_inverse=True)
        summed = np.zeros(key.size, values.dtype)
        np.add.at(summed, where, values)
        values = summed
    return key // m, key % m, values, (n, m)


def _ell(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> EllOperator:
    n, m = shape
    lengths = np.bincount(rows, minlength=n)
    widths = _widths(lengths)
    slices = np.searchsorted(widths, lengths)
    order = np.argsort(slices, kind="stable")
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    depth = np.arange(rows.size) - (np.cumsum(lengths) - lengths)[rows]
    parts, first = [], 0
    for s, width in enumerate(widths):
        mine = order[first : first + np.count_nonzero(slices == s)]
        # Padding looks at the row's own unknown, so that an infinity elsewhere does not reach it.
        looked = np.tile(np.minimum(mine, m - 1), (max(width, 1), 1))
        held = np.zeros(looked.shape, values.dtype)
        here = slices[rows] == s
        at = depth[here], place[rows[here]] - first
        looked[at], held[at] = columns[here], values[here]
        parts.append((jnp.asarray(held), jnp.asarray(looked, jnp.int32)))
        first += mine.size
    kept = None if len(widths) == 1 else jnp.asarray(place, jnp.int32)
    asymmetric = _asymmetric(rows, columns, values, shape)
    return EllOperator(tuple(v for v, _ in parts), tuple(c for _, c in parts), kept, shape, asymmetric)


def _widths(lengths: np.ndarray) -> np.ndarray:
    """Widths of the slices: one if it stores little in vain, else those that store least, by dynamic programming."""
    found, counts = np.unique(lengths, return_counts=True)
    if found[-1] * lengths.size <= _SLACK * max(lengths.sum(), 1):
        return found[-1:]
    if found.size > _UNROLL:
        kept = np.unique(np.linspace(0, found.size - 1, _UNROLL).astype(int))
        counts = np.add.reduceat(counts, np.r_[0, kept[:-1] + 1])
        found = found[kept]
    upto = np.cumsum(counts)
    best, choice = found * upto, []
    for _ in range(_SLICES - 1):
        # Either no further slice below i, or the last of the slices below ends at j.
        options = best[None, :] + found[:, None] * (upto[:, None] - upto[None, :])
        options[np.triu_indices(found.size)] = np.iinfo(options.dtype).max
        choice.append(np.where(options.min(axis=1) < best, options.argmin(axis=1), -1))
        best = np.minimum(best, options.min(axis=1))
    widths, i = [], found.size - 1
    for chosen in reversed(choice):
        if i >= 0 and chosen[i] >= 0:
            widths.append(found[i])
            i = chosen[i]
    return np.array([*widths, found[i]][::-1])


def check_symmetric(A: Any, key: jax.Array, example: PyTree | None = None, *, trials: int = 2) -> jax.Array:
    """How far A is from symmetric (Hermitian), by random vectors: |<u, A v> - <A u, v>| / (||u|| ||A v||), the largest.

    A debug check for functions, which cannot be looked into: rounding for a symmetric A, of order 1/sqrt(n) or more
    for most others. `cg` and `minres` of `jaxnum.solvers` make it in every solve with `verify_symmetry=True`.

    Args:
      A: linear function on trees like `example`, array [n, n], or operator.
      key: typed PRNG key.
      example: a tree like the right-hand side; may be None for arrays and operators.
      trials: Python int >= 1, pairs of vectors.

    Returns:
      Real scalar >= 0.

    Raises:
      ValueError: a function without an example, or trials below 1.

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> bool(jaxnum.check_symmetric(lambda v: jnp.cumsum(v), jax.random.key(0), jnp.ones(8)) > 1e-2)
      True
    """
    checks.value("check_symmetric", "trials", isinstance(trials, int) and trials >= 1, "be a Python int >= 1", trials)
    A = sparse_operator(A) if is_sparse(A) else A
    known = example is not None or hasattr(A, "shape")
    checks.value("check_symmetric", "example", known, "be a tree like b when `A` is a function", example)
    example = jnp.zeros(A.shape[-1], A.dtype) if example is None else example
    checks.dtype("check_symmetric", "inexact", **{f"example{jax.tree_util.keystr(p)}": v for p, v in _leaves(example)})
    image = jax.eval_shape(lambda v: apply(A, v), example)
    checks.same_tree("check_symmetric", ("example", example), **{"A(example)": image})
    return jnp.max(jnp.stack([_defect(A, k, example) for k in jax.random.split(key, trials)]))


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _defect(A: Any, key: jax.Array, example: PyTree) -> jax.Array:
    leaves, treedef = jax.tree.flatten(example)
    keys = jax.random.split(key, (2, len(leaves)))
    u, v = (
        jax.tree.unflatten(
            treedef, [jax.random.normal(k, jnp.shape(x), jnp.result_type(x)) for k, x in zip(row, leaves, strict=True)]
        )
        for row in keys
    )
    Au, Av = apply(A, u), apply(A, v)
    scale = trees.norm(u) * trees.norm(Av)
    # Where A v = 0 the defect is |<A u, v>| itself.
    return jnp.abs(trees.inner(u, Av) - trees.inner(Au, v)) / jnp.where(scale == 0, 1, scale)


def apply(A: Any, v: PyTree) -> PyTree:
    """A v for an operator, a function or an array."""
    if isinstance(A, Operator):
        return A.matvec(v)
    if callable(A):
        return A(v)
    return jnp.matmul(A, v, precision=jax.lax.Precision.HIGHEST)
