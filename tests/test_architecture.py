"""The house's own rules: what an import costs, who may import whom, and that one name finds all that belongs to it."""

import ast
import importlib
import inspect
import os
import shutil
import subprocess
import sys

import pytest

import jaxnum
from benchmarks import registry
from tests import source
from tests.source import ROOT

PUBLIC = ", ".join(("jaxnum", *source.ROOMS))
NAMES = source.public_names()
METHODS = [name for name in NAMES if name.is_method]


def python(code, **environment):
    """Run code in a fresh interpreter at the root."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_import_adds_little_to_jax():
    clock = "time.process_time()"
    code = f"import time; a = {clock}; import jax; b = {clock}; import {PUBLIC}; c = {clock}; print(b - a, c - b)"
    seconds = []
    # A busy machine can only slow an import down, so the quickest of several tells what it costs; seconds of this
    # process alone, since those of the wall are the neighbours' too. A slow machine, or one with busy caches, slows
    # jax as much: seconds are those of a machine that imports jax in half a second.
    while len(seconds) < 10 and min(seconds, default=1.0) >= 0.2:
        done = python(code)
        assert done.returncode == 0, done.stderr
        of_jax, added = map(float, done.stdout.split())
        seconds.append(min(added, 0.5 * added / of_jax))
    assert min(seconds) < 0.2, seconds


def test_import_starts_no_backend():
    # Whatever starts a backend meets a platform that does not exist.
    assert python("import jax; jax.devices()", JAX_PLATFORMS="none").returncode != 0
    done = python(f"import {PUBLIC}", JAX_PLATFORMS="none")
    assert done.returncode == 0, done.stderr


LAZY = [p for p in PUBLIC.split(", ") if "lazy.attach(" in inspect.getsource(importlib.import_module(p))]


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_what_is_imported_late(package):
    module = importlib.import_module(package)
    shown = {
        alias.asname: f"{node.module}.{alias.name}"
        for block in ast.parse(inspect.getsource(module)).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(shown) == sorted(module.__all__)
    for name, path in shown.items():
        home, _, inner = path.rpartition(".")
        found = importlib.import_module(path) if home == package else getattr(importlib.import_module(home), inner)
        assert getattr(module, name) is found
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        getattr(module, "absent")  # noqa: B009  # the statement, not its value


def test_import_leaves_heavy_packages_alone():
    code = f"import sys, jax; before = set(sys.modules); import {PUBLIC}; print(*set(sys.modules) - before)"
    done = python(code)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    heavy = (
        "flax",
        "equinox",
        "scipy",
        "sklearn",
        "matplotlib",
        "tqdm",
        "lineax",
        "optimistix",
        "matfree",
        "ott",
        "ot",
    )
    heavy += ("jax.experimental.pallas.tpu", "jax.experimental.pallas.mosaic_gpu", "jax.experimental.mosaic")
    assert [m for m in loaded for h in heavy if m == h or m.startswith(f"{h}.")] == []


def lint_imports(folder):
    command = [shutil.which("lint-imports", path=os.path.dirname(sys.executable)), "--no-logo", "--no-cache"]
    assert command[0], "import-linter is part of the extra `test`"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def test_import_arrows_hold():
    status, report = lint_imports(ROOT)
    assert status == 0, report
    assert "0 broken" in report


# (file, the import that no contract may let through, words of the contract that must object)
WRONG_ARROWS = [
    ("kernels_pallas/checks.py", "import jaxnum", "kernels_pallas imports nothing of jaxnum"),
    ("kernels_pallas/checks.py", "import jaxnum.core.a", "kernels_pallas imports nothing of jaxnum"),
    ("jaxnum/core/a.py", "import jaxnum.solvers.a", "the floors of jaxnum"),
    ("jaxnum/core/a.py", "import jaxnum", "no module of the floors"),
    ("jaxnum/core/a.py", "import kernels_pallas._attention", "core imports the checks"),
    ("jaxnum/solvers/a.py", "import jaxnum.transforms.a", "the floors of jaxnum"),
    ("jaxnum/transforms/a.py", "import jaxnum.solvers.a", "the floors of jaxnum"),
    ("jaxnum/curvature/a.py", "import jaxnum.solvers.a", "the floors of jaxnum"),
    ("jaxnum/solvers/a.py", "import jaxnum.tour", "the floors of jaxnum"),
    ("jaxnum/verbs.py", "import jaxnum.transforms.a", "verbs imports core and solvers only"),
]


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory):
    """Empty packages of the house's shape, under its own contracts."""
    folder = tmp_path_factory.mktemp("skeleton")
    files = ["kernels_pallas/checks.py", "kernels_pallas/_attention/__init__.py", "jaxnum/verbs.py"]
    files += [
        f"jaxnum/{room}/{file}.py"
        for room in ("transforms", "schedules", "solvers", "curvature", "sequence", "training", "core")
        for file in "ab"
    ]
    for file in [*files, "jaxnum/tour/a.py"]:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in (path.parent, path.parent.parent):
            if package != folder:
                (package / "__init__.py").touch()
        path.touch()
    # An exception that is never used would be an error.
    (folder / "jaxnum/core/b.py").write_text("import kernels_pallas.checks\n")
    (folder / "jaxnum/core/costs.py").write_text("import kernels_pallas\n")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_contracts_keep_an_honest_house(skeleton):
    status, report = lint_imports(skeleton)
    assert status == 0, report


