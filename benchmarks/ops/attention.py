"""Attention on this machine against what JAX users reach for today, with its memory at two lengths."""

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, Target, register


def make(params: Params) -> tuple:
    shape = (params["batch"], params["length"], params["heads"], params["dim"])
    return tuple(jax.random.normal(key, shape, jnp.float32) for key in jax.random.split(jax.random.key(0), 3))


def run(params: Params):
    import kernels_pallas

    return lambda q, k, v: kernels_pallas.attention(q, k, v, causal=params["causal"])


def reference(params: Params):
    import kernels_pallas

    return lambda q, k, v: kernels_pallas.attention(q, k, v, causal=params["causal"], implementation="reference")


def jax_nn(params: Params):
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=params["causal"])


def memory() -> dict[str, float]:
    """Scratch bytes of the compiled forward and gradient, and how they grow when the length grows fourfold."""
    params = {"batch": 1, "heads": 1, "dim": 64, "causal": True}
    figures = {}
    for mode in ("forward", "gradient"):
        for length in (4096, 16384):
            figures[f"temp_mib_{mode}_T{length}"] = _temp(params | {"length": length}, mode) / 2**20
        figures[f"temp_growth_{mode}"] = figures[f"temp_mib_{mode}_T16384"] / figures[f"temp_mib_{mode}_T4096"]
    dense = _temp(params | {"length": 8192}, "gradient", reference)
    figures["temp_share_of_dense_gradient_T8192"] = _temp(params | {"length": 8192}, "gradient") / dense
    return figures


def _temp(params: Params, mode: str, build=run) -> float:
    function = build(params)
    if mode == "gradient":
        function = jax.grad(lambda *arrays, f=function: f(*arrays).sum(), (0, 1, 2))
    spec = jax.ShapeDtypeStruct((params["batch"], params["length"], params["heads"], params["dim"]), jnp.float32)
    return jax.jit(function).lower(spec, spec, spec).compile().memory_analysis().temp_size_in_bytes


LONG = {"batch": 1, "length": 4096, "heads": 4, "dim": 64}

register(
    Row(
        name="attention",
        covers=("attention",),
        shapes={"causal_4096": LONG | {"causal": True}, "full_4096": LONG | {"causal": False}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd", "fwd_bwd"),
        tests=("tests/kernels_pallas/test_attention.py", "tests/contracts/test_kernels.py"),
        peers={"jax.nn": Peer("jax", jax_nn)},
        targets=(
            Target(
                "speedup",
                6.0,
                "CPU attention, causal, 4096 tokens, 4 heads, dim 64, float32: at least 6x faster than "
                "`jax.nn.dot_product_attention` forward.",
                at_least=True,
                shape="causal_4096",
                mode="fwd",
                peer="jax.nn",
            ),
            Target("figure", 4.4, "Temp memory linear in T: at most 4.4 over 4x.", figure="temp_growth_forward"),
            Target("figure", 4.4, "Temp memory linear in T: at most 4.4 over 4x.", figure="temp_growth_gradient"),
        ),
        figures={"memory": memory},
    )
)
