"""Ring attention on virtual devices equals attention on one; what it sends, keeps and skips; every bad argument."""

import os
import re
import socket
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import kernels_pallas
from kernels_pallas import (
    attention,
    from_ring_attention_layout,
    ring_attention,
    ring_attention_positions,
    to_ring_attention_layout,
)
from kernels_pallas._attention import masks
from kernels_pallas._attention.config import Config, Operands
from kernels_pallas._ring_attention.layout import LAYOUTS, offsets, positions
from tests import collectives, interpreters
from tests.source import ROOT
from tests.tolerances import tolerance

pytestmark = pytest.mark.every_jax

N, H, K, D, V = 10, 4, 2, 8, 12
TOKENS, HEADS = PartitionSpec(None, "ring"), PartitionSpec(None, None, "ring")


def devices(shards):
    return Mesh(np.array(jax.devices()[:shards]), ("ring",), axis_types=(AxisType.Auto,))


def inputs(shards, dtype="float32", *, n=N, seed=0):
    rng = np.random.default_rng(seed)
    T = n * shards
    shapes = ((2, T, H, D), (2, T, K, D), (2, T, K, V))
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    # The first segment is longer than a shard; the last tokens are padding.
    cuts = np.sort(rng.integers(n + 1, T, size=(2, 2)), axis=1)
    segments = (np.arange(T) >= cuts[:, :1]).astype(int) + (np.arange(T) >= cuts[:, 1:])
    segments[:, -3:] = -1
    return q, k, v, jnp.asarray(segments)


def ring(mesh, *, layout="contiguous", segments=None, **flags):
    """`attention` of the whole sequence, by way of the ring: both outputs in the order of positions."""
    shards = mesh.size
    reorder = partial(to_ring_attention_layout, layout=layout, shards=shards)
    restore = partial(from_ring_attention_layout, layout=layout, shards=shards)

    def body(q, k, v, *ids):
        return ring_attention(
            q, k, v, axis_name="ring", layout=layout, segment_ids=ids[0] if ids else None, return_lse=True, **flags
        )

    def whole(q, k, v):
        arrays = [reorder(x) for x in (q, k, v, segments) if x is not None]
        run = jax.shard_map(body, mesh=mesh, in_specs=(TOKENS,) * len(arrays), out_specs=(TOKENS, HEADS))
        o, lse = run(*arrays)
        return restore(o), restore(lse, axis=2)

    return whole


def single(*, segments=None, **flags):
    return partial(attention, segment_ids=segments, return_lse=True, implementation="reference", **flags)


def finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


def loss(function):
    """A scalar that both outputs enter, with weights that leave no symmetry."""

    def scalar(*arrays):
        o, lse = function(*arrays)
        w = jnp.asarray(np.random.default_rng(1).normal(size=o.shape), lse.dtype)
        return jnp.sum(o.astype(lse.dtype) * w) + jnp.sum(jnp.sin(finite(lse)))

    return scalar


def both(function):
    """Outputs and gradients."""
    return lambda *a: (function(*a), jax.grad(loss(function), (0, 1, 2))(*a))


