"""Picard iteration on a contraction of factor 0.9, against optimistix's, to the same tolerance."""

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, register

TOLERANCE = 1e-6


def make(params: Params) -> tuple:
    n = params["n"]
    q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (n, n), jnp.float64))
    return 0.9 * q, jax.random.normal(jax.random.key(1), (n,), jnp.float64)


def step(x, W, b):
    return W @ x + b


def run(params: Params):
    import jaxnum

    return lambda W, b: (
        jaxnum.fixed_point(
            step, jnp.zeros_like(b), W, b, solver=jaxnum.solvers.picard(), rtol=TOLERANCE, atol=TOLERANCE
        ).x
    )


def optimistix(params: Params):
    import optimistix

    solver = optimistix.FixedPointIteration(rtol=TOLERANCE, atol=TOLERANCE)

    def solve(W, b):
        start = jnp.zeros_like(b)
        return optimistix.fixed_point(
            lambda x, args: step(x, *args), solver, start, (W, b), max_steps=10_000, throw=False
        ).value

    return solve


def reference(params: Params):
    return lambda W, b: jnp.linalg.solve(jnp.eye(b.size) - W, b)


register(
    Row(
        name="picard",
        covers=("picard",),
        shapes={"contraction_256": {"n": 256}},
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=("tests/solvers/test_picard.py",),
        peers={"optimistix": Peer("optimistix", optimistix)},
        x64=True,
    )
)
