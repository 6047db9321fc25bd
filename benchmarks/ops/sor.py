"""SOR on a sparse 5-point Poisson matrix, beside scipy's triangular solve; and the steps that SSOR saves cg."""

import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Peer, Row, Target, register

RTOL = 1e-6
SHAPE = {"n": 64}


def matrix(n: int):
    """The 5-point matrix of an n x n grid in CSR."""
    import scipy.sparse as sp

    one = sp.diags([-1.0, 2.0, -1.0], (-1, 0, 1), shape=(n, n))  # pyright: ignore[reportArgumentType]
    return (sp.kron(one, sp.eye(n)) + sp.kron(sp.eye(n), one)).tocsr()


def best(n: int) -> float:
    """The relaxation that Young's theory gives."""
    return float(2 / (1 + np.sin(np.pi / (n + 1))))


def make(params: Params) -> tuple:
    return (jnp.asarray(np.random.default_rng(0).normal(size=params["n"] ** 2)),)


def run(params: Params):
    import jaxnum

    A = jaxnum.sparse_operator(matrix(params["n"]))
    schedule = jaxnum.solvers.sor_schedule(A, ordering=params.get("ordering", "natural"))
    solver = jaxnum.solvers.sor(best(params["n"]), schedule=schedule)
    return lambda b: jaxnum.linear_solve(A, b, solver=solver, rtol=RTOL).x


def scipy(params: Params):
    import scipy.sparse as sp
    import scipy.sparse.linalg

    A = matrix(params["n"])
    M = (sp.diags(A.diagonal() / best(params["n"])) + sp.tril(A, -1)).tocsr()

    def solve(b):
        x, r, limit = np.zeros_like(b), b, RTOL * np.linalg.norm(b)
        while np.linalg.norm(r) > limit:
            x = x + scipy.sparse.linalg.spsolve_triangular(M, r, lower=True)
            r = b - A @ x
        return x

    return solve


def reference(params: Params):
    import scipy.sparse.linalg

    A = matrix(params["n"]).tocsc()
    return lambda b: jnp.asarray(scipy.sparse.linalg.spsolve(A, np.asarray(b)))


def error(output, truth) -> float:
    return float(np.linalg.norm(np.asarray(output) - truth) / np.linalg.norm(truth))


def steps() -> dict[str, float]:
    """Steps to 1e-8 by conjugate gradients with and without SSOR, and by sor and ssor alone, in both orders."""
    import jaxnum

    n = SHAPE["n"]
    A, b, omega = jaxnum.sparse_operator(matrix(n)), jnp.ones(n * n), best(n)
    schedule = jaxnum.solvers.sor_schedule(A)
    colours = jaxnum.solvers.sor_schedule(A, ordering="multicolour")
    M = jaxnum.solvers.ssor_preconditioner(A, omega, schedule=schedule)
    # Red and black, the preconditioner is best without relaxation.
    red_black = jaxnum.solvers.ssor_preconditioner(A, 1.0, schedule=colours)

    def count(**options):
        return float(jaxnum.linear_solve(A, b, rtol=1e-8, **options).steps)

    figures = {
        "cg": count(),
        "ssor_cg": count(preconditioner=M),
        "ssor_cg_multicolour": count(preconditioner=red_black),
        "sor": count(solver=jaxnum.solvers.sor(omega, schedule=schedule)),
        "sor_multicolour": count(solver=jaxnum.solvers.sor(omega, schedule=colours)),
        "ssor": count(solver=jaxnum.solvers.ssor(omega, schedule=schedule)),
    }
    return figures | {"cg_over_ssor_cg": figures["cg"] / figures["ssor_cg"]}


register(
    Row(
        name="sor",
        covers=("sor", "sor_schedule", "ssor", "ssor_preconditioner"),
        shapes={"poisson_64": SHAPE, "poisson_64_multicolour": SHAPE | {"ordering": "multicolour"}},
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=("tests/solvers/test_sor.py", "tests/solvers/test_ssor.py"),
        peers={"scipy": Peer("scipy", scipy, jit=False)},
        targets=(
            Target(
                "figure",
                3.0,
                "64x64 Dirichlet Poisson: SSOR-PCG needs >= 3x fewer steps than CG.",
                at_least=True,
                figure="cg_over_ssor_cg",
            ),
        ),
        figures={"steps": steps},
        error=error,
        x64=True,
    )
)
