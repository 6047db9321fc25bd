"""The harness on a neutral toy row: refusals, order of sampling, judged targets, records and report."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import measure, records, registry, report, run

GREEN, RED = "def test_green():\n    assert True\n", "def test_red():\n    assert False\n"


def toy(**changes):
    fields = {
        "name": "toy",
        "covers": (),
        "shapes": {"small": {"n": 8}},
        "make": lambda params: (jnp.arange(1.0, params["n"] + 1, dtype=jnp.float32),),
        "run": lambda params: lambda x: jnp.sin(x),
        "reference": lambda params: lambda x: jnp.sin(x),
        "modes": ("fwd", "fwd_bwd"),
        "tests": ("tests/benchmarks/__init__.py",),
        "peers": {
            "twice": registry.Peer("jax", lambda params: lambda x: 2 * jnp.sin(x)),
            "host": registry.Peer("numpy", lambda params: np.sin, jit=False, modes=("fwd",)),
        },
        "targets": (registry.Target("error", 1e-6, "exact to rounding"),),
    }
    return registry.Row(**(fields | changes))


@pytest.fixture
def only_toy(monkeypatch):
    def use(row):
        monkeypatch.setattr(registry, "rows", lambda: {row.name: row})
        monkeypatch.setattr(measure, "roofline", lambda: {"matmul_gflops": 1.0, "exp_gelements": 1.0})

    return use


def options(tmp_path, *more):
    return ["--results", str(tmp_path / "r.json"), "--rounds", "2", "--compiles", "1", *more]


def test_red_tests_mean_no_timing(tmp_path, only_toy, monkeypatch, capsys):
    (tmp_path / "test_red.py").write_text(RED)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    only_toy(toy(tests=("test_red.py",)))
    assert run.main(options(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "toy: no timing, its tests are red" in err
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("tests", [(), ("tests/absent.py",)])
def test_missing_tests_mean_no_timing(tmp_path, only_toy, capsys, tests):
    only_toy(toy(tests=tests))
    assert run.main(options(tmp_path)) == 1
    assert "its tests are missing" in capsys.readouterr().err


def test_run_then_report(tmp_path, only_toy, monkeypatch, capsys):
    (tmp_path / "test_green.py").write_text(GREEN)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    figure = registry.Target("figure", 3.0, "three", figure="answer")
    row = toy(
        tests=("test_green.py",),
        figures={"answer": lambda: {"answer": 4.0}},
        targets=(registry.Target("error", 1e-6, "exact to rounding"), figure),
    )
    only_toy(row)
    assert run.main(options(tmp_path)) == 0
    assert run.main(options(tmp_path, "--mode", "fwd", "--compare", "twice")) == 0
    out = capsys.readouterr().out
    assert "target MISSED: answer 4, at most 3" in out
    kept = records.read(tmp_path / "r.json")
    cases = [(record["mode"], record["peer"]) for record in kept]
    assert cases == [
        ("fwd", "twice"),
        ("fwd", "host"),
        ("fwd_bwd", "twice"),
        ("figures", None),
        ("fwd", "twice"),
    ]
    first = kept[0]
    assert first["ours"]["error"] < 1e-6
    assert first["theirs"]["error"] == pytest.approx(1.0, rel=1e-5)
    assert first["ours"]["p20"] <= first["ours"]["median"] <= first["ours"]["p80"]
    assert {"jax", "jaxlib", "numpy"} <= set(first["versions"])
    assert first["targets"][0]["met"]
    assert kept[1]["compile_ratio"] is None
    report.main(tmp_path, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    # The newest record of a case replaces the older one.
    assert text.count("| small, fwd | twice |") == 1
    assert "**missed**: answer" in text
    assert f"jax {jax.__version__}" in text
    assert first["commit"] in text


def test_unknown_names_and_missing_package_are_named(tmp_path, only_toy, capsys):
    absent = registry.Peer("no-such-distribution", lambda params: None)
    only_toy(toy(peers={"absent": absent, "twice": toy().peers["twice"]}))
    for flags, sentence in [
        (("--op", "toi"), "--op must be one of toy; got 'toi'"),
        (("--compare", "x"), "--compare must be one of absent, twice; got 'x'"),
        (("--compare", "absent"), 'pip install "jaxnum[bench]"'),
    ]:
        assert run.main(options(tmp_path, *flags)) == 1
        assert sentence in capsys.readouterr().err


def test_samples_are_interleaved(monkeypatch):
    monkeypatch.setattr(measure, "_SAMPLE_SECONDS", 0.0)
    order = []
    samples = measure.interleave({"A": lambda: order.append("A"), "B": lambda: order.append("B")}, rounds=3)
    assert "".join(order) == "AABB" + "AABB" * 3  # each sample after a run of its own that is not timed
    assert [len(s) for s in samples.values()] == [3, 3]


def test_compiles_are_fresh_and_interleaved():
    traced = []

    def function(name):
        def body(x):
            traced.append(name)
            return x + 1

        return jax.jit(body)

    samples = measure.compile_seconds({"A": function("A"), "B": function("B")}, (jnp.ones(2),), 3)
    assert traced == list("ABABABAB")  # the first round warms up and is not counted
    assert [len(s) for s in samples.values()] == [3, 3]


def test_paired_ratio_compares_neighbours():
    assert measure.paired_ratio([1.0, 10.0, 2.0], [2.0, 20.0, 4.0]) == 0.5


def test_relative_error_takes_the_worst_leaf_and_refuses_other_trees():
    assert measure.relative_error({"a": jnp.ones(2), "b": jnp.zeros(1)}, {"a": np.ones(2), "b": np.zeros(1)}) == 0
    assert measure.relative_error((jnp.ones(2), 2 * jnp.ones(2)), (np.ones(2), np.ones(2))) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="must have 1 leaves"):
        measure.relative_error((1.0, 2.0), (1.0,))


def test_nan_meets_no_target():
    assert not registry.Target("error", 1.0, "s").met(float("nan"))
    assert not registry.Target("speedup", 1.0, "s", at_least=True).met(float("nan"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"modes": ("forward",)},
        {"targets": (registry.Target("speed", 1.0, "s"),)},
        {"targets": (registry.Target("ratio", 1.0, "s", peer="nobody"),)},
    ],
)
def test_register_refuses_what_does_not_exist(wrong, monkeypatch):
    monkeypatch.setattr(registry, "_ROWS", {})
    with pytest.raises(ValueError, match="must be among"):
        registry.register(toy(**wrong))


def test_register_refuses_a_taken_name(monkeypatch):
    monkeypatch.setattr(registry, "_ROWS", {})
    registry.register(toy())
    with pytest.raises(ValueError, match="already has a row"):
        registry.register(toy())


def test_every_row_is_complete_and_every_public_method_has_one():
    rows = registry.rows()
    assert registry.uncovered() == []
    for row in rows.values():
        assert row.tests, row.name
        assert all((records.ROOT / path).exists() for path in row.tests), row.tests


def test_results_are_one_json_record_a_line(tmp_path):
    records.append(tmp_path / "a.json", [{"x": 1}])
    records.append(tmp_path / "a.json", [{"x": 2}])
    assert [json.loads(line)["x"] for line in (tmp_path / "a.json").read_text().splitlines()] == [1, 2]
    assert records.read(tmp_path / "absent.json") == []


def test_importing_the_rows_imports_no_peer():
    code = "import sys; from benchmarks import registry; registry.rows(); "
    code += "print(sorted({'ott', 'lineax', 'optimistix', 'ot', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=records.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
