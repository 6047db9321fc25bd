"""The kernels for Hopper: interpreted against the float64 recurrence, lowered, compiled for sm_90a."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_compiler
from kernels_pallas import recurrence_gpu
from kernels_pallas._delta_rule import gpu, gpu_backward, reference
from kernels_pallas._delta_rule.config import Config, Operands
from tests import interpreters
from tests.tolerances import tolerance

pytestmark = pytest.mark.every_jax

needs_interpreter = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="the GPU interpreter came with jax 0.12, which needs Python 3.12"
)
NAMES = ("q", "k", "v", "beta", "state", "log_decay")


def call(
    dtype="bfloat16", *, B=1, T=70, H=1, K=64, V=64, gate="none", segments=None, lowest=1.0, top=1.0, alike=0.0, **flags
):
    """Config, operands and cotangents; `segments` are lengths, `alike` the correlation of keys, `top` bounds beta."""
    rng = np.random.default_rng(0)
    q, k, noise = (rng.normal(size=(B, T, H, K)) for _ in range(3))
    k = np.sqrt(1 - alike) * k + np.sqrt(alike) * noise[:, :1]
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, o_cotangent = (jnp.asarray(rng.normal(size=(B, T, H, V)), dtype) for _ in "vo")
    state, state_cotangent = (jnp.asarray(rng.normal(size=(B, H, K, V)), "float32") for _ in "so")
    beta = jnp.asarray(top * rng.uniform(size=(B, T, H)), "float32")
    shape = (B, T, H, K) if gate == "channel" else (B, T, H)
    decay = None if gate == "none" else jnp.asarray(-lowest * rng.uniform(size=shape), "float32")
    ids = None
    if segments is not None:
        # The rows of a batch break at different places.
        ids = [np.repeat(np.arange(len(segments)), np.roll(segments, row)) for row in range(B)]
        ids = jnp.asarray(np.stack(ids), "int32")
    operands = Operands(jnp.asarray(q, dtype), jnp.asarray(k, dtype), v, beta, state, decay, ids)
    return Config(K**-0.5, **flags), operands, (o_cotangent, state_cotangent)


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
    "decay, wide heads": {"T": 133, "K": 128, "V": 128, "gate": "token", "dtype": "float16"},
    "odd heads, segments of a batch": {"B": 2, "T": 70, "K": 24, "V": 72, "gate": "token", "segments": (30, 40)},
    "segments alone": {"T": 150, "segments": (64, 60, 26)},
    "steep decay": {"T": 130, "gate": "token", "lowest": 30.0},
    "keys alike, betas up to 2": {"T": 130, "alike": 0.9, "top": 2.0},
}


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", FORWARD)
def test_equals_the_recurrence(case):
    config, operands, cotangents = call(**FORWARD[case])
    assert gpu.unsupported(config, operands) is None
    o, state = forward(config, operands)
    want = truth(config, operands, cotangents)[0]
    close([o, state], want, operands.q.dtype)
    # What the state loses to 16 bits would come back with every token that reads it.
    assert np.linalg.norm(state - want[1]) <= tolerance("bfloat16", condition=0.001) * np.linalg.norm(want[1])


BACKWARD = {
    "no decay, two heads": {"H": 2},
    "decay, wide heads": {"T": 65, "K": 128, "V": 128, "gate": "token", "dtype": "float16"},
    "odd heads, segments": {"T": 140, "K": 24, "V": 136, "gate": "token", "segments": (40, 70, 30)},
    "keys alike, betas up to 2": {"T": 130, "alike": 0.9, "top": 2.0, "gate": "token", "lowest": 0.1},
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
def test_betas_of_zero_leave_linear_decay():
    """No division by beta: what is not written still has a derivative."""
    config, operands, cotangents = call(T=65, gate="token", top=0.0, dtype="float16")
    got, want = backward(config, operands, cotangents), truth(config, operands, cotangents)[1]
    for name, x, y in zip(NAMES, got, want, strict=True):
        if name in ("k", "v"):
            np.testing.assert_array_equal(x, 0)
        else:
            close([x], [y], "float16")


@needs_interpreter
@pytest.mark.timeout(300)
def test_a_segment_does_not_depend_on_another():
    """Bit for bit, beside decays of 0 and within a chunk that two share."""
    config, operands, _ = call(T=100, gate="token", segments=(60, 40), lowest=1000.0)
    o, state = forward(config, operands)
    names = ("q", "k", "v", "beta", "log_decay")
    for part, other in ((slice(0, 60), slice(60, 100)), (slice(60, 100), slice(0, 60))):
        changed = {name: getattr(operands, name).at[:, other].multiply(0.5) for name in names}
        got, final = forward(config, operands._replace(**changed))
        np.testing.assert_array_equal(got[:, part], o[:, part])
        np.testing.assert_array_equal(np.array_equal(final, state), part.start == 60)


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("module", [gpu, gpu_backward], ids=["forward", "backward"])
def test_interpreter_finds_a_missing_fence(monkeypatch, module):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    config, operands, cotangents = call()
    name = "step" if module is gpu else "_step_back"
    step, commit = getattr(module, name), plgpu.commit_smem

    def without_fences(*arguments):
        monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
        try:
            return step(*arguments)
        finally:
            monkeypatch.setattr(plgpu, "commit_smem", commit)

    monkeypatch.setattr(module, name, without_fences)
    with pytest.raises(Exception, match="RACE DETECTED"):
        forward(config, operands) if module is gpu else backward(config, operands, cotangents)


@needs_interpreter
@pytest.mark.timeout(300)
def test_interpreter_finds_a_missing_wait(monkeypatch):
    """What came of a chunk is read before it is there, and before its first wait for the tiles of the next."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    kernel, wait = recurrence_gpu._kernel, plgpu.barrier_wait

    def without_one(*arguments):
        chosen = arguments[-1].full

        def wait_for_others(barrier):
            if getattr(barrier, "ref", barrier) is not chosen:
                wait(barrier)

        monkeypatch.setattr(plgpu, "barrier_wait", wait_for_others)
        kernel(*arguments)

    monkeypatch.setattr(recurrence_gpu, "_kernel", without_one)
    config, operands, _ = call(T=60)
    # A barrier that nobody ever looks at is refused as such, where no race comes first.
    with pytest.raises(Exception, match="RACE DETECTED|no threads observed"):
        forward(config, operands)


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_inverts_without_powers(alike):
    """Betas of 2 and keys alike, where a series of powers is off by many orders of magnitude."""
    _, operands, _ = call("float16", T=64, H=2, alike=alike)
    inputs = gpu.prepared(operands)
    M = np.asarray(inputs["pairs"], np.float64)
    want = np.linalg.inv(np.eye(64) + 2 * M)
    got = np.asarray(gpu.inverted(2 * inputs["pairs"]), np.float64)
    assert np.max(np.abs(got - want)) <= tolerance("float32", 64, condition=10) * np.max(np.abs(want))
    two = np.sum(np.asarray(gpu.split(jnp.asarray(want, "float32"), "bfloat16"), np.float64), axis=-3)
    assert np.max(np.abs(two - want)) <= 2.0**-17 * np.max(np.abs(want))


