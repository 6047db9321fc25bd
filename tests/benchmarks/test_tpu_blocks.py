"""How the table of TPU blocks is chosen, on made-up measurements, and that the kernels' table is whole."""

import json

import pytest

from benchmarks import tpu_blocks, tpu_schedule
from kernels_pallas import BlockSizes

A, B = (256, 512, 256), (512, 512, 512)


def record(cost, body=100):
    return {"cost": cost, "body": body}


def test_the_cheapest_that_has_room_wins_and_the_default_loses_least():
    records = {
        "v4": {A: record(10), B: record(9)},
        "v5e": {A: record(10), B: record(40)},
        "v6e": {A: record(10), B: record(1, body=7000)},
    }
    assert tpu_blocks.row(records, "full") == {"default": A, "v4": B, "v5e": A, "v6e": A}


def test_blocks_that_do_not_compile_somewhere_are_no_default():
    records = {"v4": {B: record(10)}, "v5e": {A: record(1), B: record(40)}}
    assert tpu_blocks.row(records, "full") == {"default": B, "v4": B, "v5e": A}


def test_where_blocks_are_skipped_smaller_ones_gain():
    assert tpu_blocks.causal_share(4096, B) == 36 / 64
    assert tpu_blocks.causal_share(512, B) == 1
    assert tpu_blocks.causal_share(4096, (512, 1024, 512)) == 20 / 32
    records = {"v4": {(512, 1024, 512): record(95), B: record(100)}}
    assert tpu_blocks.row(records, "hiding")["v4"] == B
    assert tpu_blocks.row(records, "full")["v4"] == (512, 1024, 512)


@pytest.mark.parametrize("direction", tpu_blocks.CANDIDATES)
@pytest.mark.parametrize("case", tpu_blocks.WORK)
def test_the_kernels_table_holds_candidates_for_every_generation(direction, case):
    row = json.loads(tpu_blocks.TABLE.read_text())[direction][case]
    assert set(row) == {"default", *tpu_schedule.TOPOLOGIES}
    for blocks in row.values():
        BlockSizes(*blocks)
        assert tuple(blocks) in tpu_blocks.CANDIDATES[direction][case]


def test_main_writes_what_it_chose(tmp_path, monkeypatch):
    def measure(builder, generation, work, blocks):
        if blocks == (512, 4096, 512):
            raise tpu_schedule.CompileError("out of VMEM")
        return record(sum(blocks))

    monkeypatch.setattr(tpu_schedule, "measure", measure)
    path = tmp_path / "table.json"
    assert tpu_blocks.main(["--direction", "forward", "--case", "full", "--table", str(path)]) == 0
    best = [256, 4096, 1024]
    names = ("default", *tpu_schedule.TOPOLOGIES)
    assert json.loads(path.read_text()) == {"forward": {"full": dict.fromkeys(names, best)}}
    assert path.read_text() == tpu_blocks.render(json.loads(path.read_text()))
