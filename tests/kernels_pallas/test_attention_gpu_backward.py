"""The backward kernels for Hopper: interpreted against the reference's gradient, lowered, compiled for sm_90a."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_compiler
from kernels_pallas._attention import gpu_backward, reference
from kernels_pallas._attention.config import Config, Operands
from tests import interpreters
from tests.tolerances import tolerance

pytestmark = pytest.mark.every_jax

needs_interpreter = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="the GPU interpreter came with jax 0.12, which needs Python 3.12"
)


def call(dtype="bfloat16", *, B=1, T=70, S=70, H=1, K=1, D=64, V=64, seed=0, hidden=None, **flags):
    """Config, operands and cotangents; `hidden` holds the operands that masks are built from."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, V), (B, T, H, V))
    q, k, v, o_cotangent = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    lse_cotangent = jnp.asarray(rng.normal(size=(B, H, T)), "float32")
    config = Config(**{"causal": False, "window": None, "soft_cap": None, "scale": D**-0.5, "blocks": None, **flags})
    hidden = {name: jnp.asarray(x, jnp.int32) for name, x in (hidden or {}).items()}
    return config, Operands(q, k, v, **hidden), (o_cotangent, lse_cotangent)


def truth(config, operands, cotangents):
    """o, lse and the gradient in float32, of the same inputs of 16 bits."""
    wide = [x.astype("float32") for x in operands[:3]]
    (o, lse), pull = jax.vjp(lambda q, k, v: reference.forward(config, operands._replace(q=q, k=k, v=v)), *wide)
    # As everywhere: what comes back from a row that sees nothing does not count.
    sees = lse != -jnp.inf
    o_cotangent = jnp.where(jnp.swapaxes(sees, 1, 2)[..., None], cotangents[0].astype("float32"), 0)
    return o, lse, pull((o_cotangent, jnp.where(sees, cotangents[1], 0)))


def interpreted(config, operands, cotangents, o, lse):
    with interpreters.gpu_parameters() as parameters:
        got = gpu_backward.backward(
            config, operands, o.astype(operands.q.dtype), lse, *cotangents, interpret=parameters
        )
        return [np.asarray(x, "float32") for x in got]


def close(got, want, dtype):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        error = np.max(np.abs(x - np.asarray(y))) / np.max(np.abs(y))
        # p and ds are rounded to 16 bits once, and so is the result; their errors do not add up in one direction.
        assert error <= tolerance(dtype, condition=0.25), error


def segments(*lengths, last=-1):
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return np.where(ids == len(lengths) - 1, last, ids)[None]


CASES = {
    "two blocks": {"T": 130, "S": 200},
    "causal": {"T": 200, "S": 160, "causal": True},
    "groups of heads": {"H": 4, "K": 2, "causal": True},
    "window, soft cap": {"T": 160, "S": 160, "window": (20, 5), "soft_cap": 2.0},
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
    "wide heads, soft cap, causal": {"soft_cap": 2.0, "D": 128, "V": 128, "H": 2, "causal": True},
    "float16, wider values": {"dtype": "float16", "D": 64, "V": 128, "causal": True},
    "narrow heads, scale": {"D": 24, "V": 40, "scale": 0.5},
    "widest heads": {"D": 256, "V": 192, "causal": True, "T": 140},
}


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_gradient_of_the_reference(case):
    dtype = CASES[case].get("dtype", "bfloat16")
    config, operands, cotangents = call(**CASES[case])
    assert gpu_backward.unsupported_backward(config, operands) is None
    o, lse, want = truth(config, operands, cotangents)
    close(interpreted(config, operands, cotangents, o, lse), want, dtype)


@needs_interpreter
@pytest.mark.timeout(300)
def test_nothing_comes_back_from_a_row_that_sees_nothing():
    ids = segments(30, 30, 10)
    config, operands, (o_cotangent, lse_cotangent) = call(hidden={"q_segments": ids, "kv_segments": ids})
    cotangents = o_cotangent.at[:, 60:].set(jnp.nan), lse_cotangent.at[:, :, 60:].set(jnp.inf)
    o, lse, want = truth(config, operands, cotangents)
    got = interpreted(config, operands, cotangents, o, lse)
    close(got, want, "bfloat16")
    for x in got:
        np.testing.assert_array_equal(x[:, 60:], 0)


