"""Trained directions on Poisson's equation: iterations against conjugate gradients, and what they cost in seconds.

The network sees mixtures of Ritz vectors of the 32 x 32 grid in training, never one of the right-hand sides it is
judged by, nor the grid of twice the size.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.registry import Params, Peer, Row, Target, register

RTOL = 1e-4
GRID = 32
STEPS = 800


def laplacian(u):
    """Minus the five-point Laplacian [n, n] times h^2, zero outside."""
    p = jnp.pad(u, 1)
    return 4 * u - p[:-2, 1:-1] - p[2:, 1:-1] - p[1:-1, :-2] - p[1:-1, 2:]


def families(n: int) -> dict[str, jax.Array]:
    """Right-hand sides of four kinds that are no mixtures of the training's Ritz vectors."""
    t = jnp.arange(n) / n
    return {
        "noise": jax.random.normal(jax.random.key(9), (n, n), jnp.float32),
        "constant": jnp.ones((n, n), jnp.float32),
        "charges": jnp.zeros((n, n), jnp.float32).at[n // 3, n // 4].set(1).at[n // 2, n // 5].set(-1),
        "waves": jnp.outer(jnp.sin(9 * t), jnp.cos(7 * t)).astype(jnp.float32),
    }


@functools.cache
def trained() -> tuple:
    """The weights, and the seconds of training with all that belongs to it, compilation included."""
    from jaxnum import solvers

    start = time.perf_counter()
    like = jnp.zeros((GRID, GRID), jnp.float32)
    data = solvers.ritz_dataset(laplacian, like, jax.random.key(0), samples=500, vectors=200)
    first = solvers.init_dcdm_network(jax.random.key(1), filters=8, levels=4, pairs=1, coarse_pairs=1)
    out = solvers.train_dcdm(
        solvers.linear_dcdm_network, first, laplacian, data, jax.random.key(2), steps=STEPS, progress="text"
    )
    jax.block_until_ready(out)
    return out.params, time.perf_counter() - start


def make(params: Params) -> tuple:
    return (families(params["n"])["noise"],)


def run(params: Params):
    import jaxnum

    solver = jaxnum.solvers.dcdm(jaxnum.solvers.linear_dcdm_network, trained()[0])
    return lambda b: jaxnum.linear_solve(laplacian, b, solver=solver, rtol=RTOL).x


def reference(params: Params):
    import scipy.sparse.linalg

    return lambda b: scipy.sparse.linalg.spsolve(matrix(params["n"]), np.asarray(b, np.float64).ravel()).reshape(
        b.shape
    )


def matrix(n: int):
    import scipy.sparse as sp

    one = sp.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(n, n))
    return (sp.kron(one, sp.eye(n)) + sp.kron(sp.eye(n), one)).tocsc()


def cg(params: Params):
    import jaxnum

    return lambda b: jaxnum.linear_solve(laplacian, b, rtol=RTOL).x


def scipy(params: Params):
    import scipy.sparse.linalg

    A = matrix(params["n"]).tocsr().astype(np.float32)
    return lambda b: scipy.sparse.linalg.cg(A, b.ravel(), rtol=RTOL, atol=0.0)[0].reshape(b.shape)


def multigrid(params: Params):
    """pyamg's classical multigrid, set up beforehand, as preconditioner of its conjugate gradients."""
    import pyamg

    levels = pyamg.ruge_stuben_solver(matrix(params["n"]).tocsr())
    return lambda b: levels.solve(b.ravel().astype(np.float64), tol=RTOL, accel="cg").reshape(b.shape)


def iterations() -> dict[str, float]:
    """Iterations to 1e-4 over those of conjugate gradients, worst of the four families, on both grids."""
    import jaxnum

    weights, seconds = trained()
    solver = jaxnum.solvers.dcdm(jaxnum.solvers.linear_dcdm_network, weights)
    figures = {"training_seconds": seconds}
    for n in (GRID, 2 * GRID):
        ratios = {}
        for name, b in families(n).items():
            deep, plain = (
                int(jaxnum.linear_solve(laplacian, b, rtol=RTOL, **s).steps) for s in ({"solver": solver}, {})
            )
            figures[f"steps_{name}_{n}"], figures[f"cg_steps_{name}_{n}"] = deep, plain
            ratios[name] = deep / plain
        figures[f"iterations_ratio_{n}"] = max(ratios.values())
    return figures


def error(output, truth) -> float:
    """Relative error of the solution; the residual asked for is 1e-4."""
    return measure.relative_error(np.asarray(output), np.asarray(truth))


register(
    Row(
        name="dcdm",
        covers=("dcdm", "dcdm_loss", "dcdm_network", "init_dcdm_network", "linear_dcdm_network", "train_dcdm"),
        shapes={"poisson_32": {"n": GRID}, "poisson_64": {"n": 2 * GRID}},
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=("tests/solvers/test_dcdm.py", "tests/solvers/test_train_dcdm.py", "tests/solvers/test_dcdm_network.py"),
        peers={
            "cg": Peer("jax", cg),
            "scipy cg": Peer("scipy", scipy, jit=False),
            "pyamg multigrid": Peer("pyamg", multigrid, jit=False),
        },
        targets=(
            *(
                Target(
                    "figure",
                    0.15,
                    "At most 0.15x of CG's iterations to 1e-4 on right-hand sides of families it was not trained on"
                    + (", on a grid twice as large." if n > GRID else "."),
                    figure=f"iterations_ratio_{n}",
                )
                for n in (GRID, 2 * GRID)
            ),
            Target("figure", 180.0, "After at most 3 minutes of training.", figure="training_seconds"),
        ),
        figures={"iterations": iterations},
        error=error,
    )
)
