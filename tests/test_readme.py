"""README.md: its examples run and print what they say, its tables are current, its commands are those of CI."""

import re

import pytest

from tests import readme_tables, source
from tests.source import ROOT

TEXT = readme_tables.README.read_text(encoding="utf-8")


@pytest.mark.parametrize("room", ["transforms.sophia(", "fixed_point(", "linear_solve(", "transport(", "attention("])
def test_every_room_has_an_example(room):
    assert any(room in block[1] for block in readme_tables.EXAMPLE.finditer(TEXT))


def test_examples_print_what_they_say_and_tables_are_current():
    assert readme_tables.filled(TEXT) == TEXT, "run `python -m tests.readme_tables`"


def test_every_public_name_has_a_row():
    for name in source.public_names():
        assert f"`{name.call}(" in TEXT, name.call


def test_ci_runs_the_commands_of_the_readme():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    [line] = re.findall(r'^(pip install -e "\.\[test\]" && .*)$', TEXT, flags=re.M)
    install, test = line.split(" && ")
    commands = [command.strip() for command in script.splitlines()]
    # CI installs with the same words, quietly, for both versions of jax.
    assert commands.count(install.replace("install", "install -qq")) == 2
    assert commands.count(test) == 1
    assert 'pip install -e ".[tour]" && python -m jaxnum tour' in TEXT


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
