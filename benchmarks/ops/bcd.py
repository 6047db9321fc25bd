"""Block coordinate descent on sparse least squares: how many steps each rule needs; scikit-learn's lasso.

The steps are counted to a relative gap of 1e-3 and averaged over ten instances; scikit-learn's coordinate descent, with
no penalty to speak of, is cyclic over single coordinates and stops by another rule.
"""

import math

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, Target, register

N, D, TAU, GAP, LIMIT = 200, 100, 5, 1e-3, 600


def instance(seed: int, n: int = N, d: int = D):
    """Columns scaled by lognormal(0, 1), density 10 log(n) / n; the data of a normal x, with normal noise."""
    import numpy as np

    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, d)) * rng.lognormal(size=d)
    A = A * (rng.uniform(size=(n, d)) < 10 * math.log(n) / n)
    return A, A @ rng.normal(size=d) + rng.normal(size=n)


def make(params: Params) -> tuple:
    A, b = instance(0, params["n"], params["d"])
    return jnp.asarray(A), jnp.asarray(b)


def loss(x, A, b):
    return 0.5 * jnp.sum((A @ x - b) ** 2)


def run(params: Params):
    import jaxnum

    def solve(A, b):
        solver = jaxnum.solvers.bcd(selection="gsl", update="matrix", block_size=params["tau"], hessian=A.T @ A)
        problem = jaxnum.Minimize(loss, (A, b))
        return jaxnum.solve(solver, jnp.zeros(A.shape[1]), problem, rtol=1e-6, max_steps=100_000).x

    return solve


def sklearn(params: Params):
    from sklearn.linear_model import Lasso

    model = Lasso(alpha=1e-12, fit_intercept=False, tol=1e-8, max_iter=100_000)
    return lambda A, b: model.fit(A, b).coef_


def steps(solvers, instances):
    """Number of steps to the gap on each instance; the limit where it is not reached."""
    import numpy as np

    import jaxnum

    @jax.jit
    def count(solver, A, b):
        problem, x = jaxnum.Minimize(loss, (A, b)), jnp.zeros(D)
        best = loss(jnp.linalg.lstsq(A, b)[0], A, b)

        def body(pair, _):
            pair = solver.step(solver.hyper, *pair, problem)
            return pair, loss(pair[0], A, b) - best <= GAP * (loss(x, A, b) - best)

        reached = jax.lax.scan(body, (x, solver.init(solver.hyper, x, problem)), None, length=LIMIT)[1]
        return jnp.where(jnp.any(reached), 1 + jnp.argmax(reached), LIMIT)

    return np.array([int(count(s, *given)) for s, given in zip(solvers, instances, strict=True)])


def rules() -> dict[str, float]:
    """Mean steps of each rule with each update, and means over the instances of the ratios that are claimed."""
    import numpy as np

    from jaxnum.solvers import bcd, bcd_partition

    instances = [instance(seed) for seed in range(10)]
    counts = {}
    for update in ("gradient", "matrix"):
        for rule in ("random", "gs", "gsd", "gsl"):
            solvers = [
                bcd(selection=rule, update=update, block_size=TAU, hessian=A.T @ A, key=jax.random.key(0))
                for A, _ in instances
            ]
            counts[f"variable_{rule}_{update}"] = steps(solvers, instances)
        for rule in ("cyclic", "gs", "gsq"):
            solvers = [
                bcd(selection=rule, update=update, blocks=bcd_partition((A**2).sum(0), TAU), hessian=A.T @ A)
                for A, _ in instances
            ]
            counts[f"fixed_{rule}_{update}"] = steps(solvers, instances)
    figures = {f"steps_{name}": float(np.mean(given)) for name, given in counts.items()}

    def ratio(a: str, b: str) -> float:
        return float(np.mean(counts[f"variable_{a}"] / counts[f"variable_{b}"]))

    for update in ("gradient", "matrix"):
        for rule in ("gsd", "gsl"):
            figures[f"{rule}_to_gs_{update}"] = ratio(f"{rule}_{update}", f"gs_{update}")
    for rule in ("gs", "gsd", "gsl"):
        figures[f"matrix_to_gradient_{rule}"] = ratio(f"{rule}_matrix", f"{rule}_gradient")
    # The worse of the two updates for the heuristic diagonal; the worst of the greedy rules for the exact update.
    figures["diagonal_to_gs"] = max(figures["gsl_to_gs_gradient"], figures["gsl_to_gs_matrix"])
    figures["exact_to_gradient"] = max(figures[f"matrix_to_gradient_{rule}"] for rule in ("gs", "gsd", "gsl"))
    return figures


register(
    Row(
        name="bcd",
        covers=("bcd",),
        shapes={"sparse_least_squares": {"n": N, "d": D, "tau": TAU}},
        make=make,
        run=run,
        reference=lambda params: lambda A, b: jnp.linalg.lstsq(A, b)[0],
        modes=("solve",),
        tests=("tests/solvers/test_bcd.py",),
        peers={"sklearn": Peer("scikit-learn", sklearn, jit=False)},
        targets=(
            Target("figure", 0.5, "GSD-type at most 0.5x GS, greedy variable blocks.", figure="diagonal_to_gs"),
            Target("figure", 0.3, "Exact at most 0.3x the gradient update, likewise.", figure="exact_to_gradient"),
            Target("error", 1e-6, "The solution is that of lstsq."),
        ),
        figures={"rules": rules},
        x64=True,
    )
)
