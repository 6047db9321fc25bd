"""Let the referees judge, and write down how many of their cases pass: `python -m tests.referees`."""

from __future__ import annotations

import os

# Tokamax splits its inputs over every device there is, and some have axes of 4. Set before jax starts a backend.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import records
from tests.referees import splash, tokamax_cases
from tests.referees.outcome import Outcome

RESULTS = records.RESULTS / "referees.json"


def main(arguments: list[str] | None = None) -> int:
    """Judge, print and record; 1 when a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.referees", description=__doc__)
    parser.add_argument("--referee", choices=("splash", "tokamax"), action="append", help="default: both")
    parser.add_argument("--examples", type=int, default=25, help="cases of splash for each combination of its options")
    parser.add_argument(
        "--cases", choices=(*splash.CELLS, *tokamax_cases.CLASSES), action="append", help="default: all"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to")
    options = parser.parse_args(arguments)
    failed = False
    for referee, cases, outcome in _judge(options):
        found = {part.name: getattr(outcome, part.name) for part in dataclasses.fields(outcome)}
        counts = {part: len(names) for part, names in found.items()}
        print(
            f"{referee}, {cases}: " + ", ".join(f"{n} {part.replace('_', ' ')}" for part, n in counts.items()),
            flush=True,
        )
        why = {part: names for part, names in found.items() if part != "passed"}
        for part, names in why.items():
            for name, reason in names.items():
                print(f"  {part.replace('_', ' ')}: {name}: {reason}")
        origin = records.circumstances((referee,) if referee == "tokamax" else ())
        records.append(options.results, [{"referee": referee, "cases": cases, "counts": counts, "why": why, **origin}])
        failed |= bool(outcome.failed)
    return int(failed)


def _judge(options: argparse.Namespace) -> Iterator[tuple[str, str, Outcome]]:
    chosen = {"splash": splash.CELLS, "tokamax": tokamax_cases.CLASSES}
    if options.referee:
        chosen = {referee: chosen[referee] for referee in options.referee}
    if "tokamax" in chosen and importlib.util.find_spec("tokamax") is None:
        sys.exit('tests.referees: tokamax is not installed: pip install "jaxnum[referee]" (Python 3.12).')
    for referee, every in chosen.items():
        for cases in every:
            if options.cases is None or cases in options.cases:
                outcome = tokamax_cases.run(cases) if referee == "tokamax" else splash.run(cases, options.examples)
                yield referee, cases, outcome


if __name__ == "__main__":
    sys.exit(main())
