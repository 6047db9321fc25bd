"""What a stop of the tour returns, and the canvas its pictures are drawn on."""

from __future__ import annotations

from typing import Any, NamedTuple

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f6db5", "#d9722e", "#3f9b6a", "#7a5195", "#8a8f98"


class Picture(NamedTuple):
    """One matplotlib figure with the name of its file (no suffix) and one sentence on what it shows."""

    name: str
    figure: Any
    caption: str


class Stop(NamedTuple):
    """What a stop found.

    Attributes:
      title: heading of its section.
      text: paragraphs of plain text.
      finding: one sentence, for the terminal and the summary.
      rows: (quantity, value) pairs, values as text with their units.
      pictures: at least one.
    """

    title: str
    text: tuple[str, ...]
    finding: str
    rows: tuple[tuple[str, str], ...]
    pictures: tuple[Picture, ...]


def figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (9.0, 3.6)) -> tuple[Any, Any]:
    """A figure in the tour's style and its axes, an array unless there is one; `size` in inches.

    It belongs to no window system and to no global state.
    """
    from matplotlib.figure import Figure

    canvas = Figure(figsize=size, dpi=130, layout="constrained")
    axes = canvas.subplots(rows, columns)
    for ax in canvas.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        ax.title.set_fontsize(10.5)
    return canvas, axes


def curves(ax: Any, title: str, x: str, y: str, *, log: bool = True, legend: str = "best") -> None:
    """Label axes that hold curves, with a grid and a legend at the place named."""
    if log:
        ax.set_yscale("log")
    ax.set_title(title, fontsize=10.5)
    ax.set_xlabel(x, fontsize=9.5)
    ax.set_ylabel(y, fontsize=9.5)
    ax.grid(True, color="#dfe3e8", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=9, loc=legend)


def image(ax: Any, title: str) -> None:
    """Strip axes that hold a picture down to their title."""
    ax.set_title(title, fontsize=10.5)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
