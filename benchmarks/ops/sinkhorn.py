"""Sinkhorn on a dense cost and on point clouds, against ott-jax to the same marginal error; plans against POT's.

ott-jax keeps its own settings (a look at the error every 10 steps) but for the threshold, whose default is a thousand
times looser.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.registry import Params, Peer, Row, Target, register

TOLERANCE = 1e-6
MAX_STEPS = 10_000
BATCH, SIZE, EPSILON = 16, 64, 0.02
ROUNDS = 15


def make(params: Params) -> tuple:
    """Two clouds in the unit square and weights that sum to 1; the dense case gets their squared distances."""
    n, m = params["n"], params["m"]
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = (jax.random.uniform(key, (k, 2), jnp.float64) for key, k in zip(keys[:2], (n, m), strict=True))
    a, b = (jax.random.uniform(key, (k,), jnp.float64, 0.5, 1.5) for key, k in zip(keys[2:], (n, m), strict=True))
    a, b = a / jnp.sum(a), b / jnp.sum(b)
    return (x, y, a, b) if params["points"] else (squares(x, y), a, b)


def squares(x, y):
    return jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)


def run(params: Params):
    import jaxnum

    options = {"rtol": TOLERANCE, "max_steps": MAX_STEPS}
    if params["points"]:
        return lambda x, y, a, b: jaxnum.transport(jaxnum.PointCloudCost(x, y), a, b, params["epsilon"], **options).x
    return lambda C, a, b: jaxnum.transport(C, a, b, params["epsilon"], **options).x


def ott(params: Params):
    from ott.geometry import geometry, pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    solver = sinkhorn.Sinkhorn(threshold=TOLERANCE, max_iterations=MAX_STEPS)

    def solve(*inputs):
        *cost, a, b = inputs
        cloud = pointcloud.PointCloud if params["points"] else geometry.Geometry
        out = solver(linear_problem.LinearProblem(cloud(*cost, epsilon=params["epsilon"]), a=a, b=b))
        return out.f, out.g

    return solve


def error(output, truth) -> float:
    """Relative error of the potentials in one gauge, mean f = 0; each package returns another."""
    centred = [(np.asarray(f) - np.mean(f), np.asarray(g) + np.mean(f)) for f, g in (output, truth)]
    return measure.relative_error(*centred)


def pot(params: Params):
    """POT in the log domain; its threshold is on the L2 norm of the marginal error, so it gets a far smaller one."""
    import ot

    def solve(*inputs):
        *cost, a, b = map(np.asarray, inputs)
        C = np.asarray(squares(*cost)) if params["points"] else cost[0]
        _, log = ot.sinkhorn(
            a, b, C, params["epsilon"], method="sinkhorn_log", stopThr=1e-13, numItermax=100_000, log=True
        )
        return params["epsilon"] * log["log_u"], params["epsilon"] * log["log_v"]

    return solve


def fidelity() -> dict[str, float]:
    """Largest difference of the plan from POT's `sinkhorn_log` at n = 100, epsilon 0.01, dense and from points."""
    import ot

    import jaxnum

    x, y, a, b = make({"n": 100, "m": 100, "points": True})
    C = squares(x, y)
    want = ot.sinkhorn(*map(np.asarray, (a, b, C)), 0.01, method="sinkhorn_log", stopThr=1e-13, numItermax=100_000)
    figures = {}
    for name, cost in (("dense", C), ("points", jaxnum.PointCloudCost(x, y))):
        solved = jaxnum.transport(cost, a, b, 0.01, rtol=1e-12, max_steps=100_000)
        plan = jaxnum.Transport(cost, a, b, 0.01).plan(solved.x)
        figures[f"plan_error_{name}"] = float(np.max(np.abs(plan - want)))
    figures["plan_error"] = max(figures.values())
    return figures


def batch() -> dict[str, float]:
    """Time of `solve_batched` over the time of the same problems one by one, both compiled, sampled in turn."""
    import jaxnum

    solver = jaxnum.solvers.sinkhorn()
    C, a, b = batch_problems()

    @jax.jit
    def together(C, a, b):
        x0 = (jnp.zeros_like(a), jnp.zeros_like(b))
        solution = jaxnum.solve_batched(solver, x0, jaxnum.Transport(C, a, b, EPSILON))
        return solution.x, solution.steps, solution.status

    @jax.jit
    def alone(C, a, b):
        solution = jaxnum.transport(C, a, b, EPSILON)
        return solution.x, solution.steps, solution.status

    problems = list(zip(C, a, b, strict=True))
    calls = {"together": lambda: together(C, a, b), "alone": lambda: [alone(*problem) for problem in problems]}
    samples = measure.interleave(calls, ROUNDS)
    _, steps, status = together(C, a, b)
    single = [alone(*problem)[1:] for problem in problems]
    return {
        "batch_ratio": measure.paired_ratio(samples["together"], samples["alone"]),
        "batch_ms": 1e3 * measure.spread(samples["together"]).median,
        "singles_ms": 1e3 * measure.spread(samples["alone"]).median,
        "batch_fewest_steps": int(steps.min()),
        "batch_most_steps": int(steps.max()),
        "batch_step_mismatches": sum(int(s) != int(k) for s, (k, _) in zip(steps, single, strict=True)),
        "batch_not_converged": int((status != 0).sum()) + sum(int(s) != 0 for _, s in single),
    }


def batch_problems() -> tuple:
    """Sixteen 64 x 64 problems; the clouds lie ever farther apart, so that each needs a number of steps of its own."""
    keys = jax.random.split(jax.random.key(1), BATCH)
    costs, rows, columns = [], [], []
    for i, key in enumerate(keys):
        kx, ky, ka, kb = jax.random.split(key, 4)
        x = jax.random.uniform(kx, (SIZE, 2), jnp.float64)
        y = jax.random.uniform(ky, (SIZE, 2), jnp.float64) * (1 - i / (2 * BATCH))
        a, b = (jax.random.uniform(k, (SIZE,), jnp.float64, 0.5, 1.5) for k in (ka, kb))
        costs.append(squares(x, y))
        rows.append(a / jnp.sum(a))
        columns.append(b / jnp.sum(b))
    return jnp.stack(costs), jnp.stack(rows), jnp.stack(columns)


register(
    Row(
        name="sinkhorn",
        covers=("sinkhorn",),
        shapes={
            "dense_512": {"n": 512, "m": 512, "epsilon": 0.02, "points": False},
            "points_2048": {"n": 2048, "m": 2048, "epsilon": 0.1, "points": True},
        },
        make=make,
        run=run,
        reference=pot,
        modes=("solve",),
        tests=("tests/solvers/test_sinkhorn.py", "tests/core/test_transport.py", "tests/core/test_costs.py"),
        peers={"ott": Peer("ott-jax", ott)},
        targets=(
            Target(
                "figure",
                1e-9,
                "Sinkhorn plan equals POT's `sinkhorn_log` to 1e-9 (n = 100, epsilon 0.01).",
                figure="plan_error",
            ),
            Target(
                "figure",
                1.1,
                "Batched Sinkhorn of 16 problems of 64 x 64 (timings of A and B interleaved): `solve_batched` at most "
                "1.1x the sum of 16 single solves on this machine, each problem with its own steps and status.",
                figure="batch_ratio",
            ),
            Target(
                "compile_ratio",
                1.0,
                "Compile time, same run: one `transport` solve at most 1.0x ott-jax's.",
                peer="ott",
            ),
        ),
        figures={"fidelity": fidelity, "batch": batch},
        error=error,
        x64=True,
    )
)
