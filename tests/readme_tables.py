"""Write the generated parts of README.md: `python -m tests.readme_tables`.

Behind every python block stands what it prints. The table of methods comes from the first lines of docstrings and from
the files themselves; the table of support from the contracts: a name has a mark where its members are registered for
the check that shows it, since the suite runs every check on every member.
"""

import contextlib
import inspect
import io
import re
import sys

from jaxnum.tour import STOPS
from jaxnum.tour.run import load, summary
from tests import source
from tests.contracts import kernel, solver, test_kernels, test_transforms, transform
from tests.source import ROOT
from tests.test_verbs import CASES

README = ROOT / "README.md"
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:```text\n.*?^```\n)?", flags=re.M | re.S)
HEADINGS = {
    "jaxnum": "Verbs, and what drives them",
    "jaxnum.transforms": "Gradient transforms",
    "jaxnum.schedules": "Schedules",
    "jaxnum.training": "Around a training run",
    "jaxnum.solvers": "Solvers, and what composes them",
    "jaxnum.curvature": "Curvature",
    "jaxnum.sequence": "Sequence layers, and what they are made of",
    "kernels_pallas": "Kernels",
}
COLUMNS = (
    *("jit", "vmap", "forward mode", "reverse mode", "second order", "float64", "bfloat16", "sharded", "export"),
    *("CPU", "GPU", "TPU"),
)
# For each family, the check that a mark in a column stands for.
SOLVER = {
    "jit": "check_jit_and_export",
    "vmap": "check_vmap",
    "forward mode": "check_derivatives",
    "reverse mode": "check_derivatives",
    "second order": "check_derivatives",
    "float64": "check_derivatives",
    "sharded": "check_sharding",
    "export": "check_jit_and_export",
    "CPU": "check_statuses",
}
TRANSFORM = {
    "jit": "traces_once",
    "vmap": "vmap_and_scan",
    "float64": "precisions_agree",
    "bfloat16": "keeps_types",
    "sharded": "keeps_sharding",
    "CPU": "parabola",
}

KERNEL = {
    "jit": "check_export",
    "vmap": "check_vmap",
    "forward mode": "check_second_order",
    "reverse mode": "check_gradients",
    "second order": "check_second_order",
    "float64": "check_forward",
    "bfloat16": "check_forward",
    "export": "check_export",
    "CPU": "check_forward",
    "TPU": "check_compiles_for_tpu",
}
# Where a mark would say too much.
WORDS = {("kernels_pallas", "forward mode"): "`reference`", ("kernels_pallas", "TPU"): "compiled"}


def main():
    """Rewrite README.md and say whether it changed."""
    old = README.read_text(encoding="utf-8")
    new = filled(old)
    README.write_text(new, encoding="utf-8")
    print("README.md is up to date" if new == old else "README.md rewritten")
    return 0


def filled(text):
    """The text with every marked region, and the output of every example, as the repository gives them now."""
    for name, make in (("methods", methods), ("support", support), ("stops", stops)):
        pattern = rf"(<!-- begin {name}[^\n]*-->\n).*?(<!-- end {name} -->)"
        found = re.findall(pattern, text, flags=re.S)
        if len(found) != 1:
            raise ValueError(f"README.md must have one region {name!r}; got {len(found)}")
        [(begin, end)] = found
        text = re.sub(pattern, (begin + make() + "\n" + end).replace("\\", r"\\"), text, flags=re.S)
    names = {"__name__": "readme"}
    return EXAMPLE.sub(lambda block: example(block[1], names), text)


def example(code, names):
    """A python block with what it prints; all blocks share their names, as one reader would type them in."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
    output = f"```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
    return f"```python\n{code}```\n{output}"


def table(head, rows):
    """A Markdown table; cells arrive escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(text):
    """Text whose stars, bars and brackets Markdown leaves alone; what stands in backticks is safe from it."""
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([*|<])", r"\\\1", part) for i, part in enumerate(parts))


