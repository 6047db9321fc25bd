"""Stop: a Poisson problem by conjugate gradients, preconditioned, and along directions that a network proposes."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxnum
from jaxnum import solvers
from jaxnum.tour.stop import BLUE, GREEN, ORANGE, Picture, Stop, curves, figure, image


def poisson(*, n: int = 256, rtol: float = 1e-10, side: int = 16, steps: int = 320) -> Stop:
    """Poisson's equation on a grid by `linear_solve`: plain, with SSOR, with multigrid, and by `dcdm`.

    Args:
      n: cells a side, a power of two >= 8.
      rtol: relative residual asked for.
      side: cells a side of the grid that a network for `dcdm` is trained on, a multiple of 8; it is tried on twice
        that.
      steps: steps of its training, a multiple of 8.
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
    learned = _learned(side, steps)
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
            f"On a grid of {2 * side} cells a side, to {_LEARNED_RTOL:.0e}, conjugate gradients need {learned.plain} "
            f"steps, {learned.ssor} with an SSOR preconditioner, and {learned.deep} along the directions of a small "
            f"convolutional network, trained in {learned.seconds:.0f} s on a grid of half that size and on other "
            "right-hand sides. Steps are not seconds: here the network makes each of them "
            f"{learned.dearer:.0f} times dearer.",
        ),
        finding=f"CG {int(plain.steps)} steps, with multigrid {int(quick.steps)}; {errors[1]:.0e} off scipy's. "
        f"On {2 * side} x {2 * side}: CG {learned.plain}, with SSOR {learned.ssor}, trained directions {learned.deep}.",
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
            (
                f"steps to {_LEARNED_RTOL:.0e} on {2 * side} x {2 * side} cells, CG / SSOR-CG / dcdm",
                f"{learned.plain} / {learned.ssor} / {learned.deep}",
            ),
            (
                "milliseconds of these, without compilation, CG / SSOR-CG / dcdm",
                " / ".join(f"{1e3 * t:.1f}" for t in learned.times),
            ),
        ),
        pictures=(_picture(b, plain, quick, learned),),
    )


class _Learned(NamedTuple):
    """Relative residuals of three solves of one system, the seconds of each, and those of the training."""

    residuals: tuple[np.ndarray, ...]
    times: tuple[float, ...]
    seconds: float

    @property
    def plain(self) -> int:
        """Steps of conjugate gradients."""
        return self.residuals[0].size

    @property
    def ssor(self) -> int:
        """Steps with an SSOR preconditioner."""
        return self.residuals[1].size

    @property
    def deep(self) -> int:
        """Steps along trained directions."""
        return self.residuals[2].size

    @property
    def dearer(self) -> float:
        """The time of a step along trained directions over that of a step of conjugate gradients."""
        return self.times[2] / self.deep / (self.times[0] / self.plain)


_LEARNED_RTOL = 1e-4


def _learned(side: int, steps: int) -> _Learned:
    """Conjugate gradients, with SSOR, and along trained directions, on a grid twice that of the training."""
    start = time.perf_counter()
    like = jnp.zeros((side, side), jnp.float32)
    data = solvers.ritz_dataset(unit_laplacian, like, jax.random.key(0), samples=200, vectors=100)
    network = solvers.init_dcdm_network(jax.random.key(1), filters=8, levels=4, pairs=1, coarse_pairs=1)
    trained = solvers.train_dcdm(
        solvers.linear_dcdm_network, network, unit_laplacian, data, jax.random.key(2), steps=steps
    )
    deep = solvers.dcdm(solvers.linear_dcdm_network, jax.block_until_ready(trained.params))
    seconds = time.perf_counter() - start
    n = 2 * side
    b = charges(n).astype(jnp.float32)
    # By the wall the box is n + 1 mesh widths wide for the eigenvalues that matter to omega.
    omega = 2 / (1 + np.sin(np.pi / (n + 1)))
    sweep = solvers.ssor_preconditioner(jaxnum.sparse_operator(_matrix(n).astype(np.float32)), omega)
    ssor = lambda r: sweep.matvec(r.ravel()).reshape(n, n)  # noqa: E731
    runs = ({}, {"preconditioner": ssor}, {"solver": deep})
    residuals, times = [], []
    for options in runs:
        solve = jax.jit(
            lambda b, options=options: jaxnum.linear_solve(
                unit_laplacian, b, rtol=_LEARNED_RTOL, history=True, max_steps=10 * n, **options
            )
        )
        residuals.append(_residuals(solve(b), b))
        begin = time.perf_counter()
        jax.block_until_ready(solve(b))
        times.append(time.perf_counter() - begin)
    return _Learned(tuple(residuals), tuple(times), seconds)


