"""A decode step on this machine against JAX's own attention told the lengths, and what one costs in a large cache."""

import statistics

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.registry import Params, Peer, Row, Target, register


def make(params: Params) -> tuple:
    """Queries, the two arrays of a cache, and how much of each row of it is in use."""
    cache = (params["batch"], params["capacity"], params["k_heads"], params["dim"])
    shapes = ((params["batch"], params["queries"], params["heads"], params["dim"]), cache, cache)
    q, k, v = (
        jax.random.normal(key, shape, jnp.float32)
        for key, shape in zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
    )
    return q, k, v, jnp.full(params["batch"], params["length"], jnp.int32)


def run(params: Params):
    return _decode(None)


def reference(params: Params):
    return _decode("reference")


def _decode(implementation):
    import kernels_pallas

    def call(q, k, v, length):
        cache = kernels_pallas.KVCache(k, v, length)
        return kernels_pallas.decode_attention(q, cache, implementation=implementation)

    return call


def jax_nn(params: Params):
    return lambda q, k, v, length: jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length)


def growth() -> dict[str, float]:
    """One step with 512 tokens in the cache: append and attend, the cache donated, at two capacities."""
    import kernels_pallas

    def step(cache, q, k, v):
        # The length stays, so that every call does the same work.
        grown = kernels_pallas.append_to_cache(cache, k, v)
        return grown._replace(length=cache.length), kernels_pallas.decode_attention(q, grown)

    compiled = jax.jit(step, donate_argnums=0)
    q = jax.random.normal(jax.random.key(0), (1, 1, 8, 128))
    k, v = jax.random.normal(jax.random.key(1), (2, 1, 1, 2, 128))
    held = {}
    for capacity in (1024, 65536):
        cache = kernels_pallas.init_cache(1, capacity, 2, 128)
        held[capacity] = cache._replace(length=jnp.full(1, 511, jnp.int32))

    def call(capacity):
        held[capacity], o = compiled(held[capacity], q, k, v)
        return o

    samples = measure.interleave({str(n): lambda n=n: call(n) for n in held}, rounds=15)
    seconds = {n: statistics.median(times) for n, times in samples.items()}
    ratio = measure.paired_ratio(samples["65536"], samples["1024"])
    return {f"step_us_capacity_{n}": 1e6 * s for n, s in seconds.items()} | {"step_ratio_64k_to_1k": ratio}


ROW = {"batch": 1, "queries": 1, "heads": 8, "k_heads": 2, "dim": 128}

register(
    Row(
        name="decode_attention",
        covers=("decode_attention", "init_cache", "init_paged_cache", "append_to_cache"),
        shapes={
            "full_4096": ROW | {"capacity": 4096, "length": 4096},
            "short_in_16384": ROW | {"capacity": 16384, "length": 512},
            "batch_8": ROW | {"batch": 8, "capacity": 4096, "length": 2048},
        },
        make=make,
        run=run,
        reference=reference,
        modes=("fwd",),
        tests=("tests/kernels_pallas/test_decode_attention.py", "tests/contracts/test_kernels.py"),
        peers={"jax.nn": Peer("jax", jax_nn)},
        targets=(
            Target(
                "figure",
                1.3,
                "CPU: a decode step costs the same at capacities of 1k and 64k, length 512: ratio at most 1.3.",
                figure="step_ratio_64k_to_1k",
            ),
        ),
        figures={"growth": growth},
    )
)
