"""LASP-2 on virtual devices equals linear attention on one; what it sends; two processes; every bad argument."""

import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxnum.sequence import _lasp2 as lasp2_file
from jaxnum.sequence import lasp2, lasp2_hybrid_attention
from kernels_pallas import attention, linear_attention
from tests import collectives, interpreters
from tests.source import ROOT
from tests.tolerances import tolerance

pytestmark = pytest.mark.every_jax

N, H, K, V = 11, 2, 6, 4
CUT = PartitionSpec(None, "sequence")


def mesh_of(shards):
    return Mesh(np.array(jax.devices()[:shards]), ("sequence",), axis_types=(AxisType.Auto,))


def inputs(shards, gates, seed=0):
    rng = np.random.default_rng(seed)
    T = N * shards
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, H, width)), "float32") for width in (K, K, V))
    shape = {"none": None, "head": (H,), "token": (2, T, H), "channel": (2, T, H, K)}[gates]
    g = None if shape is None else -jnp.asarray(rng.uniform(0, 0.3, size=shape), "float32")
    return q, k, v, g


def cut(mesh, gates, segments=None, start=None, **flags):
    """`lasp2` of a whole sequence: its outputs, and the state after the last token."""
    specs = (CUT, CUT, CUT, PartitionSpec() if gates in ("none", "head") else CUT, PartitionSpec(), CUT)

    def body(q, k, v, g, start, ids):
        o, state = lasp2(q, k, v, axis_name="sequence", log_decay=g, initial_state=start, segment_ids=ids, **flags)
        return o, state[None]

    def whole(q, k, v, g):
        out = (CUT, PartitionSpec("sequence"))
        o, states = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out)(q, k, v, g, start, segments)
        return o, states[-1]

    return whole


def loss(run):
    rng = np.random.default_rng(7)
    weight = jnp.asarray(rng.normal(size=(2, 8 * N, H, V)), "float32")

    def scalar(*arrays):
        o, state = run(*arrays)
        return jnp.sum(o * weight[:, : o.shape[1]]) + jnp.sum(jnp.sin(state))

    return scalar


def close(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(1.0, float(np.max(np.abs(w))))
        np.testing.assert_allclose(g, w, rtol=0, atol=scale * tolerance("float32", 200, condition=4.0))


@pytest.mark.parametrize(("gates", "shards"), [("none", 1), ("none", 8), ("head", 4), ("token", 8), ("channel", 2)])
def test_equals_one_device(gates, shards):
    arrays = inputs(shards, gates)
    start = jnp.asarray(np.random.default_rng(3).normal(size=(2, H, K, V)), "float32")
    run = cut(mesh_of(shards), gates, start=start)
    single = lambda q, k, v, g: linear_attention(q, k, v, log_decay=g, initial_state=start)  # noqa: E731
    close(jax.jit(run)(*arrays), single(*arrays))
    at = (0, 1, 2, 3) if arrays[3] is not None else (0, 1, 2)
    close(jax.jit(jax.grad(loss(run), at))(*arrays), jax.grad(loss(single), at)(*arrays))


# Documents of less than a shard and of several; padding within, at a cut, and over a whole shard.
DOCUMENTS = [
    np.repeat([5, 70_000, 9, -1, 9, 2], [30, 5, 20, 4, 10, 19]),
    np.repeat([-1, 3, -1, 3, 4, -1], [3, 19, 25, 20, 20, 1]),
]


@pytest.mark.parametrize("gates", ["none", "token"])
def test_documents_reach_over_devices(gates):
    arrays, ids = inputs(8, gates), jnp.asarray(np.stack(DOCUMENTS), jnp.int32)
    arrays = [x if i == 3 else jnp.where((ids < 0)[..., None, None], jnp.nan, x) for i, x in enumerate(arrays)]
    run = cut(mesh_of(8), gates, segments=ids)
    single = lambda q, k, v, g: linear_attention(q, k, v, log_decay=g, segment_ids=ids)  # noqa: E731
    close(jax.jit(run)(*arrays), single(*arrays))
    at = (0, 1, 2) if gates == "none" else (0, 1, 2, 3)
    close(jax.jit(jax.grad(loss(run), at))(*arrays), jax.grad(loss(single), at)(*arrays))


def test_without_causality_every_token_sees_every_other():
    q, k, v, _ = inputs(4, "none")
    o, state = jax.jit(cut(mesh_of(4), "none", causal=False))(q, k, v, None)
    want = np.einsum("bshk,bshv->bhkv", np.asarray(k, np.float64), v)
    close((o, state), (K**-0.5 * np.einsum("bthk,bhkv->bthv", q, want), want))


@pytest.mark.parametrize("segments", [False, True])
def test_a_narrow_message_costs_its_rounding(segments):
    arrays, ids = inputs(8, "token"), jnp.asarray(np.stack(DOCUMENTS), jnp.int32) if segments else None
    runs = [jax.jit(cut(mesh_of(8), "token", segments=ids, wire_dtype=d)) for d in (None, jnp.bfloat16)]
    exact, rounded = (run(*arrays)[0] for run in runs)
    error = np.max(np.abs(exact - rounded)) / np.max(np.abs(exact))
    assert 0 < error <= tolerance("bfloat16")
    sent = re.findall(r"all_gather.*?-> tensor<\d+x\d+x\d+x(\w+)>", runs[1].lower(*arrays).as_text(), flags=re.S)
    assert sent == ["bf16"]


@pytest.mark.parametrize("wire_dtype", [jnp.bfloat16, jnp.float16])
def test_decays_arrive_whole(wire_dtype):
    x = jnp.asarray([-999.123, -0.0123456, -1e-3, -37.77777, 0.0], "float32")
    sent = jax.jit(lambda x: [p.astype(wire_dtype) for p in lasp2_file._pieces(lasp2_file._WHOLE * x, wire_dtype)])(x)
    got = sum(np.asarray(p, "float64") for p in sent) / lasp2_file._WHOLE
    np.testing.assert_allclose(got, x, rtol=tolerance("float32"), atol=1e-6)


@pytest.mark.parametrize("segments", [False, True])
def test_hybrid_attention_equals_one_device(segments):
    q, k, v, _ = inputs(8, "none")
    k, v = k[:, :, :1], v[:, :, :1]
    ids = jnp.asarray(np.stack(DOCUMENTS), jnp.int32) if segments else None
    run = jax.shard_map(
        lambda q, k, v, ids: lasp2_hybrid_attention(q, k, v, axis_name="sequence", segment_ids=ids),
        mesh=mesh_of(8),
        in_specs=(CUT,) * 4,
        out_specs=CUT,
    )
    close(jax.jit(run)(q, k, v, ids), attention(q, k, v, causal=True, segment_ids=ids))


def gathers(mesh, length, function):
    """The collectives of a compiled program, and the shapes of what it gathers."""
    sharding = NamedSharding(mesh, CUT)
    specs = [jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16, sharding=sharding)] * 3
    run = jax.shard_map(function, mesh=mesh, in_specs=(CUT,) * 3, out_specs=CUT)
    text = jax.jit(run).lower(*specs).compile().as_text()
    return collectives.count(text), re.findall(r"= \(?(\w+\[[\d,]*\])\S*.* all-gather(?:-start)?\(", text)


