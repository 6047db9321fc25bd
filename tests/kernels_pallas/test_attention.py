"""Attention beyond the contract: oracles nobody here wrote, identities, memory, every bad argument."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_pallas
from kernels_pallas import BlockSizes, attention
from kernels_pallas._attention import api, masks, reference, xla
from kernels_pallas._attention.config import Config, Operands
from tests.contracts.kernel import KERNELS
from tests.tolerances import tolerance

SMALL = BlockSizes(128, 128, 128)


def inputs(dtype="float32", *, B=2, T=130, S=150, H=4, K=2, D=16, V=16, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, V)))


def close(got, want, dtype="float32", size=300, condition=1.0):
    scale = max(1.0, float(np.max(np.abs(want))))
    error = float(np.max(np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)))) / scale
    assert error <= tolerance(dtype, size, condition=condition), error


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("flags", ["plain", "causal", "window", "bias", "mask", "scale"])
def test_equals_jax_nn(implementation, flags):
    q, k, v = inputs(T=150)
    rng = np.random.default_rng(2)
    bias = jnp.asarray(rng.normal(size=(2, 4, 150, 150)), "float32")
    mask = jnp.asarray(rng.random((2, 1, 150, 150)) < 0.5)
    ours, theirs = {
        "plain": ({}, {}),
        "causal": ({"causal": True}, {"is_causal": True}),
        "window": ({"window": (9, 4)}, {"local_window_size": (9, 4)}),
        "bias": ({"bias": bias}, {"bias": bias}),
        "mask": ({"mask": mask}, {"mask": mask}),
        "scale": ({"scale": 0.3}, {"scale": 0.3}),
    }[flags]
    got, lse = attention(q, k, v, implementation=implementation, block_sizes=SMALL, return_lse=True, **ours)
    want, want_lse = jax.nn.dot_product_attention(q, k, v, return_residual=True, **theirs)
    close(got, want)
    close(jnp.swapaxes(lse, 1, 2), want_lse)


def test_two_halves_of_the_keys_merge_by_their_lse(x64):
    q, k, v = inputs("float64")

    def merged(q, k, v):
        parts = [attention(q, *half, return_lse=True) for half in ((k[:, :70], v[:, :70]), (k[:, 70:], v[:, 70:]))]
        lse = jnp.logaddexp(parts[0][1], parts[1][1])
        return sum(o * jnp.exp(part - lse).swapaxes(1, 2)[..., None] for o, part in parts), lse

    whole = lambda *a: attention(*a, return_lse=True)  # noqa: E731
    for got, want in zip(merged(q, k, v), whole(q, k, v), strict=True):
        close(got, want, "float64")
    scalar = lambda f: lambda *a: sum(jnp.sum(jnp.sin(o)) for o in f(*a))  # noqa: E731
    gradients = [jax.grad(scalar(f), (0, 1, 2))(q, k, v) for f in (merged, whole)]
    for got, want in zip(*gradients, strict=True):
        close(got, want, "float64", condition=10)


def test_permuted_keys_change_nothing(x64):
    q, k, v = inputs("float64")
    bias = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 130, 150)))
    order = np.random.default_rng(1).permutation(150)
    close(attention(q, k[:, order], v[:, order], bias=bias[..., order]), attention(q, k, v, bias=bias), "float64")


def test_batch_axes_none_and_two():
    q, k, v = inputs(B=6)
    want = attention(q, k, v, causal=True)
    np.testing.assert_array_equal(attention(q[0], k[0], v[0], causal=True), want[0])
    o, lse = attention(*(x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v)), causal=True, return_lse=True)
    np.testing.assert_array_equal(o.reshape(want.shape), want)
    assert lse.shape == (2, 3, 4, 130)
    mask = jnp.ones((2, 1, 1, 130, 150), bool)
    np.testing.assert_array_equal(attention(*(x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v)), mask=mask)[1, 2],
                                  attention(q, k, v)[5])  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", "xla", None, "tpu"])
def test_nothing_to_attend_to(implementation):
    q, k, v = inputs(S=0)
    o, lse = attention(q, k, v, return_lse=True, implementation=implementation)
    np.testing.assert_array_equal(o, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    assert attention(q[:, :0], *inputs()[1:], implementation=implementation).shape == (2, 0, 4, 16)


def test_minus_infinity_in_a_bias_hides():
    q, k, v = inputs()
    hidden = np.random.default_rng(0).random((2, 1, 130, 150)) < 0.5
    hidden[:, :, 5] = True
    by_bias = attention(q, k, v, bias=jnp.where(hidden, -jnp.inf, 0.0), return_lse=True, block_sizes=SMALL)
    by_mask = attention(q, k, v, mask=jnp.asarray(~hidden), return_lse=True, block_sizes=SMALL)
    for got, want in zip(by_bias, by_mask, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(by_bias[0][:, 5], 0)


@pytest.mark.parametrize("implementation", ["reference", "xla", "xla, all heads at once", "tpu, interpreted"])
@pytest.mark.parametrize("huge", [np.finfo("float32").min, 3e38])
def test_a_row_of_huge_equal_biases_is_a_mean(implementation, huge):
    q, k, v = inputs()
    bias = jnp.zeros((1, 1, 130, 150)).at[:, :, 7].set(huge)
    o, lse = KERNELS[0].implementations[implementation]((q, k, v), {"bias": bias})
    # Beside such a bias q . k is lost to rounding, so that all keys weigh the same.
    close(o[:, 7], np.repeat(np.asarray(v).mean(1), 2, axis=1))
    assert np.isfinite(lse).all()


def test_error_in_bfloat16_is_that_of_its_rounding():
    arrays = inputs("bfloat16", S=300)
    with jax.enable_x64(True):
        truth = attention(*(jnp.asarray(np.asarray(x, np.float64)) for x in arrays), implementation="reference")
    dense = jnp.asarray(attention(*(x.astype("float32") for x in arrays), implementation="reference"), "bfloat16")
    error = lambda x: np.abs(np.asarray(x, np.float64) - np.asarray(truth)).max()  # noqa: E731
    assert error(attention(*arrays)) <= 1.5 * error(dense)


def test_memory_is_linear_in_length():
    def temp(T, implementation, gradient):
        f = lambda q, k, v: attention(q, k, v, causal=True, implementation=implementation)  # noqa: E731
        if gradient:
            f = jax.grad(lambda *a, f=f: f(*a).sum(), (0, 1, 2))
        spec = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.float32)
        return jax.jit(f).lower(spec, spec, spec).compile().memory_analysis().temp_size_in_bytes

    for gradient in (False, True):
        assert temp(16384, "xla", gradient) <= 4.4 * temp(4096, "xla", gradient)
    assert temp(8192, "xla", True) <= 0.1 * temp(8192, "reference", True)


def test_causal_costs_less_than_full():
    cost = lambda causal: np.sum(  # noqa: E731
        masks.block_kinds(
            Config(causal, None, None, 1.0, None), Operands(*(np.zeros((1, 8192, 1, 64)),) * 3), 1024, 512
        )
        != masks.SKIP
    )
    assert cost(True) <= 0.65 * cost(False)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_block_kinds_never_lie(data):
    """SKIP holds nothing that is seen, FULL nothing that is hidden, whatever the positions and segments."""
    T, S = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    edge = st.one_of(st.none(), st.integers(0, 12))
    window = data.draw(st.one_of(st.none(), st.tuples(edge, edge)))
    config = Config(data.draw(st.booleans()), window, None, 1.0, None)
    line = lambda n, low, high: np.array(  # noqa: E731
        [data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n))], np.int32
    )
    operands = Operands(np.zeros((1, T, 1, 1)), np.zeros((1, S, 1, 1)), np.zeros((1, S, 1, 1)))
    if data.draw(st.booleans()):
        operands = operands._replace(q_segments=line(T, -1, 2), kv_segments=line(S, -1, 2))
    if data.draw(st.booleans()):
        operands = operands._replace(q_positions=line(T, 0, 50))
    bq, bk = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16))
    kinds = np.asarray(masks.block_kinds(config, operands, bq, bk))[0]
    seen = reference.dense_mask(config, operands)
    seen = np.ones((T, S), bool) if seen is None else np.asarray(np.broadcast_to(seen, (1, 1, T, S)))[0, 0]
    for i in range(kinds.shape[0]):
        for j in range(kinds.shape[1]):
            tile = seen[i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            assert not (kinds[i, j] == masks.SKIP and tile.any())
            assert not (kinds[i, j] == masks.FULL and not tile.all())
            if S % bk and j == kinds.shape[1] - 1:
                assert kinds[i, j] != masks.FULL


@pytest.mark.parametrize(
    "shape", [(2, 4, 130, 150), (1, 4, 130, 150), (2, 1, 1, 150), (1, 1, 1, 150), (1, 1, 130, 150)]
)
@pytest.mark.parametrize("way", ["xla", "all heads at once", "bias alone"])
def test_gradient_of_a_bias(shape, way, x64):
    arrays = inputs("float64")
    bias = jnp.asarray(np.random.default_rng(4).normal(size=shape)).at[..., 7].set(-jnp.inf)
    flags = {"causal": True, "dropout_rate": 0.2, "dropout_seed": 1, "block_sizes": SMALL}

    def loss(o, lse):
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(lse))

    def scalar(*arrays, of):
        *arrays, bias = arrays
        return loss(*attention(*arrays, bias=bias, return_lse=True, implementation=of, **flags))

    want = jax.grad(lambda *a: scalar(*a, of="reference"), (0, 1, 2, 3))(*arrays, bias)
    if way == "xla":
        got = jax.grad(lambda *a: scalar(*a, of="xla"), (0, 1, 2, 3))(*arrays, bias)
    else:
        config, operands, _ = api.prepare(*arrays, bias=bias, **flags)
        config = dataclasses.replace(config, bias_gradient=True)
        outputs = xla.forward(config, operands, sequential=False)
        saved = (*outputs, *jax.grad(loss, (0, 1))(*outputs))
        if way == "bias alone":
            got, want = [xla.bias_gradient(config, operands, *saved)], want[3:]
        else:
            got = xla.backward(config, operands, *saved, sequential=False)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        close(g, w, "float64", condition=10)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("lead", [1, 2])
def test_gradient_of_a_bias_under_vmap(axes, lead, x64):
    q, k, v = inputs("float64", T=40, S=50)
    rng = np.random.default_rng(0)
    bias = jnp.asarray(rng.normal(size=(3, lead, 1, 40, 50)))
    run = jax.grad(lambda q, b: jnp.sum(jnp.sin(attention(q, k, v, bias=b))), (0, 1))
    given = (jnp.stack([q, 2 * q, -q]) if axes[0] == 0 else q, bias if axes[1] == 0 else bias[0])
    many = jax.vmap(run, in_axes=axes)(*given)
    for lane in range(3):
        one = run(*(x[lane] if axis == 0 else x for x, axis in zip(given, axes, strict=True)))
        for g, w in zip(many, one, strict=True):
            close(g[lane], w, "float64", condition=10)


def test_a_large_shared_bias_leaves_the_padding_of_blocks_alone():
    q, k, v = inputs(T=130)
    bias = jnp.full((1, 1, 1, 150), 100.0)
    scalar = lambda *a, b: jnp.sum(jnp.sin(attention(*a, bias=b, implementation="xla", block_sizes=SMALL)))  # noqa: E731
    gradients = [jax.grad(lambda *a, b=b: scalar(*a, b=b), (0, 1, 2))(q, k, v) for b in (bias, None)]
    for g, w in zip(*gradients, strict=True):
        # Beside 100 a score keeps fewer digits.
        close(g, w, condition=100)


@pytest.mark.parametrize("first", ["q", "v"])
def test_a_bias_that_is_differentiated_second(first, x64):
    q, k, v = inputs("float64", T=20, S=30)
    bias = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 20, 30)))

    def slope(b, of):
        run = lambda x: jnp.sum(attention(**{"q": q, "k": k, "v": v, first: x}, bias=b, implementation=of) ** 2)  # noqa: E731
        return jnp.sum(jax.grad(run)(q if first == "q" else v) ** 2)

    got, want = (jax.grad(slope)(bias, of) for of in ("xla", "reference"))
    close(got, want, "float64", condition=10)


def test_second_order_through_a_bias(x64):
    q, k, v = inputs("float64", T=20, S=30)
    bias = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 20, 30)))

    def product(of):
        inner = jax.grad(lambda q, b: jnp.sum(jnp.sin(attention(q, k, v, bias=b, implementation=of))), (0, 1))
        return jax.grad(lambda *a: sum(jnp.sum(jnp.cos(g)) for g in inner(*a)), (0, 1))(q, bias)

    for got, want in zip(product("xla"), product("reference"), strict=True):
        close(got, want, "float64", condition=10)


def test_memory_of_a_bias_gradient_is_that_of_the_bias():
    def temp(T):
        f = jax.grad(lambda q, b: attention(q, q, q, bias=b, implementation="xla").sum(), (0, 1))
        specs = (jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32), jax.ShapeDtypeStruct((1, 1, 1, T), jnp.float32))
        return jax.jit(f).lower(*specs).compile().memory_analysis().temp_size_in_bytes

    assert temp(16384) <= 4.4 * temp(4096)


@pytest.mark.parametrize("flags", [
    {"causal": True}, {"window": (300, 70)}, {"causal": True, "q_offset": -200}, {"causal": True, "q_offset": 300},
    {"causal": True, "soft_cap": 1.0, "dropout_rate": 0.3, "dropout_seed": 5},
    {"causal": True, "segment_ids": np.repeat(np.arange(3), [300, 200, 650])[None].astype("int32")},
], ids=str)  # fmt: skip
def test_rows_cut_in_two(flags, x64):
    """Blocks so long that the queries of a row are halved where the upper half sees less."""
    q, k, v = inputs("float64", B=1, T=1150, S=1150, H=2, K=1, D=8, V=8)
    bias = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 1150, 1150)))
    blocks = BlockSizes(512, 256, 256)

    def run(of, q, k, v, bias):
        return attention(q, k, v, bias=bias, return_lse=True, implementation=of, block_sizes=blocks, **flags)

    for g, w in zip(run("xla", q, k, v, bias), run("reference", q, k, v, bias), strict=True):
        np.testing.assert_array_equal(np.isfinite(g), np.isfinite(w))
        close(jnp.where(jnp.isfinite(g), g, 0), jnp.where(jnp.isfinite(w), w, 0), "float64")
    finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)  # noqa: E731
    scalar = lambda of: lambda *a: sum(jnp.sum(jnp.sin(finite(o))) for o in run(of, *a))  # noqa: E731
    got, want = (jax.grad(scalar(of), (0, 1, 2, 3))(q, k, v, bias) for of in ("xla", "reference"))
    for g, w in zip(got, want, strict=True):
        close(g, w, "float64", condition=10)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_an_offset_moves_the_queries(implementation):
    q, k, v = inputs()
    run = lambda **f: attention(q, k, v, causal=True, window=(40, None), implementation=implementation, **f)  # noqa: E731
    want = run(q_positions=jnp.arange(130) + 17)
    np.testing.assert_array_equal(run(q_offset=17), want)
    close(jax.jit(lambda n: run(q_offset=n))(17), want)
    rows = run(q_offset=jnp.array([17, 3]))
    close(rows[0], want[0])
    close(rows[1], run(q_offset=3)[1])
    # Prefill in chunks: each chunk of queries against the keys so far.
    whole = attention(q, k, v, causal=True, implementation=implementation)
    for start in (0, 50, 100):
        chunk = attention(q[:, start : start + 50], k, v, causal=True, q_offset=start, implementation=implementation)
        close(chunk, whole[:, start : start + 50])


def test_remat_scan_and_jit(x64):
    q, k, v = inputs("float64", S=130)

    def layered(q, policy):
        def layer(x, _):
            return x + attention(x, k, v, causal=True), None

        body = jax.checkpoint(layer, policy=policy) if policy else layer
        return jnp.sum(jax.lax.scan(body, q, None, length=3)[0] ** 2)

    names = jax.checkpoint_policies.save_only_these_names("attention_output", "attention_lse")
    want = jax.grad(layered)(q, None)
    for policy in (names, jax.checkpoint_policies.nothing_saveable):
        close(jax.jit(jax.grad(lambda q, p=policy: layered(q, p)))(q), want, "float64", condition=100)


def test_eager_calls_compile_once():
    from tests.compiles import count_compiles

    arrays, fresh = inputs(seed=1), inputs(seed=2)
    attention(*arrays, causal=True)
    with count_compiles() as compiled:
        attention(*fresh, causal=True)
    assert compiled() == 0


BAD = [
    ({"k": (2, 150, 3, 16), "v": (2, 150, 3, 16)}, ValueError,
     r"attention: `k` must have a number of heads that divides those of `q`, 4; got 3. Query heads share"),
    ({"k": (2, 150, 2, 12)}, ValueError, r"attention: `k` must have shape \(2, S, Hk, 16\) to match `q` \(2, 130, 4, "),
    ({"v": (2, 140, 2, 16)}, ValueError,
     r"attention: `v` must have shape \(2, 150, 2, Dv\) to match `q` .* and `k` .*; got"),
    ({"k": (3, 150, 2, 16)}, ValueError, r"attention: `k` must have shape .*; got \(3, 150, 2, 16\). The layout is"),
    ({"q": (130, 16)}, ValueError, r"attention: `q` must have shape \(\*B, T, Hq, D\); got \(130, 16\). The layout is"),
    ({"q": "int32"}, TypeError, r"attention: `q` must have one of the dtypes float32, bfloat16, .*; got int32"),
    ({"v": "bfloat16"}, TypeError, r"attention: `v` must have dtype float32 to match `q`; got bfloat16. Cast them"),
    ({"window": (-1, 0)}, ValueError, r"attention: `window` must be a pair \(left, right\) of ints >= 0 or None; got"),
    ({"window": 5}, ValueError, r"attention: `window` must be a pair .*; got 5"),
    ({"causal": jnp.array(True)}, ValueError, r"attention: `causal` must be a Python bool; got .*. Use `mask`"),
    ({"q_positions": np.array([2**31] * 130)}, ValueError, r"attention: `q_positions` must lie strictly betw"),
    ({"soft_cap": 0.0}, ValueError, r"attention: `soft_cap` must be a positive Python number; got 0.0"),
    ({"scale": float("nan")}, ValueError, r"attention: `scale` must be a finite Python number; got nan. Mult"),
    ({"bias": (2, 4, 130, 1)}, ValueError, r"attention: `bias` must have shape \(2, 4, 130, 150\), with 1 where .*"),
    ({"mask": (130, 150)}, ValueError, r"attention: `mask` must have shape .*; got \(130, 150\). The layout is"),
    ({"mask": jnp.zeros((1, 1, 1, 150))}, TypeError, r"attention: `mask` must have dtype bool; got float32. Use `b"),
    ({"bias": jnp.zeros((1, 1, 1, 150), bool)}, TypeError, r"attention: `bias` must have a floating.*; got bool. Use"),
    ({"segment_ids": jnp.zeros((2, 130), int)}, ValueError, r"attention: `segment_ids` must be a pair \(ids of q, ids"),
    ({"segment_ids": (jnp.zeros((2, 130), int), jnp.zeros((2, 130), int))}, ValueError,
     r"attention: `segment_ids\[1\]` must have shape \(2, 150\); got \(2, 130\)"),
    ({"segment_ids": (jnp.zeros((2, 130)), jnp.zeros((2, 150)))}, TypeError, r"`segment_ids\[0\]` must have an int"),
    ({"q_positions": jnp.zeros(150, int)}, ValueError, r"attention: `q_positions` must have shape \(130,\); got \(150"),
    ({"block_sizes": (128, 128)}, TypeError, r"attention: `block_sizes` must be a BlockSizes; got tuple"),
    ({"dropout_rate": 1.0}, ValueError, r"attention: `dropout_rate` must be a Python number in \[0, 1\); got 1.0"),
    ({"dropout_rate": jnp.array(0.1)}, ValueError, r"attention: `dropout_rate` must be a Python number in"),
    ({"dropout_rate": 0.1}, ValueError, r"attention: `dropout_seed` must be an int, .* when `dropout_rate` is"),
    ({"dropout_rate": 0.1, "dropout_seed": 2**32}, ValueError, r"attention: `dropout_seed` must fit into 32 bits; got"),
    ({"dropout_rate": 0.1, "dropout_seed": jnp.ones(2, int)}, ValueError, r"attention: `dropout_seed` must .*\(2,\)"),
    ({"dropout_rate": 0.1, "dropout_seed": 1.5}, ValueError, r"attention: `dropout_seed` must be an int, a.*float"),
    ({"q_offset": 3, "q_positions": jnp.arange(130)}, ValueError, r"attention: `q_offset` must be 0 beside `q_pos"),
    ({"q_offset": jnp.zeros(3, int)}, ValueError, r"attention: `q_offset` must have shape \(2,\); got \(3,\). One off"),
    ({"q_offset": 1.5}, TypeError, r"attention: `q_offset` must have an integer dtype; got float32. Positions are"),
    ({"implementation": "gpu"}, NotImplementedError, r"attention: implementation 'gpu' cannot do this call: its "),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "sentence"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, *_) in enumerate(BAD)]
)
def test_bad_arguments_each_with_its_sentence(change, error, sentence):
    arrays = dict(zip("qkv", inputs(), strict=True))
    flags = {}
    for name, value in change.items():
        if name in arrays:
            arrays[name] = arrays[name].astype(value) if isinstance(value, str) else jnp.zeros(value)
        else:
            flags[name] = (
                jnp.zeros(value, "bool" if name == "mask" else "float32")
                if (isinstance(value, tuple) and name in ("bias", "mask"))
                else value
            )
    with pytest.raises(error, match=sentence):
        jax.jit(lambda q, k, v: attention(q, k, v, **flags))(**arrays)


def test_a_kernel_for_another_platform_is_refused():
    q, k, v = inputs("bfloat16")
    for name in ("tpu", "gpu"):
        sentence = f"attention: implementation '{name}' does not run on cpu. Use implementation=None, which chooses by"
        with pytest.raises(NotImplementedError, match=sentence):
            attention(q, k, v, implementation=name)


def test_kernels_refuse_what_they_cannot_do_in_either_pass(x64):
    q, k, v = inputs("float64")
    for name, reason in (("tpu", "TPUs have no float64"), ("gpu", "its tensor cores take float16 and bfloat16")):
        with pytest.raises(NotImplementedError, match=f"attention: implementation '{name}' cannot do this.*{reason}"):
            attention(q, k, v, implementation=name)
    q, k, v = inputs("bfloat16")
    flags = {"bias": jnp.zeros((1, 1, 130, 150)), "mask": jnp.ones((1, 1, 130, 150), bool)}
    for flag, value in flags.items():
        with pytest.raises(NotImplementedError, match=f"cannot do this call: it takes no {flag}"):
            attention(q, k, v, implementation="gpu", **{flag: value})
    with pytest.raises(NotImplementedError, match="cannot do this call: it has no dropout"):
        attention(q, k, v, implementation="gpu", dropout_rate=0.1, dropout_seed=0)


def test_block_sizes_are_multiples():
    with pytest.raises(ValueError, match="BlockSizes: `q` must be a positive multiple of 128; got 100"):
        BlockSizes(100, 256, 128)
    with pytest.raises(ValueError, match="BlockSizes: `kv` must be a positive multiple of 256; got 384"):
        BlockSizes(128, 384, 256)


def test_float16_falls_back_where_the_platform_has_none():
    f = jax.jit(lambda q, k, v: kernels_pallas.attention(q, k, v))
    text = jax.export.export(f, platforms=("tpu",))(*inputs("float16")).mlir_module()
    assert "tpu_custom_call" not in text
    assert "tpu_custom_call" in jax.export.export(f, platforms=("tpu",))(*inputs("bfloat16")).mlir_module()


def test_numpy_numbers_and_endless_windows_are_taken():
    q, k, v = inputs()
    want = attention(q, k, v, causal=True, scale=0.3)
    for window in ((2**31 - 1, 0), (np.int64(500), np.int64(0)), (None, 0)):
        np.testing.assert_array_equal(attention(q, k, v, window=window, scale=np.float32(0.3)), want)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_nan_in_a_query_shows_in_both_outputs(implementation):
    q, k, v = inputs()
    o, lse = attention(q.at[0, 5].set(jnp.nan), k, v, return_lse=True, implementation=implementation)
    assert np.isnan(o[0, 5]).all()
    assert np.isnan(lse[0, :, 5]).all()
    assert np.isfinite(np.delete(np.asarray(lse), 5, axis=2)).all()


def test_a_block_map_too_large_for_a_tpu_falls_back():
    """2^16 blocks of 128 x 128 and a batch of maps of their own: the kernel refuses, None takes the chunked form."""
    spec = jax.ShapeDtypeStruct((8, 16384, 1, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((8, 16384), jnp.int32)

    def f(q, k, v, ids, implementation=None):
        return attention(q, k, v, segment_ids=ids, block_sizes=SMALL, implementation=implementation)

    exported = jax.export.export(jax.jit(f), platforms=("tpu",))(spec, spec, spec, ids)
    assert "tpu_custom_call" not in exported.mlir_module()
    with pytest.raises(NotImplementedError, match="attention: implementation 'tpu' cannot do this call: its map of"):
        jax.eval_shape(lambda *a: f(*a, implementation="tpu"), spec, spec, spec, ids)


def test_symbolic_batch_exports_without_the_kernel():
    (b,) = jax.export.symbolic_shape("b")
    spec = [jax.ShapeDtypeStruct((b, 128, heads, 16), jnp.float32) for heads in (4, 2, 2)]
    f = jax.jit(lambda q, k, v: attention(q, k, v, causal=True))
    exported = jax.export.export(f, platforms=("cpu", "tpu"))(*spec)
    arrays = inputs(T=128, S=128, B=3)
    close(exported.call(*arrays), f(*arrays))


def test_explicit_sharding_is_refused_in_one_sentence():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i"))
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match="attention: explicitly sharded arrays .*shard_map"),
    ):
        attention(*(jax.device_put(x, sharding) for x in inputs()))


def test_automatic_sharding_and_shard_map_equal_one_device():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")
    arrays = inputs(B=4)
    want = attention(*arrays, causal=True)
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in arrays]
    f = lambda *a: attention(*a, causal=True)  # noqa: E731
    close(jax.jit(f)(*placed), want)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    close(jax.jit(mapped)(*placed), want)
