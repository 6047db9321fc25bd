"""The kernels for Hopper: interpreted against the float64 recurrence, lowered, compiled for sm_90a."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_compiler
from kernels_pallas import recurrence_gpu, recurrence_gpu_backward
from kernels_pallas._linear_attention import gpu, gpu_backward, reference
from kernels_pallas._linear_attention.config import Config, Operands
from tests import interpreters
from tests.tolerances import tolerance

pytestmark = pytest.mark.every_jax

needs_interpreter = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="the GPU interpreter came with jax 0.12, which needs Python 3.12"
)
NAMES = ("q", "k", "v", "state", "log_decay")


def call(dtype="bfloat16", *, B=1, T=70, H=1, K=64, V=64, gate="none", segments=None, lowest=1.0, scale=0.125, **flags):
    """Config, operands and cotangents; `segments` are lengths."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(B, T, H, K)), dtype) for _ in "qk")
    v, o_cotangent = (jnp.asarray(rng.normal(size=(B, T, H, V)), dtype) for _ in "vo")
    state, state_cotangent = (jnp.asarray(rng.normal(size=(B, H, K, V)), "float32") for _ in "so")
    shapes = {"none": None, "head": (B, H), "token": (B, T, H), "channel": (B, T, H, K)}
    decay = None if gate == "none" else jnp.asarray(-lowest * rng.uniform(size=shapes[gate]), "float32")
    ids = None
    if segments is not None:
        # The rows of a batch break at different places.
        ids = [np.repeat(np.arange(len(segments)), np.roll(segments, row)) for row in range(B)]
        ids = jnp.asarray(np.stack(ids), "int32")
    return Config(scale, **flags), Operands(q, k, v, state, decay, ids), (o_cotangent, state_cotangent)


def wide(arrays):
    return [
        None if x is None else jnp.asarray(np.asarray(x, None if x.dtype == "int32" else "float64")) for x in arrays
    ]


def truth(config, operands, cotangents):
    """o and the final state, and their gradient, in float64 of the same inputs of 16 bits."""
    with jax.enable_x64(True):
        operands = Operands(*wide(operands))
        given = {name: getattr(operands, name) for name in NAMES if getattr(operands, name) is not None}

        @jax.jit
        def run(given, cotangents):
            outputs, pull = jax.vjp(lambda given: reference.forward(config, operands._replace(**given)), given)
            gradient = pull(cotangents)[0]
            return outputs, [gradient[name] for name in NAMES if name in given]

        return jax.tree.map(np.asarray, run(given, tuple(wide(cotangents))))


def forward(config, operands):
    with interpreters.gpu_parameters() as parameters:
        return [np.asarray(x, np.float64) for x in gpu.forward(config, operands, interpret=parameters)]


def backward(config, operands, cotangents):
    with interpreters.gpu_parameters() as parameters:
        got = gpu_backward.backward(config, operands, *cotangents, interpret=parameters)
        return [np.asarray(x, np.float64) for x in got]


def close(got, want, dtype):
    """Each to a rounding or two of what entered a product, in the norm: the errors are independent."""
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error <= tolerance(dtype, condition=0.15), error


FORWARD = {
    "no decay": {"T": 200},
    "one token": {"T": 1, "gate": "token"},
    "decay a token, wide heads": {"T": 133, "K": 128, "V": 128, "gate": "token", "dtype": "float16"},
    "decay a head": {"H": 2, "gate": "head", "lowest": 0.1},
    "odd heads, segments of a batch": {"B": 2, "T": 70, "K": 24, "V": 72, "gate": "token", "segments": (30, 40)},
    "segments alone": {"T": 150, "segments": (64, 60, 26)},
    "steep decay": {"T": 130, "gate": "token", "lowest": 30.0},
}


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", FORWARD)
def test_equals_the_recurrence(case):
    config, operands, cotangents = call(**FORWARD[case])
    assert gpu.unsupported(config, operands) is None
    close(forward(config, operands), truth(config, operands, cotangents)[0], operands.q.dtype)


BACKWARD = {
    "no decay": {"T": 130},
    "decay a token, wide heads": {"T": 65, "K": 128, "V": 128, "gate": "token", "dtype": "float16"},
    "decay a head": {"H": 2, "gate": "head", "lowest": 0.1},
    "odd heads, segments": {"T": 140, "K": 24, "V": 136, "gate": "token", "segments": (40, 70, 30)},
}


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", BACKWARD)
def test_gradient_equals_that_of_the_recurrence(case):
    config, operands, cotangents = call(**BACKWARD[case])
    assert gpu_backward.unsupported_backward(config, operands) is None
    close(backward(config, operands, cotangents), truth(config, operands, cotangents)[1], operands.q.dtype)


@needs_interpreter
@pytest.mark.timeout(300)
def test_a_segment_does_not_depend_on_another():
    """Bit for bit, beside decays of 0 and within a chunk that two share."""
    config, operands, _ = call(T=100, gate="token", segments=(60, 40), lowest=1000.0)
    o, state = forward(config, operands)
    for part, other in ((slice(0, 60), slice(60, 100)), (slice(60, 100), slice(0, 60))):
        changed = operands._replace(
            **{name: getattr(operands, name).at[:, other].multiply(0.5) for name in ("q", "k", "v", "log_decay")}
        )
        got, final = forward(config, changed)
        np.testing.assert_array_equal(got[:, part], o[:, part])
        np.testing.assert_array_equal(final == state, part.start == 60)