def one_message(q, k, v):
    return lasp2(q, k, v, axis_name="sequence", log_decay=jnp.full(2, -0.1))[0]


def test_sends_one_message_of_constant_size():
    found = [gathers(mesh_of(8), length, one_message) for length in (1024, 4096)]
    assert [counts for counts, _ in found] == [{"all-gather": 1}] * 2
    assert found[0][1] == found[1][1]
    backward = jax.grad(lambda *a: jnp.sum(one_message(*a).astype("float32") ** 2), (0, 1, 2))
    counts, _ = gathers(mesh_of(8), 1024, lambda *a: sum(backward(*a)))
    assert sum(counts.values()) == 2, counts


@pytest.mark.aot
def test_sends_one_message_on_16_chips():
    mesh = interpreters.tpu_mesh("v5e:4x4", sequence=16)
    found = [gathers(mesh, length, one_message) for length in (2048, 8192)]
    assert [counts for counts, _ in found] == [{"all-gather": 1}] * 2
    assert found[0][1] == found[1][1]
    hybrid, _ = gathers(mesh, 2048, lambda q, k, v: lasp2_hybrid_attention(q, k, v, axis_name="sequence"))
    assert hybrid == {"all-gather": 1}


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
address, rank, atol = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, num_processes=2, process_id=rank)
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxnum.sequence import lasp2
from kernels_pallas import linear_attention
mesh = Mesh(np.array(jax.devices()), ("sequence",), axis_types=(AxisType.Auto,))
assert mesh.size == 4
cut = PartitionSpec(None, "sequence")
rng = np.random.default_rng(0)
whole = [rng.normal(size=(1, 40, 2, 8)).astype("float32") for _ in range(3)]
spread = [jax.make_array_from_callback(x.shape, NamedSharding(mesh, cut), lambda i, x=x: x[i]) for x in whole]
decay = np.array([-0.1, -0.3], "float32")
run = lambda q, k, v: lasp2(q, k, v, axis_name="sequence", log_decay=jnp.asarray(decay))[0]
o = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(cut,) * 3, out_specs=cut))(*spread)
want = np.asarray(linear_attention(*map(jnp.asarray, whole), log_decay=jnp.asarray(decay))[0])
for shard in o.addressable_shards:
    np.testing.assert_allclose(shard.data, want[shard.index], rtol=0, atol=atol)
"""


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


def test_bad_input():
    q, k, v, g = inputs(1, "token")
    with pytest.raises(ValueError, match=r"lasp2: `axis_name` must be an axis of the mesh around it; got 'sequence'\."):
        lasp2(q, k, v, axis_name="sequence")
    with pytest.raises(ValueError, match="lasp2_hybrid_attention: `axis_name` must be an axis of the mesh"):
        lasp2_hybrid_attention(q, k, v, axis_name="sequence")
    with pytest.raises(ValueError, match="lasp2: `log_decay` must be absent where `causal` is False"):
        cut(mesh_of(1), "token", causal=False)(q, k, v, g)
    with pytest.raises(ValueError, match=r"lasp2: `initial_state` must have shape \(2, 2, 6, 4\)"):
        cut(mesh_of(1), "token", start=jnp.zeros((1, H, K, V)))(q, k, v, g)
