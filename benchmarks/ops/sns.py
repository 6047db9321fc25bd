"""Sinkhorn sweeps and Newton steps to a 1e-9 marginal error, against sweeps alone: ott-jax and POT.

Points in the unit square, and real data: colours of photographs, and digits on their pixel grid.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.registry import Params, Peer, Row, Target, register

TOLERANCE = 1e-9
SWEEPS = 50
PEER_STEPS = 200_000
POT_SWEEPS = 300
REPEATS = 3


def make(params: Params) -> tuple:
    """Squared distances between two clouds in the unit square, and uniform weights."""
    n = params["n"]
    x, y = (jax.random.uniform(key, (n, 2), jnp.float64) for key in jax.random.split(jax.random.key(0)))
    a = jnp.full(n, 1 / n)
    return squares(x, y), a, a


def squares(x, y):
    return jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)


def run(params: Params):
    import jaxnum

    solver = jaxnum.solvers.sns(sweeps=SWEEPS)
    return lambda C, a, b: jaxnum.transport(C, a, b, params["epsilon"], solver=solver, rtol=TOLERANCE).x


def ott(params: Params):
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    solver = sinkhorn.Sinkhorn(threshold=TOLERANCE, max_iterations=PEER_STEPS)

    def solve(C, a, b):
        out = solver(linear_problem.LinearProblem(geometry.Geometry(C, epsilon=params["epsilon"]), a=a, b=b))
        return out.f, out.g

    return solve


def pot() -> dict[str, float]:
    """POT in the log domain on the same problem: the first few hundred sweeps of one run, since all take minutes.

    Its error is the L2 norm of the marginal error, up to sqrt(n) below the L1 norm.
    """
    import ot

    params = {"n": 1000, "epsilon": 1e-3}
    inputs = make(params)
    solve = jax.jit(run(params))
    jax.block_until_ready(solve(*inputs))
    start = time.perf_counter()
    jax.block_until_ready(solve(*inputs))
    ours = time.perf_counter() - start
    C, a, b = map(np.asarray, inputs)
    options = {"stopThr": TOLERANCE / 1000**0.5, "numItermax": POT_SWEEPS, "log": True, "warn": False}
    start = time.perf_counter()
    _, log = ot.sinkhorn(a, b, C, 1e-3, method="sinkhorn_log", **options)
    theirs = time.perf_counter() - start
    return {
        "pot_sweeps": POT_SWEEPS,
        "pot_seconds_over_ours": theirs / ours,
        "pot_l2_error": float(log["err"][-1]),
    }


def reference(params: Params):
    """Our sweeps alone, to a hundredth of the error."""
    import jaxnum

    def solve(C, a, b):
        solver = jaxnum.solvers.sinkhorn(momentum=1.5)
        options = {"solver": solver, "rtol": TOLERANCE / 100, "max_steps": 30_000, "on_failure": "return"}
        return jaxnum.transport(C, a, b, params["epsilon"], **options).x

    return solve


def error(output, truth) -> float:
    """Relative error of the potentials in one gauge, mean f = 0; each package returns another."""
    centred = [(np.asarray(f) - np.mean(f), np.asarray(g) + np.mean(f)) for f, g in (output, truth)]
    return measure.relative_error(*centred)


def assignment() -> dict[str, float]:
    """Newton steps to 1e-9 on random costs of 100 x 100, and the marginal error that is left."""
    import jaxnum

    C, a = jnp.asarray(np.random.default_rng(0).random((100, 100))), jnp.full(100, 0.01)
    figures = {}
    for eta in (400, 1200):
        options = {"solver": jaxnum.solvers.sns(), "rtol": TOLERANCE, "on_failure": "return"}
        solution = jaxnum.transport(C, a, a, 1 / eta, **options)
        figures[f"newton_steps_eta_{eta}"] = int(solution.phase_steps[1])
        figures[f"marginal_error_eta_{eta}"] = float(solution.residual)
    return figures


def photographs() -> dict[str, float]:
    """The two sample photographs of scikit-learn as clouds of 4,000 colours each, epsilon 1e-3."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    clouds = [random.choice(image.reshape(-1, 3) / 255, 4000) for image in load_sample_images().images]
    a = jnp.full(4000, 1 / 4000)
    return _figures("photographs", squares(*map(jnp.asarray, clouds)), a, a, 1e-3)


def digits() -> dict[str, float]:
    """A zero onto a one of scikit-learn's digits, squared distances on the 8 x 8 grid, epsilon 1e-2 of a pixel."""
    from sklearn.datasets import load_digits

    images = np.asarray(load_digits(return_X_y=True)[0])
    a, b = (jnp.asarray(images[i] / images[i].sum()) for i in (0, 1))
    grid = jnp.stack(jnp.meshgrid(*2 * [jnp.arange(8.0)]), axis=-1).reshape(-1, 2)
    return _figures("digits", squares(grid, grid), a, b, 1e-2)


def _figures(name, C, a, b, epsilon) -> dict[str, float]:
    import jaxnum

    solver = jaxnum.solvers.sns(sweeps=SWEEPS, epsilon_scaling=0.5)
    solution = jaxnum.transport(C, a, b, epsilon, solver=solver, rtol=TOLERANCE, on_failure="return", adjoint="none")
    return {
        f"{name}_sweeps": int(solution.phase_steps[0]),
        f"{name}_newton_steps": int(solution.phase_steps[1]),
        f"{name}_cg_steps": int(solution.state.inner),
        f"{name}_marginal_error": float(solution.residual),
    }


