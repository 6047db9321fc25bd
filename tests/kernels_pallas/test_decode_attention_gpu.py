"""The Hopper kernel of decode attention: interpreted with its races watched, lowered, and compiled to machine code."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_compiler
from kernels_pallas import KVCache, PagedKVCache, decode_attention
from kernels_pallas._decode_attention import api, gpu, reference
from kernels_pallas._decode_attention.tiles import gpu_splits, not_on_gpu
from tests import interpreters
from tests.tolerances import tolerance

pytestmark = pytest.mark.every_jax

needs_interpreter = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="the GPU interpreter came with jax 0.12, which needs Python 3.12"
)


def call(lengths, dtype="bfloat16", *, S=200, T=1, H=4, K=2, D=64, V=64, page=None, **flags):
    """Config and operands; what no row reaches is NaN, and what a table does not need is no page."""
    B, rng = len(lengths), np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    q, k, v = make(B, T, H, D), make(B, S, K, D), make(B, S, K, V)
    past = (np.arange(S) >= np.asarray(lengths)[:, None])[:, :, None, None]
    k, v = (jnp.where(past, jnp.nan, x) for x in (k, v))
    length = jnp.asarray(lengths, jnp.int32)
    cache = KVCache(k, v, length)
    if page:
        N = S // page
        table = rng.permutation(B * N + 2)[: B * N].reshape(B, N)

        def scatter(x):
            pages = jnp.full((B * N + 2, page, *x.shape[2:]), jnp.nan, dtype)
            return pages.at[table].set(x.reshape(B, N, page, *x.shape[2:]))

        table = np.where(np.arange(N) * page < np.asarray(lengths)[:, None], table, 9999)
        cache = PagedKVCache(scatter(k), scatter(v), jnp.asarray(table, jnp.int32), length)
    config, operands, _ = api.prepare(q, cache, **flags)
    return config, operands


def check(config, operands, dtype, run):
    wide = [x.astype("float32") for x in operands[:3]]
    want = reference.forward(config, operands._replace(**dict(zip("qkv", wide, strict=True))))
    for got, w in zip(run(config, operands), want, strict=True):
        got, w = np.asarray(got, "float32"), np.asarray(w)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(w))
        got, w = np.where(np.isfinite(w), got, 0), np.where(np.isfinite(w), w, 0)
        assert np.max(np.abs(got - w)) / max(1.0, np.max(np.abs(w))) <= tolerance(dtype)


def interpreted(config, operands):
    with interpreters.gpu_parameters() as parameters:
        return [np.asarray(x, "float32") for x in gpu.forward(config, operands, interpret=parameters)]


CASES = {
    "rows of unequal lengths": {"lengths": [0, 100, 200]},
    "more blocks than the ring holds": {"lengths": [520], "S": 520, "K": 1, "num_splits": 1},
    "splits, window, soft cap": {
        **{"lengths": [1, 390], "S": 400, "T": 2, "K": 1, "V": 128},
        **{"window": (100, 0), "soft_cap": 2.0, "num_splits": 3},
    },
    "pages shorter than a block": {"lengths": [70, 180], "S": 208, "page": 16},
    "pages longer than a block, negative scale": {
        **{"dtype": "float16", "lengths": [70, 250], "S": 256, "page": 128, "scale": -0.3},
        "sinks": jnp.linspace(-1, 1, 4),
    },
    "more queries than a product has rows": {"lengths": [100], "T": 17, "K": 1, "V": 192},
}


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_without_a_race(case):
    config, operands = call(**CASES[case])
    assert not_on_gpu(config, operands) is None
    check(config, operands, CASES[case].get("dtype", "bfloat16"), interpreted)


@needs_interpreter
@pytest.mark.timeout(300)
@pytest.mark.parametrize("forgotten", ["barrier_wait", "commit_smem"])
def test_interpreter_finds_what_was_forgotten(monkeypatch, forgotten):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    config, operands = call([100, 200])
    monkeypatch.setattr(plgpu, forgotten, lambda *_: None)
    with pytest.raises(Exception, match="RACE DETECTED"):
        interpreted(config, operands)


def specs(dtype="bfloat16", *, B=8, S=4096, T=1, H=32, K=8, D=128, V=128, page=None, **flags):
    """A function of arrays and their specs, for the compiler."""
    spec = jax.ShapeDtypeStruct
    lead = (B * S // page, page) if page else (B, S)
    k, v, length = spec((*lead, K, D), dtype), spec((*lead, K, V), dtype), spec((B,), jnp.int32)
    cache = PagedKVCache(k, v, spec((B, S // page), jnp.int32), length) if page else KVCache(k, v, length)
    return lambda q, cache: decode_attention(q, cache, return_lse=True, **flags), [spec((B, T, H, D), dtype), cache]


COMPILED = {
    "a batch": {},
    "one long row": {"B": 1, "S": 131072},
    "a draft, every flag": {"B": 2, "T": 4, "K": 4, "window": (1000, None), "soft_cap": 30.0},
    "short pages": {"page": 16},
    "long pages, float16, heads of 64": {"page": 128, "dtype": "float16", "D": 64, "V": 64},
    "keys wider than values": {"D": 192},
}


@pytest.mark.parametrize("case", COMPILED)
def test_lowers_for_cuda(case):
    assert len(gpu_compiler.kernel_modules(gpu_compiler.lower(*specs(**COMPILED[case])))) == 1


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_without_spills(case):
    [kernel] = gpu_compiler.compile_function(*specs(**COMPILED[case]))
    assert kernel.spill_bytes == 0
    assert kernel.shared_bytes <= gpu_compiler.SHARED_MEMORY
    assert [loop.tensor() > 0 for loop in gpu_compiler.tensor_loops(kernel.sass)] == [True]


@pytest.mark.gpu_aot
def test_values_of_256_compile():
    """Their sums take half of the registers: some are spilled."""
    [kernel] = gpu_compiler.compile_function(*specs(D=256, V=256))
    assert kernel.shared_bytes <= gpu_compiler.SHARED_MEMORY


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_card(case):
    config, operands = call(**CASES[case])
    check(config, operands, CASES[case].get("dtype", "bfloat16"), jax.jit(gpu.forward, static_argnums=0))


def test_a_long_row_is_split_over_the_multiprocessors():
    """Every multiprocessor of an H100 has a part, and no part fewer keys than its merge is worth."""
    splits = lambda **sizes: gpu_splits(api.prepare(*empty(**sizes))[1])  # noqa: E731

    def empty(**sizes):
        _, (q, cache) = specs(**sizes)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (q, cache))

    assert splits(B=1, K=1, S=65536) == 132
    assert splits(B=1, K=8, S=65536) == 17
    assert splits(B=1, K=1, S=1024) == 4
    assert splits(B=33, K=4, S=512) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "its tensor cores take float16 and bfloat16, not float32"),
        ({"D": 80}, "head dimensions must be multiples of 64, not 80 and 128"),
        ({"V": 320}, "its registers and shared memory hold heads of at most 256 entries"),
        ({"S": 1001}, "the capacity must be a multiple of 8, not 1001"),
        ({"page": 20, "S": 4000}, "pages must hold 8, 16, 32 or a multiple of 64 tokens, not 20"),
    ],
)
def test_refuses_in_one_sentence_and_falls_back(change, reason):
    function, arguments = specs(**change)
    with pytest.raises(NotImplementedError, match=f"decode_attention: implementation 'gpu' cannot .*: {reason}"):
        jax.eval_shape(lambda *a: decode_attention(*a, implementation="gpu"), *arguments)
    assert gpu_compiler.kernel_modules(gpu_compiler.lower(function, arguments)) == []


def test_refuses_int8():
    q = jnp.zeros((1, 1, 2, 64), jnp.bfloat16)
    x, scale = jnp.zeros((1, 64, 2, 64), jnp.int8), jnp.zeros((1, 64, 2))
    with pytest.raises(NotImplementedError, match=r"cannot do this call: it takes no scales, and so no int8"):
        decode_attention(q, KVCache(x, x, jnp.zeros(1, int), scale, scale), implementation="gpu")
