"""What the tests of the frame read from the repository: its files, its public names, its imports."""

import ast
import importlib
import inspect
import types
from pathlib import Path
from typing import NamedTuple

from benchmarks.registry import ROOMS as ROOMS

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxnum", "kernels_pallas")


class Name(NamedTuple):
    """A public function: where users find it, the function, and its file relative to the root."""

    room: str
    name: str
    function: types.FunctionType
    file: Path

    @property
    def call(self):
        return f"{self.room}.{self.name}"

    @property
    def is_method(self):
        """Whether its file lies in a room of methods, rather than in `core` or `verbs`."""
        return any(part.startswith("_") for part in self.file.parts)


def public_functions(room):
    """The public functions of a package, in the order of their names."""
    module = importlib.import_module(room)
    listed = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    members = {name: getattr(module, name) for name in sorted(listed)}
    return [
        Name(room, name, member, Path(inspect.getfile(member)).relative_to(ROOT))
        for name, member in members.items()
        if isinstance(member, types.FunctionType)
    ]


def public_names():
    """Every public function of jaxnum itself and of its rooms."""
    return [name for room in ("jaxnum", *ROOMS) for name in public_functions(room)]


def verbs():
    """The functions of `jaxnum.verbs`, by name."""
    return [name for name in public_functions("jaxnum") if name.file.name == "verbs.py"]


def modules():
    """(dotted name, path) of every module of both packages."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


class Import(NamedTuple):
    """One imported module, and whether the import runs when its own module is imported."""

    target: str
    eager: bool


def imports(path):
    """Every absolute import of a file; `from a import b` counts as `a.b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nested = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node not in nested) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (Import(f"{node.module}.{alias.name}", node not in nested) for alias in node.names)