def unit_laplacian(u: jax.Array) -> jax.Array:
    """The stencil of `laplacian` for cells of unit size: one operator for grids of every size."""
    return laplacian(u) / u.shape[0] ** 2


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
    from scipy.sparse.linalg import spsolve

    n = b.shape[0]
    return spsolve((n**2 * _matrix(n)).tocsc(), b.ravel()).reshape(n, n)


def _matrix(n: int) -> Any:
    """The stencil for cells of unit size as scipy's sparse matrix."""
    from scipy import sparse

    main = np.full(n, 2.0)
    main[[0, -1]] = 3.0
    line = sparse.diags_array([main, -np.ones(n - 1), -np.ones(n - 1)], offsets=[0, 1, -1])
    eye = sparse.eye_array(n)
    return (sparse.kron(line, eye) + sparse.kron(eye, line)).tocsr()


def _relative(x: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def _final(solution: jaxnum.Solution, b: jax.Array) -> float:
    return float(solution.residual) / float(np.linalg.norm(np.asarray(b)))


def _residuals(solution: jaxnum.Solution, b: jax.Array) -> np.ndarray:
    """Relative residuals after each step, without that of the start."""
    return np.asarray(solution.history)[1 : int(solution.steps) + 1] / float(np.linalg.norm(np.asarray(b)))


def _picture(b: jax.Array, plain: jaxnum.Solution, quick: jaxnum.Solution, learned: _Learned) -> Picture:
    canvas, (left, middle, right) = figure(1, 3, size=(14.0, 4.0))
    u = np.asarray(quick.x)
    top = np.abs(u).max()
    shown = left.imshow(u, cmap="RdBu_r", vmin=-top, vmax=top, extent=(0, 1, 1, 0))
    centres = (np.arange(u.shape[0]) + 0.5) / u.shape[0]
    left.contour(centres, centres, u, levels=np.linspace(-top, top, 22), colors="#2a2f38", linewidths=0.4)
    image(left, "potential u and its equipotential lines")
    canvas.colorbar(shown, ax=left, shrink=0.9).ax.tick_params(labelsize=9)
    _draw(middle, (_residuals(plain, b), _residuals(quick, b)), ("CG", "CG, multigrid V-cycle"))
    curves(middle, "residual, step by step", "step", "||b - A x|| / ||b||", legend="lower left")
    _draw(right, learned.residuals, ("CG", "CG, SSOR", "dcdm, trained directions"))
    curves(right, "a smaller grid, a looser tolerance", "step", "||b - A x|| / ||b||", legend="lower left")
    caption = (
        "Left: the computed potential. Middle: relative residuals of both solves. Right: beside a trained network."
    )
    return Picture("poisson", canvas, caption)


def _draw(axes: Any, runs: tuple[np.ndarray, ...], labels: tuple[str, ...]) -> None:
    """Residuals of several solves, with room below them for the legend."""
    for residuals, label, colour in zip(runs, labels, (ORANGE, BLUE, GREEN), strict=False):
        style = ".-" if residuals.size < 50 else "-"
        steps = np.arange(1, residuals.size + 1)
        axes.plot(steps, residuals, style, color=colour, label=f"{label}: {residuals.size} steps", linewidth=1.3)
    axes.set_xscale("log")
    axes.set_ylim(bottom=min(residuals[-1] for residuals in runs) / 1e3)
