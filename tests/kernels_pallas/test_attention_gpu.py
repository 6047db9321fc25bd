"""The forward kernel for Hopper: interpreted against the reference, lowered, compiled for sm_90a, exported."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_code, gpu_compiler
from kernels_pallas import attention
from kernels_pallas._attention import gpu, reference
from kernels_pallas._attention.config import Config, Operands
from tests import interpreters
from tests.tolerances import tolerance

pytestmark = pytest.mark.every_jax

needs_interpreter = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="the GPU interpreter came with jax 0.12, which needs Python 3.12"
)


def call(dtype="bfloat16", *, B=1, T=70, S=70, H=1, K=1, D=64, V=64, seed=0, hidden=None, **flags):
    """Config and operands; `hidden` holds the operands that masks are built from."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, V)))
    config = Config(**{"causal": False, "window": None, "soft_cap": None, "scale": D**-0.5, "blocks": None, **flags})
    hidden = {name: jnp.asarray(x, jnp.int32) for name, x in (hidden or {}).items()}
    return config, Operands(q, k, v, **hidden)


def truth(config, operands):
    """o and lse in float64, of the same inputs of 16 bits."""
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(getattr(operands, name), np.float64)) for name in "qkv"}
        return [np.asarray(x) for x in reference.forward(config, operands._replace(**wide))]


def interpreted(config, operands):
    with interpreters.gpu_parameters() as parameters:
        return [np.asarray(x, np.float64) for x in gpu.forward(config, operands, interpret=parameters)]


def close(got, want, dtype):
    """o to its own rounding and that of p; lse, which no 16 bits enter, to float32."""
    for x, y, precision in zip(got, want, (dtype, "float32"), strict=True):
        assert x.shape == y.shape
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        x, y = (np.where(np.isfinite(y), z, 0) for z in (x, y))
        error = np.max(np.abs(x - y)) / max(1.0, np.max(np.abs(y)))
        assert error <= tolerance(precision, 200, condition=0.25), error


def segments(*lengths, last=-1):
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return np.where(ids == len(lengths) - 1, last, ids)[None]


CASES = {
    "plain": {},
    "one query": {"T": 1, "S": 7},
    "blocks of both": {"T": 130, "S": 300},
    "whole blocks": {"T": 128, "S": 256, "dtype": "float16"},
    "more key blocks than the ring holds": {"S": 400, "D": 128, "V": 128},
    "causal": {"T": 200, "S": 160, "causal": True},
    "more keys than queries, causal": {"T": 60, "S": 300, "causal": True},
    "groups of heads, batch": {"B": 2, "H": 4, "K": 2, "causal": True},
    "window": {"T": 160, "S": 160, "window": (20, 5)},
    "segments": {
        "T": 140,
        "S": 150,
        "hidden": {"q_segments": segments(40, 60, 40), "kv_segments": segments(50, 60, 40)},
    },
    "segments of a batch, causal": {
        "B": 2,
        "causal": True,
        "hidden": dict.fromkeys(
            ("q_segments", "kv_segments"), np.concatenate([segments(70, last=0), segments(30, 40, last=1)])
        ),
    },
    "positions": {
        "causal": True,
        "window": (30, None),
        "hidden": {"q_positions": np.arange(70)[None] + 20, "kv_positions": np.arange(70)[None, ::-1]},
    },
    "soft cap": {"soft_cap": 2.0},
    "soft cap, wide heads, causal": {"soft_cap": 2.0, "D": 128, "V": 128, "H": 2, "causal": True},
    "steep scale": {"scale": 2.0, "S": 300},
    "negative scale": {"scale": -0.5, "T": 130, "causal": True},
    "no scale": {"scale": 0.0, "causal": True},
    "wider values": {"V": 128, "causal": True},
    "wider keys": {"D": 192, "V": 128, "causal": True},
    "narrow heads": {"D": 24, "V": 40},
    "widest heads": {"D": 256, "V": 256, "causal": True, "T": 140, "S": 140},
}


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case):
    config, operands = call(**CASES[case])
    assert gpu.unsupported(config, operands) is None
    close(interpreted(config, operands), truth(config, operands), operands.q.dtype)


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("length", [1, 7, 128, 200, 257])
def test_any_length(length):
    config, operands = call("float16", T=length, S=length, causal=True)
    close(interpreted(config, operands), truth(config, operands), operands.q.dtype)


