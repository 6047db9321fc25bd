"""Halpern iteration: how exactly it meets its bound, and a map that Picard cannot solve.

There is no peer: the figures compare with the theorem, residual * (N + 1) / (2 |x_0 - x*|) <= 1, and with Picard.
"""

import math

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Row, Target, register

ANGLE = 2.0
TOLERANCE = 1e-3


def rotation(x, angle=ANGLE):
    """A rotation of the plane: nonexpansive, its fixed point is 0, and Picard keeps its distance for ever."""
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([c * x[0] - s * x[1], s * x[0] + c * x[1]])


def make(params: Params) -> tuple:
    return (jnp.full((2,), params["start"], jnp.float64),)


def run(params: Params):
    import jaxnum

    halpern = jaxnum.solvers.halpern()
    return lambda x0: jaxnum.fixed_point(rotation, x0, solver=halpern, rtol=0.0, atol=TOLERANCE).x


def fidelity() -> dict[str, float]:
    """The bound's share that is used, for T(x) = -x at even N and the Huber-type map at its worst start."""
    figures = {}
    for n in (10, 50, 200):
        figures[f"bound_share_reflection_N{n}"] = _share(lambda x: -x, 1.0, n)
        figures[f"bound_share_huber_N{n}"] = _share(_huber(n), 1.0, n)
    figures["bound_gap"] = max(abs(share - 1) for share in figures.values())
    return figures


def _huber(n: int):
    """T(x) = x - 2 clip(x, -1/(n+1), 1/(n+1)), the reflected gradient step of a Huber function with minimum at 0."""
    return lambda x: x - 2 * jnp.clip(x, -1 / (n + 1), 1 / (n + 1))


def _share(T, start: float, n: int) -> float:
    """Residual after n steps, taken one by one because the driver rightly stops at a fixed point, over its bound."""
    import jaxnum

    solver = jaxnum.solvers.halpern()
    problem = jaxnum.FixedPoint(T, ())
    x = jnp.asarray(start, jnp.float64)
    state = solver.init(solver.hyper, x, problem)
    x, state = jax.lax.fori_loop(0, n, lambda _, carry: solver.step(solver.hyper, *carry, problem), (x, state))
    return float(jnp.abs(x - T(x))) * (n + 1) / (2 * abs(start))


def steps_on_rotation() -> dict[str, float]:
    """Steps to a residual of 1e-3 on a rotation by 2 rad; Picard's residual after as many."""
    import jaxnum

    x0 = make({"start": 1.0})[0]
    options = {"rtol": 0.0, "atol": TOLERANCE, "max_steps": 10_000, "on_failure": "return"}
    ours = jaxnum.fixed_point(rotation, x0, solver=jaxnum.solvers.halpern(), **options)
    picard = jaxnum.fixed_point(rotation, x0, solver=jaxnum.solvers.picard(), **options)
    bound = 2 * math.hypot(*map(float, x0)) / TOLERANCE
    return {
        "rotation_halpern_steps": int(ours.steps),
        "rotation_halpern_residual": float(ours.residual),
        "rotation_bound_steps": bound,
        "rotation_picard_steps": int(picard.steps),
        "rotation_picard_residual": float(picard.residual),
    }


def error(output, truth) -> float:
    """Distance to the fixed point, which is 0: a relative error would divide by it."""
    return float(jnp.linalg.norm(output - truth))


register(
    Row(
        name="halpern",
        covers=("halpern",),
        shapes={"rotation": {"start": 1.0}},
        make=make,
        run=run,
        reference=lambda params: jnp.zeros_like,
        modes=("solve",),
        tests=("tests/solvers/test_halpern.py",),
        targets=(
            Target(
                "figure",
                1e-12,
                "T(x) = -x driven step by step gives residual 2|x0|/(N+1) to 1e-12 for even N = 10, 50, 200, "
                "and the Huber-type case meets the bound with equality.",
                figure="bound_gap",
            ),
        ),
        figures={"fidelity": fidelity, "rotation": steps_on_rotation},
        error=error,
        x64=True,
    )
)
