"""The choice of blocks: what it promises of itself, what it gives to `attention`, and what the TPU compiler says."""

import dataclasses
import importlib.util
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention_footprint
from kernels_pallas import BlockSizes, HwSpec, attention, attention_io, choose_attention_blocks
from kernels_pallas._attention import Config, Operands, tpu_blocks
from kernels_pallas._choose_attention_blocks import footprint
from tests.tolerances import tolerance

HARDWARE = ("tpu_v4", "tpu_v5e", "tpu_v5p", "tpu_v6e", "h100", "cpu")
SHAPES = [(4096, 4096, 64, 64), (1000, 300, 80, 128), (7, 130, 128, 128), (16384, 16384, 128, 64)]
MIB = 2**20


@pytest.mark.parametrize("flags", [{}, {"causal": True}, {"causal": True, "window": (256, None)}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("hardware", HARDWARE)
def test_a_choice_fits_its_memory_and_says_so(hardware, shape, flags):
    choice = choose_attention_blocks(*shape, hardware=hardware, dtype="bfloat16", heads=8, **flags)
    assert isinstance(choice.block_sizes, BlockSizes)
    assert 0 < choice.footprint_bytes <= choice.room_bytes == choice.hardware.fast_bytes
    assert choice.cost.words >= choice.cost.least_words
    text = choice.explain()
    assert str(choice) == text
    for words in (
        f"q {choice.block_sizes.q}, kv {choice.block_sizes.kv}, compute {choice.block_sizes.compute}",
        f"{choice.cost.words:,} of {choice.dtype}",
        f"tight: {choice.cost.tight_bound}",
        f"roofline     {hardware}: ",
        f"{choice.footprint_bytes / MIB:.2f} MiB of {choice.room_bytes / MIB:.2f} MiB",
    ):
        assert words in text
    assert ("table" in text.splitlines()[0]) == (choice.method == "table")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hardware", ["cpu", "h100", "tpu_v5e"])
def test_the_model_chooses_the_least_predicted_seconds(hardware, causal):
    sizes = (2048, 2048, 64, 64)
    choice = choose_attention_blocks(*sizes, hardware=hardware, causal=causal, method="model", dtype="bfloat16")
    for q, kv in itertools.product((128, 256, 512, 1024, 2048), repeat=2):
        if hardware == "h100" and q != 128:
            continue
        blocks = BlockSizes(q, kv, kv if hardware == "cpu" else min(kv, 1024))
        if footprint(choice.hardware, blocks, 64, 64, "bfloat16") > choice.room_bytes:
            continue
        width = 128 if hardware == "tpu_v5e" else 64
        cost = attention_io(2048, 2048, width, width, block_q=q, block_kv=kv, causal=causal)
        other = dataclasses.replace(choice, block_sizes=blocks, cost=cost)
        assert choice.seconds <= 1.01 * other.seconds


def test_less_room_moves_more_words():
    words = []
    for room in (256 * 2**10, MIB, 4 * MIB, 16 * MIB):
        choice = choose_attention_blocks(8192, 8192, 64, hardware="cpu", fast_bytes=room)
        assert choice.footprint_bytes <= room == choice.room_bytes
        assert choice.method == "model"
        words.append(choice.cost.words)
    assert words == sorted(words, reverse=True)
    assert words[0] > 2 * words[-1]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e"])
def test_the_tuned_table_decides_where_it_has_a_row(generation, backward):
    choice = choose_attention_blocks(4096, 4096, 128, hardware=f"tpu_{generation}", dtype="bfloat16", backward=backward)
    assert choice.method == "table"
    q = jax.ShapeDtypeStruct((1, 4096, 1, 128), jnp.bfloat16)
    call = Config(False, None, None, 1.0, None), Operands(q, q, q)
    assert choice.block_sizes == tpu_blocks(*call, backward=backward, generation=generation)
    assert "the table that was tuned" in choice.explain()
    if backward:
        assert choice.footprint_bytes is None
        assert "not modelled" in choice.explain()


def test_what_is_not_in_the_table_goes_to_the_model():
    own = HwSpec("mine", "tpu", 8 * MIB, 1e12, 1e14, 2e13, 1e-7)
    choice = choose_attention_blocks(4096, 4096, 128, hardware=own, dtype="bfloat16")
    assert choice.method == "model"
    assert choice.footprint_bytes <= 8 * MIB
    named = choose_attention_blocks(4096, 4096, 128, hardware="tpu_v5e", dtype="bfloat16", method="model")
    assert named.method == "model"
    assert "the I/O model" in named.explain()


@pytest.mark.parametrize("flags", [{}, {"causal": True}], ids=str)
def test_attention_takes_the_choice(flags):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 300, 2, 32))
    choice = choose_attention_blocks(300, 300, 32, hardware="cpu", heads=2, **flags)
    got = attention(q, k, v, block_sizes=choice.block_sizes, **flags)
    want = attention(q, k, v, implementation="reference", **flags)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance(jnp.float32, 300))


def test_padding_is_counted_as_the_kernels_pad():
    on_tpu = choose_attention_blocks(1000, 300, 80, hardware="tpu_v5e", dtype="bfloat16")
    T, S, D, Dv = on_tpu.padding
    assert (T % on_tpu.block_sizes.q, S % on_tpu.block_sizes.kv, D, Dv) == (0, 0, 128, 128)
    assert T >= 1000
    assert S >= 300
    assert "padded by the kernel to T" in on_tpu.explain()
    on_cpu = choose_attention_blocks(100, 60, 80, hardware="cpu")
    assert on_cpu.padding == (100, 60, 80, 80)
    assert "padded" not in on_cpu.explain()