def wide(function, *arrays):
    """In float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*(jnp.asarray(np.asarray(x, np.float64)) for x in arrays)))


def close(got, want, dtype="float32", size=8 * N, condition=4.0):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_array_equal(np.isfinite(g), np.isfinite(w))
        g, w = np.where(np.isfinite(g), g, 0), np.where(np.isfinite(w), w, 0)
        error = np.max(np.abs(g - w)) / max(1.0, np.max(np.abs(w)))
        assert error <= tolerance(dtype, size, condition=condition), error


CASES = {
    "plain": {},
    "causal, segments": {"layout": "contiguous", "causal": True, "segmented": True},
    "causal, window": {"layout": "contiguous", "causal": True, "window": (13, None)},
    "striped, causal, segments, soft cap": {
        "layout": "striped",
        "causal": True,
        "segmented": True,
        "soft_cap": 5.0,
        "scale": 0.5,
    },
    "striped, window": {"layout": "striped", "window": (3, 21)},
    "zigzag, causal": {"layout": "zigzag", "causal": True},
    "zigzag, window, segments": {"layout": "zigzag", "window": (13, 5), "segmented": True},
}


def case(name, segments):
    flags = dict(CASES[name])
    layout = flags.pop("layout", "contiguous")
    return layout, flags | {"segments": segments if flags.pop("segmented", False) else None}


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_equal_one(name):
    *arrays, segments = inputs(8)
    layout, flags = case(name, segments)
    close(jax.jit(both(ring(devices(8), layout=layout, **flags)))(*arrays), wide(both(single(**flags)), *arrays))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16(layout):
    *arrays, segments = inputs(4, "bfloat16")
    flags = {"causal": True, "segments": segments}
    got = jax.jit(both(ring(devices(4), layout=layout, **flags)))(*arrays)
    assert [x.dtype.name for x in jax.tree.leaves(got)] == ["bfloat16", "float32"] + ["bfloat16"] * 3
    # o, lse: a rounding of every share and one of their sum.
    close(got, wide(both(single(**flags)), *arrays), "bfloat16", condition=1.0)


def test_float64_and_second_order(x64):
    *arrays, segments = inputs(4, "float64")
    flags = {"causal": True, "segments": segments}
    functions = ring(devices(4), layout="zigzag", **flags), single(**flags)

    def product(function):
        inner = lambda *a: sum(jnp.sum(jnp.sin(g)) for g in jax.grad(loss(function), (0, 1, 2))(*a))  # noqa: E731
        return jax.jit(jax.grad(inner, (0, 1, 2)))(*arrays)

    got, want = (product(function) for function in functions)
    close(got, want, "float64", condition=10.0)


def test_reference_is_differentiated_in_any_mode_and_others_name_it(x64):
    *arrays, segments = inputs(2, "float64")
    flags = {"causal": True, "segments": segments}
    mesh = devices(2)
    dense = ring(mesh, implementation="reference", **flags)
    close(jax.jit(both(dense))(*arrays), both(single(**flags))(*arrays), "float64")
    pushed = [jax.jit(lambda *a, f=f: jax.jvp(loss(f), a, a))(*arrays) for f in (dense, single(**flags))]
    close(*pushed, "float64", condition=10.0)
    with pytest.raises(TypeError, match=r"^ring_attention: forward-mode .* pass implementation='reference'"):
        jax.jvp(loss(ring(mesh, **flags)), arrays, arrays)


def test_padding_may_hold_nan_and_sees_nothing():
    *arrays, segments = inputs(4)
    padding = segments < 0
    dirty = [jnp.where(padding[..., None, None], jnp.nan, x) for x in arrays]
    function = jax.jit(both(ring(devices(4), causal=True, segments=segments)))
    want, got = function(*arrays), function(*dirty)
    for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(w, g)
    (o, lse), gradients = got
    for x in (o, *gradients):
        np.testing.assert_array_equal(np.asarray(x)[np.asarray(padding)], 0)
    np.testing.assert_array_equal(np.asarray(lse).swapaxes(1, 2)[np.asarray(padding)], -np.inf)


def test_what_is_behind_the_queries_is_not_computed():
    *arrays, _ = inputs(4)
    q, k, v = arrays
    # A key that is hidden but computed would turn its row to NaN: 0 NaN is NaN.
    poisoned = [x.at[:, 2 * N :].set(jnp.nan) for x in (k, v)]
    run = jax.jit(ring(devices(4), causal=True))
    for got, want in zip(run(q, *poisoned), run(q, k, v), strict=True):
        axis = 1 if got.ndim == 4 else 2
        np.testing.assert_array_equal(*(np.take(x, range(2 * N), axis) for x in (got, want)))
    first = lambda *a: jnp.sum(run(*a)[0][:, : 2 * N])  # noqa: E731
    gradients = [jax.grad(first)(q, *given) for given in (poisoned, (k, v))]
    np.testing.assert_array_equal(*(np.asarray(x)[:, : 2 * N] for x in gradients))


def test_without_jit_and_without_the_check_of_axes():
    *arrays, _ = inputs(2)
    mesh = devices(2)
    want = single(causal=True)(*arrays)
    close(ring(mesh, causal=True)(*arrays), want)
    run = partial(ring_attention, axis_name="ring", causal=True)
    loose = jax.shard_map(run, mesh=mesh, in_specs=(TOKENS,) * 3, out_specs=TOKENS, check_vma=False)
    close(loose(*arrays), want[0])
    gradients = [jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(*arrays)
                 for f in (loose, partial(attention, causal=True))]  # fmt: skip
    close(*gradients)


def test_inside_vmap_and_instead_of_devices():
    *arrays, _ = inputs(2)
    lanes = [jnp.stack([x, x[::-1], 2 * x]) for x in arrays]
    flags = {"causal": True}
    many = jax.jit(jax.vmap(ring(devices(2), **flags)))(*lanes)
    close(many, jax.vmap(single(**flags))(*lanes))
    # vmap names axes too; a ring of lanes needs no devices.
    lanes = [jnp.stack(jnp.split(x, 2, axis=1)) for x in arrays]
    run = partial(ring_attention, axis_name="lane", **flags)
    o = jax.jit(jax.vmap(run, axis_name="lane"))(*lanes)
    close(jnp.concatenate(list(o), axis=1), single(**flags)(*arrays)[0])


def test_beside_other_axes_of_the_mesh():
    *arrays, segments = inputs(4)
    q, k, v = arrays[0], *(x[:, :, :1] for x in arrays[1:])
    mesh = jax.make_mesh((2, 2, 2), ("ring", "more", "heads"), (AxisType.Auto,) * 3)
    tokens = ("ring", "more")
    place, shared = PartitionSpec(None, tokens, "heads"), PartitionSpec(None, tokens)
    run = partial(ring_attention, axis_name=tokens, causal=True, return_lse=True)
    body = lambda q, k, v, ids: run(q, k, v, segment_ids=ids)  # noqa: E731
    out = (place, PartitionSpec(None, "heads", tokens))
    cut = jax.shard_map(body, mesh=mesh, in_specs=(place, shared, shared, shared), out_specs=out)
    # One key head, which both devices of the axis of heads hold: their shares of its gradient are summed.
    got = jax.jit(both(lambda *a: cut(*a, segments)))(q, k, v)
    close(got, wide(both(single(causal=True, segments=segments)), q, k, v))


# --- What travels, what is kept, who works. ---------------------------------------------------------------------------


def lowered(mesh, *, n, gradient=False, segmented=False, dtype="float32", **flags):
    """The program of one call, or of its gradient, which runs the forward ring and then the backward ring."""
    dim, heads, T = 128, (8, 2, 2), n * mesh.size
    place = NamedSharding(mesh, TOKENS)
    arrays = [jax.ShapeDtypeStruct((1, T, h, dim), dtype, sharding=place) for h in heads]
    ids = [jax.ShapeDtypeStruct((1, T), "int32", sharding=place)] * segmented

    def body(q, k, v, *rest):
        def run(q, k, v):
            segment_ids = rest[0] if segmented else None
            return ring_attention(q, k, v, axis_name="ring", segment_ids=segment_ids, **flags)

        return jax.vjp(run, q, k, v)[1](rest[-1]) if gradient else run(q, k, v)

    given = [*arrays, *ids, *arrays[:gradient]]
    out = (TOKENS,) * 3 if gradient else TOKENS
    run = jax.shard_map(body, mesh=mesh, in_specs=(TOKENS,) * len(given), out_specs=out)
    return jax.jit(run).lower(*given)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [({"causal": True}, 8), ({"causal": True, "layout": "zigzag", "segmented": True}, 8), ({"window": (130, 64)}, 5)],
)
def test_counts_of_what_is_sent(flags, steps):
    mesh = devices(8)
    # Keys, values and ids go as one message each; in the backward ring they go again, and the cotangents of keys and
    # values with them, which take one step more, home.
    forward = (3 if flags.get("segmented") else 2) * (steps - 1)
    program = lowered(mesh, n=64, **flags)
    assert collectives.count(program.compile().as_text()) == {"collective-permute": forward}
    program = lowered(mesh, n=64, gradient=True, **flags)
    # A CPU's compiler keeps what both rings send alike, so that the two are told apart before it only.
    assert program.as_text().count("stablehlo.collective_permute") == forward + forward + 2 * steps
    assert set(collectives.count(program.compile().as_text())) == {"collective-permute"}


def work(layout, shards, n, block):
    """Visible blocks of scores that each device computes in each step of a causal ring; half of those on a diagonal."""
    config = Config(True, None, None, 1.0, None)
    q = np.zeros((1, n, 1, 1))
    out = np.zeros((shards, shards))
    for shard in range(shards):
        for step in range(shards):
            own, of_keys = (positions(layout, shards, n, np.int32(s))[None] for s in (shard, (shard - step) % shards))
            operands = Operands(q, q, q, q_positions=own, kv_positions=of_keys)
            kinds = masks.block_kinds(config, operands, block, block)
            out[shard, step] = np.sum(kinds == masks.FULL) + 0.5 * np.sum(kinds == masks.PARTIAL)
    return out


def test_zigzag_keeps_all_devices_equally_busy():
    blocks = work("contiguous", 8, 64, 32).sum(1)
    assert blocks.max() / blocks.mean() == 1.875
    blocks = work("zigzag", 8, 64, 32)
    assert blocks.sum(1).max() / blocks.sum(1).mean() == 1.0
    # In every step, too: nobody waits for a neighbour.
    np.testing.assert_array_equal(blocks, blocks[0, 0])


@pytest.mark.parametrize("left", [0, 1, 9, 10, 11, 20, 35, 69, 70, 500])
def test_a_window_ends_the_ring(left):
    steps = offsets("contiguous", 8, 10, True, (left, None))
    assert steps == tuple(range(min(8, 1 + -(-left // 10))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (0, 0), (3, 4), (9, None), (None, 6), (25, 7)])
def test_the_ring_meets_every_shard_that_is_seen(layout, causal, window):
    shards, n = 6, 4
    at = positions(layout, shards, n, np.arange(shards))
    q, kv = at[:, None, :, None], at[None, :, None]
    seen = masks.visible(Config(causal, window, None, 1.0, None), q, kv)
    live = np.ones((shards, shards), bool) if seen is None else seen.any(axis=(2, 3))
    reader, owner = np.nonzero(live)
    needed = {int(x) for x in (reader - owner) % shards}
    met = offsets(layout, shards, n, causal, window)
    assert met[0] == 0
    assert list(met) == sorted(met)
    # Tokens of a striped shard are far apart, so that it is taken for all that lies between them.
    assert set(met) >= needed if layout == "striped" else set(met) == needed


def test_lowers_to_the_kernels_of_a_tpu():
    *arrays, segments = inputs(4)
    run = ring(devices(4), causal=True, layout="zigzag", segments=segments)
    lowered = jax.jit(both(run)).trace(*arrays).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") >= 2 * 4


@pytest.mark.aot
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_for_sixteen_chips(layout):
    mesh = interpreters.tpu_mesh("v5e:4x4", ring=16)
    flags = {"n": 1024, "causal": True, "layout": layout, "dtype": "bfloat16"}
    forward, both = (lowered(mesh, gradient=gradient, **flags).compile().as_text() for gradient in (False, True))
    assert collectives.count(forward) == {"collective-permute": 2 * 15}
    assert collectives.count(both) == {"collective-permute": 2 * 15 + 2 * 15 + 2 * 16}
    assert forward.count('custom_call_target="tpu_custom_call"') == 16


@pytest.mark.aot
@pytest.mark.parametrize("gradient", [False, True])
def test_memory_does_not_grow_with_the_ring(gradient):
    temp = {}
    for topology, shards in (("v5e:2x2", 4), ("v5e:4x4", 16)):
        mesh = interpreters.tpu_mesh(topology, ring=shards)
        program = lowered(mesh, n=8192, gradient=gradient, causal=True, layout="zigzag", dtype="bfloat16").compile()
        temp[shards] = program.memory_analysis().temp_size_in_bytes
    # Four times the ring, and the sequence: a shard more of keys and values a step would be 96 MiB.
    assert temp[16] <= 1.25 * temp[4], temp


@pytest.mark.aot
def test_sends_run_beside_the_kernels():
    text = lowered(interpreters.tpu_mesh("v5e:2x2", ring=4), n=8192, causal=True, dtype="bfloat16").compile().as_text()
    marks = re.findall(
        r"^  (?:ROOT )?%(collective-permute-start|collective-permute-done|attention_forward)", text, re.M
    )
    # The keys of the next step leave before the kernel of this one, and are waited for after it.
    between = [marks[max(0, at - 2) : at + 3] for at, mark in enumerate(marks) if mark == "attention_forward"]
    start, done = ["collective-permute-start"] * 2, ["collective-permute-done"] * 2
    assert between[:-1] == [[*start, "attention_forward", *done]] * 3, marks


# --- Layouts. ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3, 8])
def test_layouts_have_an_inverse_and_their_positions(layout, shards):
    x = jnp.arange(2 * 6 * shards).reshape(2, 6 * shards, 1)
    there = to_ring_attention_layout(x, layout=layout, shards=shards)
    np.testing.assert_array_equal(from_ring_attention_layout(there, layout=layout, shards=shards), x)
    for shard, piece in enumerate(jnp.split(there[0, :, 0], shards)):
        np.testing.assert_array_equal(ring_attention_positions(6, layout=layout, shard=shard, shards=shards), piece)
    across = to_ring_attention_layout(jnp.moveaxis(x, 1, -1), layout=layout, shards=shards, axis=-1)
    np.testing.assert_array_equal(jnp.moveaxis(across, -1, 1), there)


LAYOUT_ERRORS = {
    "unknown": (
        lambda: to_ring_attention_layout(jnp.ones(8), layout="snake", shards=2, axis=0),
        ValueError,
        "to_ring_attention_layout: `layout` must be one of 'contiguous', 'striped', 'zigzag'; got 'snake'.",
    ),
    "length": (
        lambda: from_ring_attention_layout(jnp.ones((3, 6)), layout="zigzag", shards=2),
        ValueError,
        "from_ring_attention_layout: `x` must have a length that 4 divides along axis 1; got (3, 6). Pad the sequence.",
    ),
    "axis": (
        lambda: to_ring_attention_layout(jnp.ones(8), layout="zigzag", shards=2),
        ValueError,
        "to_ring_attention_layout: `axis` must be an axis of `x` (8,); got 1.",
    ),
    "shards": (
        lambda: to_ring_attention_layout(jnp.ones(8), layout="zigzag", shards=0, axis=0),
        ValueError,
        "to_ring_attention_layout: `shards` must be an int >= 1; got 0.",
    ),
    "odd": (
        lambda: ring_attention_positions(3, layout="zigzag", shard=0, shards=2),
        ValueError,
        "ring_attention_positions: `length` must have an even number of tokens a shard",
    ),
    "shard": (
        lambda: ring_attention_positions(4, layout="zigzag", shard=0.5, shards=2),
        TypeError,
        "ring_attention_positions: `shard` must have an integer dtype; got float32.",
    ),
    "negative": (
        lambda: ring_attention_positions(-4, layout="zigzag", shard=0, shards=2),
        ValueError,
        "ring_attention_positions: `length` must be an int >= 0; got -4.",
    ),
}


@pytest.mark.parametrize(("call", "error", "sentence"), LAYOUT_ERRORS.values(), ids=LAYOUT_ERRORS)
def test_bad_layouts(call, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        call()


ERRORS = {
    "lengths": ({"k": jnp.ones((2, 3, 2, 8))}, ValueError, "ring_attention: `k` must have shape (2, 4, Hk, 8)"),
    "heads": (
        {"k": jnp.ones((2, 4, 3, 8)), "v": jnp.ones((2, 4, 3, 8))},
        ValueError,
        "ring_attention: `k` must have a",
    ),
    "dtype": ({"v": jnp.ones((2, 4, 2, 8), int)}, TypeError, "ring_attention: `v` must have dtype float32 to match"),
    "layout": ({"layout": "snake"}, ValueError, "ring_attention: `layout` must be one of 'contiguous'"),
    "ids": ({"segment_ids": jnp.ones((2, 3), int)}, ValueError, "ring_attention: `segment_ids` must have shape (2, 4)"),
    "ids that are not": (
        {"segment_ids": jnp.ones((2, 4))},
        TypeError,
        "ring_attention: `segment_ids` must have an int",
    ),
    "window": ({"window": (-1, 0)}, ValueError, "ring_attention: `window` must be a pair"),
    "soft cap": ({"soft_cap": 0.0}, ValueError, "ring_attention: `soft_cap` must be a positive"),
    "implementation": ({"implementation": "fast"}, ValueError, "ring_attention: `implementation` must be one of"),
    "axis": (
        {"axis_name": "sequence"},
        ValueError,
        "ring_attention: `axis_name` must be an axis of the mesh around it; got 'sequence'. Call it inside",
    ),
    "float16 on a TPU": (
        {name: jnp.ones((2, 4, 2, 8), "float16") for name in "qkv"} | {"implementation": "tpu"},
        NotImplementedError,
        "ring_attention: implementation 'tpu' cannot do this call: TPUs have no float16",
    ),
}


@pytest.mark.parametrize(("change", "error", "sentence"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments(change, error, sentence):
    given = {name: jnp.ones((2, 4, 2, 8)) for name in "qkv"} | {"axis_name": "ring"} | change
    with pytest.raises(error, match=re.escape(sentence)):
        jax.vmap(lambda _: ring_attention(**given), axis_name="ring")(jnp.arange(2))


def test_odd_zigzag_shards_and_nothing_at_all():
    run = lambda n: jax.vmap(  # noqa: E731
        lambda q: kernels_pallas.ring_attention(q, q, q, axis_name="ring", layout="zigzag", return_lse=True),
        axis_name="ring",
    )(jnp.ones((2, 1, n, 1, 4)))
    with pytest.raises(ValueError, match=r"^ring_attention: `q` must have an even number of tokens .* Pad the seq"):
        run(3)
    o, lse = run(0)
    assert (o.shape, lse.shape) == ((2, 1, 0, 1, 4), (2, 1, 1, 0))


# --- Several processes. -----------------------------------------------------------------------------------------------

PROCESS = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from kernels_pallas import attention, ring_attention

assert jax.process_count() == 2
assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("ring",), (AxisType.Auto,))
cut = PartitionSpec(None, "ring")
place = NamedSharding(mesh, cut)
whole = np.random.default_rng(0).normal(size=(3, 1, 64, 2, 8)).astype("float32")
given = [jax.make_array_from_callback(x.shape, place, lambda index, x=x: x[index]) for x in whole]
run = lambda q, k, v: ring_attention(q, k, v, axis_name="ring", causal=True)
ring = jax.shard_map(run, mesh=mesh, in_specs=(cut,) * 3, out_specs=cut)
both = lambda f: lambda *a: (f(*a), jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2))(*a))
got = jax.jit(both(ring))(*given)
want = jax.tree.leaves(both(lambda *a: attention(*a, causal=True))(*map(jnp.asarray, whole)))
for g, w in zip(jax.tree.leaves(got), want, strict=True):
    for shard in g.addressable_shards:
        np.testing.assert_allclose(shard.data, w[shard.index], atol=float(sys.argv[3]))
"""


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    atol = str(tolerance("float32", 64, condition=4.0))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(rank), atol],
            cwd=ROOT,
            env=os.environ | flags,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ends