@pytest.mark.parametrize(("file", "statement", "contract"), WRONG_ARROWS)
def test_contracts_reject_a_wrong_arrow(skeleton, file, statement, contract):
    path = skeleton / file
    path.write_text(f"{statement}\n")
    try:
        status, report = lint_imports(skeleton)
    finally:
        path.write_text("")
    assert status == 1, report
    assert any(line.startswith(contract) and "BROKEN" in line for line in report.splitlines()), report


def private_door(module, target):
    """Whether an import goes past the front door of a folder that belongs to somebody else.

    Operations of kernels_pallas are entered through their `__init__` alone; interop and tour use public names only.
    """
    parts, own = target.split("."), module.split(".")
    if parts[0] not in source.PACKAGES:
        return False
    if parts[0] == "kernels_pallas" and own[:2] != parts[:2] and len(parts) > 2 and parts[1].startswith("_"):
        # `kernels_pallas._attention.attention` is a name in its `__init__`; a module of that name is inside.
        inside = ROOT.joinpath(*parts)
        return inside.is_dir() or inside.with_suffix(".py").exists()
    if own[:2] in (["jaxnum", "interop"], ["jaxnum", "tour"]) and own[:2] != parts[:2]:
        return any(part.startswith("_") for part in parts) or parts[:2] == ["jaxnum", "core"]
    return False


def test_nobody_uses_another_folders_back_door():
    wrong = [(m, i.target) for m, path in source.modules() for i in source.imports(path) if private_door(m, i.target)]
    assert wrong == []
    assert private_door("jaxnum.tour._digits", "jaxnum.transforms._sophia.sophia")
    assert private_door("jaxnum.interop.lineax", "jaxnum.core.solver.Solver")
    assert not private_door("jaxnum.tour._digits", "jaxnum.transforms.sophia")


def test_only_the_command_line_imports_the_tour():
    users = {m for m, path in source.modules() for i in source.imports(path) if i.target.startswith("jaxnum.tour")}
    assert {m for m in users if not m.startswith("jaxnum.tour")} == {"jaxnum.__main__"}


def test_everything_public_is_reached_from_the_top():
    assert {n.call for n in NAMES} >= {"jaxnum.solve", "jaxnum.fixed_point", "jaxnum.transforms.sophia"}
    assert all(getattr(jaxnum, room.split(".")[1]) for room in source.ROOMS if room.startswith("jaxnum."))


def stem(name):
    """What the file of a method, or its own folder, is called after its underscore."""
    *_, part = [part for part in name.file.parts if part.startswith("_")]
    return part.removesuffix(".py")[1:]


@pytest.mark.parametrize("name", METHODS, ids=lambda n: n.name)
def test_one_name_finds_file_test_and_row(name):
    # A file may hold variants of its method; the rule is for the name on the file.
    method = stem(name)
    assert name.name == method or f"_{method}_" in f"_{name.name}_", f"{name.call} lives in {name.file}"
    assert (name.room, method) in {(n.room, n.name) for n in METHODS}
    assert list((ROOT / "tests").rglob(f"test_{method}.py")), f"tests/**/test_{method}.py is missing"


def test_every_file_of_a_method_gives_a_public_name():
    rooms = {"transforms", "schedules", "solvers", "curvature", "sequence", "training"}
    files = {
        path.stem[1:]
        for m, path in source.modules()
        if path.stem.startswith("_") and path.stem != "__init__" and m.split(".")[1] in rooms
    }
    folders = {path.parent.name[1:] for path in (ROOT / "kernels_pallas").rglob("api.py")}
    assert files | folders == {stem(n) for n in METHODS}


def test_every_method_is_measured_or_says_why_not():
    assert registry.uncovered() == []
    rows = registry.rows()
    for name in METHODS:
        if name.name == stem(name):
            assert name.name in rows or name.name in registry.EXEMPT, f"benchmarks/ops/{name.name}.py is missing"
    assert {path.stem for path in (ROOT / "benchmarks/ops").glob("[!_]*.py")} == set(rows)
