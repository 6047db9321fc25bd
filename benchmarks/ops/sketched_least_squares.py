"""Tall least squares with condition number 1e6: sketch and precondition beside the QR and SVD of others."""

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, Target, register

RTOL = 1e-10


def make(params: Params) -> tuple:
    n, d, kappa = params["n"], params["d"], params["kappa"]
    keys = jax.random.split(jax.random.key(0), 4)
    u, _ = jnp.linalg.qr(jax.random.normal(keys[0], (n, d), jnp.float64))
    v, _ = jnp.linalg.qr(jax.random.normal(keys[1], (d, d), jnp.float64))
    A = (u * jnp.geomspace(1, 1 / kappa, d)) @ v
    return A, A @ jax.random.normal(keys[2], (d,), jnp.float64) + 1e-3 * jax.random.normal(keys[3], (n,), jnp.float64)


def solve(A, b, kind: str = "srht"):
    import jaxnum

    return jaxnum.solvers.sketched_least_squares(jax.random.key(1), A, b, kind=kind, rtol=RTOL)


def run(params: Params):
    return lambda A, b: solve(A, b, params["kind"]).x


def lapack(params: Params):
    return lambda A, b: jnp.linalg.lstsq(A, b)[0]


def lineax(params: Params):
    import lineax

    return lambda A, b: lineax.linear_solve(lineax.MatrixLinearOperator(A), b, lineax.QR()).value


def scipy(params: Params):
    import scipy.linalg

    def solve(A, b):
        found = scipy.linalg.lstsq(A, b)
        assert found is not None
        return found[0]

    return solve


def steps() -> dict[str, float]:
    """Steps for condition numbers 1 to 1e6, by every sketch."""
    figures: dict[str, float] = {}
    for kind in ("srht", "gaussian", "countsketch"):
        for kappa in (1.0, 1e3, 1e6):
            A, b = make({"n": 4000, "d": 50, "kappa": kappa})
            figures[f"{kind}_steps_kappa_{kappa:.0e}"] = int(solve(A, b, kind).steps)
    figures["most_steps"] = max(figures.values())
    figures["steps_kappa_1e6_over_1"] = figures["srht_steps_kappa_1e+06"] / figures["srht_steps_kappa_1e+00"]
    return figures


def shape(kind: str) -> Params:
    return {"n": 10_000, "d": 100, "kappa": 1e6, "kind": kind}


register(
    Row(
        name="sketched_least_squares",
        covers=("sketched_least_squares",),
        shapes={kind: shape(kind) for kind in ("srht", "countsketch")},
        make=make,
        run=run,
        reference=lapack,
        modes=("solve",),
        tests=("tests/solvers/test_sketched_least_squares.py", "tests/solvers/test_sketch.py"),
        peers={
            "jnp.linalg.lstsq": Peer("jax", lapack),
            "lineax": Peer("lineax", lineax),
            "scipy": Peer("scipy", scipy, jit=False),
        },
        targets=(
            Target(
                "figure",
                1.2,
                "Sketch-and-precondition least squares converges in O(1) steps independent of kappa.",
                figure="steps_kappa_1e6_over_1",
            ),
            Target("figure", 30, "The error halves a step at rows = 4 d: 1e-10 in about 30.", figure="most_steps"),
        ),
        figures={"steps": steps},
        x64=True,
    )
)
