"""Predicted words against schedules that are run in a memory which counts them (`tests/fast_memory.py`)."""

import dataclasses

import numpy as np
import pytest

from kernels_pallas import HwSpec, attention_io
from tests import fast_memory
from tests.fast_memory import FastMemory, OutOfFastMemory

# T, S, D, Dv and what is hidden; no block divides most of these lengths.
PROBLEMS = {
    "square": (96, 96, 16, 16, {}),
    "odd": (53, 71, 13, 9, {}),
    "causal": (61, 61, 12, 20, {"causal": True}),
    "causal, more keys": (37, 90, 8, 8, {"causal": True}),
    "causal, a chunk": (30, 75, 8, 12, {"causal": True, "q_offset": 45}),
    "window": (80, 80, 8, 8, {"causal": True, "window": (11, None)}),
    "window on both sides": (50, 64, 8, 8, {"window": (5, 9)}),
    "window past the end": (64, 20, 8, 8, {"causal": True, "window": (7, None)}),
    "nothing seen": (16, 24, 8, 8, {"window": (2, 2), "q_offset": 100}),
}
# Words of fast memory: from a few score tiles to everything at once.
CACHES = (150, 260, 700, 2048, 9001, 100_000)


def inputs(T, S, d, dv, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, d)) / np.sqrt(d), rng.normal(size=(S, d)), rng.normal(size=(S, dv))


def check(memory, cost):
    assert (memory.loaded, memory.stored) == (cost.words_read, cost.words_written)
    assert memory.peak == cost.fast_words
    assert memory.products == cost.flops
    assert memory.loaded + memory.stored >= cost.least_words
    assert memory.tiles == {}


@pytest.mark.parametrize("words", CACHES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("schedule", ["flash", "small"])
def test_prediction_equals_the_instrumented_run(schedule, problem, words):
    T, S, d, dv, flags = problem
    cost = attention_io(T, S, d, dv, schedule=schedule, fast_words=words, **flags)
    q, k, v = inputs(T, S, d, dv)
    seen = fast_memory.visible(T, S, **flags)
    memory = FastMemory(words)
    if schedule == "flash":
        o, lse = fast_memory.flash(memory, q, k, v, seen, cost.block_q, cost.block_kv)
    else:
        assert cost.block_q == cost.block_kv
        o, lse = fast_memory.small_cache(memory, q, k, v, seen, cost.block_q)
    check(memory, cost)
    want_o, want_lse = fast_memory.dense(q, k, v, seen)
    np.testing.assert_allclose(o, want_o, rtol=0, atol=1e-10)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=1e-10)


@pytest.mark.parametrize("words", [260, 700, 2048, 9001, 100_000])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_prediction_of_the_backward_pass_equals_the_instrumented_run(problem, words):
    T, S, d, dv, flags = problem
    cost = attention_io(T, S, d, dv, fast_words=words, backward=True, **flags)
    q, k, v = inputs(T, S, d, dv)
    do = np.random.default_rng(1).normal(size=(T, dv))
    seen = fast_memory.visible(T, S, **flags)
    o, lse = fast_memory.dense(q, k, v, seen)
    memory = FastMemory(words)
    got = fast_memory.flash_backward(memory, q, k, v, o, do, lse, seen, cost.block_q, cost.block_kv)
    check(memory, cost)
    for a, b in zip(got, fast_memory.dense_gradients(q, k, v, o, do, lse, seen), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("block_q", "block_kv"), [(1, 1), (7, 5), (16, 48), (53, 1), (1, 71), (200, 200)])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("flags", [{}, {"causal": True, "q_offset": 9}, {"window": (6, 3)}], ids=str)
def test_any_blocks_are_counted_exactly(block_q, block_kv, backward, flags):
    T, S, d, dv = 53, 71, 6, 4
    cost = attention_io(T, S, d, dv, block_q=block_q, block_kv=block_kv, backward=backward, **flags)
    q, k, v = inputs(T, S, d, dv)
    seen = fast_memory.visible(T, S, **flags)
    memory = FastMemory(cost.fast_words)
    if backward:
        o, lse = fast_memory.dense(q, k, v, seen)
        fast_memory.flash_backward(memory, q, k, v, o, np.ones_like(o), lse, seen, block_q, block_kv)
    else:
        fast_memory.flash(memory, q, k, v, seen, block_q, block_kv)
    check(memory, cost)


