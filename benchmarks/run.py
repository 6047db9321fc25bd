"""Measure methods against their peers: `python -m benchmarks.run [--op NAME] [--compare PEER]`.

For each row of `benchmarks.registry`: its tests run first, and red tests mean no timing; then compile seconds,
run time (median, 20 and 80 %), the compiler's scratch memory and the error against the reference, ours and each
peer's, sampled in turn in one process. Records go to `benchmarks/results/<device>.json`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, records, registry

OURS = "jaxnum"


class Refused(Exception):
    """A measurement that must not be made or reported; the text says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    say = partial(print, file=sys.stderr, flush=True)
    try:
        chosen = select(registry.rows(), options.op, options.compare)
        refused = [text for row in chosen if (text := run_tests(row, say))]
        if refused:
            raise Refused("\n".join(refused))
        say("roofline of this machine ...")
        roofline = measure.roofline()
        for row in chosen:
            for record in measure_row(row, options, roofline, say):
                records.append(options.results or default_results(), [record])
                print(summary(record), flush=True)
    except Refused as error:
        say(f"benchmarks.run: {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="one method; default all")
    parser.add_argument("--compare", metavar="PEER", help="one peer; default all of the row")
    parser.add_argument("--shape", help="one named parameter set; default all of the row")
    parser.add_argument("--mode", choices=registry.MODES, help="one mode; default all of the row")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each call (default 9)")
    parser.add_argument("--compiles", type=int, default=5, help="fresh compiles of each call (default 5)")
    parser.add_argument("--results", type=Path, help="file to append to; default benchmarks/results/<device>.json")
    return parser


def default_results() -> Path:
    """The file of this device."""
    return records.RESULTS / f"{records.slug(records.device())}.json"


def select(rows: dict[str, registry.Row], op: str | None, peer: str | None) -> list[registry.Row]:
    """The rows asked for, with the peers asked for, every needed package present.

    Raises:
      Refused: no such op, no such peer, or a peer's package is not installed.
    """
    if op is not None and op not in rows:
        raise Refused(f"--op must be one of {', '.join(rows)}; got {op!r}.")
    chosen = [row for name, row in rows.items() if op in (None, name)]
    if peer is not None:
        if not any(peer in row.peers for row in chosen):
            known = sorted({name for row in chosen for name in row.peers})
            raise Refused(f"--compare must be one of {', '.join(known) or 'none: no peers'}; got {peer!r}.")
        chosen = [row for row in chosen if peer in row.peers]
    for row in chosen:
        for name, other in row.peers.items():
            if peer in (None, name):
                _require(name, other)
    return chosen


# Packages of the extra that holds PyTorch.
_TORCH = ("torch", "fla-core")


def _require(name: str, peer: registry.Peer) -> None:
    try:
        importlib.metadata.distribution(peer.package)
    except importlib.metadata.PackageNotFoundError:
        raise Refused(
            f"peer {name!r} needs the package {peer.package!r}, which is not installed. "
            f'Install the extra: pip install "jaxnum[{"bench-torch" if peer.package in _TORCH else "bench"}]".'
        ) from None


def run_tests(row: registry.Row, say: Any) -> str | None:
    """Run a row's tests in a process of their own; None when green, else why nothing will be timed."""
    missing = [path for path in row.tests if not (records.ROOT / path.split("::")[0]).exists()]
    if missing or not row.tests:
        return f"{row.name}: no timing, its tests are missing: {', '.join(missing) or 'none listed'}."
    say(f"{row.name}: tests {' '.join(row.tests)} ...")
    command = [sys.executable, "-m", "pytest", "-q", "-x", *row.tests]
    done = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    tail = "\n".join(done.stdout.splitlines()[-15:] + done.stderr.splitlines()[-5:])
    return f"{row.name}: no timing, its tests are red (pytest status {done.returncode}):\n{tail}"


def measure_row(row: registry.Row, options: Any, roofline: dict[str, float], say: Any):
    """Yield one record for each shape, mode and peer of a row; one without peer when it has none."""
    if options.shape is not None and options.shape not in row.shapes:
        raise Refused(f"--shape of {row.name} must be one of {', '.join(row.shapes)}; got {options.shape!r}.")
    with jax.enable_x64(row.x64):
        for shape in row.shapes:
            for mode in row.modes:
                if options.shape in (None, shape) and options.mode in (None, mode):
                    yield from _measure_case(row, shape, mode, options, roofline, say)
        if row.figures and options.shape is None and options.mode is None and options.compare is None:
            yield _figures(row, roofline, say)


def _measure_case(row: registry.Row, shape: str, mode: str, options: Any, roofline: dict[str, float], say: Any):
    params = row.shapes[shape]
    inputs = row.make(params)
    ours = measure.in_mode(row.run(params), mode)
    say(f"{row.name} {shape} {mode}: reference ...")
    error = partial(_error, row, _truth(row, params, inputs, mode))
    peers = [
        (name, peer)
        for name, peer in row.peers.items()
        if options.compare in (None, name) and (peer.modes is None or mode in peer.modes)
    ]
    for name, peer in peers or [(None, None)]:
        say(f"{row.name} {shape} {mode}{f' against {name}' if name else ''} ...")
        functions = {OURS: ours}
        if peer is not None and peer.jit:
            functions[name] = measure.in_mode(peer.build(params), mode)
        compiling = measure.compile_seconds(functions, inputs, options.compiles)
        executables = {key: measure.compiled(function, inputs) for key, function in functions.items()}
        calls = {key: partial(executable, *inputs) for key, executable in executables.items()}
        if peer is not None and not peer.jit:
            calls[name] = partial(peer.build(params), *(np.asarray(x) for x in inputs))
        sampled = measure.interleave(calls, options.rounds)
        sides = {
            key: {
                "compile_s": measure.spread(compiling[key]).median if key in compiling else None,
                **measure.spread(sampled[key])._asdict(),
                "temp_bytes": measure.temp_bytes(executables[key]) if key in executables else None,
                "error": error(call()) if key == OURS or peer.same_answer else None,
            }
            for key, call in calls.items()
        }
        record = {
            **records.circumstances([peer.package] if peer else []),
            "op": row.name,
            "shape": shape,
            "mode": mode,
            "peer": name,
            "roofline": roofline,
            "ours": sides[OURS],
            "theirs": sides.get(name),
            "ratio": measure.paired_ratio(sampled[OURS], sampled[name]) if name else None,
            "compile_ratio": (measure.paired_ratio(compiling[OURS], compiling[name]) if name in compiling else None),
        }
        yield record | {"targets": judged(row, record)}


def _truth(row: registry.Row, params: registry.Params, inputs: tuple, mode: str) -> Any:
    """The reference's answer on the same inputs in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(_widen, inputs)
        return jax.tree.map(np.asarray, measure.in_mode(row.reference(params), mode)(*wide))


def _widen(leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _error(row: registry.Row, truth: Any, output: Any) -> float:
    return float((row.error or measure.relative_error)(output, truth))


def _figures(row: registry.Row, roofline: dict[str, float], say: Any) -> dict[str, Any]:
    values: dict[str, float] = {}
    for name, figure in row.figures.items():
        say(f"{row.name}: figure {name} ...")
        values |= {key: float(value) for key, value in figure().items()}
    record = {
        **records.circumstances(),
        "op": row.name,
        "shape": None,
        "mode": "figures",
        "peer": None,
        "roofline": roofline,
        "figures": values,
    }
    return record | {"targets": judged(row, record)}


def judged(row: registry.Row, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The row's targets that speak about this record, each with its value and whether it is met."""
    verdicts = []
    for target in row.targets:
        if (target.metric == "figure") != (record["mode"] == "figures"):
            continue
        if target.metric == "figure":
            value = record["figures"].get(target.figure)
        else:
            told = ("shape", "mode") if target.metric == "error" else ("shape", "mode", "peer")
            if any(getattr(target, key) not in (None, record[key]) for key in told):
                continue
            value = _metric(record, target.metric)
        if value is None:
            continue
        verdicts.append(
            {
                "what": target.figure or target.metric,
                "value": value,
                "limit": target.limit,
                "at_least": target.at_least,
                "met": bool(target.met(value)),
                "source": target.source,
            }
        )
    return verdicts


def _metric(record: dict[str, Any], metric: str) -> float | None:
    if metric == "error":
        return record["ours"]["error"]
    if metric == "speedup":
        return None if record["ratio"] is None else 1 / record["ratio"]
    return record[metric]


def summary(record: dict[str, Any]) -> str:
    """One record in a few lines."""
    head = (
        f"{record['op']} {record['mode']}"
        if record["shape"] is None
        else (f"{record['op']} {record['shape']} {record['mode']}")
    )
    lines = [f"{head}  [{record['device']}, jax {record['versions']['jax']}]"]
    for key, value in record.get("figures", {}).items():
        lines.append(f"  {key}: {value:.6g}")
    for name, side in ((OURS, record.get("ours")), (record["peer"], record.get("theirs"))):
        if side:
            lines.append(f"  {name}: {_side(side)}")
    if record.get("ratio") is not None:
        compile_ratio = "" if record["compile_ratio"] is None else f", compile {record['compile_ratio']:.2f}"
        lines.append(f"  ratio {record['ratio']:.3f}{compile_ratio} ({OURS} / {record['peer']}; below 1 is faster)")
    for verdict in record["targets"]:
        sense = "at least" if verdict["at_least"] else "at most"
        word = "met" if verdict["met"] else "MISSED"
        lines.append(f"  target {word}: {verdict['what']} {verdict['value']:.4g}, {sense} {verdict['limit']:g}")
    return "\n".join(lines)


def _side(side: dict[str, Any]) -> str:
    compiling = "" if side["compile_s"] is None else f", compile {side['compile_s']:.2f} s"
    temp = "" if side["temp_bytes"] is None else f", temp {side['temp_bytes'] / 2**20:.2f} MiB"
    times = f"{side['median'] * 1e3:.4g} ms (20 % {side['p20'] * 1e3:.4g}, 80 % {side['p80'] * 1e3:.4g})"
    error = "" if side["error"] is None else f", error {side['error']:.2e}"
    return f"{times}{compiling}{temp}{error}"


if __name__ == "__main__":
    sys.exit(main())