def test_a_backward_pass_moves_more():
    forward, backward = (
        choose_attention_blocks(4096, 4096, 64, hardware="cpu", causal=True, backward=backward).cost
        for backward in (False, True)
    )
    assert backward.words > 2 * forward.words
    assert backward.least_words > forward.least_words


def test_every_table_entry_starts_no_backend():
    code = (
        "from kernels_pallas import choose_attention_blocks as choose\n"
        f"for name in {HARDWARE}: choose(256, 256, 64, hardware=name, dtype='bfloat16')"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"JAX_PLATFORMS": "none"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ERRORS = {
    "no length": (dict(T=0), ValueError, "`T` must be an int of at least 1; got 0."),
    "a head dimension that is not an int": (dict(D=64.0), ValueError, "`D` must be an int of at least 1; got 64.0."),
    "no heads": (dict(heads=0), ValueError, "`heads` must be an int of at least 1; got 0."),
    "no such hardware": (dict(hardware="tpu_v2"), ValueError, "`hardware` must be one of 'tpu_v4', 'tpu_v5e'"),
    "no such method": (dict(method="guess"), ValueError, "`method` must be one of None, 'table', 'model'; got"),
    "integers": (dict(dtype="int8"), ValueError, "`dtype` must be a floating-point dtype; got int8."),
    "negative window": (dict(window=(-1, 0)), ValueError, "`window` must be a pair (left, right) of ints >= 0"),
    "no room": (dict(fast_bytes=1000), ValueError, "`fast_bytes` must be at least "),
    "a table for a CPU": (dict(method="table"), ValueError, "`method` must be None or 'model' for cpu"),
    "the model of a fused kernel": (
        dict(hardware="tpu_v5e", backward=True, method="model"),
        NotImplementedError,
        "`method` 'model' cannot choose for the backward pass on a TPU",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "words"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments_are_named(arguments, error, words):
    arguments = {"T": 512, "S": 512, "D": 64, "hardware": "cpu"} | arguments
    sizes = [arguments.pop(n) for n in ("T", "S", "D")]
    with pytest.raises(error) as info:
        choose_attention_blocks(*sizes, **arguments)
    assert str(info.value).startswith("choose_attention_blocks: ")
    assert words in str(info.value)


@pytest.mark.parametrize(
    ("argument", "got"),
    [("fast_bytes", 0), ("bandwidth", -1.0), ("flops_16", None), ("kind", "npu"), ("step_seconds", -1)],
)
def test_a_machine_that_cannot_be_is_refused(argument, got):
    good = HwSpec("good", "cpu", 1, 1.0, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match=f"HwSpec: `{argument}` must be"):
        dataclasses.replace(good, **{argument: got})


# --- The footprint and the TPU compiler. ------------------------------------------------------------------------------

LISTING = """\
  #allocation1 [shape = 'u32[72,128]{1,0:T(1,128)}', space=vmem, size = 0x9000, scoped, tag = 'internal scratch']
    #allocation9 [shape = 'u8[32768]{0}', space=vmem, size = 0x8000, scoped, tag = 'output window']
    #allocation9 [shape = 'u8[32768]{0}', space=vmem, size = 0x8000, scoped, tag = 'output window']
  #allocation6 [shape = 'u8[512]{0}', space=smem, size = 0x200, scoped, tag = 'prefetched SMEM operand 0']
      #allocation13_spill [shape = 'u32[8,128]{1,0}', space=vmem, size = 0x1000, scoped, tag = 'spilled vreg/vmreg']
      #allocation14_spill [shape = 'u32[8,128]{1,0}', space=vmem, size = 0x1000, scoped, tag = 'spilled vreg/vmreg']
"""


def test_a_listing_is_read_once_an_allocation():
    assert attention_footprint.read_allocations(LISTING) == (0x9000 + 0x8000, 2 * 0x1000)


def test_a_fit_bounds_what_it_was_fitted_to():
    work, blocks = attention_footprint.STEP
    compiled = {"work": work._asdict(), "blocks": list(blocks), "bundles": 3.0e8, "floor": 1.0e8}
    compiled |= {"held_bytes": 600_000, "spilled_bytes": 70_000}
    fitted = attention_footprint.fit([compiled])
    assert fitted["score_tiles"] == 1.07
    steps = work.batch * work.heads * (work.length // 128) ** 2
    assert fitted["step_bundles"] == round(2.0e8 / steps)
    assert fitted["internal_bytes"] > 0


# Not among the blocks that the constants were fitted to.
UNSEEN = [
    ({}, (512, 2048, 512)),
    ({"causal": True}, (512, 1024, 512)),
    ({"v_dim": 256}, (256, 1024, 256)),
]


@pytest.mark.aot
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e"])
@pytest.mark.parametrize(("flags", "blocks"), UNSEEN, ids=str)
def test_the_footprint_bounds_what_the_compiler_allocates(generation, flags, blocks):
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail('this test needs the TPU compiler: pip install "jaxnum[tpu-aot]"')
    work = attention_footprint.Work(**flags)
    compiled = attention_footprint.figures(generation, work, blocks)
    allocated = compiled["held_bytes"] + compiled["spilled_bytes"]
    spec = choose_attention_blocks(256, 256, 64, hardware=f"tpu_{generation}").hardware
    predicted = footprint(spec, BlockSizes(*blocks), work.dim, work.v_dim, work.dtype)
    assert allocated <= predicted <= 3 * allocated
