"""Ring attention over the devices of this machine, what a larger ring sends, and how evenly its layouts divide work."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Peer, Row, Target, register

SHARDS = 8


def make(params: Params) -> tuple:
    shape = (params["batch"], params["length"], params["heads"], params["dim"])
    return tuple(jax.random.normal(key, shape, jnp.float32) for key in jax.random.split(jax.random.key(0), 3))


def run(params: Params):
    import kernels_pallas

    shards, layout = jax.device_count(), params["layout"]
    ring = _ring(jax.make_mesh((shards,), ("sequence",), (jax.sharding.AxisType.Auto,)), layout)

    def call(q, k, v):
        arrays = (kernels_pallas.to_ring_attention_layout(x, layout=layout, shards=shards) for x in (q, k, v))
        return kernels_pallas.from_ring_attention_layout(ring(*arrays), layout=layout, shards=shards)

    return call


def _ring(mesh, layout):
    import kernels_pallas

    def body(q, k, v):
        return kernels_pallas.ring_attention(q, k, v, axis_name="sequence", causal=True, layout=layout)

    cut = jax.sharding.PartitionSpec(None, "sequence")
    return jax.shard_map(body, mesh=mesh, in_specs=(cut,) * 3, out_specs=cut)


def reference(params: Params):
    import kernels_pallas

    return lambda q, k, v: kernels_pallas.attention(q, k, v, causal=True, implementation="reference")


def jax_nn(params: Params):
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)


def balance() -> dict[str, float]:
    """Causal work of the busiest of 8 devices over that of the mean one, in blocks; one on a diagonal is half."""
    figures = {}
    for layout in ("contiguous", "striped", "zigzag"):
        work = np.array([sum(_blocks(layout, shard, owner) for owner in range(SHARDS)) for shard in range(SHARDS)])
        figures[f"max_over_mean_{layout}"] = float(work.max() / work.mean())
    return figures


def _blocks(layout: str, shard: int, owner: int, length: int = 1024, block: int = 128) -> float:
    """How many blocks of keys of `owner` the queries of `shard` compute."""
    import kernels_pallas

    q, kv = (
        np.asarray(kernels_pallas.ring_attention_positions(length, layout=layout, shard=s, shards=SHARDS))
        .reshape(-1, block)
        .astype(int)
        for s in (shard, owner)
    )
    live = kv.min(axis=1) <= q.max(axis=1)[:, None]
    whole = kv.max(axis=1) <= q.min(axis=1)[:, None]
    return live.sum() / 2 + whole.sum() / 2


def sent() -> dict[str, float]:
    """Messages of the forward ring and of both rings, counted in the programs of 8 devices that need not be here."""
    ring = _ring(jax.sharding.AbstractMesh((SHARDS,), ("sequence",), (jax.sharding.AxisType.Auto,)), "zigzag")
    both = lambda q, k, v, o: jax.vjp(ring, q, k, v)[1](o)  # noqa: E731
    spec = jax.ShapeDtypeStruct((1, 1024 * SHARDS, 4, 64), jnp.float32)
    figures = {}
    for name, function, count in (("forward", ring, 3), ("both_rings", both, 4)):
        text = jax.jit(function).trace(*(spec,) * count).lower(lowering_platforms=("cpu",)).as_text()
        figures[f"messages_{name}"] = text.count("stablehlo.collective_permute")
    return figures


LONG = {"batch": 1, "length": 4096, "heads": 4, "dim": 64}

register(
    Row(
        name="ring_attention",
        covers=(
            "ring_attention",
            "to_ring_attention_layout",
            "from_ring_attention_layout",
            "ring_attention_positions",
        ),
        shapes={"zigzag_4096": LONG | {"layout": "zigzag"}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd", "fwd_bwd"),
        tests=("tests/kernels_pallas/test_ring_attention.py",),
        peers={"jax.nn": Peer("jax", jax_nn)},
        targets=(
            Target("figure", 1.875, "(2 W - 1) / W at W = 8.", figure="max_over_mean_contiguous"),
            Target("figure", 1.0, "Zigzag: every device has the same work.", figure="max_over_mean_zigzag"),
            Target("figure", 14, "W - 1 messages each of k and v.", figure="messages_forward"),
            Target("figure", 44, "Again, and W each of their cotangents.", figure="messages_both_rings"),
        ),
        figures={"balance": balance, "sent": sent},
    )
)
