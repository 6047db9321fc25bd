"""How things are measured: interleaved samples, fresh compiles, memory from the compiler, this machine's roofline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A sample repeats a fast call until the clock's own noise no longer counts.
_SAMPLE_SECONDS = 0.02


class Spread(NamedTuple):
    """Median and the 20 and 80 % quantiles, in seconds."""

    median: float
    p20: float
    p80: float


def spread(samples: list[float]) -> Spread:
    """Quantiles of a list of seconds."""
    low, middle, high = np.quantile(samples, [0.2, 0.5, 0.8])
    return Spread(float(middle), float(low), float(high))


def interleave(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, sampled in turn (A B A B ...), so that a busy machine slows all of them alike.

    Each call runs once before the clock of each of its samples starts, so that what the call before it leaves behind,
    such as memory on its way back to the system, is not charged to it. A call shorter than a sample is repeated inside
    it, the same number of times in every round.
    """
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        repeats[name] = max(1, round(_SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            jax.block_until_ready(call())
            start = time.perf_counter()
            for _ in range(repeats[name]):
                jax.block_until_ready(call())
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return samples


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of our time / theirs: neighbours in time are compared with each other."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def compile_seconds(functions: Mapping[str, Callable], inputs: tuple, rounds: int) -> dict[str, list[float]]:
    """Seconds to trace, lower and compile each function, interleaved, with every cache emptied before each.

    One more round comes first and is not counted: the compiler's own start falls on whoever comes first.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            jax.clear_caches()
            start = time.perf_counter()
            compiled(function, inputs)
            if turn > 0:
                samples[name].append(time.perf_counter() - start)
    return samples


def compiled(function: Callable, inputs: tuple) -> Any:
    """The executable of a fresh trace of the function."""
    return jax.jit(lambda *arguments: function(*arguments)).lower(*inputs).compile()


def temp_bytes(executable: Any) -> int | None:
    """Scratch memory the compiler reserved, or None where the backend does not say."""
    analysis = executable.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def in_mode(function: Callable, mode: str) -> Callable:
    """The function itself, or for "fwd_bwd" its output with the gradients of |output|^2 / 2 in every input."""
    if mode != "fwd_bwd":
        return function

    def forward_backward(*inputs: Any) -> Any:
        output, pull = jax.vjp(function, *inputs)
        return output, pull(output)

    return forward_backward


def relative_error(output: Any, truth: Any) -> float:
    """Largest over the leaves of ||output - truth|| / ||truth||, in float64."""
    got, want = jax.tree.leaves(output), jax.tree.leaves(truth)
    if len(got) != len(want):
        raise ValueError(f"relative_error: `output` must have {len(want)} leaves like the reference; got {len(got)}.")
    errors = []
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        errors.append(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny)))
    return max(errors)


def roofline() -> dict[str, float]:
    """This machine's 2048^3 float32 matmul in GFLOP/s and exp in G elements/s."""
    n = 2048
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.float32)
    matmul, exp = jax.jit(lambda a: a @ a), jax.jit(jnp.exp)
    samples = interleave({"matmul": lambda: matmul(a), "exp": lambda: exp(a)}, rounds=5)
    return {
        "matmul_gflops": 2 * n**3 / spread(samples["matmul"]).median / 1e9,
        "exp_gelements": n * n / spread(samples["exp"]).median / 1e9,
    }
