"""Attention on this machine against what JAX and PyTorch users reach for today, with its memory at several lengths."""

import jax
import jax.numpy as jnp

from benchmarks import measure
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


def torch_forward(params: Params):
    return _torch(params, backward=False)


def torch_backward(params: Params):
    return _torch(params, backward=True)


def _torch(params: Params, *, backward: bool):
    """PyTorch's own, on as many threads as there are cores, in the layout it likes best."""
    import os

    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    held: list = []

    def call(*arrays):
        if not held:
            held.extend(torch.from_numpy(x.transpose(0, 2, 1, 3).copy()).requires_grad_(backward) for x in arrays)
        o = torch.nn.functional.scaled_dot_product_attention(*held, is_causal=params["causal"])
        if not backward:
            return o.transpose(1, 2).numpy()
        # The loss of `measure.in_mode`: the sum of the outputs' squares over two, whose cotangent is the output.
        gradients = torch.autograd.grad(o, held, o.detach())
        o, *gradients = (x.detach().transpose(1, 2).numpy() for x in (o, *gradients))
        return o, tuple(gradients)

    return call


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


def against_itself() -> dict[str, float]:
    """What a causal mask saves at 8192 tokens, and what 16-bit arrays cost at 4096 against 32 bits."""
    long = LONG | {"length": 8192}
    narrow = tuple(x.astype(jnp.bfloat16) for x in make(LONG))
    pairs = {
        "causal_over_full_T8192": ((LONG | {"causal": True}, make(long)), (LONG | {"causal": False}, make(long))),
        "bfloat16_over_float32_T4096": ((LONG | {"causal": True}, narrow), (LONG | {"causal": True}, make(LONG))),
    }
    figures = {}
    for name, sides in pairs.items():
        calls = {}
        for side, (params, inputs) in zip(("ours", "theirs"), sides, strict=True):
            executable = measure.compiled(run(params), inputs)
            calls[side] = lambda e=executable, x=inputs: e(*x)
        sampled = measure.interleave(calls, 9)
        figures[name] = measure.paired_ratio(sampled["ours"], sampled["theirs"])
    return figures


def _temp(params: Params, mode: str, build=run) -> float:
    function = build(params)
    if mode == "gradient":
        function = jax.grad(lambda *arrays, f=function: f(*arrays).sum(), (0, 1, 2))
    spec = jax.ShapeDtypeStruct((params["batch"], params["length"], params["heads"], params["dim"]), jnp.float32)
    return jax.jit(function).lower(spec, spec, spec).compile().memory_analysis().temp_size_in_bytes


CPU = "CPU attention, causal, 4096 tokens, 4 heads, dim 64, float32: "
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
        peers={
            "jax.nn": Peer("jax", jax_nn),
            "torch": Peer("torch", torch_forward, jit=False, modes=("fwd",)),
            "torch, backward": Peer("torch", torch_backward, jit=False, modes=("fwd_bwd",)),
        },
        targets=(
            *(
                Target("speedup", 6.0, CPU + what, at_least=True, shape="causal_4096", mode=mode, peer="jax.nn")
                for mode, what in (
                    ("fwd", "at least 6x faster than `jax.nn.dot_product_attention` forward."),
                    ("fwd_bwd", "at least 6x faster than `jax.nn.dot_product_attention` forward and backward."),
                )
            ),
            Target(
                "ratio",
                1.15,
                CPU + "at most 1.15x the time of torch 2.13's scaled_dot_product_attention forward.",
                shape="causal_4096",
                mode="fwd",
                peer="torch",
            ),
            Target(
                "ratio",
                1.1,
                CPU + "at most 1.1x the time of torch 2.13's scaled_dot_product_attention forward and backward.",
                shape="causal_4096",
                mode="fwd_bwd",
                peer="torch, backward",
            ),
            Target("figure", 4.4, "Temp memory linear in T: at most 4.4 over 4x.", figure="temp_growth_forward"),
            Target("figure", 4.4, "Temp memory linear in T: at most 4.4 over 4x.", figure="temp_growth_gradient"),
            Target(
                "figure",
                1 / 30,
                "Temp memory of the gradient at 8192 tokens: at most 1/30 of the dense path's.",
                figure="temp_share_of_dense_gradient_T8192",
            ),
            Target(
                "figure", 0.6, "Causal at 8192 tokens: at most 0.6x of not causal.", figure="causal_over_full_T8192"
            ),
            Target("figure", 1.3, "bfloat16: not slower than float32 by more.", figure="bfloat16_over_float32_T4096"),
        ),
        figures={"memory": memory, "against itself": against_itself},
    )
)
