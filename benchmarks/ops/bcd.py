"""Block coordinate descent: how many steps each rule needs on sparse least squares, a lasso, forests of a grid.

The steps are counted to a relative gap of 1e-3 and averaged over ten instances. The rule "gsl" over variable blocks is
the paper's GSD with D_i = tau L_i, whose factor tau changes no choice, and "gsd" the one with the row sums of |H|.
scikit-learn's coordinate descent is cyclic over single coordinates and stops by another rule; for least squares it has
no penalty to speak of.
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


def dense_instance(seed: int, n: int, d: int, nonzeros: int):
    """Normal A; the data of a sparse x, with a tenth of normal noise."""
    import numpy as np

    rng = np.random.default_rng(seed)
    A, x = rng.normal(size=(n, d)), np.zeros(d)
    x[rng.permutation(d)[:nonzeros]] = 3 * rng.normal(size=nonzeros)
    return A, A @ x + 0.1 * rng.normal(size=n)


def make(params: Params) -> tuple:
    n, d, weight = params["n"], params["d"], params["weight"]
    A, b = dense_instance(0, n, d, params["nonzeros"]) if weight else instance(0, n, d)
    return jnp.asarray(A), jnp.asarray(b)


def loss(x, A, b):
    return squares(A @ x, b)


def squares(image, b):
    return 0.5 * jnp.sum((image - b) ** 2)


def lasso(A, b, weight: float):
    import jaxnum

    penalty = lambda x: weight * jnp.abs(x)  # noqa: E731
    return jaxnum.Minimize(squares, (b,), jaxnum.solvers.resolvents.l1(weight), penalty, A)


def run(params: Params):
    import jaxnum

    tau, weight = params["tau"], params["weight"]

    def solve(A, b):
        # Once the support stands, Newton's steps end what descent began.
        patience = 5 if weight else None
        solver = jaxnum.solvers.bcd(
            selection="gsl", update="matrix", block_size=tau, hessian=A.T @ A, identify_after=patience
        )
        problem = lasso(A, b, weight) if weight else jaxnum.Minimize(squares, (b,), A=A)
        return jaxnum.solve(solver, jnp.zeros(A.shape[1]), problem, rtol=1e-6, max_steps=100_000).x

    return solve


def sklearn(params: Params):
    from sklearn.linear_model import Lasso

    alpha = params["weight"] / params["n"] or 1e-12
    model = Lasso(alpha=alpha, fit_intercept=False, tol=1e-8, max_iter=100_000)
    return lambda A, b: model.fit(A, b).coef_


def reference(params: Params):
    """Of LAPACK; of 20,000 proximal gradient steps for the lasso, whose matrix is well conditioned."""

    def solve(A, b):
        if not params["weight"]:
            return jnp.linalg.lstsq(A, b)[0]
        step = 1 / jnp.linalg.norm(A, 2) ** 2

        def turn(_, x):
            x = x - step * (A.T @ (A @ x - b))
            return jnp.sign(x) * jnp.maximum(jnp.abs(x) - step * params["weight"], 0)

        return jax.lax.fori_loop(0, 20_000, turn, jnp.zeros(A.shape[1]))

    return solve


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
        for rule in ("random", "gs", "gsd", "gsl", "gsq"):
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
        for rule in ("gsd", "gsl", "gsq"):
            figures[f"{rule}_to_gs_{update}"] = ratio(f"{rule}_{update}", f"gs_{update}")
    for rule in ("gs", "gsd", "gsl", "gsq"):
        figures[f"matrix_to_gradient_{rule}"] = ratio(f"{rule}_matrix", f"{rule}_gradient")
    # The worse of the two updates for the heuristic diagonal; the worst of the greedy rules for the exact update.
    figures["diagonal_to_gs"] = max(figures["gsl_to_gs_gradient"], figures["gsl_to_gs_matrix"])
    figures["exact_to_gradient"] = max(figures[f"matrix_to_gradient_{rule}"] for rule in ("gs", "gsd", "gsl"))
    return figures


def identification() -> dict[str, float]:
    """Lassos of 100 unknowns: the step from which the support stays, and what three Newton steps leave of the gap."""
    import numpy as np

    from jaxnum.solvers import bcd

    weight, length = 20.0, 60
    solver = bcd(selection="gs", update="gradient", block_size=TAU, identify_after=5)

    @jax.jit
    def path(A, b):
        problem = lasso(A, b, weight)

        def turn(pair, _):
            x, state = pair
            pair = solver.step(solver.hyper, x, state, problem)
            return pair, (pair[0], state.active.waited >= 5)

        x = jnp.zeros(D)
        return jax.lax.scan(turn, (x, solver.init(solver.hyper, x, problem)), None, length=length)[1]

    settled, gaps = [], []
    for seed in range(10):
        A, b = dense_instance(seed, N, D, 10)
        xs, tried = (np.asarray(leaf) for leaf in path(A, b))
        values = [0.5 * np.sum((A @ x - b) ** 2) + weight * np.sum(np.abs(x)) for x in xs]
        wrong = np.flatnonzero(((xs != 0) != (xs[-1] != 0)).any(axis=1))
        settled.append(1 + int(wrong.max(initial=-1)))
        first = settled[-1] + int(np.argmax(tried[settled[-1] :]))
        gaps.append((values[min(first + 2, length - 1)] - min(values)) / min(values))
    return {
        "lasso_steps_to_the_support": float(np.mean(settled)),
        "lasso_gap_after_three_newton_steps": float(max(gaps)),
    }


def forests() -> dict[str, float]:
    """Labels spread over a 50 x 50 grid, to a relative gap of 1e-4: steps on two forests, and on red and black."""
    import numpy as np
    import scipy.sparse as sp
    from scipy.sparse.linalg import spsolve

    import jaxnum
    from jaxnum.solvers import Forest, bcd, bcd_partition_forests

    n, limit = 50, 400
    size, rng = n * n, np.random.default_rng(0)
    path = np.eye(n, k=1) + np.eye(n, k=-1)
    path = sp.csr_array(np.diag(path.sum(axis=0)) - path)
    labelled = rng.uniform(size=size) < 0.1
    A = (sp.kron(path, sp.eye_array(n)) + sp.kron(sp.eye_array(n), path) + sp.diags_array(labelled * 1.0)).tocsr()
    y = rng.choice([-1.0, 1.0], size=size) * labelled
    x = spsolve(A.tocsc(), y)
    best = 0.5 * x @ (A @ x) - y @ x
    problem = jaxnum.Minimize(
        lambda x, A, y: 0.5 * jnp.sum(x * A.matvec(x)) - jnp.sum(y * x), (jaxnum.sparse_operator(A), jnp.asarray(y))
    )
    red = np.add.outer(np.arange(n), np.arange(n)).ravel() % 2 == 0
    alone = jnp.asarray(np.stack([np.flatnonzero(red), np.flatnonzero(~red)])[:, None], jnp.int32)
    masks = jnp.asarray(np.stack([red, ~red]))

    @jax.jit
    def count(solver, problem):
        def turn(pair, _):
            pair = solver.step(solver.hyper, *pair, problem)
            return pair, problem.value(pair[0]) - best <= -1e-4 * best

        x = jnp.zeros(size)
        reached = jax.lax.scan(turn, (x, solver.init(solver.hyper, x, problem)), None, length=limit)[1]
        return jnp.where(jnp.any(reached), 1 + jnp.argmax(reached), limit)

    blocks = {"forests": bcd_partition_forests(A), "red_black": Forest(alone, jnp.full_like(alone, size), masks)}
    counts = {name: float(count(bcd(blocks=given, selection="cyclic"), problem)) for name, given in blocks.items()}
    figures = {f"grid_steps_{name}": steps for name, steps in counts.items()}
    return figures | {"forests_to_red_black": counts["forests"] / counts["red_black"]}


register(
    Row(
        name="bcd",
        covers=("bcd",),
        shapes={
            "sparse_least_squares": {"n": N, "d": D, "tau": TAU, "weight": 0.0},
            "lasso": {"n": N, "d": D, "tau": TAU, "weight": 20.0, "nonzeros": 10},
        },
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=(
            "tests/solvers/test_bcd.py",
            "tests/solvers/test_bcd_composite.py",
            "tests/solvers/test_bcd_partition.py",
        ),
        peers={"sklearn": Peer("scikit-learn", sklearn, jit=False)},
        targets=(
            Target("figure", 0.5, "GSD-type at most 0.5x GS, greedy variable blocks.", figure="diagonal_to_gs"),
            Target("figure", 0.3, "Exact at most 0.3x the gradient update, likewise.", figure="exact_to_gradient"),
            Target("error", 1e-6, "The solution is that of lstsq, or of proximal gradient steps."),
            Target("figure", 0.5, "Forests in at most 0.5x the steps of red-black.", figure="forests_to_red_black"),
            Target(
                "figure",
                1e-12,
                "After the support is identified, the gap falls below 1e-12 in 3 Newton steps.",
                figure="lasso_gap_after_three_newton_steps",
            ),
        ),
        figures={"rules": rules, "identification": identification, "forests": forests},
        x64=True,
    )
)
