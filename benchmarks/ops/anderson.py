"""Anderson acceleration on a slow symmetric contraction, against Picard in optimistix, to the same tolerance."""

import jax
import jax.numpy as jnp

from benchmarks.ops.picard import optimistix as picard_of_optimistix
from benchmarks.ops.picard import reference, step
from benchmarks.registry import Params, Peer, Row, register

TOLERANCE = 1e-6


def make(params: Params) -> tuple:
    n = params["n"]
    q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (n, n), jnp.float64))
    return (q * jnp.linspace(-0.5, 0.99, n)) @ q.T, jax.random.normal(jax.random.key(1), (n,), jnp.float64)


def solution(W, b, solver):
    import jaxnum

    return jaxnum.fixed_point(
        step, jnp.zeros_like(b), W, b, solver=solver, rtol=TOLERANCE, atol=TOLERANCE, adjoint="none"
    )


def run(params: Params):
    import jaxnum

    return lambda W, b: solution(W, b, jaxnum.solvers.anderson()).x


def steps() -> dict[str, float]:
    """Evaluations of T to the tolerance: memory 5 and 10, and Picard."""
    from jaxnum.solvers import anderson, picard

    W, b = make({"n": 256})
    solvers = {"anderson_5": anderson(), "anderson_10": anderson(10), "picard": picard()}
    return {f"steps_{name}": int(solution(W, b, solver).steps) for name, solver in solvers.items()}


register(
    Row(
        name="anderson",
        covers=("anderson",),
        shapes={"slow_contraction_256": {"n": 256}},
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=("tests/solvers/test_anderson.py",),
        peers={"optimistix": Peer("optimistix", picard_of_optimistix)},
        figures={"steps": steps},
        x64=True,
    )
)
