"""The parsers on a small hand-made listing, a real compile for a card that is not here, and the interpreter's races."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_compiler
from tests import interpreters

# A loop of one tensor instruction, entered at .L_x_1: a wait that polls out of line (.L_x_9), a rescale that a uniform
# branch steps over, and a back edge.
LISTING = """\
        .global         entry
entry:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28] 
.L_x_1:
   -:-:1:Y:02        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R5 
   1:-:-:Y:05        /*0020*/              @!P1 BRA `(.L_x_9) 
.L_x_2:
   -:-:-:Y:01        /*0030*/                   HGMMA.64x128x16.F32 R24, gdesc[UR56], R24, gsb0 
   -:-:-:Y:02        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 
   -:-:-:Y:05        /*0050*/               @P0 BRA `(.L_x_3) 
   -:-:-:Y:01        /*0060*/                   FMUL R24, R24, R4 
   -:-:-:Y:01        /*0070*/                   FMUL R25, R25, R4 
.L_x_3:
   -:-:-:Y:01        /*0080*/                   FADD R3, R24, R3 
   -:-:-:Y:05        /*0090*/              @!P2 BRA `(.L_x_1) 
   -:-:-:Y:05        /*00a0*/                   EXIT 
.L_x_9:
   -:-:1:Y:02        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R5 
   1:-:-:Y:05        /*00c0*/              @!P1 BRA `(.L_x_9) 
   -:-:-:Y:05        /*00d0*/                   BRA `(.L_x_2) 
"""  # noqa: W291

PTXAS = """\
ptxas info    : Compiling entry function 'mine_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def test_a_trip_steps_over_what_is_seldom_run():
    [loop] = gpu_compiler.tensor_loops(LISTING)
    assert [step.name.split(".")[0] for step in loop.trip] == [
        *("WARPGROUP", "BRA", "FADD", "BRA", "SYNCS", "BRA", "HGMMA")
    ]
    assert (loop.tensor(), loop.other(), loop.macs()) == (1, 6, 64 * 128 * 16)


def test_predicates_and_labels_are_read():
    instructions, labels = gpu_compiler.parse_sass(LISTING)
    assert labels[".L_x_9"] == 11
    assert [step.predicate for step in instructions if step.name == "BRA"] == ["!P1", "P0", "!P2", "!P1", ""]


def test_registers_after_giving_them_back_are_counted():
    text = LISTING.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "USETMAXREG.DEALLOC.CTAPOOL 0x18")
    # R25 is the highest that is reached from there; the one that names R1 lies before.
    assert gpu_compiler.register_bounds(text) == [(26, 24)]
    assert gpu_compiler.register_bounds(LISTING) == []


def test_figures_are_read():
    kernel = gpu_compiler.read(PTXAS, "sass", "dynamic shared memory: 165976\n")
    assert kernel == ("mine", 168, 12, 165976, "sass")
    with pytest.raises(gpu_compiler.CompileError, match="no figures"):
        gpu_compiler.read("nothing", "sass", "")


def product(copies_awaited=True, interpret=False):
    """64 x 64 times 64 x 64 by one warpgroup, operands by TMA; a forgotten wait reads what may not be there yet."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def product_kernel(a, b, out, a_smem, b_smem, out_smem, barrier):
        plgpu.copy_gmem_to_smem(a, a_smem, barrier)
        plgpu.copy_gmem_to_smem(b, b_smem, barrier)
        if copies_awaited:
            plgpu.barrier_wait(barrier)

        def multiply(accumulator):
            plgpu.wgmma(accumulator, a_smem, b_smem)
            return accumulator[...]

        out_smem[...] = pl.run_scoped(multiply, plgpu.ACC((64, 64), jnp.float32)).astype(jnp.float16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out)
        plgpu.wait_smem_to_gmem(0)

    tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    smem = [plgpu.SMEM((64, 64), jnp.float16, transforms=tiles)] * 3
    return plgpu.kernel(
        product_kernel,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float16),
        scratch_types=[*smem, plgpu.Barrier(num_arrivals=2)],
        interpret=interpret,
    )


needs_interpreter = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="the GPU interpreter came with jax 0.12, which needs Python 3.12"
)


@needs_interpreter
@pytest.mark.timeout(120)
def test_interpreter_multiplies():
    a, b = jax.random.normal(jax.random.key(0), (2, 64, 64), jnp.float16)
    with interpreters.gpu_parameters() as parameters:
        got = np.asarray(product(interpret=parameters)(a, b))
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=2**-10 * np.abs(want).max())


@needs_interpreter
@pytest.mark.timeout(120)
def test_interpreter_finds_a_missing_wait():
    a, b = jax.random.normal(jax.random.key(0), (2, 64, 64), jnp.float16)
    with interpreters.gpu_parameters() as parameters, pytest.raises(Exception, match="RACE DETECTED"):
        np.asarray(product(copies_awaited=False, interpret=parameters)(a, b))


SPEC = jax.ShapeDtypeStruct((64, 64), jnp.float16)


def test_lowering_holds_the_kernel():
    assert len(gpu_compiler.kernel_modules(gpu_compiler.lower(product(), [SPEC] * 2))) == 1


@pytest.mark.gpu_aot
def test_compile_reads_the_figures_of_a_product():
    [kernel] = gpu_compiler.compile_function(product(), [SPEC] * 2)
    assert kernel.name == "product_kernel"
    assert kernel.spill_bytes == 0
    # Three tiles and a barrier, with the compiler's own padding.
    assert 3 * 64 * 64 * 2 <= kernel.shared_bytes <= 3 * 64 * 64 * 2 + 4096
    assert kernel.sass.count("HGMMA") == 4
    with pytest.raises(ValueError, match="no Mosaic GPU kernel"):
        gpu_compiler.compile_function(jnp.sin, [SPEC])


@pytest.mark.gpu_aot
def test_what_the_compiler_refuses_is_an_error():
    with pytest.raises(gpu_compiler.CompileError):
        gpu_compiler.compile_module(b"not a module")
