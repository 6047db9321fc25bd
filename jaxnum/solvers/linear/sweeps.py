"""Triangular sweeps: by LAPACK when A is dense; level by level, or colour by colour, when it is sparse.

Row i of a triangular solve waits for the rows it reads. In the natural order rows that wait for equally many others
form a level and are solved at once; in a multicolour order, rows of one colour, none of which reads another. The host
finds either from the pattern. One scan runs over chunks of them, all of one width; a colour of a matrix of diagonals is
one product with it instead, which looks nothing up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core import operators
from jaxnum.core.operators import DiaOperator, EllOperator
from kernels_pallas import checks

# A step of a scan costs about as much as this many entries.
_STEP = 512


class Triangle(NamedTuple):
    """The entries on one side of the diagonal, for each chunk: int32 [chunks, entries, width].

    Attributes:
      at: where the entry stands in the operator's storage; one past its end for padding.
      reads: which unknown it multiplies, in the order of the sweep.
    """

    at: jax.Array
    reads: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "place", "lower", "upper"], meta_fields=["offsets"])
@dataclass(frozen=True)
class Schedule:
    """Which rows are solved together.

    Attributes:
      rows: int32 [chunks, width], the rows of each chunk; n for padding.
      place: int32 [n], where each unknown stands in the order of the sweep.
      lower: entries of earlier unknowns; in the natural order, those left of the diagonal.
      upper: entries of later ones.
      offsets: the diagonals of a `DiaOperator`, None for an `EllOperator`; static.
    """

    rows: jax.Array
    place: jax.Array
    lower: Triangle
    upper: Triangle
    offsets: tuple[int, ...] | None


@partial(jax.tree_util.register_dataclass, data_fields=["colour"], meta_fields=["count", "offsets"])
@dataclass(frozen=True)
class Colours:
    """Which rows of a matrix of diagonals are solved together.

    Attributes:
      colour: int32 [n], the colour of each row.
      count: how many colours there are; static.
      offsets: the diagonals; static.
    """

    colour: jax.Array
    count: int
    offsets: tuple[int, ...]


class Split(NamedTuple):
    """A as D / omega + L + U, ready for sweeps.

    Attributes:
      diagonal: D, [n].
      scaled: D / omega, in chunks when there is a `Schedule`.
      lower: for dense A the matrix D / omega + L + U; with a `Schedule` the values of L in chunks; with `Colours` A.
      upper: with a `Schedule` the values of U in chunks; else None.
      schedule: None for dense A.
      broken: whether a diagonal entry is zero, or A has entries that the schedule does not know.
    """

    diagonal: jax.Array
    scaled: jax.Array
    lower: Any
    upper: jax.Array | None
    schedule: Schedule | Colours | None
    broken: jax.Array


def check_relaxation(function: str, omega: Any, argument: str = "omega") -> None:
    """Omega must lie in (0, 2), as far as it is known."""
    if not checks.traced(omega):
        inside = bool(np.all((np.asarray(omega) > 0) & (np.asarray(omega) < 2)))
        checks.value(function, argument, inside, "be in (0, 2)", omega, "Outside no start converges.")


def check_matrix(function: str, A: Any, schedule: Schedule | Colours | None) -> None:
    """A must show its entries, and come with a schedule when it is sparse."""
    sparse = isinstance(A, (DiaOperator, EllOperator))
    remedy = "A sweep reads entries of A, which a function does not show; use jaxnum.solvers.cg()."
    known = sparse or (hasattr(A, "ndim") and not isinstance(A, operators.Operator))
    checks.value(function, "A", known, "be an array or a sparse matrix", type(A).__name__, remedy, TypeError)
    remedy = "Give schedule=jaxnum.solvers.sor_schedule(A)."
    checks.value(function, "schedule", not sparse or schedule is not None, "be given for a sparse A", None, remedy)
    if sparse and schedule is not None:
        unknowns = schedule.colour if isinstance(schedule, Colours) else schedule.place
        fits = schedule.offsets == getattr(A, "offsets", None) and unknowns.shape[0] == A.shape[0]
        remedy = "Make it from the operator that is solved with."
        checks.value(function, "schedule", fits, "be made for the format and size of A", "another's", remedy)
    remedy = "Leave it out."
    checks.value(function, "schedule", sparse or schedule is None, "be None for a dense A", "a schedule", remedy)


def split(A: Any, omega: jax.Array, schedule: Schedule | Colours | None) -> Split:
    """The parts of A, D divided by omega."""
    diagonal = jnp.diagonal(A) if schedule is None else A.diagonal()
    omega = omega.astype(jnp.finfo(diagonal.dtype).dtype)
    broken = jnp.any(diagonal == 0)
    if schedule is None:
        # One matrix serves both solves: each reads its own triangle.
        both = A + jnp.diag((1 / omega - 1) * diagonal)
        return Split(diagonal, diagonal / omega, both, None, None, broken)
    if isinstance(schedule, Colours):
        for row, k in zip(A.diagonals, schedule.offsets, strict=True):
            # What wraps around multiplies a zero.
            same = schedule.colour == jnp.roll(schedule.colour, -k)
            broken = broken | ((k != 0) & jnp.any((row != 0) & same))
        return Split(diagonal, diagonal / omega, A, None, schedule, broken)
    storage = jnp.append(_storage(A), jnp.zeros((), A.dtype))
    lower, upper = storage[schedule.lower.at], storage[schedule.upper.at]
    seen = sum(jnp.count_nonzero(part) for part in (lower, upper, diagonal))
    broken = broken | (seen != jnp.count_nonzero(storage))
    if isinstance(A, EllOperator):
        columns = jnp.append(jnp.concatenate([c.ravel() for c in A.columns]), jnp.int32(0))
        for triangle, values in ((schedule.lower, lower), (schedule.upper, upper)):
            moved = columns[triangle.at] != schedule.rows.ravel()[triangle.reads]
            broken = broken | jnp.any((values != 0) & moved)
    scaled = jnp.append(diagonal / omega, jnp.ones((), A.dtype))[schedule.rows]
    return Split(diagonal, scaled, lower, upper, schedule, broken)


def forward(parts: Split, r: jax.Array) -> jax.Array:
    """(D / omega + L)^-1 r."""
    return _solve(parts, r, reverse=False)


def backward(parts: Split, r: jax.Array) -> jax.Array:
    """(D / omega + U)^-1 r."""
    return _solve(parts, r, reverse=True)


def _solve(parts: Split, r: jax.Array, *, reverse: bool) -> jax.Array:
    schedule = parts.schedule
    if schedule is None:
        return jax.scipy.linalg.solve_triangular(parts.lower, r, lower=not reverse)
    if isinstance(schedule, Colours):
        return _coloured(schedule, parts.lower, parts.scaled, r, reverse=reverse)
    triangle, values = (schedule.upper, parts.upper) if reverse else (schedule.lower, parts.lower)
    return _sweep(schedule, triangle.reads, values, parts.scaled, r, reverse=reverse)


def _coloured(colours: Colours, A: DiaOperator, scaled: jax.Array, r: jax.Array, *, reverse: bool) -> jax.Array:
    turn = colours.count - 1 - colours.colour if reverse else colours.colour

    def solve(k: jax.Array, y: jax.Array) -> jax.Array:
        # A's rows of this turn read no row of it, and rows of later turns are zero still.
        return jnp.where(turn == k, (r - A.matvec(y)) / scaled, y)

    return jax.lax.fori_loop(1, colours.count, solve, jnp.where(turn == 0, r / scaled, 0))


def _sweep(
    schedule: Schedule, reads: jax.Array, values: Any, scaled: jax.Array, r: jax.Array, *, reverse: bool
) -> jax.Array:
    chunks, width = schedule.rows.shape

    def solve(y: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
        k, reads, values, scaled, r = chunk
        known = jnp.sum(values * y.at[reads].get(mode="promise_in_bounds"), axis=0)
        return jax.lax.dynamic_update_slice(y, (r - known) / scaled, (k * width,)), None

    held = jnp.append(r, jnp.zeros((), r.dtype))[schedule.rows]
    inputs = (jnp.arange(chunks, dtype=jnp.int32), reads, values, scaled, held)
    y, _ = jax.lax.scan(solve, jnp.zeros(chunks * width, r.dtype), inputs, reverse=reverse)
    return y[schedule.place]


def _storage(A: DiaOperator | EllOperator) -> jax.Array:
    if isinstance(A, DiaOperator):
        return A.diagonals.ravel()
    return jnp.concatenate([values.ravel() for values in A.values])


def build(A: DiaOperator | EllOperator, ordering: str) -> Schedule | Colours:
    """The schedule of a concrete square operator, in the natural or a multicolour order."""
    n = A.shape[0]
    rows, columns, at, size = _entries(A)
    # Levels and colours of the symmetrised pattern serve the sweep back too, in reverse.
    later, earlier = np.maximum(rows, columns), np.minimum(rows, columns)
    later, earlier = later[later != earlier], earlier[later != earlier]
    level = _levels(later, earlier, n)
    if ordering == "multicolour":
        level = _colours(later, earlier, level)
        if isinstance(A, DiaOperator):
            return Colours(jnp.asarray(level, jnp.int32), int(level.max()) + 1, A.offsets)
    sizes = np.bincount(level)
    left, right = level[columns] < level[rows], level[columns] > level[rows]
    deepest = max(1, *(np.bincount(rows[side], minlength=1).max() for side in (left, right)))
    width = _width(sizes, deepest)
    per_level = -(-sizes // width)
    order = np.argsort(level, kind="stable")
    within = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.empty(n, np.int64)
    place[order] = np.repeat((np.cumsum(per_level) - per_level) * width, sizes) + within
    chunked = np.full(per_level.sum() * width, n)
    chunked[place] = np.arange(n)
    triangles = [
        _triangle(rows[s], columns[s], at[s], place, chunked.size // width, width, size) for s in (left, right)
    ]
    return Schedule(
        rows=jnp.asarray(chunked.reshape(-1, width), jnp.int32),
        place=jnp.asarray(place, jnp.int32),
        lower=triangles[0],
        upper=triangles[1],
        offsets=getattr(A, "offsets", None),
    )


def _entries(A: DiaOperator | EllOperator) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Row, column and place in the storage of every entry that is not zero, and the storage's size."""
    n = A.shape[0]
    if isinstance(A, DiaOperator):
        held = np.asarray(A.diagonals)
        diagonal, rows = np.nonzero(held)
        return rows, rows + np.asarray(A.offsets)[diagonal], diagonal * n + rows, held.size
    owners = np.arange(n) if A.place is None else np.argsort(np.asarray(A.place))
    parts, first, base = [], 0, 0
    for values, columns in zip(A.values, A.columns, strict=True):
        held, looked = np.asarray(values), np.asarray(columns)
        depth, mine = np.nonzero(held)
        parts.append((owners[first + mine], looked[depth, mine], base + depth * held.shape[1] + mine))
        first, base = first + held.shape[1], base + held.size
    rows, columns, at = (np.concatenate(column) for column in zip(*parts, strict=True))
    return rows, columns, at, base


