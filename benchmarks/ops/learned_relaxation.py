"""SOR on 1,000 shifted Laplacians of a 10 x 10 grid: the relaxation learned, fixed in advance, and drawn at random.

A_t = A + c_t I, c_t = -0.15 + 0.6 Beta(2, 6), residual 1e-8 relative. b_t is normal: the experiment cuts it to a ball,
which changes its length alone, and so no count.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Row, Target, register

RTOL = 1e-8
GRID = 10
SYSTEMS = 1000


def laplacian():
    """The 5-point matrix with 4 on its diagonal, dense."""
    one = 2 * np.eye(GRID) - np.eye(GRID, k=1) - np.eye(GRID, k=-1)
    return jnp.asarray(np.kron(one, np.eye(GRID)) + np.kron(np.eye(GRID), one))


def make(params: Params) -> tuple:
    shift, side = jax.random.split(jax.random.key(params["seed"]))
    shifts = -0.15 + 0.6 * jax.random.beta(shift, 2.0, 6.0, (params["systems"],))
    return shifts, jax.random.normal(side, (params["systems"], GRID**2))


def sequence(shifts, b, **options):
    import jaxnum

    A, eye = laplacian(), jnp.eye(GRID**2)
    make_problem = lambda context: jaxnum.Linear(A + context[0] * eye, context[1])  # noqa: E731
    return jaxnum.solvers.learned_relaxation(make_problem, (shifts, b), jax.random.key(1), rtol=RTOL, **options)


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


def ratios() -> dict[str, float]:
    """Mean steps over the best fixed omega of the grid, over all systems and over the second half."""
    inputs = make({"systems": SYSTEMS, "seed": 0})
    fixed = jax.jit(lambda omega: sequence(*inputs, omegas=omega[None]).steps)
    table = np.array([np.mean(fixed(omega)) for omega in jnp.linspace(1, 1.95, 20)])
    ours = np.asarray(jax.jit(lambda: sequence(*inputs).steps)())
    blind = np.asarray(jax.jit(lambda: sequence(*inputs, bandit=chance(20)).steps)())
    figures = {
        f"steps_at_{omega:.2f}": float(table[i]) for i, omega in enumerate(np.linspace(1, 1.95, 20)) if i % 4 == 0
    }
    return figures | {
        "steps_best_fixed": float(table.min()),
        "best_fixed_omega": float(np.linspace(1, 1.95, 20)[table.argmin()]),
        "steps_learned": float(ours.mean()),
        "steps_chance": float(blind.mean()),
        "learned_over_best": float(ours.mean() / table.min()),
        "learned_over_best_second_half": float(ours[SYSTEMS // 2 :].mean() / table.min()),
        "chance_over_best": float(blind.mean() / table.min()),
    }


register(
    Row(
        name="learned_relaxation",
        covers=("learned_relaxation", "tsallis_inf"),
        shapes={"shifted_laplacians_100": {"systems": 100, "seed": 0}},
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=("tests/solvers/test_learned_relaxation.py", "tests/solvers/test_tsallis_inf.py"),
        targets=(
            Target(
                "figure",
                1.45,
                "Tsallis-INF within 1.45x of the best fixed omega over 1,000 systems.",
                figure="learned_over_best",
            ),
        ),
        figures={"ratios": ratios},
        x64=True,
    )
)