def specs(dtype="bfloat16", *, B=2, T=4096, H=8, K=128, V=128, gate="token", segments=False):
    spec = jax.ShapeDtypeStruct
    q, v = (spec((B, T, H, size), dtype) for size in (K, V))
    beta, state = spec((B, T, H), "float32"), spec((B, H, K, V), "float32")
    decay = None if gate == "none" else beta
    return Operands(q, q, v, beta, state, decay, spec((B, T), "int32") if segments else None), (v, state)


def functions(**flags):
    """Forward and backward functions of arrays, each with its specs and kernels."""
    operands, cotangents = specs(**flags)
    config = Config(0.125)
    yield lambda operands: gpu.forward(config, operands), [operands], ["delta_rule_o"]
    kernels = ["delta_rule_states", "delta_rule_final", "chunk_dq_dk_dm"]
    yield lambda *a: gpu_backward.backward(config, a[0], *a[1:]), [operands, *cotangents], kernels


COMPILED = {
    "decay": {},
    "no decay, heads of 64": {"gate": "none", "K": 64, "V": 64, "dtype": "float16"},
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
    """In a chunk, for 64 columns: q k^T, q S and p u once, k S and k^T u twice, the inverse times e three times."""
    function, arrays, _ = next(functions())
    [kernel] = gpu_compiler.compile_function(function, arrays)
    [loop] = gpu_compiler.tensor_loops(kernel.sass)
    K, C = 128, recurrence_gpu.CHUNK
    assert loop.macs() == 2 * C * K * C + C * C * C + 4 * C * K * C + 3 * C * C * C


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
        ({"chunk": 32}, "64 tokens, not 32"),
    ],
)
def test_says_what_it_cannot_do(change, reason):
    config, operands, _ = call(**change)
    assert reason in gpu.unsupported(config, operands)
    assert reason in gpu_backward.unsupported_backward(config, operands)
