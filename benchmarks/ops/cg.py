"""Conjugate gradients on a dense matrix with condition number 1e3 that all four solve to the same residual."""

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, Target, register

RTOL = 1e-8


def make(params: Params) -> tuple:
    n = params["n"]
    q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (n, n), jnp.float64))
    A = (q * jnp.logspace(-3, 0, n)) @ q.T
    return (A + A.T) / 2, jax.random.normal(jax.random.key(1), (n,), jnp.float64)


def run(params: Params):
    import jaxnum

    return lambda A, b: jaxnum.linear_solve(A, b, rtol=RTOL).x


def lineax(params: Params):
    import lineax

    solver = lineax.CG(rtol=RTOL, atol=0.0, max_steps=10_000)

    def solve(A, b):
        operator = lineax.MatrixLinearOperator(A, lineax.positive_semidefinite_tag)
        return lineax.linear_solve(operator, b, solver, throw=False).value

    return solve


def jax_scipy(params: Params):
    return lambda A, b: jax.scipy.sparse.linalg.cg(A, b, tol=RTOL)[0]


def scipy(params: Params):
    import scipy.sparse.linalg

    return lambda A, b: scipy.sparse.linalg.cg(A, b, rtol=RTOL, atol=0.0)[0]


def fidelity() -> dict[str, float]:
    """Largest difference of the first twenty iterates from scipy's, relative to the solution, at n = 60."""
    import numpy as np
    import scipy.sparse.linalg

    import jaxnum
    from jaxnum.core.loops import begin

    A, b = make({"n": 60})
    theirs = []
    scipy.sparse.linalg.cg(
        np.asarray(A), np.asarray(b), rtol=1e-14, maxiter=20, callback=lambda x: theirs.append(x.copy())
    )
    solver, problem = jaxnum.solvers.cg(), jaxnum.Linear(A, b)
    x = jnp.zeros_like(b)

    def body(pair, _):
        pair = solver.step(solver.hyper, *pair, problem)
        return pair, pair[0]

    ours = jax.lax.scan(body, (x, begin(solver, x, problem)), None, length=20)[1]
    return {"iterate_gap_to_scipy": float(np.max(np.abs(ours - np.stack(theirs))) / np.max(np.abs(theirs[-1])))}


register(
    Row(
        name="cg",
        covers=("cg",),
        shapes={"dense_512": {"n": 512}},
        make=make,
        run=run,
        reference=lambda params: jnp.linalg.solve,
        modes=("solve",),
        tests=("tests/solvers/test_cg.py",),
        peers={
            "lineax": Peer("lineax", lineax),
            "jax.scipy": Peer("jax", jax_scipy),
            "scipy": Peer("scipy", scipy, jit=False),
        },
        targets=(
            Target(
                "compile_ratio",
                1.0,
                "Compile time, same run: one `linear_solve` at most 1.0x lineax's.",
                peer="lineax",
            ),
        ),
        figures={"fidelity": fidelity},
        x64=True,
    )
)