@needs_interpreter
@pytest.mark.timeout(300)
def test_interpreter_finds_a_missing_fence(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    config, operands, _ = call()
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    with pytest.raises(Exception, match="RACE DETECTED"):
        forward(config, operands)


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("forgotten", ["full", "tokens_ready", "states_ready", "dstates_ready"])
def test_interpreter_finds_each_wait_that_tiles_need(monkeypatch, forgotten):
    """Without one of them a tile is read before it is there."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    module = recurrence_gpu if forgotten == "full" else recurrence_gpu_backward
    kernel, wait = module._kernel, plgpu.barrier_wait

    def without_one(*arguments):
        chosen = getattr(arguments[-1], forgotten)

        def wait_for_others(barrier):
            if getattr(barrier, "ref", barrier) is not chosen:
                wait(barrier)

        monkeypatch.setattr(plgpu, "barrier_wait", wait_for_others)
        kernel(*arguments)
        monkeypatch.setattr(plgpu, "barrier_wait", wait)

    monkeypatch.setattr(module, "_kernel", without_one)
    config, operands, cotangents = call(T=60, gate="token")
    # A barrier that nobody ever looks at is refused as such, where no race comes first.
    with pytest.raises(Exception, match="RACE DETECTED|no threads observed"):
        backward(config, operands, cotangents)


def specs(dtype="bfloat16", *, B=2, T=4096, H=8, K=128, V=128, gate="token", segments=False):
    spec = jax.ShapeDtypeStruct
    shapes = {"none": None, "head": (B, H), "token": (B, T, H)}
    q, v = (spec((B, T, H, size), dtype) for size in (K, V))
    decay = None if gate == "none" else spec(shapes[gate], "float32")
    state = spec((B, H, K, V), "float32")
    return Operands(q, q, v, state, decay, spec((B, T), "int32") if segments else None), (v, state)


def functions(**flags):
    """Forward and backward functions of arrays, each with its specs and kernels."""
    operands, cotangents = specs(**flags)
    config = Config(0.125)
    kernels = ["linear_attention_o"]
    yield lambda operands: gpu.forward(config, operands), [operands], kernels
    kernels = ["linear_attention_states", "linear_attention_final", "chunk_dq_dk_dv"]
    yield lambda *a: gpu_backward.backward(config, a[0], *a[1:]), [operands, *cotangents], kernels


COMPILED = {
    "decay a token": {},
    "no decay": {"gate": "none"},
    "decay a head, heads of 64": {"gate": "head", "K": 64, "V": 64, "dtype": "float16"},
    "segments, odd sizes": {"T": 4001, "K": 72, "V": 129, "segments": True},
}


@pytest.mark.parametrize("case", COMPILED)
def test_lowers_for_cuda(case):
    for function, arrays, kernels in functions(**COMPILED[case]):
        wanted = len(kernels) + (len(kernels) == 3 and case == "segments, odd sizes")
        assert len(gpu_compiler.kernel_modules(gpu_compiler.lower(function, arrays))) == wanted


def test_lowers_with_x64_on(x64):
    for function, arrays, kernels in functions():
        assert len(gpu_compiler.kernel_modules(gpu_compiler.lower(function, arrays))) == len(kernels)


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_without_spills(case):
    for function, arrays, kernels in functions(**COMPILED[case]):
        found = gpu_compiler.compile_function(function, arrays)
        # Wide values take the last kernel twice.
        assert list(dict.fromkeys(kernel.name for kernel in found)) == kernels
        for kernel in found:
            assert kernel.spill_bytes == 0
            assert kernel.shared_bytes <= gpu_compiler.SHARED_MEMORY


@pytest.mark.gpu_aot
def test_tensor_cores_do_what_the_mathematics_asks_for():
    """In a chunk q k^T, q S, p v and k^T v, for 64 columns; and two blocks fit a multiprocessor."""
    function, arrays, _ = next(functions())
    [kernel] = gpu_compiler.compile_function(function, arrays)
    [loop] = gpu_compiler.tensor_loops(kernel.sass)
    K, C = 128, recurrence_gpu.CHUNK
    assert loop.macs() == C * K * C + C * K * 64 + C * C * 64 + K * C * 64
    assert 2 * (kernel.shared_bytes + 1024) <= gpu_compiler.SHARED_MEMORY + 1024
    assert kernel.registers * 128 * 2 <= 65536


@pytest.mark.gpu
@pytest.mark.parametrize("case", FORWARD)
def test_on_a_card(case):
    config, operands, cotangents = call(**FORWARD[case])
    found = jax.jit(lambda operands: gpu.forward(config, operands))(operands)
    want = truth(config, operands, cotangents)[0]
    close([np.asarray(x, np.float64) for x in found], want, operands.q.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", BACKWARD)
def test_gradient_on_a_card(case):
    config, operands, cotangents = call(**BACKWARD[case])
    found = jax.jit(lambda *a: gpu_backward.backward(config, a[0], *a[1:]))(operands, *cotangents)
    want = truth(config, operands, cotangents)[1]
    close([np.asarray(x, np.float64) for x in found], want, operands.q.dtype)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "float16 and bfloat16, not float32"),
        ({"gate": "channel"}, "no decay per key channel"),
        ({"K": 136}, "at most 128"),
        ({"chunk": 128}, "64 tokens, not 128"),
    ],
)
def test_says_what_it_cannot_do(change, reason):
    config, operands, _ = call(**change)
    assert reason in gpu.unsupported(config, operands)
    assert reason in gpu_backward.unsupported_backward(config, operands)
