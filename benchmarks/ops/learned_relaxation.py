"""A relaxation learned over a sequence of systems, beside fixed ones: shifted Laplacians by SOR, heat by SSOR and CG.

A_t = A + c_t I of a 10 x 10 grid, c_t = -0.15 + 0.6 Beta(2, 6), of low variance, or Beta(1/2, 3/2), of high; residual
1e-8 relative. b_t is normal: the experiment cuts it to a ball, which changes its length alone, and so no count. Heat is
Crank-Nicolson's in two dimensions with a diffusivity that swings by a hundred, each step solved from the last one.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Row, Target, register

RTOL = 1e-8
GRID = 10
SYSTEMS = 1000
SEEDS = 5
OMEGAS = np.linspace(1, 1.95, 20)
# The mean of the steps has one valley over omega, and its lowest point lies well inside of these.
VALLEY = slice(9, 18)
LOW_VARIANCE, HIGH_VARIANCE = (2.0, 6.0), (0.5, 1.5)
# What a bandit is told of the contexts, and into how many bins it may cut them.
SHIFTS, SHIFT_BINS = (-0.15, 0.65), 5
HEAT_POINTS, HEAT_STEPS, HEAT_STEP = 25, 1000, 1e-3
DIFFUSIVITIES, HEAT_BINS = (0.0, 10.0), 6
HEAT_FIXED = (1.0, 1.3, 1.5, 1.75, 1.95)


def laplacian():
    """The 5-point matrix with 4 on its diagonal, dense."""
    one = 2 * np.eye(GRID) - np.eye(GRID, k=1) - np.eye(GRID, k=-1)
    return jnp.asarray(np.kron(one, np.eye(GRID)) + np.kron(np.eye(GRID), one))


def make(params: Params) -> tuple:
    shift, side = jax.random.split(jax.random.key(params["seed"]))
    a, b = params.get("beta", LOW_VARIANCE)
    shifts = -0.15 + 0.6 * jax.random.beta(shift, a, b, (params["systems"],))
    return shifts, jax.random.normal(side, (params["systems"], GRID**2))


def sequence(shifts, b, key=1, **options):
    import jaxnum

    A, eye = laplacian(), jnp.eye(GRID**2)
    make_problem = lambda context: jaxnum.Linear(A + context[0] * eye, context[1])  # noqa: E731
    return jaxnum.solvers.learned_relaxation(make_problem, (shifts, b), jax.random.key(key), rtol=RTOL, **options)


def run(params: Params):
    return lambda shifts, b: sequence(shifts, b).x


def reference(params: Params):
    A, eye = laplacian(), jnp.eye(GRID**2)
    return lambda shifts, b: jax.lax.map(lambda c: jnp.linalg.solve(A + c[0] * eye, c[1]), (shifts, b))


def chance(arms: int):
    """A bandit that never learns."""
    from jaxnum.solvers.linear._tsallis_inf import Bandit

    draw = lambda state, key: (jax.random.randint(key, (), 0, arms), state)  # noqa: E731
    return Bandit(lambda: jnp.int32(0), draw, lambda state, loss: state)


def bandits(low: float, high: float, bins: int) -> dict[str, tuple]:
    """Name to bandit and whether it looks at contexts in [low, high]."""
    from jaxnum.solvers import cheb_cb, tsallis_inf

    edges = jnp.linspace(low, high, bins + 1)[1:-1]
    return {
        "tsallis": (tsallis_inf(OMEGAS.size), False),
        "binned": (tsallis_inf(OMEGAS.size, context_bins=edges), True),
        "cheb": (cheb_cb(OMEGAS.size, low, high), True),
        "chance": (chance(OMEGAS.size), False),
    }


def best_for_each(shifts, b):
    """Steps with the omega that Young's theory gives for each matrix."""
    import jaxnum

    A, eye = laplacian(), jnp.eye(GRID**2)
    beta = 4 * jnp.cos(jnp.pi / (GRID + 1)) / (4 + shifts)
    omegas = 1 + (beta / (1 + jnp.sqrt(1 - beta**2))) ** 2

    def solve(inputs):
        shift, b, omega = inputs
        return jaxnum.linear_solve(
            A + shift * eye, b, solver=jaxnum.solvers.sor(omega), rtol=RTOL, adjoint="none"
        ).steps

    return jax.lax.map(solve, (shifts, b, omegas))


