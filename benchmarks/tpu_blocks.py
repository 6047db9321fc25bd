"""Blocks of attention's TPU kernels, by what the compiler schedules: `python -m benchmarks.tpu_blocks`.

For each direction, case and generation the candidates are compiled as in `benchmarks.tpu_schedule`; the best goes into
`kernels_pallas/_attention/tpu_blocks.json`, which the kernels read. Among the candidates whose loop body fits
(instruction memory is finite), the best has the fewest bundles; where blocks are skipped, times the share of the blocks
that a causal mask leaves, and with half the room, since the kernel then has a second body for blocks without hidden
entries. `default`, for a program whose generation is not known, is the candidate that loses least on the worst of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tpu_schedule
from benchmarks.tpu_schedule import Work

TABLE = Path(__file__).resolve().parent.parent / "kernels_pallas" / "_attention" / "tpu_blocks.json"
Blocks = tuple[int, int, int]
ROOM = 6000  # bundles of a loop body

# What stands for each case of the table, and the blocks that are tried.
WORK = {"full": Work(), "hiding": Work(), "wide": Work(heads=1, length=2048, dtype="float32")}
CANDIDATES: dict[str, dict[str, list[Blocks]]] = {
    "forward": {
        "full": [(256, 4096, 1024), (512, 4096, 512)],
        "hiding": [(512, 1024, 512), (512, 512, 512), (256, 1024, 1024)],
        "wide": [(256, 512, 256)],
    },
    "backward": {
        "full": [(2048, 1024, 512), (2048, 512, 512), (1024, 512, 512)],
        "hiding": [(512, 512, 512)],
        "wide": [(256, 256, 128)],
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--direction", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--case", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    table = json.loads(options.table.read_text()) if options.table.exists() else {}
    for direction in options.direction:
        for case in options.case:
            table.setdefault(direction, {})[case] = row(measured(direction, case), case)
            options.table.write_text(render(table))
            print(direction, case, table[direction][case], flush=True)
    return 0


def measured(direction: str, case: str) -> dict[str, dict[Blocks, dict[str, Any]]]:
    """The record of every candidate that compiles, by generation."""
    work = WORK[case]._replace(direction="fwd" if direction == "forward" else "bwd")
    records: dict[str, dict[Blocks, dict[str, Any]]] = {}
    for generation in tpu_schedule.TOPOLOGIES:
        for blocks in CANDIDATES[direction][case]:
            try:
                record = tpu_schedule.measure("benchmarks.tpu_schedule:ours", generation, work, blocks)
            except tpu_schedule.CompileError as error:
                print(f"{generation} {work} {blocks}: {error}", file=sys.stderr, flush=True)
                continue
            records.setdefault(generation, {})[blocks] = record
            print(
                f"{generation} {work} {blocks}: {record['cost']:.0f}, body {record['body']}",
                file=sys.stderr,
                flush=True,
            )
    return records


def row(records: Mapping[str, Mapping[Blocks, Mapping[str, Any]]], case: str) -> dict[str, Blocks]:
    """The best blocks of each generation, and those that lose least on the worst generation as `default`."""
    scores = {
        generation: {blocks: score(record, blocks, case) for blocks, record in of.items()}
        for generation, of in records.items()
    }
    best = {generation: min(of, key=of.__getitem__) for generation, of in scores.items()}
    everywhere = [blocks for blocks in next(iter(scores.values())) if all(blocks in of for of in scores.values())]

    def loss(blocks: Blocks) -> tuple[int, float]:
        """How many generations have no room for it, and what it loses on the worst."""
        losses = [scores[g][blocks][1] / scores[g][best[g]][1] for g in scores]
        return sum(scores[g][blocks][0] > scores[g][best[g]][0] for g in scores), max(losses)

    return {"default": min(everywhere, key=loss), **best}


def score(record: Mapping[str, Any], blocks: Blocks, case: str) -> tuple[int, float]:
    """The smaller, the better: a body without room comes after all that have it; then bundles."""
    hides = case == "hiding"
    over = record["body"] - (ROOM // 2 if hides else ROOM)
    live = causal_share(WORK[case].length, blocks) if hides else 1.0
    return max(over, 0), record["cost"] * live


def causal_share(length: int, blocks: Blocks) -> float:
    """Of the blocks of scores of `length` queries and keys, those with an entry on or below the diagonal."""
    q, kv, _ = blocks
    rows, columns = -(-length // q), -(-length // kv)
    live = sum(min(columns, ((i + 1) * q - 1) // kv + 1) for i in range(rows))
    return live / (rows * columns)


def render(table: Mapping[str, Any]) -> str:
    """JSON with one line a case."""
    parts = []
    for direction, cases in table.items():
        lines = [f'    "{case}": {json.dumps(of)}' for case, of in cases.items()]
        parts.append(f'  "{direction}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