def test_without_hidden_entries_the_counts_are_the_closed_forms():
    T, S, d, dv, bq, bk = 1000, 700, 48, 32, 96, 64
    rows, columns = -(-T // bq), -(-S // bk)
    cost = attention_io(T, S, d, dv, block_q=bq, block_kv=bk)
    assert cost.words_read == T * d + rows * S * (d + dv)
    assert cost.words_written == T * dv + T
    assert cost.fast_words == bq * (d + dv) + bk * (d + dv) + bq * bk + 2 * bq
    assert cost.steps == rows * columns
    back = attention_io(T, S, d, dv, block_q=bq, block_kv=bk, backward=True)
    queries, keys = T * (d + dv + 2), S * (d + dv)
    assert back.words_read == 2 * T * dv + queries + rows * keys + keys + columns * queries
    assert back.words_written == T + T * d + S * (d + dv)
    tile = 10
    small = attention_io(T, S, d, dv, schedule="small", block_q=tile, block_kv=tile)
    again = -(-dv // tile)
    assert small.words_read == -(-S // tile) * T * d + -(-T // tile) * S * (d + dv) + T * S * (1 + again) + T
    assert small.words_written == T * S + T + T * dv
    assert small.fast_words == 3 * tile**2 + tile


def test_the_memory_that_counts_refuses_one_word_too_few():
    T, S, d, dv = 40, 40, 8, 8
    q, k, v = inputs(T, S, d, dv)
    seen = fast_memory.visible(T, S)
    cost = attention_io(T, S, d, dv, block_q=16, block_kv=8)
    fast_memory.flash(FastMemory(cost.fast_words), q, k, v, seen, 16, 8)
    with pytest.raises(OutOfFastMemory):
        fast_memory.flash(FastMemory(cost.fast_words - 1), q, k, v, seen, 16, 8)


def slope(schedule, low, high):
    """Of log words against log M, by least squares."""
    M = np.unique(np.geomspace(low, high, 25).astype(int))
    words = [attention_io(1024, 1024, 32, 32, schedule=schedule, fast_words=int(m)).words for m in M]
    return np.polyfit(np.log(M), np.log(words), 1)[0]


def test_words_fall_with_the_fast_memory_as_the_bounds_do():
    d = 32
    assert slope("flash", d**2, 16 * d**2) == pytest.approx(-1, abs=0.1)
    assert slope("small", d**2 / 32, d**2 / 2) == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize("d", [64, 128])
def test_the_small_schedule_wins_in_a_small_fast_memory_and_flash_in_a_large_one(d):
    def words(schedule, M):
        return attention_io(1024, 1024, d, d, schedule=schedule, fast_words=M).words

    for share in (32, 16, 12, 8):
        M = d**2 // share
        if 4 * d + 3 <= M:  # one query and one key, as flash needs at least
            assert words("small", M) < words("flash", M)
    assert words("flash", d**2) < words("small", d**2)


def test_the_crossover_lies_well_below_the_square_of_the_head_dimension():
    d = 128
    gap = [
        attention_io(8192, 8192, d, d, schedule="flash", fast_words=m).words
        / attention_io(8192, 8192, d, d, schedule="small", fast_words=m).words
        for m in (d**2 // 8, d**2 // 2)
    ]
    assert gap[0] > 1 > gap[1]


@pytest.mark.parametrize("schedule", ["flash", "small"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_never_below_the_trivial_bound(schedule, problem):
    T, S, d, dv, flags = problem
    seen = fast_memory.visible(T, S, **flags)
    for words in (*CACHES, 10**9):
        cost = attention_io(T, S, d, dv, schedule=schedule, fast_words=words, **flags)
        queries, keys = np.any(seen, axis=1).sum(), np.any(seen, axis=0).sum()
        assert cost.least_words == queries * d + keys * (d + dv) + T * dv
        assert cost.words >= cost.least_words


def test_everything_in_fast_memory_reaches_the_bound_but_for_the_lse():
    cost = attention_io(128, 200, 16, 24, fast_words=10**6)
    assert cost.words == cost.least_words + 128


def test_the_bound_that_is_tight():
    d = 64
    tight = {m: attention_io(4096, 4096, d, d, fast_words=m).tight_bound for m in (d**2 // 8, 4 * d**2, 10**7)}
    assert list(tight.values()) == ["N^2 d / sqrt(M)", "N^2 d^2 / M", "inputs and outputs once"]


def test_roofline_is_the_slower_of_arithmetic_and_traffic():
    cost = attention_io(1024, 1024, 64, 64, block_q=128, block_kv=128)
    chip = HwSpec("toy", "cpu", fast_bytes=2**20, bandwidth=1e9, flops_16=1e12, flops_32=1e11, step_seconds=0.0)
    assert cost.roofline(chip, "float32") == pytest.approx(max(cost.flops / 1e11, 4 * cost.words / 1e9))
    assert cost.roofline(chip, "bfloat16") == pytest.approx(max(cost.flops / 1e12, 2 * cost.words / 1e9))
    starved = dataclasses.replace(chip, bandwidth=1e6)
    assert cost.roofline(starved, "float32") == pytest.approx(4 * cost.words / 1e6)


ERRORS = {
    "no length": (dict(T=0, S=4, D=4), "`T` must be an int of at least 1; got 0."),
    "a length that is not an int": (dict(T=4.0, S=4, D=4), "`T` must be an int of at least 1; got 4.0."),
    "a schedule of no name": (dict(schedule="fast"), "`schedule` must be one of 'flash', 'small'; got 'fast'."),
    "blocks and room": (dict(block_q=4, block_kv=4, fast_words=99), "`fast_words` must be None beside block sizes"),
    "one block of two": (dict(block_q=4), "`block_kv` must be given with `block_q`"),
    "neither": (dict(), "`fast_words` must be given without block sizes"),
    "no room": (dict(fast_words=20), "`fast_words` must be at least 67, one query and one key; got 20."),
    "no room for three tiles": (dict(fast_words=3, schedule="small"), "`fast_words` must be at least 4"),
    "tiles that are not square": (dict(block_q=4, block_kv=8, schedule="small"), "`block_kv` must be 4, as `block_q`"),
    "backward by the small schedule": (
        dict(fast_words=999, schedule="small", backward=True),
        "`schedule` must be 'flash' for the backward pass; got 'small'.",
    ),
    "negative window": (dict(fast_words=999, window=(-1, 2)), "`window` must be a pair (left, right) of ints >= 0"),
}


@pytest.mark.parametrize(("arguments", "words"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments_are_named(arguments, words):
    arguments = {"T": 64, "S": 64, "D": 16} | arguments
    sizes = [arguments.pop(n) for n in ("T", "S", "D")]
    with pytest.raises(ValueError) as info:
        attention_io(*sizes, **arguments)
    assert str(info.value).startswith("attention_io: ")
    assert words in str(info.value)
