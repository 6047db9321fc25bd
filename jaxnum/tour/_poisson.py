"""Stop: a Poisson problem by conjugate gradients, plain and preconditioned by a multigrid cycle."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxnum
from jaxnum.tour.stop import BLUE, ORANGE, Picture, Stop, curves, figure, image


def poisson(*, n: int = 256, rtol: float = 1e-10) -> Stop:
    """Poisson's equation on a grid by `linear_solve`, plain and with a multigrid preconditioner.

    Args:
      n: cells a side, a power of two >= 8.
      rtol: relative residual asked for.
    """
    with jax.enable_x64(True):
        b = charges(n)
        start = time.perf_counter()
        plain = jaxnum.linear_solve(laplacian, b, rtol=rtol, history=True, max_steps=10 * n)
        middle = time.perf_counter()
        quick = jaxnum.linear_solve(laplacian, b, preconditioner=v_cycle, rtol=rtol, history=True, max_steps=10 * n)
        jax.block_until_ready((plain, quick))
        end = time.perf_counter()
        exact = _direct(np.asarray(b))
        errors = [_relative(np.asarray(s.x), exact) for s in (plain, quick)]
    direct = time.perf_counter() - end
    gain = int(plain.steps) / int(quick.steps)
    return Stop(
        title=f"Poisson's equation on a {n} x {n} grid",
        text=(
            "The electric potential of charged plates and a ring in a grounded box solves -Δu = f. A is the "
            f"five-point stencil, given to linear_solve as a function: its {n * n:,} x {n * n:,} matrix is never "
            "formed.",
            f"Plain conjugate gradients need {int(plain.steps)} steps. With one multigrid V-cycle as preconditioner, "
            f"written in plain JAX, {int(quick.steps)} are enough, and the solution "
            f" agrees with scipy's sparse direct solver to {errors[1]:.0e}.",
        ),
        finding=f"CG {int(plain.steps)} steps, with multigrid {int(quick.steps)}; {errors[1]:.0e} off scipy's.",
        rows=(
            ("unknowns", f"{n * n:,}"),
            ("steps, CG", f"{int(plain.steps)}"),
            ("steps, CG with a multigrid V-cycle", f"{int(quick.steps)} ({gain:.0f} times fewer)"),
            ("relative residual asked for", f"{rtol:.0e}"),
            ("relative residual reached, CG / multigrid CG", " / ".join(f"{_final(s, b):.1e}" for s in (plain, quick))),
            ("relative error against scipy's direct solver, CG / multigrid CG", " / ".join(f"{e:.1e}" for e in errors)),
            (
                "seconds, compilation included: CG / multigrid CG / scipy direct",
                f"{middle - start:.2f} / {end - middle:.2f} / {direct:.2f}",
            ),
        ),
        pictures=(_picture(b, plain, quick),),
    )


def charges(n: int) -> jax.Array:
    """Right-hand side [n, n]: two plates of opposite charge and a ring, in the unit square."""
    centres = (jnp.arange(n) + 0.5) / n
    y, x = jnp.meshgrid(centres, centres, indexing="ij")
    plate = (jnp.abs(x - 0.38) < 0.2).astype(x.dtype)
    upper, lower = (plate * (jnp.abs(y - level) < 0.012) for level in (0.3, 0.46))
    ring = jnp.abs(jnp.hypot(x - 0.68, y - 0.74) - 0.12) < 0.012
    return 100.0 * (upper - lower + 0.3 * ring)


def laplacian(u: jax.Array) -> jax.Array:
    """-Δu [n, n] on the cells of the unit square, u = 0 on its boundary, half a cell from the outermost centres."""
    n = u.shape[0]
    return n**2 * (4 * u - _neighbours(u))


def _neighbours(u: jax.Array) -> jax.Array:
    p = _with_ghosts(_with_ghosts(u, 0), 1)
    return p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:]


def _with_ghosts(u: jax.Array, axis: int) -> jax.Array:
    """One cell more at both ends of an axis, with the opposite value: their mean, at the wall, is 0."""
    first, last = jax.lax.slice_in_dim(u, 0, 1, axis=axis), jax.lax.slice_in_dim(u, -1, None, axis=axis)
    return jnp.concatenate([-first, u, -last], axis)


def v_cycle(r: jax.Array) -> jax.Array:
    """One symmetric multigrid V-cycle for -Δ u = r from u = 0, smoothed by damped Jacobi before and after."""
    n = r.shape[0]
    inverse = 0.8 / _diagonal(n, r.dtype)
    if n <= 2:
        u = inverse * r
        for _ in range(3):
            u = u + inverse * (r - laplacian(u))
        return u
    u = inverse * r
    u = u + inverse * (r - laplacian(u))
    p = interpolation(n // 2, r.dtype)
    restricted = _sandwich(p.T, r - laplacian(u)) / 4
    u = u + _sandwich(p, v_cycle(restricted))
    for _ in range(2):
        u = u + inverse * (r - laplacian(u))
    return u


def _diagonal(n: int, dtype: Any) -> jax.Array:
    """The stencil's diagonal [n, n]: 4, and one more for each wall a cell touches."""
    wall = jnp.zeros(n, dtype).at[jnp.array([0, n - 1])].add(1)
    return n**2 * (4 + wall[:, None] + wall[None, :])


