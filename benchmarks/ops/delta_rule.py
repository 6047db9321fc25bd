"""The gated delta rule on this machine, against the recurrence in `lax.scan` and fla's plain PyTorch."""

import jax
import jax.numpy as jnp

from benchmarks import fla
from benchmarks.registry import Params, Peer, Row, Target, register


def make(params: Params) -> tuple:
    shape = (1, params["length"], 4, 64)
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, shape, jnp.float32) for key in keys[:3])
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    beta, gate = (jax.random.uniform(key, shape[:3], jnp.float32) for key in keys[3:])
    return q, k, v, beta, -gate


def run(params: Params):
    import kernels_pallas

    return lambda q, k, v, beta, g: kernels_pallas.delta_rule(q, k, v, beta, log_decay=g)[0]


def reference(params: Params):
    import kernels_pallas

    return lambda q, k, v, beta, g: kernels_pallas.delta_rule(q, k, v, beta, log_decay=g, implementation="reference")[0]


def recurrence(params: Params):
    """What a user writes: one token after the other."""

    def step(state, token):
        q, k, v, beta, g = token
        state = jnp.exp(g)[..., None, None] * state
        written = beta[..., None] * (v - jnp.einsum("bhk,bhkv->bhv", k, state))
        state = state + k[..., :, None] * written[..., None, :]
        return state, q.shape[-1] ** -0.5 * jnp.einsum("bhk,bhkv->bhv", q, state)

    def call(*arrays):
        q, _, v, _, _ = arrays
        start = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]))
        return jnp.moveaxis(jax.lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in arrays))[1], 0, 1)

    return call


def naive(backward: bool):
    def build(params: Params):
        function = fla.naive("gated_delta_rule").naive_chunk_gated_delta_rule
        return fla.call(lambda q, k, v, beta, g: function(q, k, v, g, beta)[0], backward=backward)

    return build


CPU = "CPU gated delta rule, 4 heads, dim 64, float32: "

register(
    Row(
        name="delta_rule",
        covers=("delta_rule", "delta_rule_step"),
        shapes={"T256": {"length": 256}, "T2048": {"length": 2048}, "T4096": {"length": 4096}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd", "fwd_bwd"),
        tests=("tests/kernels_pallas/test_delta_rule.py",),
        peers={
            "lax.scan": Peer("jax", recurrence),
            "fla": Peer("fla-core", naive(False), jit=False, modes=("fwd",)),
            "fla, backward": Peer("fla-core", naive(True), jit=False, modes=("fwd_bwd",)),
        },
        targets=(
            Target("ratio", 1.4, CPU + "forward at most 1.4x the recurrence.", mode="fwd", peer="lax.scan"),
            *(
                Target(
                    "speedup",
                    4.0,
                    CPU + f"forward and backward at least 4x faster than through the recurrence at {shape[1:]} tokens.",
                    at_least=True,
                    shape=shape,
                    mode="fwd_bwd",
                    peer="lax.scan",
                )
                for shape in ("T2048", "T4096")
            ),
            Target("ratio", 1.0, CPU + "faster than fla's plain PyTorch forward.", mode="fwd", peer="fla"),
            Target(
                "ratio", 1.0, CPU + "faster than fla's plain PyTorch and back.", mode="fwd_bwd", peer="fla, backward"
            ),
        ),
    )
)
