"""MINRES on a shifted Poisson matrix with eigenvalues of both signs, sparse, beside scipy's on its CSR."""

import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Peer, Row, Target, register

RTOL = 1e-8
# scipy's rule divides the residual by ||A|| ||x||, not by ||b||: this one leaves the residual that ours leaves.
SCIPY_RTOL = 1e-11
SHIFT = 0.05


def matrix(n: int):
    """The 5-point matrix of an n x n grid less SHIFT, in CSR."""
    import scipy.sparse as sp

    one = sp.diags([-1.0, 2.0, -1.0], (-1, 0, 1), shape=(n, n))  # pyright: ignore[reportArgumentType]
    return (sp.kron(one, sp.eye(n)) + sp.kron(sp.eye(n), one) - SHIFT * sp.eye(n * n)).tocsr()


def make(params: Params) -> tuple:
    return (jnp.asarray(np.random.default_rng(0).normal(size=params["n"] ** 2)),)


def run(params: Params):
    import jaxnum

    A = jaxnum.sparse_operator(matrix(params["n"]))
    solver = jaxnum.solvers.minres()
    return lambda b: jaxnum.linear_solve(A, b, solver=solver, symmetric="indefinite", rtol=RTOL).x


def scipy(params: Params):
    import scipy.sparse.linalg

    A = matrix(params["n"])
    return lambda b: scipy.sparse.linalg.minres(A, b, rtol=SCIPY_RTOL)[0]


def reference(params: Params):
    import scipy.sparse.linalg

    A = matrix(params["n"]).tocsc()
    return lambda b: jnp.asarray(scipy.sparse.linalg.spsolve(A, np.asarray(b)))


def error(output, truth) -> float:
    return float(np.linalg.norm(np.asarray(output) - truth) / np.linalg.norm(truth))


register(
    Row(
        name="minres",
        covers=("minres",),
        shapes={"shifted_poisson_64": {"n": 64}},
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=("tests/solvers/test_minres.py",),
        peers={"scipy": Peer("scipy", scipy, jit=False)},
        targets=(Target("error", 1e-5, "MINRES equals scipy's solutions."),),
        error=error,
        x64=True,
    )
)
