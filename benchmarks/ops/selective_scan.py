"""Mamba's selective scan on this machine, against the two ways in which JAX users write it."""

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, Target, register


def make(params: Params) -> tuple:
    B, T, D, N = 2, params["length"], params["width"], 16
    keys = jax.random.split(jax.random.key(0), 4)
    u, delta = (jax.random.normal(key, (B, T, D), jnp.float32) for key in keys[:2])
    write, read = (jax.random.normal(key, (B, T, N), jnp.float32) for key in keys[2:])
    A = -jnp.broadcast_to(jnp.arange(1.0, N + 1), (D, N))
    return u, delta, A, write, read


def run(params: Params):
    import kernels_pallas

    return lambda *arrays: kernels_pallas.selective_scan(*arrays)[0]


def reference(params: Params):
    import kernels_pallas

    return lambda *arrays: kernels_pallas.selective_scan(*arrays, implementation="reference")[0]


def associative(params: Params):
    """All states at once, which the gradient keeps several times."""

    def combine(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    def call(u, delta, A, write, read):
        dt = jax.nn.softplus(delta)
        a = jnp.exp(dt[..., None] * A)
        b = (dt * u)[..., None] * write[:, :, None, :]
        h = jax.lax.associative_scan(combine, (a, b), axis=1)[1]
        return jnp.einsum("btdn,btn->btd", h, read)

    return call


def recurrence(params: Params):
    def call(u, delta, A, write, read):
        def step(h, token):
            u, dt, write, read = token
            h = jnp.exp(dt[..., None] * A) * h + (dt * u)[..., None] * write[:, None, :]
            return h, jnp.einsum("bdn,bn->bd", h, read)

        tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (u, jax.nn.softplus(delta), write, read))
        start = jnp.zeros((u.shape[0], *A.shape))
        return jnp.moveaxis(jax.lax.scan(step, start, tokens)[1], 0, 1)

    return call


register(
    Row(
        name="selective_scan",
        covers=("selective_scan", "selective_scan_step"),
        shapes={"T1024": {"length": 1024, "width": 128}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd", "fwd_bwd"),
        tests=("tests/kernels_pallas/test_selective_scan.py",),
        peers={"lax.scan": Peer("jax", recurrence), "associative_scan": Peer("jax", associative)},
        targets=(
            Target(
                "ratio",
                1.0,
                "CPU selective scan, 1024 tokens of 128, float32: forward and backward faster than all states at once.",
                mode="fwd_bwd",
                peer="associative_scan",
            ),
        ),
    )
)
