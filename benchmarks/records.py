"""Where measurements are kept: one JSON record a line, so that runs append and two runs merge."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add records at the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(record, sort_keys=True) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Every record of a file, oldest first; an absent file has none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def newest(records: Iterable[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The last record of each combination of keys, in the order the combinations first appeared."""
    latest: dict[tuple, dict[str, Any]] = {}
    for record in records:
        latest[tuple(record.get(key) for key in keys)] = record
    return list(latest.values())


def circumstances(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Date, commit, device, cores and versions: what a figure means nothing without."""
    return {
        "date": now(),
        "commit": commit(),
        "device": device(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "numpy", *packages)},
    }


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def version(package: str) -> str:
    """The installed version of a distribution."""
    return importlib.metadata.version(package)


def commit() -> str:
    """The commit of this tree, with "+changes" when files differ from it; "unknown" outside git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        # Results are written while measuring; they do not change what was measured.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def device() -> str:
    """The accelerator's kind, or the processor's model name."""
    import jax

    first = jax.devices()[0]
    return cpu_model() if first.platform == "cpu" else first.device_kind


def cpu_model() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        names = re.findall(r"^model name\s*: (.+)$", listing.read_text(), re.MULTILINE)
        if names:
            return names[0].strip()
    return platform.machine()


def slug(text: str) -> str:
    """A file name made of a device's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
