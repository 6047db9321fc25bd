"""The TPU kernels of attention, interpreted: derivatives, chunks, what moves; and compiled for real chips."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import BlockSizes
from kernels_pallas._attention import api, config, masks, reference, tpu, tpu_backward
from tests import interpreters
from tests.contracts.kernel import close
from tests.contracts.kernel_cases import AttentionCase

# Two or three blocks along each axis, two steps of the arithmetic in each.
BLOCKS = BlockSizes(256, 256, 128)


class Small(AttentionCase):
    B, T, S, H, K, D, V = 1, 300, 400, 2, 1, 16, 24


SMALL = Small()
FLAGS = sorted(SMALL.cases("float32"))


def prepared(arrays, flags, blocks=BLOCKS):
    return api.prepare(*arrays, block_sizes=blocks, **flags)[:2]


def cotangents(o, lse, seed=4):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in (o, lse))


def pulled(arrays, flags, given):
    """The reference's cotangents of q, k and v, in float64."""
    with jax.enable_x64(True):
        wide = lambda xs: tuple(jnp.asarray(np.asarray(x, np.float64)) for x in xs)  # noqa: E731
        run = lambda *a: reference.forward(*prepared(a, SMALL.widened(flags)))  # noqa: E731
        return jax.vjp(run, *wide(arrays))[1](wide(given))


def backward(arrays, flags, given, seed=0, blocks=BLOCKS):
    static, operands = prepared(arrays, flags, blocks)
    o, lse = reference.forward(static, operands)
    run = partial(tpu_backward.backward, interpret=interpreters.tpu_parameters(seed))
    return run(static, operands, o, lse, *given)


def check(arrays, flags, dtype="float32", seed=0, blocks=BLOCKS):
    given = cotangents(*reference.forward(*prepared(arrays, flags)))
    got = backward(arrays, flags, given, seed, blocks)
    assert not interpreters.tpu_races_found()
    for g, w in zip(got, pulled(arrays, flags, given), strict=True):
        assert g.dtype == jnp.dtype(dtype)
        close(g, w, dtype, SMALL.terms, "backward", factor=4.0)


@pytest.mark.parametrize("flag", FLAGS)
def test_backward_equals_the_reference(flag):
    check(*SMALL.cases("float32")[flag])


@pytest.mark.parametrize("flag", ["causal", "dropout, offset"])
def test_backward_equals_the_reference_in_bfloat16(flag):
    check(*SMALL.cases("bfloat16")[flag], dtype="bfloat16")


@pytest.mark.parametrize("seed", [1, 2])
def test_backward_has_no_race_in_any_order(seed):
    check(SMALL.arrays("float32"), {"causal": True}, seed=seed)


@pytest.mark.parametrize("queries", [256, 512], ids=["a block at a time", "a head at a time"])
@pytest.mark.parametrize("flag", ["plain", "causal", "dropout, offset"])
def test_queries_in_chunks_give_the_same(monkeypatch, queries, flag):
    monkeypatch.setattr(tpu_backward, "_DQ_BYTES", 4 * 128 * queries)
    arrays, flags = SMALL.cases("float32")[flag]
    plan = tpu_backward._plan(*prepared(arrays, flags))
    assert plan.chunks == {256: 4, 512: 2}[queries]
    check(arrays, flags)


def test_rolled_steps_give_the_same():
    arrays = SMALL.arrays("float32", T=512, S=256, H=1)
    check(arrays, {"causal": True, "q_offset": -20}, blocks=BlockSizes(512, 256, 128))


def test_rows_that_see_nothing_have_no_gradient_and_spoil_none():
    mask = np.ones((1, 1, SMALL.T, SMALL.S), bool)
    rows = np.array([0, 7, SMALL.T - 1])
    mask[:, :, rows] = False
    arrays, flags = SMALL.arrays("float32"), {"mask": jnp.asarray(mask)}
    do, dlse = cotangents(*reference.forward(*prepared(arrays, flags)))
    want = backward(arrays, flags, (do.at[:, rows].set(0), dlse.at[:, :, rows].set(0)))
    got = backward(arrays, flags, (do.at[:, rows].set(jnp.nan), dlse.at[:, :, rows].set(jnp.nan)))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)
    np.testing.assert_array_equal(got[0][:, rows], 0)