@needs_interpreter
@pytest.mark.timeout(300)
def test_blocks_that_nothing_sees_are_not_read():
    config, operands, cotangents = call(T=60, S=200, causal=True)
    o, lse, want = truth(config, operands, cotangents)
    poisoned = operands._replace(k=operands.k.at[:, 128:].set(jnp.nan), v=operands.v.at[:, 128:].set(jnp.nan))
    got = interpreted(config, poisoned, cotangents, o, lse)
    close(got, want, "bfloat16")
    for x in got[1:]:
        np.testing.assert_array_equal(x[:, 128:], 0)


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("forgotten", ["barrier_wait", "commit_smem"])
def test_interpreter_finds_what_was_forgotten(monkeypatch, forgotten):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    config, operands, cotangents = call()
    o, lse, _ = truth(config, operands, cotangents)
    monkeypatch.setattr(plgpu, forgotten, lambda *_: None)
    with pytest.raises(Exception, match="RACE DETECTED"):
        interpreted(config, operands, cotangents, o, lse)


def specs(dtype="bfloat16", *, B=2, T=4096, S=4096, H=8, K=2, D=128, V=128, segmented=False, placed=False, **flags):
    """A function of arrays and their specs, for the compiler."""
    config, empty, _ = call(T=1, S=1, D=D, **flags)
    spec = jax.ShapeDtypeStruct
    names = [name for name, wanted in (("segments", segmented), ("positions", placed)) if wanted]
    hidden = {
        f"{side}_{name}": spec((B, length), jnp.int32) for name in names for side, length in (("q", T), ("kv", S))
    }
    operands = empty._replace(q=spec((B, T, H, D), dtype), k=spec((B, S, K, D), dtype), v=spec((B, S, K, V), dtype))
    out, line = spec((B, T, H, V), dtype), spec((B, H, T), jnp.float32)

    def function(*inputs):
        return gpu_backward.backward(config, *inputs)

    return function, [operands._replace(**hidden), out, line, out, line]


COMPILED = {
    "full": {},
    "causal": {"causal": True},
    "causal, odd lengths": {"causal": True, "T": 4001, "S": 3999},
    "window, odd lengths": {"window": (500, 9), "T": 4001, "S": 3999, "K": 8},
    "causal, segments": {"causal": True, "segmented": True},
    "soft cap": {"soft_cap": 30.0},
    "every flag": {
        "causal": True,
        "segmented": True,
        "placed": True,
        "soft_cap": 30.0,
        "window": (500, None),
        "S": 4001,
    },
    "float16, heads of 64": {"dtype": "float16", "D": 64, "V": 64, "causal": True},
    "heads of 64 and 128, every flag": {
        **{"D": 64, "causal": True, "segmented": True, "placed": True},
        **{"soft_cap": 30.0, "S": 4001},
    },
    "heads of 256": {"D": 256, "V": 256, "causal": True},
    "heads of 256, every flag": {
        **{"D": 256, "V": 256, "causal": True, "segmented": True, "placed": True},
        **{"soft_cap": 30.0, "S": 4001},
    },
}


@pytest.mark.parametrize("case", COMPILED)
def test_lowers_for_cuda(case):
    function, inputs = specs(**COMPILED[case])
    kernels = gpu_compiler.kernel_modules(gpu_compiler.lower(function, inputs))
    assert len(kernels) == (3 if "256" in case else 2)


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_without_spills(case):
    for kernel in gpu_compiler.compile_function(*specs(**COMPILED[case])):
        assert kernel.spill_bytes == 0, kernel.name
        assert kernel.shared_bytes <= gpu_compiler.SHARED_MEMORY, kernel.name
        whole, masked = gpu_compiler.tensor_loops(kernel.sass)
        assert whole.tensor() == masked.tensor()
        # A trip waits for all products once: those of the step before are still at work when it starts.
        assert sum("DEPBAR" in step.name and "0x0" in step.operands for step in whole.trip) == 1, kernel.name


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_card(case):
    dtype = CASES[case].get("dtype", "bfloat16")
    config, operands, cotangents = call(**CASES[case])
    o, lse, want = truth(config, operands, cotangents)
    got = jax.jit(lambda *a: gpu_backward.backward(config, *a))(operands, o.astype(dtype), lse, *cotangents)
    close([np.asarray(x, "float32") for x in got], want, dtype)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "float16 or bfloat16, not float32"),
        ({"dropout": 100}, "no dropout"),
        ({"V": 264}, "at most 256"),
    ],
)
def test_says_what_it_cannot_do(change, reason):
    config, operands, _ = call(**change)
    assert reason in gpu_backward.unsupported_backward(config, operands)


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_takes_no_arrays_over_scores(name):
    config, operands, _ = call()
    operands = operands._replace(**{name: jnp.ones((1, 1, 70, 70), bool if name == "mask" else "float32")})
    assert f"no {name}" in gpu_backward.unsupported_backward(config, operands)