def sparse() -> dict[str, float]:
    """Newton's stage with the largest 128 entries of each row against the whole plan, 4,000 points of the square."""
    cost, a, start = _swept(4000, 1e-3)
    compiled = {linear: _newton(linear, 1e-3, cost, a, start) for linear in ("cg", "sparse")}
    seconds = {linear: [] for linear in compiled}
    for _ in range(REPEATS):
        for linear, newton in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(newton(cost, a, start))
            seconds[linear].append(time.perf_counter() - began)
    best = {linear: min(each) for linear, each in seconds.items()}
    return {
        "newton_4000_dense_seconds": best["cg"],
        "newton_4000_sparse_seconds": best["sparse"],
        "newton_4000_dense_over_sparse_seconds": best["cg"] / best["sparse"],
        "newton_4000_dense_temp_mib": _temp_mib(compiled["cg"]),
        "newton_4000_sparse_temp_mib": _temp_mib(compiled["sparse"]),
    }


def cloud() -> dict[str, float]:
    """20,000 points of the square, epsilon 2e-4: the plan takes 3.2 GB and is never stored."""
    cost, a, start = _swept(20_000, 2e-4)
    newton = _newton("sparse", 2e-4, cost, a, start)
    began = time.perf_counter()
    solution = jax.block_until_ready(newton(cost, a, start))
    return {
        "newton_20000_seconds": time.perf_counter() - began,
        "newton_20000_steps": int(solution.steps),
        "newton_20000_steps_with_the_whole_plan": int(solution.state.whole),
        "newton_20000_marginal_error": float(solution.residual),
        "newton_20000_temp_mib": _temp_mib(newton),
        "newton_20000_dense_temp_mib": _temp_mib(_newton("cg", 2e-4, cost, a, start)),
    }


def _swept(n, epsilon):
    """Two clouds in the unit square, uniform weights, and the potentials after 25 sweeps with falling epsilon."""
    import jaxnum

    x, y = (jax.random.uniform(key, (n, 2), jnp.float64) for key in jax.random.split(jax.random.key(0)))
    cost, a = jaxnum.PointCloudCost(x, y), jnp.full(n, 1 / n)
    solver = jaxnum.solvers.sinkhorn(epsilon_scaling=0.5, stage_sweeps=1)
    options = {"solver": solver, "max_steps": 25, "on_failure": "return", "adjoint": "none"}
    return cost, a, jax.jit(lambda cost, a: jaxnum.transport(cost, a, a, epsilon, **options).x)(cost, a)


def _newton(linear, epsilon, *inputs):
    import jaxnum

    options = {"solver": jaxnum.solvers.newton(linear=linear), "rtol": TOLERANCE, "on_failure": "return"}

    def solve(cost, a, start):
        return jaxnum.transport(cost, a, a, epsilon, x0=start, adjoint="none", **options)

    return jax.jit(solve).lower(*inputs).compile()


def _temp_mib(compiled) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


register(
    Row(
        name="sns",
        covers=("newton", "sns"),
        shapes={"square_1000": {"n": 1000, "epsilon": 1e-3}},
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=("tests/solvers/test_newton.py", "tests/solvers/test_sns.py"),
        peers={"ott": Peer("ott-jax", ott)},
        targets=(
            Target(
                "speedup",
                20,
                "SNS on the unit square, 1000 points, epsilon 1e-3, to a 1e-9 marginal error: at least 20x ott-jax.",
                at_least=True,
                peer="ott",
            ),
            Target(
                "figure",
                20,
                "At n = 100, eta = 400 at most 20 Newton steps to a 1e-9 marginal error.",
                figure="newton_steps_eta_400",
            ),
            Target(
                "figure",
                1e-9,
                "At n = 100, eta = 1200 the marginal error reaches 1e-9.",
                figure="marginal_error_eta_1200",
            ),
            Target(
                "figure",
                1e-9,
                "Two photographs as clouds of 4,000 colours reach a 1e-9 marginal error.",
                figure="photographs_marginal_error",
            ),
            Target("figure", 1e-9, "Digits reach a 1e-9 marginal error.", figure="digits_marginal_error"),
            Target(
                "figure",
                1.2,
                "4,000 points: Newton with 128 entries a row at least 1.2x as fast as with the whole plan.",
                at_least=True,
                figure="newton_4000_dense_over_sparse_seconds",
            ),
            Target(
                "figure",
                1e-9,
                "20,000 points without their plan reach a 1e-9 marginal error.",
                figure="newton_20000_marginal_error",
            ),
            Target(
                "figure",
                256,
                "20,000 points: under 256 MiB of temporaries where the plan alone takes 3 GiB.",
                figure="newton_20000_temp_mib",
            ),
        ),
        figures={
            "assignment": assignment,
            "pot": pot,
            "photographs": photographs,
            "digits": digits,
            "sparse": sparse,
            "cloud": cloud,
        },
        error=error,
        x64=True,
    )
)
