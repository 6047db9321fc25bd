"""Stop: colour transfer between two photographs by entropic optimal transport."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxnum
from jaxnum.solvers import sinkhorn, sns
from jaxnum.tour.stop import BLUE, GREEN, ORANGE, Picture, Stop, curves, figure, image


class Moved(NamedTuple):
    """The two photographs in each other's colours, and the solves that moved them."""

    images: tuple[np.ndarray, np.ndarray]
    plain: jaxnum.Solution
    relaxed: jaxnum.Solution
    price: float


class Sharp(NamedTuple):
    """The same transport to nine digits in float64, and the seconds of each solve, compilation included."""

    sweeps: jaxnum.Solution
    newton: jaxnum.Solution
    seconds: tuple[float, float]


_SHARP_RTOL = 1e-9
_SHARP_STEPS = 3000


def colours(*, samples: int = 1000, stride: int = 2, epsilon: float = 0.003, seed: int = 0) -> Stop:
    """Two photographs exchange their colours, by `transport` between samples of their pixels.

    Args:
      samples: pixels drawn from each photograph.
      stride: every how many pixels of a photograph are shown, along both axes.
      epsilon: of the transport, in units of squared distance in the unit cube of colours.
      seed: of the samples.
    """
    photographs = load(stride)
    random = np.random.default_rng(seed)
    palettes = tuple(jnp.asarray(random.choice(p.reshape(-1, 3), samples)) for p in photographs)
    moved = exchange(photographs, palettes, epsilon)
    sharp = to_nine_digits(palettes, epsilon)
    error = float(moved.relaxed.residual)
    before, after = (
        float(np.linalg.norm(p.reshape(-1, 3).mean(0) - photographs[1].reshape(-1, 3).mean(0)))
        for p in (photographs[0], moved.images[0])
    )
    return Stop(
        title="Two photographs exchange their colours",
        text=(
            f"Draw {samples} pixels from each of scikit-learn's two sample photographs and transport one cloud of "
            "colours onto the other at the least total squared distance, up to entropy. The plan says where each "
            "colour goes; the potentials carry it to all other pixels: colour z becomes the mean of the target colours "
            "y_j under weights proportional to exp((g_j - |z - y_j|²) / ε), and the reverse with f.",
            "One solve colours both photographs. The cost is a PointCloudCost, so the matrix of squared distances is "
            "never stored.",
            f"To a marginal error of {_SHARP_RTOL:.0e}, sweeps alone take {int(sharp.sweeps.steps)} steps and "
            f"{sharp.seconds[0]:.1f} s; `sns`, {int(sharp.newton.phase_steps[0])} sweeps and then Newton's method, "
            f"{int(sharp.newton.phase_steps[1])} Newton steps and {sharp.seconds[1]:.1f} s.",
        ),
        finding=f"{int(moved.relaxed.steps)} over-relaxed Sinkhorn steps (plain: {int(moved.plain.steps)}), marginal "
        f"error {error:.1e}.",
        rows=(
            ("colours on each side", f"{samples}"),
            ("epsilon", f"{epsilon:g}"),
            ("steps, Sinkhorn over-relaxed by 1.5", f"{int(moved.relaxed.steps)}"),
            ("steps, Sinkhorn plain", f"{int(moved.plain.steps)}"),
            (
                "marginal error in the L1 norm, over-relaxed / plain",
                f"{error:.1e} / {float(moved.plain.residual):.1e}",
            ),
            (
                f"steps to {_SHARP_RTOL:.0e} in float64, sweeps alone / sweeps + Newton",
                f"{int(sharp.sweeps.steps)} / {' + '.join(map(str, sharp.newton.phase_steps.tolist()))}",
            ),
            (
                "marginal error of these, sweeps alone / sweeps + Newton",
                f"{float(sharp.sweeps.residual):.1e} / {float(sharp.newton.residual):.1e}",
            ),
            ("seconds of these, compilation included", " / ".join(f"{t:.1f}" for t in sharp.seconds)),
            ("mean squared distance a colour is moved", f"{moved.price:.4f}"),
            ("distance of the mean colours, before", f"{before:.4f}"),
            ("distance of the mean colours, after", f"{after:.4f}"),
        ),
        pictures=(_photographs(photographs, moved.images), _diagnostics(palettes, moved, sharp)),
    )