def test_a_large_bias_leaves_padding_alone():
    check(SMALL.arrays("float32"), {"bias": jnp.full((1, 1, 1, SMALL.S), 100.0)})


def test_the_bias_of_a_single_key_counts():
    # One key has weight 1 whatever its bias; the cotangent of lse, and a second head, tell a bias that is dropped.
    arrays = SMALL.arrays("float32", T=20, S=1)
    check(arrays, {"bias": jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 20, 1)), "float32")})


def test_blocks_that_are_never_live_have_zero_gradients():
    arrays = SMALL.arrays("float32", T=500, S=500, H=1)
    ids = jnp.asarray(np.where(np.arange(500) < 256, 0, -1)[None], jnp.int32)
    flags = {"segment_ids": ids}
    given = cotangents(*reference.forward(*prepared(arrays, flags)))
    for g in backward(arrays, flags, given):
        assert np.any(g[:, :256])
        np.testing.assert_array_equal(g[:, 256:], 0)


@pytest.mark.parametrize("compute", [512, 1024])
def test_forward_drops_what_the_reference_drops_at_every_tile(compute):
    arrays = SMALL.arrays("float32", T=200, S=1100, H=1)
    flags = {"dropout_rate": 0.3, "dropout_seed": 7}
    static, operands = prepared(arrays, flags, BlockSizes(128, 1024, compute))
    got = tpu.forward(static, operands, interpret=interpreters.tpu_parameters())
    for g, w in zip(got, reference.forward(static, operands), strict=True):
        close(g, w, "float32", 1100, "dropout")


# --- What moves. ------------------------------------------------------------------------------------------------------


def steps(monkeypatch, module, run):
    """The grid of a kernel in order: whether each step is live, and the block of each input that it points at."""
    caught = {}

    def call(kernel, *, out_shape, grid_spec, **_):
        def given(*arguments):
            caught.update(spec=grid_spec, scalars=arguments[: grid_spec.num_scalar_prefetch])
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out_shape)

        return given

    monkeypatch.setattr(module.pl, "pallas_call", call)
    run()
    spec = caught["spec"]
    scalars = [np.asarray(x) for x in caught["scalars"]]
    order = [tuple(map(np.int32, at)) for at in np.ndindex(*map(int, spec.grid))]
    blocks = [tuple(tuple(map(int, s.index_map(*at, *scalars))) for s in spec.in_specs) for at in order]
    return order, blocks, scalars


def moves(blocks):
    """How often a step points an input at another block than the step before, for each input."""
    return [sum(a != b for a, b in zip(of, of[1:], strict=False)) for of in zip(*blocks, strict=True)]


def causal_operands(length):
    spec = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)
    return (jnp.zeros(spec.shape, spec.dtype),) * 3


def test_causal_forward_skips_dead_blocks_and_moves_nothing_for_them(monkeypatch):
    static, operands = prepared(causal_operands(4096), {"causal": True}, BlockSizes(512, 512, 512))
    order, blocks, (_, count, _) = steps(monkeypatch, tpu, lambda: tpu.forward(static, operands))
    live = [at[3] < count[at[2]] for at in order]
    assert sum(live) / len(order) <= 0.57
    q, k, v = moves(blocks)
    assert q == 8 - 1
    assert k == v <= sum(live) - 1
    for at, alive, now, before in zip(order[1:], live[1:], blocks[1:], blocks, strict=False):
        assert alive or now == before, at


