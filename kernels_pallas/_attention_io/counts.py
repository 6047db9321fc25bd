"""Words moved, words held and flops of the schedules, from which tiles of the scores are live. No arrays of T x S."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Window = tuple[int | None, int | None] | None


class Problem(NamedTuple):
    """One head: lengths, head dimensions, and what positions hide. Query i stands at i + q_offset, key j at j."""

    T: int
    S: int
    D: int
    Dv: int
    causal: bool = False
    window: Window = None
    q_offset: int = 0


class Count(NamedTuple):
    """What `IOCost` holds and a schedule decides."""

    words_read: int
    words_written: int
    fast_words: int
    flops: int
    steps: int


class Live(NamedTuple):
    """Sums over the live tiles, whose heights b and widths w are true: the last ones may be short.

    Attributes:
      tiles: how many there are.
      rows: sum of b.
      columns: sum of w.
      area: sum of b w.
    """

    tiles: int
    rows: int
    columns: int
    area: int


def live(problem: Problem, block_q: int, block_kv: int) -> Live:
    """The tiles that hold a pair of a query and a key that sees it."""
    T, S = problem.T, problem.S
    starts = np.arange(0, T, block_q)
    stops = np.minimum(starts + block_q, T)
    low, _ = _reach(problem, starts)
    _, high = _reach(problem, stops - 1)
    # Neighbouring queries reach neighbouring keys, so what a block sees is one interval, as long as each sees any at
    # all; an interval that has left [0, S) is empty.
    first, last = low // block_kv, high // block_kv
    alive = (low <= high) & (low < S) & (high >= 0)
    first, last = np.where(alive, first, 0), np.where(alive, last, -1)
    heights, tiles = stops - starts, last - first + 1
    widths = np.where(alive, np.minimum((last + 1) * block_kv, S) - first * block_kv, 0)
    return Live(int(tiles.sum()), int(heights @ tiles), int(widths.sum()), int(heights @ widths))


def seen(problem: Problem) -> tuple[int, int]:
    """How many queries see a key, and how many keys are seen."""
    low, high = _reach(problem, np.arange(problem.T))
    sees = low <= high
    low, high = low[sees], high[sees]
    if not low.size:
        return 0, 0
    before = np.concatenate([[-1], high[:-1]])  # never falls
    return int(sees.sum()), int(np.maximum(high - np.maximum(low, before + 1) + 1, 0).sum())


def _reach(problem: Problem, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest key that query i sees, cut to [0, S); the first exceeds the second where it sees none."""
    position = i + problem.q_offset
    left, right = problem.window or (None, None)
    low = np.zeros_like(position) if left is None else np.maximum(position - left, 0)
    reach = [b for b in (0 if problem.causal else None, right) if b is not None]
    high = np.full_like(position, problem.S - 1)
    return low, np.minimum(high, position + min(reach)) if reach else high


def least_words(problem: Problem, *, backward: bool) -> int:
    """Inputs that are seen and outputs, once each."""
    T, S, D, Dv = problem[:4]
    queries, keys = seen(problem)
    if backward:  # q, o, do and lse, k and v in; dq, dk and dv out
        return queries * (D + 2 * Dv + 1) + keys * (D + Dv) + T * D + S * (D + Dv)
    return queries * D + keys * (D + Dv) + T * Dv


# --- The schedules. ---------------------------------------------------------------------------------------------------


def flash(problem: Problem, block_q: int, block_kv: int) -> Count:
    """Queries, output and statistics of a block stay; each of its live blocks of keys is read once."""
    T, S, D, Dv = problem[:4]
    tiles, _, columns, area = live(problem, block_q, block_kv)
    bq, bk = min(block_q, T), min(block_kv, S)
    held = bq * (D + Dv + 2)
    if tiles:
        held += bk * (D + Dv) + bq * bk
    return Count(T * D + columns * (D + Dv), T * Dv + T, held, 2 * area * (D + Dv), tiles)


def flash_backward(problem: Problem, block_q: int, block_kv: int) -> Count:
    """Three passes: delta = rowsum(do o); dq with a block of queries resident; dk and dv with one of keys."""
    T, S, D, Dv = problem[:4]
    tiles, rows, columns, area = live(problem, block_q, block_kv)
    bq, bk = min(block_q, T), min(block_kv, S)
    query, key = D + Dv + 2, D + Dv  # q, do, lse, delta; k, v
    tile = 2 * bq * bk if tiles else 0  # p and ds
    held = (
        bq * (2 * Dv + 1),
        bq * (query + D) + (bk * key + tile if tiles else 0),
        2 * bk * key + (bq * query + tile if tiles else 0),
    )
    read = 2 * T * Dv + T * query + columns * key + S * key + rows * query
    return Count(read, T + T * D + S * key, max(held), 2 * area * (4 * D + 3 * Dv), 2 * tiles)


def small(problem: Problem, tile: int) -> Count:
    """Scores by tiled products, written; their log-sum-exp; then the output by tiled products of exp(s - lse)."""
    T, S, D, Dv = problem[:4]
    tiles, rows, columns, area = live(problem, tile, tile)
    again = -(-Dv // tile)
    read = D * (rows + columns) + area + T + again * area + columns * Dv
    written = area + T + T * Dv
    b, w = min(tile, T), min(tile, S)
    d, dv = min(tile, D), min(tile, Dv)
    held = (b * w + (b + w) * d, b * w + 2 * b, b * w + (b + w) * dv + b) if tiles else (2 * b, b + b * dv)
    return Count(read, written, max(held), 2 * area * (D + Dv), tiles)
