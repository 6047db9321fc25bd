"""What the TPU compiler scheduled for recurrent kernels, beside causal softmax: `python -m benchmarks.tpu_recurrence`.

Costs are those of `benchmarks.tpu_schedule`, in the same records. Softmax attention is compiled without a mask, where
every block is live, and counts for the share of its blocks that a causal mask leaves: the loop of a causal kernel holds
one body for blocks that are masked and one for those that are not, of which a block runs only one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records, tpu_schedule
from benchmarks.tpu_schedule import RESULTS, TOPOLOGIES

HEADS, DIM, CHUNK = 8, 128, 128
LENGTHS = (8192, 16384)


class Work(NamedTuple):
    """One call: which kernel, how long, and in which direction."""

    kernel: str
    length: int
    direction: str = "fwd"

    def __str__(self) -> str:
        of = "attention, full" if self.kernel == "softmax" else self.kernel.replace("_", " ")
        return f"{of}, {self.direction}, B1 H{HEADS} T{self.length} K{DIM} V{DIM} bfloat16"

    def macs(self) -> int:
        """Useful multiply-adds in chunks of 128, the half of a chunk that causality hides included."""
        if self.kernel == "softmax":
            return (2 if self.direction == "fwd" else 5) * HEADS * self.length**2 * DIM
        # Products with a state, and products of a chunk's tokens with each other, a token.
        state, pairs = {
            ("linear_attention", "fwd"): (2, 2),
            ("linear_attention", "bwd"): (5, 5),
            ("delta_rule", "fwd"): (3, 5),
            ("delta_rule", "bwd"): (8, 13),
        }[self.kernel, self.direction]
        return HEADS * self.length * (state * DIM * DIM + pairs * CHUNK * DIM)


def build(work: Sequence, blocks: None) -> tuple[Callable, list, int]:
    """The kernel of a work, its inputs, and its useful multiply-adds, as `tpu_schedule.measure` wants them."""
    import kernels_pallas

    work = Work(*work)
    tokens = ((1, work.length, HEADS, DIM), "bfloat16")
    gates = ((1, work.length, HEADS), "float32")

    def softmax(q: Any, k: Any, v: Any) -> Any:
        return kernels_pallas.attention(q, k, v, implementation="tpu")

    def linear_attention(q: Any, k: Any, v: Any, g: Any) -> Any:
        return kernels_pallas.linear_attention(q, k, v, log_decay=g, implementation="tpu")[0]

    def delta_rule(q: Any, k: Any, v: Any, beta: Any, g: Any) -> Any:
        return kernels_pallas.delta_rule(q, k, v, beta, log_decay=g, implementation="tpu")[0]

    run, more = {
        "softmax": (softmax, []),
        "linear_attention": (linear_attention, [((HEADS,), "float32")]),
        "delta_rule": (delta_rule, [gates, gates]),
    }[work.kernel]
    function, specs, _ = tpu_schedule._directed(tpu_schedule.Work(direction=work.direction), run, [tokens] * 3 + more)
    return function, specs, work.macs()


def live_share(generation: str, length: int) -> float:
    """Share of the blocks of our causal softmax attention that hold anything visible."""
    import jax

    from kernels_pallas._attention.config import Config, Operands, tpu_blocks

    tokens = jax.ShapeDtypeStruct((1, length, HEADS, DIM), "bfloat16")
    blocks = tpu_blocks(Config(True, None, None, 1.0, None), Operands(tokens, tokens, tokens), generation=generation)
    rows, columns = range(0, length, blocks.q), range(0, length, blocks.kv)
    return sum(column < row + blocks.q for row in rows for column in columns) / (len(rows) * len(columns))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile every kernel for every chip and record what was scheduled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_recurrence", description=__doc__.splitlines()[0])
    parser.add_argument("--chip", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for generation in options.chip:
        for length in LENGTHS:
            softmax = _record(Work("softmax", length), generation, options.results)
            causal = softmax * live_share(generation, length)
            for kernel in ("linear_attention", "delta_rule"):
                _record(Work(kernel, length), generation, options.results, over=causal)
        for kernel in ("linear_attention", "delta_rule"):
            _record(Work(kernel, LENGTHS[0], "bwd"), generation, options.results)
    return 0


def _record(work: Work, generation: str, results: Path, over: float | None = None) -> float:
    print(f"{generation} {work} ...", file=sys.stderr, flush=True)
    record = tpu_schedule.measure("benchmarks.tpu_recurrence:build", generation, list(work), None)
    bundles = max(record["cost"], record["floor"])
    record |= {"kernel": "ours", "blocks": "own", "work": str(work)}
    if over is not None:
        record["over_causal_softmax"] = bundles / over
    records.append(results, [record])
    print(tpu_schedule.summary(record), record.get("over_causal_softmax", ""), flush=True)
    return bundles


if __name__ == "__main__":
    sys.exit(main())