def _levels(later: np.ndarray, earlier: np.ndarray, n: int) -> np.ndarray:
    """For each row the length of the longest chain of rows it waits for."""
    order = np.argsort(earlier, kind="stable")
    later, counts = later[order], np.bincount(earlier, minlength=n)
    starts = np.cumsum(counts) - counts
    waiting = np.bincount(later, minlength=n)
    level, depth, ready = np.zeros(n, np.int64), 0, np.flatnonzero(waiting == 0)
    while ready.size:
        level[ready] = depth
        lengths = counts[ready]
        ranges = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths - starts[ready], lengths)
        freed = later[ranges]
        np.subtract.at(waiting, freed, 1)
        ready, depth = np.unique(freed[waiting[freed] == 0]), depth + 1
    return level


def _colours(later: np.ndarray, earlier: np.ndarray, level: np.ndarray) -> np.ndarray:
    """For each row, in the natural order, the least colour that no row before it with a common entry has.

    Rows of a level have no common entry, so that they are coloured at once.
    """
    n = level.size
    order = np.argsort(level[later], kind="stable")
    later, earlier = later[order], earlier[order]
    stops = np.cumsum(np.bincount(level[later], minlength=level.max(initial=0) + 1))
    colour = np.zeros(n, np.int64)
    for first, last in zip(stops[:-1], stops[1:], strict=True):
        row, taken = np.divmod(np.unique(later[first:last] * n + colour[earlier[first:last]]), n)
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        rank = np.arange(row.size) - np.repeat(starts, np.diff(starts, append=row.size))
        # The colours taken, sorted, are 0, 1, .. up to the first gap.
        colour[row[starts]] = np.add.reduceat(taken == rank, starts)
    return colour


def _width(sizes: np.ndarray, deepest: int) -> int:
    """The width of a chunk, a power of two or the greatest size, that makes a sweep cheapest."""
    options = np.append(2 ** np.arange(int(sizes.max() - 1).bit_length() + 1), sizes.max())
    chunks = (-(-sizes[None, :] // options[:, None])).sum(axis=1)
    return int(options[np.argmin(chunks * (_STEP + options * deepest))])


def _triangle(
    rows: np.ndarray, columns: np.ndarray, at: np.ndarray, place: np.ndarray, chunks: int, width: int, size: int
) -> Triangle:
    order = np.argsort(rows, kind="stable")
    rows, columns, at = rows[order], columns[order], at[order]
    lengths = np.bincount(rows, minlength=place.size)
    depth = np.arange(rows.size) - (np.cumsum(lengths) - lengths)[rows]
    where, reads = (np.full((chunks, max(1, lengths.max()), width), fill) for fill in (size, 0))
    chunk, lane = np.divmod(place[rows], width)
    where[chunk, depth, lane], reads[chunk, depth, lane] = at, place[columns]
    return Triangle(jnp.asarray(where, jnp.int32), jnp.asarray(reads, jnp.int32))
