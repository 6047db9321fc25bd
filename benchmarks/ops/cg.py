"""Conjugate gradients on a dense matrix with condition number 1e3 that all four solve to the same residual."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
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


# A solve of milliseconds wants more rounds than one of seconds, whose samples are long anyway.
ROUNDS, ROUNDS_SMALL, SMALL = 3, 25, 20_000


def sparse_problems() -> dict[str, tuple]:
    """Symmetric positive definite matrices in CSR, and the tolerance that ends in seconds: pyamg's, real and made."""
    import pyamg
    from pyamg.gallery import load_example, poisson, stencil_grid

    problems = {name: (load_example(name)["A"].tocsr().astype(float), 1e-6) for name in ("airfoil", "bar", "knot")}
    problems["unit_cube"] = load_example("unit_cube")["A"].tocsr().astype(float), 1e-6
    problems["local_disc_galerkin"] = load_example("local_disc_galerkin_diffusion")["A"].tocsr().astype(float), 1e-6
    problems["poisson_10k"] = poisson((100, 100), format="csr"), 1e-8
    stretched = pyamg.gallery.diffusion_stencil_2d(epsilon=0.1, theta=0.5, type="FE")
    problems["stencil_90k"] = stencil_grid(stretched, (300, 300), format="csr"), 1e-6
    problems["poisson_1m"] = poisson((1000, 1000), format="csr"), 1e-2
    return problems


def sparse() -> dict[str, float]:
    """Steps and time of ours over scipy's on the same sparse matrices, ours converted once, both to one tolerance."""
    import scipy.sparse.linalg

    import jaxnum

    figures: dict[str, float] = {}
    for name, (A, rtol) in sparse_problems().items():
        n = A.shape[0]
        b = np.random.default_rng(0).normal(size=n)
        operator, right, seen = jaxnum.sparse_operator(A), jnp.asarray(b), []
        solve = jax.jit(lambda A, b, rtol=rtol, n=n: jaxnum.linear_solve(A, b, rtol=rtol, max_steps=10 * n))
        steps = int(solve(operator, right).steps)
        theirs = lambda A=A, b=b, rtol=rtol, n=n: scipy.sparse.linalg.cg(A, b, rtol=rtol, maxiter=10 * n)  # noqa: E731
        scipy.sparse.linalg.cg(A, b, rtol=rtol, maxiter=10 * n, callback=seen.append)
        rounds = ROUNDS_SMALL if n <= SMALL else ROUNDS
        samples = measure.interleave({"ours": lambda: solve(operator, right), "scipy": theirs}, rounds)  # noqa: B023
        figures[f"steps_{name}"], figures[f"scipy_steps_{name}"] = steps, len(seen)
        figures[f"time_ratio_{name}"] = measure.paired_ratio(samples["ours"], samples["scipy"])
    named = [name.removeprefix("steps_") for name in figures if name.startswith("steps_")]
    figures["worst_steps_ratio"] = max(figures[f"steps_{m}"] / figures[f"scipy_steps_{m}"] for m in named)
    figures["worst_time_ratio"] = max(figures[f"time_ratio_{m}"] for m in named)
    return figures


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
            Target(
                "figure",
                1.02,
                "Iteration counts within 2 % of scipy's on pyamg's matrices and gallery up to n = 1e6.",
                figure="worst_steps_ratio",
            ),
            Target("figure", 0.9, "Time at most 0.9x scipy's CG on the same.", figure="worst_time_ratio"),
        ),
        figures={"fidelity": fidelity, "sparse": sparse},
        x64=True,
    )
)
