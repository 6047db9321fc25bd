"""Anderson acceleration on a slow symmetric contraction, against scipy's and Picard in optimistix.

scipy is given our rule for stopping. That of optimistix at the same tolerances is stricter, by some 160 of its steps.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ops.picard import optimistix as picard_of_optimistix
from benchmarks.ops.picard import reference, step
from benchmarks.registry import Params, Peer, Row, Target, register

TOLERANCE = 1e-6


def make(params: Params) -> tuple:
    n = params["n"]
    q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (n, n), jnp.float64))
    return (q * jnp.linspace(-0.5, 0.99, n)) @ q.T, jax.random.normal(jax.random.key(1), (n,), jnp.float64)


def solution(W, b, solver):
    import jaxnum

    return jaxnum.fixed_point(
        step, jnp.zeros_like(b), W, b, solver=solver, rtol=TOLERANCE, atol=TOLERANCE, adjoint="none"
    )


def run(params: Params):
    import jaxnum

    return lambda W, b: solution(W, b, jaxnum.solvers.anderson()).x


def scipy(params: Params):
    return lambda W, b: accelerated(W, b)[0]


def accelerated(W, b, memory: int = 5) -> tuple[np.ndarray, int]:
    """scipy's answer, stopped by our rule, and the evaluations of T it took."""
    import scipy.optimize

    images = []

    def residual(x):
        images.append(W @ x + b)
        return images[-1] - x

    def scaled(r) -> float:
        return float(np.linalg.norm(r) / (TOLERANCE + TOLERANCE * np.linalg.norm(images[-1])))

    # alpha = 1 starts from a step of Picard; the full step needs no line search, which would evaluate more.
    options = {"M": memory, "alpha": 1.0, "w0": 0.0, "line_search": None}
    x = scipy.optimize.anderson(residual, np.zeros_like(b), f_tol=1.0, tol_norm=scaled, **options)
    return np.asarray(x), len(images)


def steps() -> dict[str, float]:
    """Evaluations of T to the tolerance: memory 5 and 10, scipy's with as much, and Picard."""
    from jaxnum.solvers import anderson, picard

    W, b = make({"n": 256})
    solvers = {"anderson_5": anderson(), "anderson_10": anderson(10), "picard": picard()}
    figures = {f"steps_{name}": int(solution(W, b, solver).steps) for name, solver in solvers.items()}
    theirs = {memory: accelerated(np.asarray(W), np.asarray(b), memory)[1] for memory in (5, 10)}
    figures |= {f"steps_scipy_{memory}": count for memory, count in theirs.items()}
    ratios = {
        "worst_steps_to_scipy": max(figures[f"steps_anderson_{memory}"] / theirs[memory] for memory in theirs),
        "steps_to_picard": figures["steps_anderson_5"] / figures["steps_picard"],
    }
    return figures | ratios


register(
    Row(
        name="anderson",
        covers=("anderson",),
        shapes={"slow_contraction_256": {"n": 256}},
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=("tests/solvers/test_anderson.py",),
        peers={"scipy": Peer("scipy", scipy, jit=False), "optimistix": Peer("optimistix", picard_of_optimistix)},
        targets=(
            Target("figure", 1.02, "Evaluations within 2 % of scipy's Anderson.", figure="worst_steps_to_scipy"),
            Target("figure", 0.25, "Memory 5: at most a quarter of Picard's evaluations.", figure="steps_to_picard"),
        ),
        figures={"steps": steps},
        x64=True,
    )
)
