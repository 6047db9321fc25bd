"""Run stops one after the other: a line before and after each, then the table and the page."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from jaxnum.tour import STOPS
from jaxnum.tour.page import Section, write
from jaxnum.tour.stop import Stop
from kernels_pallas import checks

_NEEDED = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "scipy": "scipy"}


def run(names: Sequence[str] = STOPS, out: str | Path = "jaxnum-tour", *, say: Callable[[str], None] = print) -> Path:
    """Run stops of the tour and write their pictures and `index.html`.

    Args:
      names: stops to run, of `jaxnum.tour.STOPS`.
      out: folder to write to; made if it is not there.
      say: takes each line of progress.

    Returns:
      Path of the page, which is rewritten after every stop.

    Raises:
      ValueError: a name that is no stop.
      ImportError: a package of the extra `tour` is missing.
    """
    stops = {name: load(name) for name in names}
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f'The tour needs {", ".join(missing)}: pip install "jaxnum[tour]"')
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    say(f"jaxnum tour, {len(stops)} stop{'s' * (len(stops) != 1)}, writing to {out}/")
    for i, (name, function) in enumerate(stops.items(), 1):
        say(f"[{i}/{len(stops)}] {name}: {summary(function)}")
        start = time.perf_counter()
        found = function()
        images = _save(found, out)
        seconds = time.perf_counter() - start
        sections.append(Section(name, found, images, seconds))
        page = write(sections, out / "index.html")
        say(f"      {seconds:.1f} s. {found.finding}")
    say("\n" + table(sections))
    say(f"\nOpen {page}")
    return page


def load(name: str) -> Callable[[], Stop]:
    """The function of a stop, by its name."""
    checks.choice("tour", "only", name, STOPS)
    return getattr(importlib.import_module(f"jaxnum.tour._{name}"), name)


def summary(function: Callable[[], Stop]) -> str:
    """The first line of a stop's docstring."""
    return (function.__doc__ or "").strip().splitlines()[0]


def table(sections: Sequence[Section]) -> str:
    """The closing table, as text."""
    width = max(len(s.name) for s in sections)
    lines = [f"{'stop':<{width}}  {'seconds':>7}  finding", "-" * (width + 40)]
    lines += [f"{s.name:<{width}}  {s.seconds:7.1f}  {s.stop.finding}" for s in sections]
    lines.append(f"{'total':<{width}}  {sum(s.seconds for s in sections):7.1f}")
    return "\n".join(lines)


def _save(stop: Stop, out: Path) -> tuple[Path, ...]:
    paths = tuple(out / f"{picture.name}.png" for picture in stop.pictures)
    for path, picture in zip(paths, stop.pictures, strict=True):
        picture.figure.savefig(path)
    return paths