def laplacians(name: str, beta: tuple[float, float]) -> dict[str, float]:
    """Mean steps over the best fixed omega of the grid, all systems and the second half; mean and range over seeds."""
    fixed = jax.jit(lambda shifts, b, omega: sequence(shifts, b, omegas=omega[None]).steps)
    learned = {
        rule: jax.jit(
            lambda shifts, b, key, bandit=bandit, looks=looks: (
                sequence(shifts, b, key, bandit=bandit, bandit_contexts=shifts if looks else None).steps
            )
        )
        for rule, (bandit, looks) in bandits(*SHIFTS, SHIFT_BINS).items()
    }
    best = jax.jit(best_for_each)
    ratios: dict[str, list[float]] = {}
    figures: dict[str, Any] = {}
    for seed in range(SEEDS):
        inputs = make({"systems": SYSTEMS, "seed": seed, "beta": beta})
        table = np.array([np.mean(fixed(*inputs, omega)) for omega in OMEGAS[VALLEY]])
        counts = {rule: np.asarray(steps(*inputs, seed + 1)) for rule, steps in learned.items()}
        counts["best_for_each"] = np.asarray(best(*inputs))
        for rule, steps in counts.items():
            ratios.setdefault(rule, []).append(steps.mean() / table.min())
            ratios.setdefault(f"{rule}_late", []).append(steps[SYSTEMS // 2 :].mean() / table.min())
        ratios.setdefault("cheb_over_tsallis", []).append(counts["cheb"].mean() / counts["tsallis"].mean())
        if seed == 0:
            figures = {f"steps_at_{omega:.1f}": np.mean(fixed(*inputs, omega)) for omega in OMEGAS[::4]}
            figures |= {"best_fixed_omega": OMEGAS[VALLEY][table.argmin()], "best_fixed_steps": table.min()}
    for rule, values in ratios.items():
        figures[rule] = np.mean(values)
        if not rule.endswith("_late"):
            figures |= {f"{rule}_least": min(values), f"{rule}_most": max(values)}
    return {f"{name}_{key}": float(value) for key, value in figures.items()}


def heat_steps(P, schedule, choose, learn, state, key):
    """Steps of conjugate gradients with SSOR at each of Crank-Nicolson's, omega from the state of a bandit."""
    import jaxnum

    h, unit = 1 / HEAT_POINTS, jnp.asarray(P.offsets)[:, None] == 0
    places = jnp.stack(jnp.meshgrid(*[h * jnp.arange(1, HEAT_POINTS)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)

    def bump(centre, radius):
        inside = 1 - jnp.minimum(1, jnp.sum((places - centre) ** 2, axis=1) / radius**2)
        return jnp.where(inside > 0, jnp.exp(1 - 1 / jnp.where(inside > 0, inside, 1)), 0)

    def step(carry, inputs):
        u, state = carry
        t, key = inputs
        diffusivity = jnp.maximum(0.1 * jnp.sin(2 * jnp.pi * t), -10 * jnp.sin(2 * jnp.pi * t))
        half = diffusivity * HEAT_STEP / (2 * h**2)
        A = replace(P, diagonals=unit + half * P.diagonals)
        centre = 0.5 + jnp.stack([jnp.cos(16 * jnp.pi * t), jnp.sin(16 * jnp.pi * t)]) / 4
        b = u - half * P.matvec(u) + HEAT_STEP * 32 * bump(centre, 0.125)
        omega, state = choose(state, key, diffusivity)
        M = jaxnum.solvers.ssor_preconditioner(A, omega, schedule=schedule)
        solution = jaxnum.linear_solve(A, b, u, preconditioner=M, rtol=RTOL, adjoint="none", on_failure="return")
        return (solution.x, learn(state, jnp.maximum(solution.steps, 1))), solution.steps

    times = HEAT_STEP * (0.5 + jnp.arange(HEAT_STEPS))
    return jax.lax.scan(step, (bump(jnp.asarray(0.5), 0.25), state), (times, jax.random.split(key, HEAT_STEPS)))[1]


def heat() -> dict[str, float]:
    """Mean steps of each fixed omega, and those of each bandit over the best of them."""
    import jaxnum
    from benchmarks.ops.sor import matrix

    P = jaxnum.sparse_operator(matrix(HEAT_POINTS - 1), format="dia")
    steps = partial(heat_steps, P, jaxnum.solvers.sor_schedule(P))
    choose = lambda omega, key, context: (omega, omega)  # noqa: E731
    fixed = jax.jit(lambda omega: steps(choose, lambda omega, loss: omega, omega, jax.random.key(0)))
    figures = {f"heat_steps_at_{omega:.2f}": float(np.mean(fixed(jnp.asarray(omega)))) for omega in HEAT_FIXED}
    best = min(figures.values())
    for rule, ((init, sample, update), looks) in bandits(*DIFFUSIVITIES, HEAT_BINS).items():

        def draw(state, key, context, sample=sample, looks=looks):
            arm, state = sample(state, key, context) if looks else sample(state, key)
            return jnp.asarray(OMEGAS)[arm], state

        learned = jax.jit(partial(steps, draw, update))
        figures[f"heat_{rule}"] = float(np.mean(learned(init(), jax.random.key(1)))) / best
    return figures


register(
    Row(
        name="learned_relaxation",
        covers=("learned_relaxation", "tsallis_inf", "cheb_cb"),
        shapes={"shifted_laplacians_100": {"systems": 100, "seed": 0}},
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=(
            "tests/solvers/test_learned_relaxation.py",
            "tests/solvers/test_tsallis_inf.py",
            "tests/solvers/test_cheb_cb.py",
        ),
        targets=(
            Target(
                "figure",
                1.45,
                "Tsallis-INF within 1.45x of the best fixed omega over 1,000 systems.",
                figure="low_tsallis_most",
            ),
            Target("figure", 1.0, "High variance: ChebCB beats the best fixed omega.", figure="high_cheb_most"),
            Target("figure", 1.0, "High variance: ChebCB beats Tsallis-INF.", figure="high_cheb_over_tsallis_most"),
        ),
        figures={
            "low": partial(laplacians, "low", LOW_VARIANCE),
            "high": partial(laplacians, "high", HIGH_VARIANCE),
            "heat": heat,
        },
        x64=True,
    )
)