@needs_interpreter
@pytest.mark.timeout(300)
def test_the_bound_follows_a_maximum_that_rises():
    # Scores that grow along the keys from far below zero: every block lifts the maximum, by more than the slack and
    # by less.
    for rise in (0.02, 0.5):
        config, operands = call("float16", T=10, S=384, scale=1.0)
        ramp = jnp.zeros((1, 384, 1, 64), "float16").at[..., 0].set(jnp.arange(384)[None, :, None] * rise - 150)
        operands = operands._replace(q=jnp.zeros_like(operands.q).at[..., 0].set(1), k=ramp)
        close(interpreted(config, operands), truth(config, operands), "float16")


@needs_interpreter
@pytest.mark.timeout(300)
def test_a_row_that_sees_nothing():
    ids = segments(30, 30, 10)
    config, operands = call(hidden={"q_segments": ids, "kv_segments": ids})
    o, lse = interpreted(config, operands)
    np.testing.assert_array_equal(o[:, 60:], 0)
    np.testing.assert_array_equal(lse[:, :, 60:], -np.inf)


@needs_interpreter
@pytest.mark.timeout(300)
def test_blocks_that_nothing_sees_are_not_read():
    config, operands = call(T=60, S=300, causal=True)
    want = truth(config, operands)
    poisoned = operands._replace(k=operands.k.at[:, 128:].set(jnp.nan), v=operands.v.at[:, 128:].set(jnp.nan))
    close(interpreted(config, poisoned), want, "bfloat16")


@needs_interpreter
@pytest.mark.timeout(300)
def test_is_repeatable():
    config, operands = call(T=130, S=300, causal=True)
    for x, y in zip(interpreted(config, operands), interpreted(config, operands), strict=True):
        np.testing.assert_array_equal(x, y)


