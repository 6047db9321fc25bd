import re

import pytest

import jaxnum.tour.run as tour
from jaxnum.__main__ import main
from jaxnum.tour import STOPS
from jaxnum.tour.page import Section, write
from jaxnum.tour.stop import Picture, Stop, curves, figure


def tiny():
    """A stop for the test."""
    canvas, ax = figure(size=(2, 1))
    ax.plot([1, 10], label="a < b")
    curves(ax, "title", "x", "y")
    return Stop(
        "Tiny & small", ("One <paragraph>.",), "Found 3.", (("error", "1e-3"),), (Picture("tiny", canvas, "It rises."),)
    )


def unit(function):
    """The stop `function` of the module of that name, run by the frame."""
    return lambda name: function


def test_run_writes_a_page_that_needs_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tour, "load", unit(tiny))
    lines = []
    page = tour.run(["tiny"], tmp_path / "out", say=lines.append)
    html = page.read_text(encoding="utf-8")
    assert page == tmp_path / "out" / "index.html"
    assert (tmp_path / "out" / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"https?://|<link|<script|@import|url\(", html)
    assert re.findall(r'src="([^"]{22})', html) == ["data:image/png;base64,"]
    for text in ("Tiny &amp; small", "One &lt;paragraph&gt;.", "Found 3.", "1e-3", "It rises.", 'href="#tiny"'):
        assert text in html


def test_run_says_what_comes_before_it_starts_and_what_was_found_after(tmp_path, monkeypatch):
    lines = []

    def stop():
        """Looks at what was said."""
        assert lines[-1] == "[1/1] tiny: Looks at what was said."
        return tiny()

    monkeypatch.setattr(tour, "load", unit(stop))
    tour.run(["tiny"], tmp_path, say=lines.append)
    assert re.fullmatch(r" +\d+\.\d s\. Found 3\.", lines[2])
    assert "tiny" in lines[3]
    assert "total" in lines[3]


def test_every_section_is_on_the_page(tmp_path):
    path = tmp_path / "tiny.png"
    path.write_bytes(b"png")
    sections = [Section(name, tiny(), (path,), 1.5) for name in ("first", "second")]
    html = write(sections, tmp_path / "index.html").read_text(encoding="utf-8")
    assert html.count("<section id=") == 2
    assert "3.0" in html


def test_missing_packages_are_named_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tour, "find_spec", lambda name: None)
    assert main(["tour", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err.strip()
    assert said == 'The tour needs matplotlib, scikit-learn, scipy: pip install "jaxnum[tour]"'


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "tour" in capsys.readouterr().out


def test_list_names_every_stop_with_its_summary(capsys):
    assert main(["tour", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STOPS)
    assert all(len(line.split()) > 5 for line in lines)


def test_an_unknown_stop_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["tour", "--only", "nowhere"])
    said = capsys.readouterr().err
    assert "nowhere" in said
    assert all(name in said for name in STOPS)
    with pytest.raises(ValueError, match="tour: `only` must be one of 'digits'"):
        tour.load("nowhere")


@pytest.mark.slow
def test_the_whole_tour_ends_within_three_minutes(tmp_path, capsys):
    assert main(["tour", "--out", str(tmp_path)]) == 0
    total = float(re.search(r"total +([\d.]+)", capsys.readouterr().out).group(1))
    assert total < 180
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert html.count("<section id=") == len(STOPS)
