"""Every notebook: text and .ipynb agree cell by cell, no outputs are kept, and the text runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = sorted((ROOT / "notebooks").glob("*.py"))


def cells(text):
    """(kind, source) of every percent cell, as jupytext writes them."""
    body = re.sub(r"\A# ---\n(#.*\n)*?# ---\n", "", text)
    for chunk in re.split(r"^# %%", body, flags=re.M)[1:]:
        head, _, source = chunk.partition("\n")
        source = source.strip("\n")
        if "[markdown]" in head:
            source = "\n".join(re.sub(r"^# ?", "", line) for line in source.split("\n"))
            yield "markdown", source
        else:
            yield "code", source


def test_there_are_notebooks():
    assert TEXTS
    assert [p.stem for p in TEXTS] == [p.stem for p in sorted((ROOT / "notebooks").glob("*.ipynb"))]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.stem)
def test_text_and_notebook_agree(path):
    notebook = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    built = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert built == list(cells(path.read_text(encoding="utf-8")))
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert "colab-badge.svg" in built[0][1]
    assert f"/notebooks/{path.stem}.ipynb" in built[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
