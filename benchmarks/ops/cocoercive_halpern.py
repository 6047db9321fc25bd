"""Anchored forward-backward: how exactly it meets its bound, and box-constrained least squares beside scipy's."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Peer, Row, Target, register

RTOL = 1e-8


def make(params: Params) -> tuple:
    rows, columns = params["rows"], params["columns"]
    A = jax.random.normal(jax.random.key(0), (rows, columns), jnp.float64)
    return A, jax.random.normal(jax.random.key(1), (rows,), jnp.float64)


def run(params: Params):
    import jaxnum

    solver = jaxnum.solvers.restarted(jaxnum.solvers.cocoercive_halpern())
    box = jaxnum.solvers.resolvents.box(-0.05, 0.05)
    force = lambda x, A, b: A.T @ (A @ x - b)  # noqa: E731
    return lambda A, b: jaxnum.inclusion(force, jnp.zeros_like(A[0]), A, b, resolvent=box, solver=solver, rtol=RTOL).x


def scipy(params: Params):
    import scipy.optimize

    return lambda A, b: scipy.optimize.lsq_linear(A, b, (-0.05, 0.05)).x


def reference(params: Params):
    import scipy.optimize

    solve = lambda A, b: scipy.optimize.lsq_linear(A, b, (-0.05, 0.05), method="bvls", tol=1e-14).x  # noqa: E731
    return lambda A, b: solve(np.asarray(A), np.asarray(b))


def fidelity() -> dict[str, float]:
    """The bound's share that is used, residual (N + 1) / (L |x_0|), for F(x) = L x and the Huber force."""
    figures = {}
    for n in (10, 50, 200):
        figures[f"bound_share_linear_N{n}"] = _share(lambda x: 3.0 * x, n)
        figures[f"bound_share_huber_N{n}"] = _share(lambda x, c=1 / (n + 1): 3.0 * jnp.clip(x, -c, c), n)
    figures["bound_gap"] = max(abs(share - 1) for share in figures.values())
    return figures


def _share(F, n: int) -> float:
    import jaxnum

    solver, problem = jaxnum.solvers.cocoercive_halpern(3.0), jaxnum.Inclusion(F)
    x = jnp.ones((), jnp.float64)
    pair = (x, solver.init(solver.hyper, x, problem))
    pair = jax.lax.fori_loop(0, n, lambda _, carry: solver.step(solver.hyper, *carry, problem), pair)
    return float(solver.measure(solver.hyper, *pair, problem).residual) * (n + 1) / 3.0


register(
    Row(
        name="cocoercive_halpern",
        covers=("cocoercive_halpern",),
        shapes={"box_fit_300x100": {"rows": 300, "columns": 100}},
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=("tests/solvers/test_cocoercive_halpern.py",),
        peers={"scipy": Peer("scipy", scipy, jit=False)},
        targets=(Target("figure", 1e-12, "Halpern/FEG: the tight cases of the card exactly.", figure="bound_gap"),),
        figures={"fidelity": fidelity},
        x64=True,
    )
)
