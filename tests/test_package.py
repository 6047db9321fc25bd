"""The package as a stranger gets it: its extras, its wheel, and an import with nothing but the core installed."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from tests import source
from tests.source import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def plain(name):
    """A distribution's name in its normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    return {plain(Requirement(line).name) for line in requirements}


def closure(distributions):
    """Distributions and all they require, none of their extras."""
    found, queue = set(), set(distributions)
    while queue:
        name = queue.pop()
        found.add(name)
        wanted = [Requirement(line) for line in metadata.requires(name) or ()]
        queue |= {plain(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})} - found
    return found


def top_levels(distributions):
    """Names under which distributions are imported."""
    owners = metadata.packages_distributions()
    return {module for module, owned in owners.items() if {plain(d) for d in owned} & distributions}


def test_extras_exist():
    machines = {"tpu-aot", "gpu-aot"}
    checks = {"test", "bench", "bench-torch", "referee", "lint"}
    assert set(EXTRAS) == {"tour", "interop", "notebooks", "docs"} | checks | machines
    assert PROJECT["requires-python"] == ">=3.11"
    assert "jax>=0.10.2" in PROJECT["dependencies"]


def test_version_is_one():
    import jaxnum

    assert jaxnum.__version__ == PROJECT["version"]


CORE_ONLY = """
import importlib, sys
refused = set(sys.argv[1].split(","))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
for module in sys.argv[2].split(","):
    importlib.import_module(module)
"""


def import_without(refused, modules):
    arguments = [sys.executable, "-c", CORE_ONLY, ",".join(sorted(refused)), ",".join(modules)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_every_module_imports_with_the_core_alone():
    core = top_levels(closure(names(PROJECT["dependencies"])))
    extras = set(metadata.packages_distributions()) - core - set(source.PACKAGES)
    assert {"ot", "lineax", "optimistix", "sklearn", "matplotlib", "tqdm"} <= extras
    done = import_without(extras, [m for m, _ in source.modules()])
    assert done.returncode == 0, done.stderr
    assert "No module named 'ot'" in import_without(extras, ["ot"]).stderr


def test_every_import_is_declared():
    core = top_levels(names(PROJECT["dependencies"]))
    later = core | top_levels(names([*EXTRAS["tour"], *EXTRAS["interop"]]))
    known = set(sys.stdlib_module_names) | set(source.PACKAGES)
    wrong = [
        (m, i.target)
        for m, path in source.modules()
        for i in source.imports(path)
        if i.target.split(".")[0] not in known | (core if i.eager else later)
    ]
    assert wrong == []


def test_the_wheel_holds_types_and_licence(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    [wheel] = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {f"{package}/py.typed" for package in source.PACKAGES} <= set(files)
    assert any(file.endswith("licenses/LICENSE") for file in files)
    assert {file.split("/")[0] for file in files if ".dist-info/" not in file} == set(source.PACKAGES)
    assert {f"{m.replace('.', '/')}" for m, _ in source.modules()} <= {
        file.removesuffix(".py").removesuffix("/__init__") for file in files
    }


@pytest.mark.parametrize(
    "linter", ["ruff check", "ruff format", "codespell", "nbstripout", "basedpyright", "lint-imports"]
)
def test_ci_and_pre_commit_run_the_same_linters(linter):
    assert f"entry: {linter}" in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert linter in (ROOT / ".ci/run").read_text(encoding="utf-8")


def tracked():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return [ROOT / file for file in done.stdout.split("\0") if file]


MACHINE = re.compile(r"(?<![\w.~$}])/(?:work|tmp|root|home|Users|mnt|opt)/\w")


@pytest.mark.parametrize(("text", "found"), [("cd /home" + "/someone", True), ("a/home/b", False), ("~/opt/x", False)])
def test_pattern_of_machine_paths(text, found):
    assert bool(MACHINE.search(text)) is found


def test_no_file_names_a_path_of_one_machine():
    wrong = [
        f"{path}:{number}"
        for path in tracked()
        if path.exists()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert wrong == []
