"""Variance-reduced Halpern: evaluations of terms until ||F|| <= eps, as a share of the deterministic method's.

Least squares F_i(u) = a_i (a_i.u - b_i) with unit rows, so L = 1 on average. There is no peer: the figures compare with
`cocoercive_halpern`, given the same L, and given the constant of the mean, which is smaller and which a user may know.
Beside it `inexact_halpern` on bilinear games, where nothing is cocoercive, as a share of the terms that `feg` takes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Row, Target, register

EPS = 3e-3
SEEDS = 3


def problem(n: int, d: int = 20):
    rng = np.random.default_rng(0)
    A = rng.normal(size=(n, d)) / np.arange(1, d + 1)
    A /= np.linalg.norm(A, axis=1, keepdims=True)
    return jnp.asarray(A), jnp.asarray(A @ rng.normal(size=d))


def make(params: Params) -> tuple:
    return problem(params["n"])


def terms(u, indices, A, b):
    rows = A[indices]
    return rows.T @ (rows @ u - b[indices]) / indices.size


def solve(solver, A, b, eps=EPS):
    import jaxnum

    summed = jaxnum.FiniteSum(terms, b.size, (A, b))
    start = jnp.zeros_like(A[0])
    return jaxnum.solve(solver, start, summed, rtol=0.0, atol=eps, adjoint="none", max_steps=200_000)


def run(params: Params):
    import jaxnum

    solver = jaxnum.solvers.vr_halpern(jax.random.key(0), 1.0)
    return lambda A, b: jnp.linalg.norm(terms(solve(solver, A, b).x, jnp.arange(b.size), A, b))


def deterministic(A, b, lipschitz: float, eps: float) -> int:
    """Terms that the deterministic method evaluates: n at the start and n a step."""
    import jaxnum

    force = lambda u, A, b: A.T @ (A @ u - b) / b.size  # noqa: E731
    solver = jaxnum.solvers.cocoercive_halpern(lipschitz)
    start = jnp.zeros_like(A[0])
    solution = jaxnum.inclusion(
        force, start, A, b, solver=solver, rtol=0.0, atol=eps, adjoint="none", max_steps=200_000
    )
    return b.size * (1 + int(solution.steps))


def calls(A, b, step: float, eps: float) -> float:
    """Terms that the random method evaluates, the mean over seeds."""
    import jaxnum

    keys = jax.random.split(jax.random.key(0), SEEDS)
    solvers = [jaxnum.solvers.vr_halpern(key, 1.0, step=step) for key in keys]
    return float(np.mean([int(solve(solver, A, b, eps).state.calls) for solver in solvers]))


def ratios() -> dict[str, float]:
    """Shares at n = 20,000 for three accuracies and three steps; at eps = 3e-3 over n, where it loses too."""
    figures = {}
    for n in (400, 2000, 20_000, 200_000):
        A, b = problem(n)
        own = float(np.linalg.norm(A, 2) ** 2 / n)
        for eps in (1e-2, EPS, 1e-3) if n == 20_000 else (EPS,):
            base, best = deterministic(A, b, 1.0, eps), deterministic(A, b, own, eps)
            for step in (0.25, 0.5, 1.0) if n == 20_000 else (0.5,):
                count = calls(A, b, step, eps)
                figures[f"share_n{n}_eps{eps:g}_step{step:g}"] = count / base
                figures[f"share_of_own_constant_n{n}_eps{eps:g}_step{step:g}"] = count / best
    return figures


def game(u, indices, a, b, M, c):
    """Mean over i of (x, y) -> ((M + a_i b_i^T) y, -(M + a_i b_i^T)^T x) + c."""
    x, y = jnp.split(u, 2)
    A, B = a[indices], b[indices]
    return jnp.concatenate([M @ y + A.T @ (B @ y) / indices.size, -M.T @ x - B.T @ (A @ x) / indices.size]) + c


def games(n: int, mean: float, half: int = 5) -> tuple[tuple, float, float]:
    """The arrays of a game of n random rank-one terms around `mean` times a fixed one; L on average, L of the mean."""
    rng = np.random.default_rng(0)
    M = mean * np.diag(np.linspace(0.05, 1, half))
    a, b = rng.choice([-1.0, 1.0], size=(2, n, half)) / np.sqrt(half)
    a /= 2
    own = np.linalg.norm(M + a.T @ b / n, 2)
    single = M + a[:, :, None] * b[:, None, :]
    squares = (np.mean(single @ single.transpose(0, 2, 1), 0), np.mean(single.transpose(0, 2, 1) @ single, 0))
    average = max(np.linalg.norm(square, 2) for square in squares) ** 0.5
    return tuple(jnp.asarray(leaf) for leaf in (a, b, M, rng.normal(size=2 * half) * own)), float(average), float(own)


def bilinear() -> dict[str, float]:
    """Terms of the inexact method over those of `feg`, which is given the smaller constant of the mean."""
    import jaxnum

    figures = {}
    # Around no mean at all, the terms are some tens of times as steep as what is left of them.
    for label, n, mean, accuracy in (("", 1000, 1.0, 1e-2), ("", 10_000, 1.0, 1e-2), ("_steep_terms", 1000, 0.0, 1e-1)):
        args, average, own = games(n, mean)
        everything = jnp.arange(n)
        options = {"rtol": 0.0, "atol": accuracy * own, "adjoint": "none", "max_steps": 100_000}
        solver = jaxnum.solvers.inexact_halpern(jax.random.key(0), average)
        inexact = jaxnum.solve(solver, jnp.zeros_like(args[-1]), jaxnum.FiniteSum(game, n, args), **options)
        force = lambda u, *args, of=everything: game(u, of, *args)  # noqa: E731
        feg = jaxnum.solvers.feg(own)
        exact = jaxnum.inclusion(force, jnp.zeros_like(args[-1]), *args, solver=feg, **options)
        figures[f"inexact_share_of_feg_n{n}{label}"] = int(inexact.state.calls) / (n * (1 + 2 * int(exact.steps)))
    return figures


register(
    Row(
        name="vr_halpern",
        covers=("vr_halpern", "inexact_halpern"),
        shapes={"least_squares_20000": {"n": 20_000}},
        make=make,
        run=run,
        reference=lambda params: lambda A, b: np.zeros(()),
        modes=("solve",),
        tests=("tests/solvers/test_vr_halpern.py", "tests/solvers/test_inexact_halpern.py"),
        targets=(
            Target(
                "figure",
                0.45,
                "VR Halpern at n = 20,000: at most 0.45x the oracle calls of deterministic Halpern at eps 3e-3.",
                figure="share_n20000_eps0.003_step0.5",
            ),
            Target("error", EPS, "The exit is the exact residual.", shape="least_squares_20000"),
        ),
        figures={"ratios": ratios, "bilinear": bilinear},
        error=lambda output, truth: float(output),
        x64=True,
    )
)