def interpolation(n: int, dtype: Any) -> jax.Array:
    """Linear interpolation [2 n, n] from n cells to 2 n, at distances 1/4 and 3/4; values beyond the walls are odd."""
    at = np.arange(n)
    p = np.zeros((2 * n, n))
    p[2 * at, at] = p[2 * at + 1, at] = 0.75
    p[2 * at[1:], at[:-1]] = p[2 * at[:-1] + 1, at[1:]] = 0.25
    p[0, 0] = p[-1, -1] = 0.5
    return jnp.asarray(p, dtype)


def _sandwich(p: jax.Array, u: jax.Array) -> jax.Array:
    """The same map along both axes, p u pᵀ."""
    return jnp.linalg.multi_dot([p, u, p.T], precision="highest")


def _direct(b: np.ndarray) -> np.ndarray:
    from scipy import sparse
    from scipy.sparse.linalg import spsolve

    n = b.shape[0]
    main = np.full(n, 2.0)
    main[[0, -1]] = 3.0
    line = sparse.diags_array([main, -np.ones(n - 1), -np.ones(n - 1)], offsets=[0, 1, -1])
    eye = sparse.eye_array(n)
    matrix = n**2 * (sparse.kron(line, eye) + sparse.kron(eye, line))
    return spsolve(matrix.tocsc(), b.ravel()).reshape(n, n)


def _relative(x: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def _final(solution: jaxnum.Solution, b: jax.Array) -> float:
    return float(solution.residual) / float(np.linalg.norm(np.asarray(b)))


def _picture(b: jax.Array, plain: jaxnum.Solution, quick: jaxnum.Solution) -> Picture:
    canvas, (left, right) = figure(1, 2, size=(9.5, 4.0))
    u = np.asarray(quick.x)
    top = np.abs(u).max()
    shown = left.imshow(u, cmap="RdBu_r", vmin=-top, vmax=top, extent=(0, 1, 1, 0))
    centres = (np.arange(u.shape[0]) + 0.5) / u.shape[0]
    left.contour(centres, centres, u, levels=np.linspace(-top, top, 22), colors="#2a2f38", linewidths=0.4)
    image(left, "potential u and its equipotential lines")
    canvas.colorbar(shown, ax=left, shrink=0.9).ax.tick_params(labelsize=9)
    scale = float(np.linalg.norm(np.asarray(b)))
    for solution, label, colour in ((plain, "CG", ORANGE), (quick, "CG, multigrid V-cycle", BLUE)):
        residuals = np.asarray(solution.history)[1 : int(solution.steps) + 1] / scale
        right.plot(
            np.arange(1, residuals.size + 1),
            residuals,
            ".-" if residuals.size < 50 else "-",
            color=colour,
            label=f"{label}: {int(solution.steps)} steps",
            linewidth=1.3,
        )
    right.set_xscale("log")
    right.set_ylim(bottom=float(quick.residual) / scale / 1e3)
    curves(right, "residual, step by step", "step", "||b - A x|| / ||b||", legend="lower left")
    return Picture("poisson", canvas, "Left: the computed potential. Right: relative residual of both solves.")