def load(stride: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's photographs of a temple and of a flower, [h, w, 3] in [0, 1]."""
    from sklearn.datasets import load_sample_images

    first, second = (np.asarray(i[::stride, ::stride] / 255, np.float32) for i in load_sample_images().images)
    return first, second


def exchange(
    photographs: tuple[np.ndarray, np.ndarray], palettes: tuple[jnp.ndarray, jnp.ndarray], epsilon: float
) -> Moved:
    """Transport one palette to the other, and carry both photographs along."""
    x, y = palettes
    a = jnp.full(x.shape[0], 1 / x.shape[0])
    cost = jaxnum.PointCloudCost(x, y)
    options = {"history": True, "check_every": 1, "adjoint": "none", "max_steps": 3000}
    plain = jaxnum.transport(cost, a, a, epsilon, **options)
    relaxed = jaxnum.transport(cost, a, a, epsilon, solver=sinkhorn(momentum=1.5), **options)
    f, g = relaxed.x
    images = (carry(photographs[0], y, g, epsilon), carry(photographs[1], x, f, epsilon))
    return Moved(images, plain, relaxed, float(jaxnum.Transport(cost, a, a, epsilon).primal_cost(relaxed.x)))


def to_nine_digits(palettes: tuple[jnp.ndarray, jnp.ndarray], epsilon: float) -> Sharp:
    """Sweeps alone, and sweeps followed by Newton's method, on the same problem in float64."""
    solutions, seconds = [], []
    with jax.enable_x64(True):
        x, y = (jnp.asarray(np.asarray(palette), jnp.float64) for palette in palettes)
        a = jnp.full(x.shape[0], 1 / x.shape[0])
        for solver in (sinkhorn(), sns()):
            start = time.perf_counter()
            solution = jaxnum.transport(
                jaxnum.PointCloudCost(x, y),
                a,
                a,
                epsilon,
                solver=solver,
                rtol=_SHARP_RTOL,
                max_steps=_SHARP_STEPS,
                history=True,
                adjoint="none",
                on_failure="return",
            )
            jax.block_until_ready(solution.x)
            solutions.append(solution)
            seconds.append(time.perf_counter() - start)
    return Sharp(*solutions, tuple(seconds))


def carry(photograph: np.ndarray, palette: jnp.ndarray, potential: jnp.ndarray, epsilon: float) -> np.ndarray:
    """Send each pixel to its mean colour of the palette under the plan that the potential defines."""
    pixels = jnp.asarray(photograph.reshape(-1, 3))
    cost = jaxnum.PointCloudCost(pixels, palette)
    weights = potential / epsilon
    rows = cost.lse_rows(weights, epsilon)
    return np.asarray(cost.apply(-rows, weights, epsilon, palette)).reshape(photograph.shape).clip(0, 1)


def _photographs(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]) -> Picture:
    canvas, axes = figure(2, 2, size=(9.5, 6.7))
    titles = ("temple", "flower", "temple in the flower's colours", "flower in the temple's colours")
    for ax, photograph, title in zip(axes.flat, (*before, *after), titles, strict=True):
        ax.imshow(photograph)
        image(ax, title)
    return Picture("colours", canvas, "Above: the photographs. Below: each with the other's colours.")


def _diagnostics(palettes: tuple[jnp.ndarray, jnp.ndarray], moved: Moved, sharp: Sharp) -> Picture:
    canvas, (left, middle, right) = figure(1, 3, size=(10.5, 3.5))
    for ax, palette, title in ((left, palettes[0], "temple"), (middle, palettes[1], "flower")):
        shown = np.asarray(palette)
        ax.scatter(shown[:, 0], shown[:, 2], c=shown, s=9, linewidths=0)
        ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="red", ylabel="blue", aspect="equal")
        ax.set_title(f"sampled colours, {title}", fontsize=10.5)
    for solution, name, colour in ((moved.plain, "plain", ORANGE), (moved.relaxed, "over-relaxed", BLUE)):
        history = np.asarray(solution.history)[1 : int(solution.steps) + 1]
        right.plot(np.arange(1, history.size + 1), history, color=colour, label=f"{name}: {int(solution.steps)} steps")
    for solution, name, style in ((sharp.sweeps, "float64, plain", ":"), (sharp.newton, "float64, sns", "-")):
        history = np.asarray(solution.history)
        # Each phase records its start too.
        history = history[np.isfinite(history)][1:]
        label = f"{name}: {int(solution.steps)} steps"
        right.plot(np.arange(1, history.size + 1), history, style, color=GREEN, label=label)
    right.set_xscale("log")
    curves(right, "marginal error", "step", "L1 norm of both errors")
    # Over-relaxation overshoots at first. Limits on a log axis hold only once it is one.
    right.set_ylim(top=5)
    return Picture("colours_transport", canvas, "The two clouds of colours, and the marginal errors of the solves.")