def test_causal_backward_skips_dead_blocks_and_moves_nothing_for_them(monkeypatch):
    static, operands = prepared(causal_operands(4096), {"causal": True}, BlockSizes(512, 512, 512))
    o, lse = jnp.zeros(operands.q.shape, jnp.bfloat16), jnp.zeros((1, 1, 4096), jnp.float32)
    run = lambda: tpu_backward.backward(static, operands, o, lse, o, lse)  # noqa: E731
    order, blocks, (_, count, _, _) = steps(monkeypatch, tpu_backward, run)
    live = [at[4] < count[at[2]] for at in order]
    assert sum(live) / len(order) <= 0.57
    q, do, k, v, stats = moves(blocks)
    assert k == v == 8 - 1
    assert q == do == stats <= sum(live) - 1
    for at, alive, now, before in zip(order[1:], live[1:], blocks[1:], blocks, strict=False):
        assert alive or now == before, at


def test_every_live_block_is_visited_once_and_each_query_block_begins_once():
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(-1, 9, (2, 2048)), axis=1), jnp.int32)
    q = jnp.zeros((2, 2048, 2, 128), jnp.bfloat16)
    static, operands = prepared((q, q, q), {"causal": True, "segment_ids": ids}, BlockSizes(256, 256, 128))
    kinds = np.asarray(masks.block_kinds(static, operands, 256, 256))
    plan = tpu_backward._plan(static, operands)
    order, count, codes = (np.asarray(x)[0] for x in plan.maps)
    order, codes = order.reshape(2, 8, 8), codes.reshape(2, 8, 8)
    count = count.reshape(2, 8)
    for b in range(2):
        begun = set()
        for j in range(8):
            rows = order[b, j, : count[b, j]]
            np.testing.assert_array_equal(rows, np.flatnonzero(kinds[b, :, j]))
            for i in rows:
                kind, first = codes[b, j, i] % 4, codes[b, j, i] >= 4
                assert kind == kinds[b, i, j]
                assert first == (i not in begun)
                begun.add(i)
        dead = np.asarray(plan.dead)[b].reshape(8, 256)[:, 0]
        assert begun == set(np.flatnonzero(~dead))


# --- Blocks and compilers. --------------------------------------------------------------------------------------------


def test_blocks_are_those_of_the_generation_that_jax_names():
    static, operands = prepared(causal_operands(4096), {}, None)
    row = config._tpu_table()["forward"]["full"]
    assert config.tpu_blocks(static, operands) == BlockSizes(*row["default"])
    for kind, generation in (("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e")):
        chip = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=chip)):
            assert config.tpu_blocks(static, operands) == BlockSizes(*row[generation])


@pytest.mark.aot
@pytest.mark.parametrize("topology", interpreters.TOPOLOGIES)
@pytest.mark.parametrize(
    "flags", [{}, {"causal": True, "dropout_rate": 0.1, "dropout_seed": 3}], ids=["full", "causal"]
)
def test_the_gradient_compiles_to_two_kernels(topology, flags):
    specs = [((2, 4096, 8, 128), jnp.bfloat16), *[((2, 4096, 2, 128), jnp.bfloat16)] * 2]

    def loss(*arrays):
        return jnp.sum(kernels_pallas.attention(*arrays, implementation="tpu", **flags).astype(jnp.float32))

    with jax.enable_x64(True):
        text = interpreters.compile_for_tpu(jax.grad(loss, (0, 1, 2)), topology, specs).as_text()
    assert "attention_forward" in text
    assert "attention_backward" in text


@pytest.mark.aot
@pytest.mark.parametrize("topology", interpreters.TOPOLOGIES)
@pytest.mark.parametrize(
    ("heads", "length", "width", "dtype"), [(32, 3001, 128, "bfloat16"), (2, 2000, 512, "float32")]
)
def test_backward_compiles_in_chunks_and_for_wide_heads(topology, heads, length, width, dtype):
    specs = [((1, length, heads, width), dtype), *[((1, length, 1, width), dtype)] * 2]

    def loss(*arrays):
        return jnp.sum(kernels_pallas.attention(*arrays, implementation="tpu", causal=True).astype(jnp.float32))

    text = interpreters.compile_for_tpu(jax.grad(loss, (0, 1, 2)), topology, specs).as_text()
    assert "attention_backward" in text
