"""Attention inside jax.shard_map over batch and heads, with the check of varying axes on, equals attention outside."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels_pallas import BlockSizes, attention
from tests import collectives, interpreters
from tests.tolerances import tolerance

pytestmark = pytest.mark.every_jax

B, T, H, D = 4, 150, 4, 16
BLOCKS = BlockSizes(128, 128, 128)
BATCH, HEADS, BOTH = PartitionSpec("data"), PartitionSpec(None, "heads"), PartitionSpec("data", "heads")
TOKENS = PartitionSpec("data", None, "heads")
# Where the keys lie: each head beside its queries, or one key head on every device of the axis.
KEYS = {"own keys": (4, TOKENS), "shared keys": (1, BATCH)}


def arrays(k_heads, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = ((B, T, H, D), (B, T, k_heads, D), (B, T, k_heads, D), (1, H, T, T))
    q, k, v, bias = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    segments = np.sort(rng.integers(0, 3, size=(B, T)), axis=1)
    segments[:, -9:] = -1
    return q, k, v, bias, jnp.asarray(segments)


def run(q, k, v, bias, segments, *, implementation="xla"):
    return attention(
        q, k, v, bias=bias, segment_ids=segments, causal=True, window=(90, 0), soft_cap=20.0, return_lse=True,
        implementation=implementation, block_sizes=BLOCKS,
    )  # fmt: skip


def sharded(function, keys, out=(TOKENS, BOTH)):
    mesh = jax.make_mesh((4, 2), ("data", "heads"), (AxisType.Auto,) * 2)
    return jax.shard_map(function, mesh=mesh, in_specs=(TOKENS, keys, keys, HEADS, BATCH), out_specs=out)


def loss(function, segments):
    """A scalar that both outputs enter, with weights that leave no symmetry."""
    w = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, H, D)), "float32")

    def scalar(*arrays):
        o, lse = function(*arrays, segments)
        return jnp.sum(o.astype(w.dtype) * w) + jnp.sum(jnp.sin(jnp.where(jnp.isfinite(lse), lse, 0)))

    return scalar


def close(got, want, dtype="float32", condition=4.0):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_array_equal(np.isfinite(g), np.isfinite(w))
        g, w = np.where(np.isfinite(g), g, 0), np.where(np.isfinite(w), w, 0)
        assert np.max(np.abs(g - w)) <= tolerance(dtype, B * T, condition=condition) * max(1.0, np.max(np.abs(w)))


@pytest.mark.parametrize(
    ("keys", "implementation", "compiled"),
    [
        ("own keys", "xla", True),
        ("shared keys", "xla", True),
        ("shared keys", "xla", False),
        ("shared keys", "reference", True),
    ],
)
def test_forward_and_gradients(keys, implementation, compiled):
    k_heads, place = KEYS[keys]
    *inputs, segments = arrays(k_heads)
    both = sharded(partial(run, implementation=implementation), place)
    jit = jax.jit if compiled else lambda f: f
    close(jit(both)(*inputs, segments), run(*inputs, segments))
    # Of shared keys, and of the bias, every device has a share, which must be summed.
    for at in ((0, 1, 2), (0, 1, 2, 3)):
        want = jax.grad(loss(run, segments), at)(*inputs)
        close(jit(jax.grad(loss(both, segments), at))(*inputs), want)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_inside_and_through_one_output(output):
    *inputs, segments = arrays(1)

    def inside(*given):
        def part(*a):
            x = run(*a, given[-1])[output]
            return jnp.sum(jnp.where(jnp.isfinite(x), x, 0))

        return jax.grad(part, (0, 1, 2))(*given[:-1])

    many = sharded(inside, BATCH, (TOKENS, BATCH, BATCH))
    close(jax.jit(many)(*inputs, segments), inside(*inputs, segments))


def test_second_order(x64):
    *inputs, segments = arrays(1, "float64")

    def product(function):
        inner = lambda *a: sum(jnp.sum(jnp.sin(g)) for g in jax.grad(loss(function, segments), (0, 1, 2, 3))(*a))  # noqa: E731
        return jax.jit(jax.grad(inner, (0, 1, 2, 3)))(*inputs)

    close(product(sharded(run, BATCH)), product(run), "float64", condition=10.0)


@pytest.mark.parametrize("inside", [True, False])
def test_vmap(inside):
    q, k, v, bias, segments = arrays(1)
    qs, vs = jnp.stack([q, 2 * q, q + 1]), jnp.stack([v, v - 1, v])

    def lanes(function):
        return jax.vmap(lambda q, v: function(q, k, v, bias, segments))

    if inside:

        def body(qs, k, vs, bias, segments):
            return jax.vmap(lambda q, v: run(q, k, v, bias, segments))(qs, vs)

        mesh = jax.make_mesh((4, 2), ("data", "heads"), (AxisType.Auto,) * 2)
        lane = lambda spec: PartitionSpec(None, *spec)  # noqa: E731
        places = (lane(TOKENS), BATCH, lane(BATCH), HEADS, BATCH)
        many = jax.shard_map(body, mesh=mesh, in_specs=places, out_specs=(lane(TOKENS), lane(BOTH)))
        both = lambda qs, vs: many(qs, k, vs, bias, segments)  # noqa: E731
    else:
        both = lanes(sharded(run, BATCH))
    close(jax.jit(both)(qs, vs), lanes(run)(qs, vs))
    scalar = lambda f: lambda *a: sum(jnp.sum(jnp.where(jnp.isfinite(x), jnp.sin(x), 0)) for x in f(*a))  # noqa: E731
    close(jax.jit(jax.grad(scalar(both), (0, 1)))(qs, vs), jax.grad(scalar(lanes(run)), (0, 1))(qs, vs))


def test_lowers_to_the_kernel_of_a_tpu():
    *inputs, segments = arrays(1)
    both = sharded(partial(run, implementation=None), BATCH)
    for function in (both, lambda *a: jax.grad(loss(both, a[-1]), (0, 1, 2))(*a[:-1])):
        lowered = jax.jit(function).trace(*inputs, segments).lower(lowering_platforms=("tpu",))
        assert "tpu_custom_call" in lowered.as_text()


def test_what_the_compiler_divides_itself_is_left_to_xla():
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    spec = jax.ShapeDtypeStruct((B, T, H, 64), jnp.bfloat16, sharding=NamedSharding(mesh, BATCH))
    for platform in ("tpu", "cuda"):
        traced = jax.jit(lambda x: attention(x, x, x, causal=True)).trace(spec)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "tpu_custom_call" not in text
        assert "mosaic_gpu" not in text
    named = jax.jit(lambda x: attention(x, x, x, implementation="tpu")).trace(spec)
    with pytest.raises(NotImplementedError, match="attention: implementation 'tpu' cannot be divided over devices by"):
        named.lower(lowering_platforms=("tpu",))


@pytest.mark.aot
def test_compiles_for_sixteen_chips():
    mesh = interpreters.tpu_mesh("v5e:4x4", data=4, heads=4)
    place = NamedSharding(mesh, TOKENS)
    inputs = [jax.ShapeDtypeStruct((8, 1024, heads, 128), jnp.bfloat16, sharding=place) for heads in (16, 4, 4)]
    causal = partial(attention, causal=True)
    both = jax.shard_map(causal, mesh=mesh, in_specs=(TOKENS,) * 3, out_specs=TOKENS)
    # The cotangent of o is an input, so that the sum of the loss over devices is not part of the program.
    pull = lambda *a: jax.vjp(both, *a[:3])[1](a[3])  # noqa: E731
    for function, given in ((both, inputs), (pull, [*inputs, inputs[0]])):
        text = jax.jit(function).lower(*given).compile().as_text()
        assert "tpu_custom_call" in text
        # Batch and heads are independent: no chip sends anything.
        assert collectives.count(text) == {}
