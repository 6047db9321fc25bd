"""The tour's page: one HTML file that holds its pictures and needs nothing else."""

from __future__ import annotations

import base64
import os
import platform
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from jaxnum.tour.stop import Stop


class Section(NamedTuple):
    """A stop as it was run: its name, what it found, the files of its pictures and its wall time."""

    name: str
    stop: Stop
    images: tuple[Path, ...]
    seconds: float


def write(sections: Sequence[Section], path: Path) -> Path:
    """Write the page of these sections to `path` and return it."""
    total = sum(s.seconds for s in sections)
    body = "\n".join([_summary(sections, total), *(_section(i, s) for i, s in enumerate(sections, 1))])
    path.write_text(_PAGE.format(style=_STYLE, machine=escape(_machine()), body=body), encoding="utf-8")
    return path


def _machine() -> str:
    import jax

    import jaxnum

    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return (
        f"jaxnum {jaxnum.__version__}, jax {jax.__version__}, Python {platform.python_version()}, "
        f"{devices} ({os.cpu_count()} cores, {platform.machine()})"
    )


def _summary(sections: Sequence[Section], total: float) -> str:
    rows = "".join(
        f'<tr><td><a href="#{escape(s.name)}">{escape(s.name)}</a></td><td class="number">{s.seconds:.1f}</td>'
        f"<td>{escape(s.stop.finding)}</td></tr>"
        for s in sections
    )
    return (
        '<table class="summary"><thead><tr><th>stop</th><th class="number">seconds</th><th>finding</th></tr></thead>'
        f'<tbody>{rows}</tbody><tfoot><tr><td>total</td><td class="number">{total:.1f}</td>'
        "<td>compilation included</td></tr></tfoot></table>"
    )


def _section(number: int, section: Section) -> str:
    stop = section.stop
    text = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in stop.text)
    pictures = "".join(
        f'<figure><img alt="{escape(picture.caption)}" src="{_inline(path)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture, path in zip(stop.pictures, section.images, strict=True)
    )
    rows = "".join(
        f'<tr><td>{escape(what)}</td><td class="number">{escape(value)}</td></tr>' for what, value in stop.rows
    )
    return (
        f'<section id="{escape(section.name)}"><h2><span>{number}</span>{escape(stop.title)}</h2>'
        f"{text}{pictures}<table>{rows}</table></section>"
    )


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f5f7; color: #1d2430;
  font: 16px/1.6 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
header { background: #17324f; color: #fff; padding: 2.2rem 1rem 2rem; }
header > div, main { max-width: 62rem; margin: 0 auto; }
header h1 { margin: 0 0 .3rem; font-size: 2rem; letter-spacing: -.01em; }
header p { margin: .2rem 0; color: #c9d6e4; }
main { padding: 1.4rem 1rem 3rem; }
section, .summary { background: #fff; border-radius: 8px; box-shadow: 0 1px 3px rgba(20, 35, 60, .13); }
section { padding: 1.4rem 1.8rem 1.6rem; margin: 1.4rem 0; }
h2 { margin: 0 0 .7rem; font-size: 1.35rem; }
h2 span { display: inline-block; min-width: 1.7rem; margin-right: .6rem; border-radius: 50%; background: #2f6db5;
  color: #fff; text-align: center; font-size: 1rem; line-height: 1.7rem; vertical-align: .12rem; }
p { margin: .5rem 0; max-width: 50rem; }
figure { margin: 1.1rem 0; }
img { display: block; width: 100%; height: auto; }
figcaption { color: #596273; font-size: .92rem; margin-top: .3rem; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
td, th { padding: .38rem .7rem; border-bottom: 1px solid #e4e7ec; text-align: left; vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th { color: #596273; font-weight: 600; }
.summary { overflow: hidden; }
.summary td, .summary th { padding: .55rem 1rem; }
tfoot td { background: #f7f8fa; font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
section table .number { white-space: normal; }
a { color: #2f6db5; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>jaxnum tour</title>
<style>{style}</style>
</head>
<body>
<header><div><h1>jaxnum, at work</h1>
<p>Gradient transforms, solvers and kernels on real data. Every figure on this page was computed by this run.</p>
<p>{machine}</p></div></header>
<main>
{body}
</main>
</body>
</html>
"""
