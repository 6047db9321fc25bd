"""Linear attention with a gate a token, against the recurrence in `lax.scan` and fla's plain PyTorch."""

import jax
import jax.numpy as jnp

from benchmarks import fla, measure
from benchmarks.registry import Params, Peer, Row, Target, register


def make(params: Params) -> tuple:
    shape = (1, params["length"], 4, 64)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, shape, jnp.float32) for key in keys[:3])
    return q, k, v, -jax.random.uniform(keys[3], shape[:3], jnp.float32)


def run(params: Params):
    import kernels_pallas

    return lambda q, k, v, g: kernels_pallas.linear_attention(q, k, v, log_decay=g)[0]


def reference(params: Params):
    import kernels_pallas

    return lambda q, k, v, g: kernels_pallas.linear_attention(q, k, v, log_decay=g, implementation="reference")[0]


def recurrence(params: Params):
    """What a user writes: one token after the other."""

    def step(state, token):
        q, k, v, g = token
        state = jnp.exp(g)[..., None, None] * state + k[..., :, None] * v[..., None, :]
        return state, q.shape[-1] ** -0.5 * jnp.einsum("bhk,bhkv->bhv", q, state)

    def call(q, k, v, g):
        B, _, H, K = q.shape
        tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g))
        return jnp.moveaxis(jax.lax.scan(step, jnp.zeros((B, H, K, v.shape[-1])), tokens)[1], 0, 1)

    return call


def naive(backward: bool):
    def build(params: Params):
        function = fla.naive("simple_gla").naive_chunk_simple_gla
        return fla.call(lambda q, k, v, g: function(q, k, v, g)[0], backward=backward)

    return build


def per_token() -> dict[str, float]:
    """Time a token at lengths from 1k to 64k over that at 4k, and the gradient's scratch beside the recurrence's."""
    figures, lengths = {}, (1024, 4096, 16384, 65536)
    calls = {}
    for length in lengths:
        inputs = make({"length": length})
        executable = measure.compiled(run({}), inputs)
        calls[length] = lambda e=executable, x=inputs: e(*x)
    for length in lengths:
        sampled = measure.interleave({"ours": calls[length], "theirs": calls[4096]}, 7)
        figures[f"per_token_T{length}"] = measure.paired_ratio(sampled["ours"], sampled["theirs"]) * 4096 / length
    spread = [figures[f"per_token_T{length}"] for length in lengths]
    figures["per_token_spread"] = max(spread) / min(spread)
    spec = jax.eval_shape(lambda: make({"length": 4096}))
    temp = [_gradient_scratch(build({}), spec) for build in (run, recurrence)]
    figures["temp_share_of_recurrence"] = temp[0] / temp[1]
    return figures


def _gradient_scratch(function, spec: tuple) -> int:
    gradient = jax.grad(lambda *arrays: function(*arrays).sum(), (0, 1, 2, 3))
    return jax.jit(gradient).lower(*spec).compile().memory_analysis().temp_size_in_bytes


CPU = "CPU linear attention, 4 heads, dim 64, float32: "

register(
    Row(
        name="linear_attention",
        covers=("linear_attention", "linear_attention_step"),
        shapes={"T256": {"length": 256}, "T1024": {"length": 1024}, "T4096": {"length": 4096}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd", "fwd_bwd"),
        tests=("tests/kernels_pallas/test_linear_attention.py",),
        peers={
            "lax.scan": Peer("jax", recurrence),
            "fla": Peer("fla-core", naive(False), jit=False, modes=("fwd",)),
            "fla, backward": Peer("fla-core", naive(True), jit=False, modes=("fwd_bwd",)),
        },
        targets=(
            Target("ratio", 1.2, CPU + "forward at most 1.2x the recurrence.", mode="fwd", peer="lax.scan"),
            Target(
                "speedup",
                4.5,
                CPU + "forward and backward at least 4.5x faster than through the recurrence at 4096 tokens.",
                at_least=True,
                shape="T4096",
                mode="fwd_bwd",
                peer="lax.scan",
            ),
            Target("ratio", 1.0, CPU + "faster than fla's plain PyTorch forward.", mode="fwd", peer="fla"),
            Target(
                "ratio", 1.0, CPU + "faster than fla's plain PyTorch and back.", mode="fwd_bwd", peer="fla, backward"
            ),
            Target("figure", 1.3, CPU + "time a token flat from 1k to 64k tokens.", figure="per_token_spread"),
            Target(
                "figure",
                1 / 8,
                CPU + "scratch of the gradient at 4096 tokens at most 1/8 of the recurrence's.",
                figure="temp_share_of_recurrence",
            ),
        ),
        figures={"a token": per_token},
    )
)
