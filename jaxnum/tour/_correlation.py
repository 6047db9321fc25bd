"""Stop: the nearest correlation matrix by Halpern's iteration on two projections."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxnum
from jaxnum.solvers import halpern
from jaxnum.tour.stop import BLUE, GREEN, GREY, ORANGE, Picture, Stop, curves, figure, image


def correlation(*, steps: int = 2000, hidden: float = 0.2, seed: int = 0) -> Stop:
    """The nearest correlation matrix to data with holes, by `halpern` on the composition of two projections.

    Args:
      steps: steps of the iteration.
      hidden: share of each column to hide, in (0, 1).
      seed: of the choice of what is hidden.
    """
    with jax.enable_x64(True):
        broken = jnp.asarray(pairwise_correlation(features_with_holes(hidden, seed)))
        solution = jaxnum.fixed_point(
            two_projections,
            broken,
            solver=halpern(),
            rtol=0.0,
            atol=0.0,
            max_steps=steps,
            history=True,
            adjoint="none",
            on_failure="return",
        )
        repaired = rescaled(solution.x)
        before, after, final = (np.linalg.eigvalsh(np.asarray(m)) for m in (broken, solution.x, repaired))
        plain = jaxnum.fixed_point(two_projections, broken, adjoint="none")
        distance, picard_distance, iterate_distance = (
            float(jnp.linalg.norm(m - broken)) for m in (repaired, rescaled(plain.x), solution.x)
        )
        residuals = np.asarray(solution.history)
    taken = int(solution.steps)
    bound = 2 * distance / (np.arange(residuals.size) + 1)
    share = float(np.nanmax(residuals / bound))
    n = broken.shape[0]
    return Stop(
        title="Repairing a correlation matrix",
        text=(
            f"Hide {hidden:.0%} of each of the {n} measurements in scikit-learn's breast-cancer data, and estimate "
            "each correlation from the patients that have both. The result is no correlation matrix: "
            f"{int((before < 0).sum())} of its eigenvalues are negative, the lowest {before[0]:.4f}, and whatever is "
            "built on it, from a portfolio to a Gaussian sampler, breaks.",
            "T projects onto the positive semidefinite matrices, then onto those with unit diagonal. Its fixed points "
            "are the correlation matrices, and Halpern's iteration x ← λ x0 + (1 - λ) T(x) tends to the one nearest to "
            "its anchor x0, the broken matrix, where Higham's method ends too. Picard's iteration x ← T(x) takes "
            f"{int(plain.steps)} steps, but to a correlation matrix that is not the nearest. Halpern's residual after "
            "N steps is at most 2 ||x0 - x*|| / (N + 1), whatever the data.",
            f"After {taken} steps the lowest eigenvalue is {after[0]:.1e}. Clipping that rest and rescaling to unit "
            f"diagonal gives a correlation matrix at Frobenius distance {distance:.6f} from the broken one (Picard: "
            f"{picard_distance:.6f}); it serves as x* in the bound drawn here. The nearest one is "
            "reached in the limit only.",
        ),
        finding=f"{int((before < 0).sum())} negative eigenvalues repaired, distance {distance:.4f}, residual "
        f"{residuals[taken]:.1e} under its bound {bound[taken]:.1e}.",
        rows=(
            ("matrix", f"{n} x {n}"),
            ("steps", f"{taken}"),
            ("lowest eigenvalue, before", f"{before[0]:.4e}"),
            ("lowest eigenvalue, after the iteration", f"{after[0]:.4e}"),
            ("lowest eigenvalue, after clipping and rescaling", f"{final[0]:.4e}"),
            ("distance to the broken matrix, iterate", f"{iterate_distance:.6f}"),
            ("distance to the broken matrix, clipped and rescaled", f"{distance:.6f}"),
            ("the same by Picard's iteration", f"{picard_distance:.6f}, after {int(plain.steps)} steps"),
            ("residual at the last step", f"{residuals[taken]:.3e}"),
            ("its bound 2 ||x0 - x*|| / (N + 1)", f"{bound[taken]:.3e}"),
            ("largest residual / bound over all steps", f"{share:.3f} (the theorem allows 1)"),
        ),
        pictures=_pictures(np.asarray(broken), np.asarray(repaired), before, final, residuals, bound),
    )


def features_with_holes(hidden: float, seed: int) -> np.ndarray:
    """scikit-learn's breast-cancer features [569, 30], with a share of each column replaced by NaN."""
    from sklearn.datasets import load_breast_cancer

    features = load_breast_cancer().data.copy()
    random = np.random.default_rng(seed)
    count = round(hidden * features.shape[0])
    for column in features.T:
        column[random.choice(column.size, count, replace=False)] = np.nan
    return features


def pairwise_correlation(features: np.ndarray) -> np.ndarray:
    """Correlations [k, k] of columns [m, k], each over the rows where both columns are known."""
    known = ~np.isnan(features)
    result = np.eye(features.shape[1])
    for i in range(features.shape[1]):
        for j in range(i):
            both = known[:, i] & known[:, j]
            result[i, j] = result[j, i] = np.corrcoef(features[both, i], features[both, j])[0, 1]
    return result


def two_projections(x: jax.Array) -> jax.Array:
    """Projection onto the positive semidefinite matrices, then onto the symmetric ones with unit diagonal."""
    return unit_diagonal(semidefinite(x))


def semidefinite(x: jax.Array) -> jax.Array:
    """The nearest positive semidefinite matrix: negative eigenvalues become 0."""
    values, vectors = jnp.linalg.eigh(x)
    return (vectors * jnp.maximum(values, 0)) @ vectors.T


def unit_diagonal(x: jax.Array) -> jax.Array:
    """The nearest matrix with unit diagonal."""
    return x.at[jnp.diag_indices(x.shape[0])].set(1)


def rescaled(x: jax.Array) -> jax.Array:
    """A correlation matrix beside x: semidefinite, then scaled by its own diagonal."""
    x = semidefinite(x)
    scale = 1 / jnp.sqrt(jnp.diag(x))
    return unit_diagonal(scale[:, None] * x * scale[None, :])


def _pictures(
    broken: np.ndarray,
    repaired: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    residuals: np.ndarray,
    bound: np.ndarray,
) -> tuple[Picture, ...]:
    canvas, (left, middle, right) = figure(1, 3, size=(10.5, 3.5))
    change = repaired - broken
    top = np.abs(change).max()
    shown = left.imshow(change, cmap="RdBu_r", vmin=-top, vmax=top)
    image(left, "repaired minus broken")
    canvas.colorbar(shown, ax=left, shrink=0.8).ax.tick_params(labelsize=8)
    count = min(14, before.size)
    order = np.arange(1, count + 1)
    middle.axhline(0, color=GREY, linewidth=0.8)
    middle.plot(order, before[:count], "o", color=ORANGE, label="before", markersize=5)
    middle.plot(order, after[:count], "o", color=BLUE, label="after", markersize=4)
    middle.set_xticks(order[1::2])
    curves(middle, "lowest eigenvalues", "number, from below", "eigenvalue", log=False)
    steps = np.arange(1, residuals.size)
    right.plot(steps, bound[1:], "--", color=GREY, label="2 ||x0 - x*|| / (N + 1)")
    right.plot(steps, residuals[1:], color=GREEN, label="||x - T(x)||")
    right.set_xscale("log")
    curves(right, "Halpern's residual and its bound", "step N", "Frobenius norm")
    caption = "What the repair changed, the low end of the spectrum before and after, and the residual under its bound."
    return (Picture("correlation", canvas, caption),)
