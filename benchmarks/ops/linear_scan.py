"""The elementwise linear recurrence on this machine, against what JAX users write."""

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, Target, register


def make(params: Params) -> tuple:
    shape = (1, params["length"], params["width"])
    a, b = jax.random.split(jax.random.key(0))
    return jax.random.uniform(a, shape, jnp.float32), jax.random.normal(b, shape, jnp.float32)


def run(params: Params):
    import kernels_pallas

    return lambda a, b: kernels_pallas.linear_scan(a, b)[0]


def reference(params: Params):
    import kernels_pallas

    return lambda a, b: kernels_pallas.linear_scan(a, b, implementation="reference")[0]


def associative(params: Params):
    def combine(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    return lambda a, b: jax.lax.associative_scan(combine, (a, b), axis=1)[1]


def recurrence(params: Params):
    def step(h, token):
        a, b = token
        h = a * h + b
        return h, h

    def call(a, b):
        tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (a, b))
        return jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(b[:, 0]), tokens)[1], 0, 1)

    return call


register(
    Row(
        name="linear_scan",
        covers=("linear_scan",),
        shapes={"T4096": {"length": 4096, "width": 256}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd", "fwd_bwd"),
        tests=("tests/kernels_pallas/test_linear_scan.py",),
        peers={"lax.scan": Peer("jax", recurrence), "associative_scan": Peer("jax", associative)},
        targets=(
            Target(
                "ratio",
                1.0,
                "CPU linear scan, 4096 tokens of 256, float32: forward and backward faster than through lax.scan.",
                mode="fwd_bwd",
                peer="lax.scan",
            ),
        ),
    )
)
