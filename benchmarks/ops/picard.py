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


def fidelity() -> dict[str, float]:
    """Largest difference of the implicit gradient from optimistix's on x = tanh(A x + 1)."""
    import optimistix

    import jaxnum

    A = jnp.array([[0.3, 0.1], [0.2, 0.4]])
    T = lambda x, A: jnp.tanh(A @ x + 1)  # noqa: E731
    solver = optimistix.FixedPointIteration(rtol=1e-12, atol=1e-12)
    ours = jax.grad(lambda A: jaxnum.fixed_point(T, jnp.zeros(2), A, rtol=1e-12).x.sum())(A)
    theirs = jax.grad(lambda A: optimistix.fixed_point(T, solver, jnp.zeros(2), A, max_steps=1000).value.sum())(A)
    return {"gradient_gap_to_optimistix": float(jnp.max(jnp.abs(ours - theirs)))}


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
        figures={"fidelity": fidelity},
        x64=True,
    )
)