def methods():
    """One table a room."""
    head = ("I want", "call", "file", "test", "notebook")
    parts = []
    for room, heading in HEADINGS.items():
        names = source.public_functions(room)
        if names:
            parts += [f"### {heading}", table(head, [method(name) for name in names])]
    return "\n\n".join(parts)


def method(name):
    """The row of one public name."""
    summary = inspect.getdoc(name.function).split("\n")[0].rstrip(".:")
    required = [
        ("*" if p.kind is p.VAR_POSITIONAL else "") + p.name
        for p in inspect.signature(name.function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
    ]
    books = [link(path.with_suffix(".ipynb"), path.stem[:2]) for path in notebooks(name)]
    call = f"`{name.call}({', '.join(required)})`"
    return plain(summary), call, link(name.file), link(test_file(name)), ", ".join(books)


def link(path, text=None):
    """A link to a file of the repository."""
    path = path.relative_to(ROOT) if path.is_absolute() else path
    return f"[{plain(text or path.name)}]({path.as_posix()})"


def test_file(name):
    """The test file named after the method or its file, else the one that names it most often."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    for stem in (name.name, name.file.stem.strip("_")):
        for path in files:
            if path.stem == f"test_{stem}":
                return path
    patterns = (rf"\b{name.call.split('.')[-2]}\.{name.name}\b", rf"\b{name.name}\(")
    return max(files, key=lambda path: [len(re.findall(p, path.read_text(encoding="utf-8"))) for p in patterns])


def notebooks(name):
    """The notebooks that call it."""
    call = re.compile(rf"\b{name.name}\(")
    return [path for path in sorted((ROOT / "notebooks").glob("*.py")) if call.search(path.read_text(encoding="utf-8"))]


def support():
    """The table of support, and the names that have no row in it."""
    rows, without = [], []
    for name in source.public_names():
        marks = marked(name)
        if marks:
            rows.append(
                (
                    f"`{name.call}`",
                    *(WORDS.get((name.room, column), "yes") if column in marks else "" for column in COLUMNS),
                )
            )
        else:
            without.append(f"`{name.call}`")
    return table(("", *COLUMNS), rows) + f"\n\nWithout a row, since no contract is theirs alone: {', '.join(without)}."


def marked(name):
    """The columns in which a name has a mark."""
    if name.room == "jaxnum.transforms":
        members = [
            m
            for m in test_transforms.TRANSFORMS
            if name.name in (m.name, m.factory.__name__, m.factory.__name__.split("_")[0])
        ]
        members += [
            m
            for m in test_transforms.TRANSFORMS
            if name.name in (f"scale_by_{m.factory.__name__}", f"scale_by_{m.name}")
        ]
        return shown(members, TRANSFORM, {check.__name__ for check in transform.CHECKS})
    if name.room == "kernels_pallas":
        called = re.findall(r"kernel\.(check_\w+)", inspect.getsource(test_kernels))
        run = {*called, *(f"check_{each}" for each in test_kernels.PER_IMPLEMENTATION)}
        return shown([m for m in kernel.KERNELS if m.name == name.name], KERNEL, run)
    if name.room == "jaxnum.solvers":
        members = [m for m in solver.SOLVERS if name.name in m.make().name.split()]
    elif name.name in CASES:
        members = [m for m in solver.SOLVERS if issubclass(type(CASES[name.name][2]), m.make().problem)]
    else:
        members = solver.SOLVERS if name.name == "solve" else []
    return shown(members, SOLVER, {check.__name__ for check in solver.CHECKS})


def shown(members, columns, run):
    """The columns of a name with members, whose checks must all be among those that the suite runs."""
    missing = set(columns.values()) - run
    if missing:
        raise ValueError(f"the contract has no checks {sorted(missing)}")
    return set(columns) if members else set()


def stops():
    """The stops of the tour."""
    return "\n".join(f"- **{name}**: {plain(summary(load(name)))}" for name in STOPS)


if __name__ == "__main__":
    sys.exit(main())
