"""The parsers on small hand-made listings, and one real compile for a chip that is not here."""

import importlib.util
import json

import pytest

from benchmarks import records, report, tpu_schedule

# Two nested loops of 3 and (by a step of 2) 10 trips. The empty bundle lies in the inner loop; the outer branch is
# printed without a mark and its delay slot with one; a comment runs over two lines.
LISTING = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: f32[8]] } /* entry bundle: %mine.1 = custom-call(%x) */
   0x1 LB: > { %s3_s3 = sphi %s1_s1, %s4_s3 }
   0x2 PB: > { %5 = vst %v1  /* a comment
that goes on */ }
   0x3 LB: > > { %v1_v0 = vld [vmem:[%s1_s0] sm:$0xff]  ;;  %s9_s9 = sadd.s32 2, %s8_s8 }
   0x4   :  {}
   0x5   : > > { %p7_p0 = scmp.ge.s32.totalorder %s9_s9, 20 /* loop exit test */ }
   0x6   :  { %6 = sbr.rel (!%p7_p0) target = $region5 }
   0x7   : > { %s4_s3 = sadd.s32 1, %s3_s3 }
   0x8   : > { %p8_p1 = scmp.ge.s32.totalorder %s4_s3, 3 /* loop exit test */ }
   0x9   :  { %7 = sbr.rel (!%p8_p1) target = $region2 }
   0xa   : > { %s10_s5 = smov 1 }
   0xb   :  {}
   0xc   :  { %8 = vsyncpa [#allocation6], 1 }
"""

UTILIZATION = """\
== CAPACTIY:
MXU, VALU, VLOAD:FILL, VSTORE:SPILL
    4     4     3     1
== UTILIZATION:
1 2 0 0
4 0 2 1
0 0 1 0
"""

ALLOCATIONS = """\
$region0: #{mine.1}
  #allocation0 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4]
  #allocation2 [shape = 'f32[8,128]{1,0:T(8,128)}', space=vmem, size = 0x1000, scoped, tag = 'scratch operand']
    #allocation5 [shape = 'u8[8192]{0}', space=vmem, size = 0x2000, scoped, tag = 'input window']
    #allocation5 [shape = 'u8[8192]{0}', space=vmem, size = 0x2000, scoped, tag = 'input window']
"""


def test_bundles_keep_their_loop_depth():
    bundles = tpu_schedule.parse_bundles(LISTING)
    assert [bundle.depth for bundle in bundles] == [0, 1, 1, 2, 2, 2, 0, 1, 1, 0, 1, 1, 0]
    assert [bundle.label for bundle in bundles if bundle.label] == ["LB", "PB", "LB"]
    assert "that goes on" in bundles[2].text


def test_cost_multiplies_the_trips_of_nested_loops():
    cost, body = tpu_schedule.loop_cost(tpu_schedule.parse_bundles(LISTING))
    outer, inner, outside = 6, 3, 4
    assert cost == outside + 3 * outer + 3 * 10 * inner
    assert body == outer + inner


@pytest.mark.parametrize("bound", ["%s12_s1", None])
def test_a_loop_of_unknown_length_is_refused(bound):
    test = "scmp.ge.s32.totalorder %s4_s3, 3 /* loop exit test */"
    text = LISTING.replace(test, test.replace(" 3 ", f" {bound} ") if bound else "nop")
    with pytest.raises(ValueError, match="no exit test with a constant bound"):
        tpu_schedule.loop_cost(tpu_schedule.parse_bundles(text))


def test_utilization_sums_columns():
    capacity, used = tpu_schedule.parse_utilization(UTILIZATION)
    assert capacity == {"MXU": 4, "VALU": 4, "VLOAD:FILL": 3, "VSTORE:SPILL": 1}
    assert used == {"MXU": 5, "VALU": 2, "VLOAD:FILL": 3, "VSTORE:SPILL": 1}


def test_vmem_counts_each_allocation_once():
    assert tpu_schedule.vmem_bytes(ALLOCATIONS) == 0x3000


def write_dump(folder, listing=LISTING):
    (folder / "17-mine.1-72-final_bundles.txt").write_text(listing)
    (folder / "17-mine.1-71-schedule-analysis_final_bundles.txt").write_text("not a listing")
    (folder / "17-mine.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    (folder / "17-mine.1-51-pre-finalize-registers-and-allocations.txt").write_text(ALLOCATIONS)
    # The program that calls the kernel names it, but is not it.
    caller = LISTING.replace("entry bundle: %mine.1 =", "entry bundle of the program: %mine.1 =")
    (folder / "17-TLP-72-final_bundles.txt").write_text(caller)


def test_a_dump_is_read_kernel_by_kernel(tmp_path):
    write_dump(tmp_path)
    assert tpu_schedule.read_dump(tmp_path) == {
        "cost": 112,
        "body": 9,
        "fills": 3,
        "spills": 1,
        "vmem_bytes": 0x3000,
        "units": 4,
        "around": 0,
    }


def test_sums_of_partial_results_cost_and_the_rest_of_xla_is_recorded_beside(tmp_path):
    write_dump(tmp_path)
    xla = LISTING.replace("entry bundle: %mine.1 =", "entry bundle of a fusion: %x =")
    (tmp_path / "18-reduce.1-72-final_bundles.txt").write_text(xla)
    (tmp_path / "19-multiply_reduce_fusion-72-final_bundles.txt").write_text(xla)
    (tmp_path / "20-copy.3-72-final_bundles.txt").write_text(xla.replace(", 20 /*", ", %s1_s0 /*"))
    figures = tpu_schedule.read_dump(tmp_path)
    assert figures["cost"] == 2 * 112
    assert figures["around"] == 112


def test_a_dump_without_a_kernel_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no Pallas kernel"):
        tpu_schedule.read_dump(tmp_path)


def test_floor_of_the_standard_work():
    macs = tpu_schedule.Work().macs()
    assert macs / (4 * tpu_schedule.MXU_WIDTH["v5e"] ** 2) == 524_288
    assert macs / (2 * tpu_schedule.MXU_WIDTH["v6e"] ** 2) == 262_144
    assert tpu_schedule.Work(direction="bwd").macs() == 2.5 * macs


def test_reason_names_the_error():
    assert tpu_schedule._reason("Traceback\n  File\njax.errors.SomeError: too big\nnote") == (
        "jax.errors.SomeError: too big"
    )
    assert tpu_schedule._reason("") == "no message"


@pytest.mark.parametrize("search", [False, True])
def test_main_records_what_compiled_and_fails_on_what_did_not(tmp_path, monkeypatch, capsys, search):
    def measure(builder, generation, work, blocks):
        if blocks == tpu_schedule.EVEN:
            raise tpu_schedule.CompileError("out of VMEM")
        figures = {"cost": sum(blocks) * 1e3, "floor": 1e6, "share": 0.5, "body": 10, "fills": 0, "spills": 0}
        sizes = {"vmem_bytes": 0, "hbm_bytes": 0}
        origin = {"date": "2026-01-01T00:00:00", "commit": "abc", "versions": {"jax": "1"}}
        return {"generation": generation, "work": str(work), **figures, **sizes, **origin}

    monkeypatch.setattr(tpu_schedule, "measure", measure)
    results = tmp_path / tpu_schedule.RESULTS.name
    flags = ["--chip", "v5e", "--direction", "fwd", "--kernel", "flash", "--results", str(results)]
    status = tpu_schedule.main([*flags, *(["--search"] if search else [])])
    assert status == (0 if search else 1)
    assert "out of VMEM" in capsys.readouterr().out
    [record] = records.read(results)
    assert record["blocks"] == ("256/512/512" if search else "512/4096/1024")
    text = report.render(tmp_path)
    assert "| v5e |" in text
    assert record["blocks"] in text


def grid_of_matmuls(work, blocks):
    """A kernel for the compiler: `blocks[0]` independent matmuls of 256 x 256, one a grid step."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    steps, n = blocks[0], 256

    def kernel(a, b, out):
        out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    run = pl.pallas_call(
        kernel,
        grid=(steps,),
        in_specs=[pl.BlockSpec((n, n), lambda i: (i, 0)), pl.BlockSpec((n, n), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((n, n), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((steps * n, n), jnp.float32),
    )
    return run, [((steps * n, n), "bfloat16"), ((n, n), "bfloat16")], steps * n**3


@pytest.mark.aot
def test_a_doubled_grid_costs_double():
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail('this test needs the TPU compiler: pip install "jaxnum[tpu-aot]"')
    builder = f"{__name__}:grid_of_matmuls"
    single = tpu_schedule.measure(builder, "v5e", "matmuls", [32])
    double = tpu_schedule.measure(builder, "v5e", "matmuls", [64])
    # Two steps of the pipeline are its ends: 34 and 66 trips.
    assert double["cost"] / single["cost"] == pytest.approx(66 / 34, rel=0.02)
    assert double["floor"] == 2 * single["floor"]
    assert 0 < single["share"] <= 1
    assert single["fills"] == single["spills"] == 0
    # Both windows of a, of b and of the output, twice each for the pipeline; b is fetched once.
    assert 256 * 256 * (2 + 2 + 4) <= single["vmem_bytes"] <= 2**20
    assert json.dumps(single)
