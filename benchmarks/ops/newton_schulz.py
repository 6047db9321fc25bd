"""Newton-Schulz beside LAPACK's inverse, and how its steps grow with the condition number beside gradient descent's."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Peer, Row, Target, register

RTOL = 1e-8


def make(params: Params) -> tuple:
    return (matrix(params["n"], params["kappa"]),)


def matrix(n: int, kappa: float):
    u, v = (jnp.linalg.qr(jax.random.normal(jax.random.key(i), (n, n), jnp.float64))[0] for i in (0, 1))
    return (u * jnp.geomspace(1, 1 / kappa, n)) @ v


def run(params: Params):
    import jaxnum

    return lambda A: jaxnum.solvers.newton_schulz(A, rtol=RTOL).x


def growth() -> dict[str, float]:
    """Steps for a condition number of 10 to 10^4, and gradient descent's on ||A x - b||^2 to the same error."""
    import jaxnum

    kappas = (10.0, 100.0, 1e3, 1e4)
    figures: dict[str, float] = {}
    for order in (2, 3):
        steps = [int(jaxnum.solvers.newton_schulz(matrix(20, kappa), order=order, rtol=RTOL).steps) for kappa in kappas]
        figures |= {f"order_{order}_steps_kappa_{kappa:.0e}": s for kappa, s in zip(kappas, steps, strict=True)}
        figures[f"order_{order}_slope"] = float(np.polyfit(np.log2(kappas), steps, 1)[0])
    for kappa in (10.0, 100.0):
        figures[f"gradient_descent_steps_kappa_{kappa:.0e}"] = int(_descent(matrix(20, kappa)))
    return figures


@jax.jit
def _descent(A):
    """Steps of M <- M + A^T (I - A M) / ||A||_2^2, which shrinks each error by 1 - 1 / kappa^2."""
    S, goal = A.T @ A, RTOL

    def step(carry):
        E, count = carry
        return E - S @ E / jnp.linalg.norm(A, 2) ** 2, count + 1

    start = (jnp.eye(A.shape[0]), jnp.int32(0))
    return jax.lax.while_loop(lambda c: jnp.linalg.norm(c[0]) > goal * A.shape[0] ** 0.5, step, start)[1]


register(
    Row(
        name="newton_schulz",
        covers=("newton_schulz", "newton_schulz_regression"),
        shapes={"dense_256": {"n": 256, "kappa": 100.0}},
        make=make,
        run=run,
        reference=lambda params: jnp.linalg.inv,
        modes=("solve", "fwd_bwd"),
        tests=("tests/solvers/test_newton_schulz.py",),
        peers={"jnp.linalg.inv": Peer("jax", lambda params: jnp.linalg.inv)},
        targets=(
            Target("figure", 2.3, "Steps linear in log2 kappa: slope 2 +- 0.3.", figure="order_2_slope"),
            Target("figure", 1.7, "Steps linear in log2 kappa: slope 2 +- 0.3.", at_least=True, figure="order_2_slope"),
        ),
        figures={"growth": growth},
        x64=True,
    )
)
