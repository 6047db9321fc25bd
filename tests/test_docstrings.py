"""Every public function says what it takes, gives and comes from; no signature hides behind **kwargs."""

import ast
import inspect
import re

import pytest

from tests import source

NAMES = source.public_names()
# A check of arguments has no arithmetic of its own.
NO_PAPER = {"strict"}
SECTIONS = ("Args", "Returns", "Raises", "Cost", "Numerics", "Derivatives", "Source", "Example")


def sections(name):
    """The sections of a docstring by heading; prose such as "Args and errors: see `sophia`." borrows another's."""
    text = inspect.getdoc(name.function) or ""
    found = {"summary": text}
    for borrowed in re.findall(r"^(?:Args|Raises|Source)\b[^:\n]*: see `(\w+)`", text, flags=re.M):
        found |= sections(next(n for n in NAMES if n.name == borrowed))
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", text, flags=re.M)
    return found | {"summary": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", NAMES, ids=lambda n: n.call)
def test_docstring_is_complete(name):
    found = sections(name)
    first = found["summary"].split("\n")[0]
    assert first.endswith((".", ":")), first
    assert found.get("Returns", "").strip()
    for argument in inspect.signature(name.function).parameters.values():
        shown = "*" * (argument.kind is argument.VAR_POSITIONAL) + argument.name
        assert re.search(rf"^\s*{re.escape(shown)}\b.*?:", found["Args"], flags=re.M), f"`{shown}` is not described"


@pytest.mark.parametrize("name", [n for n in NAMES if n.is_method], ids=lambda n: n.call)
def test_method_names_its_source_and_what_it_raises(name):
    found = sections(name)
    assert found.get("Raises", "").strip()
    assert found.get("Source", "").strip() or name.name in NO_PAPER


def test_every_method_has_an_example():
    assert [n.call for n in NAMES if n.is_method and ">>>" not in sections(n).get("Example", "")] == []


def test_no_signature_hides_behind_keywords():
    # optax's extra arguments must pass through; the checks take their arguments by name to repeat the names; what is
    # called `_` is dropped, as a callback may drop what its caller insists on.
    wrong = []
    for module, path in source.modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            keywords = getattr(getattr(node, "args", None), "kwarg", None)
            if keywords is not None and keywords.arg.strip("_") not in ("", "extra_args"):
                is_check = module == "kernels_pallas.checks" or getattr(node, "name", "").startswith("_check")
                wrong += [] if is_check else [f"{path}:{node.lineno}"]
    assert wrong == []


def test_no_switch_in_the_environment():
    assert [m for m, path in source.modules() if re.search(r"\b(environ|getenv)\b", path.read_text())] == []
