"""The public call of the I/O model: checks, and the blocks that a fast memory has room for."""

from __future__ import annotations

import math
from typing import Any

from kernels_pallas import checks
from kernels_pallas._attention_io import counts
from kernels_pallas._attention_io.config import IOCost

_NAME = "attention_io"


def attention_io(
    T: int,
    S: int,
    D: int,
    Dv: int | None = None,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    fast_words: int | None = None,
    schedule: str = "flash",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int = 0,
    backward: bool = False,
) -> IOCost:
    """Words that exact attention of one head moves between a slow and a fast memory, counted, not estimated.

    Flash, with r = ceil(T / block_q) and nothing hidden: T D + r S (D + Dv) words read and T Dv + T written (output and
    log-sum-exp), block_q (D + Dv + 2) + block_kv (D + Dv) + block_q block_kv held. It grows as N^2 d^2 / M. The small
    schedule, for M well below d^2, writes the scores in square tiles of edge t with 3 t^2 + t <= M and reads them
    1 + ceil(Dv / t) times: N^2 d / sqrt(M). Backward (flash only): delta = rowsum(do o), a pass for dq with queries
    resident and one for dk and dv with keys resident. Under a mask by positions only live tiles count, those that hold
    a key and a query that sees it.

    Tiles have their true size: the last of a length that no block divides is short and no padding moves. For a kernel
    that pads its lengths, give the padded ones. A word is one number of whatever dtype.

    Args:
      T: queries, >= 1.
      S: keys, >= 1.
      D: head dimension of queries and keys, >= 1.
      Dv: of values; default D.
      block_q: queries a tile, with `block_kv`; instead of `fast_words`.
      block_kv: keys a tile; equal to `block_q` in the small schedule.
      fast_words: M, the size of the fast memory in words. Flash then takes one key a tile and as many queries as fit,
        which moves least; the small schedule the largest tile.
      schedule: "flash" or "small".
      causal: as in `attention`.
      window: as in `attention`.
      q_offset: position of the first query.
      backward: count the backward pass.

    Returns:
      `IOCost`: words read and written, words held at most, flops, the trivial bound, and methods that put them against
      bounds and hardware. Batch and heads: `IOCost.times`.

    Raises:
      ValueError: an argument that does not fit, or a fast memory without room for one tile.

    Cost: a few vectors of T numbers in NumPy; nothing is traced.

    Source: Saha & Ye, "The I/O Complexity of Attention, or How Optimal is FlashAttention?" (2024), whose counts these
      are with their constants. Where two lines of it leave freedom: statistics of the small schedule do not fit beside
      the tiles of all rows, so their log-sum-exp is written once and read once.

    Example:
      >>> from kernels_pallas import attention_io
      >>> cost = attention_io(4096, 4096, 64, block_q=512, block_kv=512)
      >>> cost.words_read, cost.words_written, cost.tight_bound
      (4456448, 266240, 'inputs and outputs once')
    """
    Dv = D if Dv is None else Dv
    for argument, size in (("T", T), ("S", S), ("D", D), ("Dv", Dv)):
        _check_size(argument, size)
    checks.choice(_NAME, "schedule", schedule, ("flash", "small"))
    checks.value(
        _NAME, "schedule", not backward or schedule == "flash", "be 'flash' for the backward pass", repr(schedule)
    )
    check_window(_NAME, window)
    ok = isinstance(q_offset, int) and not isinstance(q_offset, bool)
    checks.value(_NAME, "q_offset", ok, "be an int", q_offset)
    problem = counts.Problem(T, S, D, Dv, causal, window, q_offset)
    bq, bk = _blocks(problem, block_q, block_kv, fast_words, schedule, backward)
    if schedule == "small":
        count = counts.small(problem, bq)
    else:
        count = (counts.flash_backward if backward else counts.flash)(problem, bq, bk)
    return IOCost(
        schedule,
        count.words_read,
        count.words_written,
        count.fast_words,
        counts.least_words(problem, backward=backward),
        count.flops,
        count.steps,
        bq,
        bk,
        T * S,
        (D + Dv) / 2,
    )


def check_window(function: str, window: Any) -> None:
    """A window is None or a pair of distances, None for no limit on a side."""
    pair = window is None or (isinstance(window, tuple | list) and len(window) == 2)
    ok = pair and all(w is None or (isinstance(w, int) and not isinstance(w, bool) and w >= 0) for w in (window or ()))
    checks.value(function, "window", ok, "be a pair (left, right) of ints >= 0 or None", window)


def _check_size(argument: str, size: Any) -> None:
    ok = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    checks.value(_NAME, argument, ok, "be an int of at least 1", size)


def _blocks(
    problem: counts.Problem,
    block_q: int | None,
    block_kv: int | None,
    fast_words: int | None,
    schedule: str,
    backward: bool,
) -> tuple[int, int]:
    """Queries and keys a tile: the given ones, or those that move least in `fast_words`."""
    if block_q is None and block_kv is None:
        checks.value(_NAME, "fast_words", fast_words is not None, "be given without block sizes", fast_words)
        _check_size("fast_words", fast_words)
        return _fitting(problem, int(fast_words or 0), schedule, backward)
    for argument, size, other in (("block_q", block_q, "block_kv"), ("block_kv", block_kv, "block_q")):
        checks.value(_NAME, argument, size is not None, f"be given with `{other}`", size)
        _check_size(argument, size)
    checks.value(_NAME, "fast_words", fast_words is None, "be None beside block sizes", fast_words)
    if schedule == "small":
        checks.value(_NAME, "block_kv", block_kv == block_q, f"be {block_q}, as `block_q`: tiles are square", block_kv)
    return int(block_q or 0), int(block_kv or 0)


def _fitting(problem: counts.Problem, M: int, schedule: str, backward: bool) -> tuple[int, int]:
    T, S, D, Dv = problem[:4]
    if schedule == "small":
        checks.value(_NAME, "fast_words", M >= 4, "be at least 4, three tiles of one number and its statistic", M)
        # The largest t with 3 t^2 + t <= M.
        tile = (math.isqrt(12 * M + 1) - 1) // 6
        tile = min(tile, max(T, S, D, Dv))
        return tile, tile
    if backward:
        # Both passes are paid for by their own block; equal ones are the middle of the road.
        def holds(b: int) -> bool:
            return counts.flash_backward(problem, b, b).fast_words <= M

        least = counts.flash_backward(problem, 1, 1).fast_words
        checks.value(_NAME, "fast_words", holds(1), f"be at least {least}, one query and one key", M)
        block = _largest(holds, max(T, S))
        return block, block
    least = counts.flash(problem, 1, 1).fast_words
    checks.value(_NAME, "fast_words", least <= M, f"be at least {least}, one query and one key", M)
    return _largest(lambda b: counts.flash(problem, b, 1).fast_words <= M, T), 1


def _largest(holds: Any, top: int) -> int:
    """The largest b <= top that holds, by bisection; 1 holds."""
    low, high = 1, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
