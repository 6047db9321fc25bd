"""Figures of a hand-made listing, and a report of records."""

import pytest

from benchmarks import gpu_code, gpu_compiler, records, report
from tests.benchmarks.test_gpu_compiler import LISTING

COMPILED = gpu_compiler.Kernel("attention_forward", 168, 0, 1024, LISTING)


def test_figures_are_a_score_and_thread():
    found = gpu_code.figures(COMPILED, "forward", gpu_code.FULL)
    [loop] = found["loops"]
    # 64 x 128 x 16 multiply-adds are 512 scores of 128 + 128 entries: 4 a thread.
    assert (loop["tensor"], loop["other"], loop["per_score"]) == (1, 6, 6 / 4)
    assert loop["instructions"]["BRA"] == 3
    assert found["shared_bytes"] == 1024


def test_main_records_and_the_report_shows(tmp_path, monkeypatch, capsys):
    asked = []

    def compile_function(function, arrays):
        asked.append(len(arrays))
        return [COMPILED]

    monkeypatch.setattr(gpu_compiler, "compile_function", compile_function)
    monkeypatch.setattr(gpu_code, "PACKAGES", ("jax",))
    results = tmp_path / gpu_code.RESULTS.name
    flags = ["--kernel", "ours", "jax", "--results", str(results)]
    assert gpu_code.main(["--work", "full", "segments", *flags]) == 0
    # JAX's kernel knows no segments, which are a fourth array.
    assert asked == [3, 3, 4]
    assert [record["kernel"] for record in records.read(results)] == ["ours", "jax", "ours"]
    assert "1.50 (6 beside 1) instructions a score" in capsys.readouterr().out
    assert "| attention forward full" in report.render(tmp_path)


def test_main_fails_on_what_does_not_compile(tmp_path, monkeypatch, capsys):
    def refuse(function, arrays):
        raise gpu_compiler.CompileError("too many registers")

    monkeypatch.setattr(gpu_compiler, "compile_function", refuse)
    results = tmp_path / gpu_code.RESULTS.name
    assert gpu_code.main(["--work", "full", "--kernel", "ours", "--results", str(results)]) == 1
    assert "too many registers" in capsys.readouterr().out
    assert records.read(results) == []


@pytest.mark.parametrize(("name", "served"), [("full", True), ("segments", False), ("causal_gradient", False)])
def test_jax_is_asked_for_what_it_can_do(name, served):
    assert gpu_code.KERNELS["jax"].serves(gpu_code.WORKS[name]) is served
    assert gpu_code.KERNELS["ours"].serves(gpu_code.WORKS[name])