@needs_interpreter
@pytest.mark.timeout(300)
def test_interpreter_finds_a_missing_fence(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    config, operands = call()
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    with pytest.raises(Exception, match="RACE DETECTED"):
        interpreted(config, operands)


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("forgotten", ["q_ready", "k_ready", "v_ready", "k_free", "v_free"])
def test_interpreter_finds_each_wait_that_tiles_need(monkeypatch, forgotten):
    """Without one of them a tile is read before it is there, or written over before it is read."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    kernel, wait = gpu._kernel, plgpu.barrier_wait

    def without_one(plan, *refs):
        chosen = getattr(refs[-1], forgotten)
        monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None if barrier.ref is chosen else wait(barrier))
        kernel(plan, *refs)

    monkeypatch.setattr(gpu, "_kernel", without_one)
    config, operands = call(T=60, S=300, D=128, V=128)
    # A barrier that nobody ever looks at is refused as such, where no race comes first.
    with pytest.raises(Exception, match="RACE DETECTED|no threads observed"):
        interpreted(config, operands)


def specs(dtype="bfloat16", *, B=2, T=4096, S=4096, H=8, K=2, D=128, V=128, segmented=False, placed=False, **flags):
    """A function of arrays and their specs, for the compiler."""
    config, empty = call(T=1, S=1, D=D, **flags)
    spec = jax.ShapeDtypeStruct
    names = [name for name, wanted in (("segments", segmented), ("positions", placed)) if wanted]
    hidden = {
        f"{side}_{name}": spec((B, length), jnp.int32) for name in names for side, length in (("q", T), ("kv", S))
    }
    operands = empty._replace(q=spec((B, T, H, D), dtype), k=spec((B, S, K, D), dtype), v=spec((B, S, K, V), dtype))
    return lambda operands: gpu.forward(config, operands), [operands._replace(**hidden)]


EVERY_FLAG = {"causal": True, "segmented": True, "placed": True, "soft_cap": 30.0, "window": (500, None), "S": 4001}
COMPILED = {
    "full": {},
    "causal": {"causal": True},
    "causal, odd lengths": {"causal": True, "T": 4001, "S": 3999},
    "fewer than a tile": {"T": 1, "S": 7},
    "causal, segments": {"causal": True, "segmented": True},
    "soft cap": {"soft_cap": 30.0},
    "every flag": EVERY_FLAG,
    "float16, heads of 64": {"dtype": "float16", "D": 64, "V": 64, "causal": True},
    "heads of 64, every flag": {"D": 64, "V": 64} | EVERY_FLAG,
    "heads of 192 and 128": {"D": 192, "causal": True, "segmented": True},
    "heads of 80": {"D": 80, "V": 80, "causal": True},
    "heads of 256": {"D": 256, "V": 256, "causal": True},
    "heads of 256, every flag": {"D": 256, "V": 256} | EVERY_FLAG,
}


@pytest.mark.parametrize("case", COMPILED)
def test_lowers_for_cuda(case):
    assert len(gpu_compiler.kernel_modules(gpu_compiler.lower(*specs(**COMPILED[case])))) == 1


def test_lowers_with_x64_on(x64):
    assert len(gpu_compiler.kernel_modules(gpu_compiler.lower(*specs(causal=True)))) == 1


def test_exports_without_a_card_in_sight():
    function, [operands] = specs(T=200, S=200, causal=True)
    exported = jax.export.export(jax.jit(lambda *qkv: function(Operands(*qkv))), platforms=("cuda",))(*operands[:3])
    assert exported.mlir_module().count("mosaic_gpu") >= 1
    assert jax.export.deserialize(exported.serialize()).platforms == ("cuda",)


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_without_spills(case):
    [kernel] = gpu_compiler.compile_function(*specs(**COMPILED[case]))
    assert kernel.name == "attention_forward"
    assert kernel.spill_bytes == 0
    assert kernel.shared_bytes <= gpu_compiler.SHARED_MEMORY
    # Scores, and p v: at least a product of each in every loop.
    assert all(loop.tensor() >= 2 for loop in gpu_compiler.tensor_loops(kernel.sass))


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", ["full", "every flag", "heads of 256, every flag"])
def test_warpgroups_keep_to_their_registers(case):
    """The assembler must not use, after registers were given back, more than were kept."""
    [kernel] = gpu_compiler.compile_function(*specs(**COMPILED[case]))
    bounds = gpu_compiler.register_bounds(kernel.sass)
    assert bounds
    for used, kept in bounds:
        assert used <= kept


@pytest.mark.gpu_aot
@pytest.mark.parametrize("work", ["full", "causal"])
def test_fewer_instructions_a_score_than_the_kernel_of_jax(work):
    [ours], [theirs] = (gpu_code.measure(name, gpu_code.WORKS[work]) for name in ("ours", "jax"))
    for x, y in zip(ours["loops"], theirs["loops"], strict=True):
        assert x["per_score"] <= 0.9 * y["per_score"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_card(case):
    config, operands = call(**CASES[case])
    got = jax.jit(lambda operands: gpu.forward(config, operands))(operands)
    close([np.asarray(x, np.float64) for x in got], truth(config, operands), operands.q.dtype)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "float16 and bfloat16, not float32"),
        ({"dropout": 100}, "no dropout"),
        ({"V": 264}, "at most 256"),
    ],
)
def test_says_what_it_cannot_do(change, reason):
    assert reason in gpu.unsupported(*call(**change))


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_takes_no_arrays_over_scores(name):
    config, operands = call()
    operands = operands._replace(**{name: jnp.ones((1, 1, 70, 70), bool if name == "mask" else "float32")})
    assert re.search(f"no {name}", gpu.unsupported(config, operands))


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_one_export_holds_the_kernels_of_all_platforms(gradient):
    arrays = call(T=70, S=70, H=2, K=1)[1][:3]

    def forward(q, k, v):
        return attention(q, k, v, causal=True)

    function = jax.grad(lambda *a: jnp.sum(forward(*a).astype(jnp.float32)), (0, 1, 2)) if gradient else forward
    exported = jax.export.export(jax.jit(function), platforms=("cpu", "tpu", "cuda"))(*arrays)
    text = exported.mlir_module()
    assert "tpu_custom_call" in text
    assert "mosaic_gpu" in text
    reloaded = jax.export.deserialize(exported.serialize())
    for x in jax.tree.leaves(reloaded.call(*arrays)):
        assert np.all(np.isfinite(np.asarray(x, np.float32)))
