"""Block coordinate descent: a few coordinates a step, chosen by what they promise.

Cost: one gradient a step; with Newton updates a block of the Hessian by as many Hessian products as it has columns.
Source: Nutini, Laradji & Schmidt 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core.problems import Minimize
from jaxnum.core.solver import Measure, Solver
from jaxnum.core.status import Status
from jaxnum.curvature import hessian_product
from jaxnum.solvers.minimize import flat
from jaxnum.solvers.minimize import selection as rules
from kernels_pallas import checks

PyTree = Any

_SELECTIONS = ("gs", "gsl", "gsd", "gsq", "gsn", "cyclic", "random")
_UPDATES = ("newton", "matrix", "gradient")


class BCDState(NamedTuple):
    """What the next step starts from.

    Attributes:
      gradient: [d] at x.
      count: [] int32, steps taken.
      mark: [] int32, a Status found on the way, else 0.
    """

    gradient: jax.Array
    count: jax.Array
    mark: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["lipschitz", "hessian", "blocks", "key"],
    meta_fields=["selection", "update", "block_size", "coordinates"],
)
@dataclass(frozen=True)
class _Hyper:
    selection: str
    update: str
    block_size: int
    coordinates: int | None  # in the fixed blocks
    lipschitz: Any
    hessian: Any
    blocks: Any
    key: Any


def bcd(
    *,
    selection: str = "gs",
    update: str = "newton",
    block_size: int = 8,
    blocks: Any = None,
    lipschitz: Any = None,
    hessian: Any = None,
    key: jax.Array | None = None,
) -> Solver:
    """Block coordinate descent x_B <- x_B + d_B for a smooth f, the block B chosen anew at each step.

    With the gradient g, blocks B of tau coordinates, H a bound of the Hessian (H - f'' positive semidefinite) and L_B
    that of its block, the selections are

    - "gs" (Gauss-Southwell): the largest |g_B|;
    - "gsl": the largest |g_B|² / L_B; without fixed blocks the tau largest g_i² / L_i;
    - "gsd": the largest sum of g_i² / D_i over B, D a diagonal bound of every block: the row sums of |H|, or tau L_i;
    - "gsq": the largest g_Bᵀ H_BB⁻¹ g_B, the decrease that an exact step promises; over all blocks of tau coordinates,
      which is combinatorial, ten iterations of hard thresholding towards it;
    - "gsn": the same with the Hessian at x, formed densely;
    - "cyclic", "random": whatever the gradient.

    The updates are "newton", d_B = -t f''(x)_BB⁻¹ g_B, with t by Armijo backtracking (an indefinite block is shifted
    until it is not); "matrix", d_B = -H_BB⁻¹ g_B; "gradient", d_B = -g_B / L_B. Greedy choice, variable blocks and
    "newton" or "matrix" converge in the fewest steps.

    Args:
      selection: one of the above.
      update: one of the above.
      block_size: tau, Python int >= 1, of variable blocks; more than there are unknowns means all of them, which is
        Newton's method. Ignored with `blocks`.
      blocks: None, or fixed blocks: int [K, tau] of coordinates in the order in which the leaves of x are raveled, -1
        where a block is shorter. See `bcd_partition`. "cyclic" without blocks goes through them in order.
      lipschitz: None, or [d] > 0 bounds of the second derivatives along the coordinates.
      hessian: None, or [d, d] a bound of the Hessian, as AᵀA for 0.5 |A x - b|², AᵀA / 4 for the logistic loss. It
        serves as `lipschitz` too, by its diagonal.
      key: typed random key for "random".

    Returns:
      A Solver for `Minimize`. It stops at |gradient| <= atol + rtol (scale 1, as the gtol of scipy.optimize). Bounds
      that are too small make "matrix" and "gradient" diverge: `nonfinite`, with the last finite x. `stagnated`: no step
      along the Newton direction decreases f.

    Raises:
      ValueError: an unknown option, an option that the rule needs is missing, a block is empty, a coordinate is in no
        block.
      ShapeError, DtypeError: an array has the wrong shape or dtype; at the solve, one does not fit x.

    Cost: one gradient of f a step (f is any function, so a partial gradient costs no less), and for "newton" tau
      Hessian products and a factorisation of tau³. "gsq" over variable blocks costs ten products with H, "gsn" d
      Hessian products.

    Numerics: f is compared up to 8 roundings. float32 runs end near |gradient| of 1e-6 times its terms.

    Source: Nutini, Laradji & Schmidt, "Let's make block coordinate descent converge faster" (2022), sections 2 to 4.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> A = jnp.array([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 4.0]])
      >>> f = lambda x: 0.5 * x @ A @ x - jnp.sum(x)
      >>> solution = jaxnum.solve(jaxnum.solvers.bcd(block_size=2), jnp.zeros(3), jaxnum.Minimize(f))
      >>> bool(jnp.allclose(A @ solution.x, 1.0, atol=1e-4))
      True
    """
    checks.choice("bcd", "selection", selection, _SELECTIONS)
    checks.choice("bcd", "update", update, _UPDATES)
    ok = isinstance(block_size, int) and not isinstance(block_size, bool) and block_size >= 1
    checks.value("bcd", "block_size", ok, "be a Python int >= 1", block_size, "An empty block cannot move.")
    bounded = hessian is not None or lipschitz is not None
    needs_bound = bounded or (selection not in ("gsl", "gsd") and update != "gradient")
    wanted = f"be given, or `hessian`, for {selection!r} and {update!r}"
    checks.value("bcd", "lipschitz", needs_bound, wanted, None, "Bound the second derivatives, or take gs and newton.")
    needs_matrix = hessian is not None or (selection != "gsq" and update != "matrix")
    remedy = "Take gsn and newton, which form it from f."
    checks.value("bcd", "hessian", needs_matrix, f"be given for {selection!r} and {update!r}", None, remedy)
    needs_key = key is not None or selection != "random"
    checks.value("bcd", "key", needs_key, "be given for 'random'", None, "Make one with jax.random.key(seed).")
    if hessian is not None:
        checks.shape("bcd", hessian=(hessian, "D D"))
        hessian = jnp.asarray(hessian)
    if lipschitz is not None:
        checks.shape("bcd", lipschitz=(lipschitz, "D"))
        lipschitz = jnp.asarray(lipschitz)
    coordinates = None
    if blocks is not None:
        blocks = _checked_blocks(blocks)
        coordinates = int(blocks.max()) + 1
        blocks = jnp.asarray(blocks)
    hyper = _Hyper(selection, update, block_size, coordinates, lipschitz, hessian, blocks, key)
    return Solver(name="bcd", init=_init, step=_step, measure=_measure, problem=Minimize, hyper=hyper)


def bcd_partition(lipschitz: Any, block_size: int, *, order: str = "sorted") -> np.ndarray:
    """Fixed blocks for `bcd`, each coordinate in one.

    Args:
      lipschitz: [d] bounds of the second derivatives along the coordinates, concrete.
      block_size: coordinates in a block, Python int >= 1; the last block may have fewer.
      order: "sorted" puts large bounds with large ones, which the paper finds best; "average" deals them out like
        cards; "given" leaves the coordinates where they are.

    Returns:
      int32 [K, block_size], -1 where the last block ends.

    Raises:
      ValueError: an unknown order, block_size below 1, no coordinates.
      ShapeError: lipschitz is not one axis.

    Cost: one sort on the host.

    Source: Nutini, Laradji & Schmidt (2022), section 5.2.

    Example:
      >>> import numpy as np
      >>> bcd_partition(np.array([1.0, 9.0, 2.0, 8.0]), 2).tolist()
      [[1, 3], [2, 0]]
    """
    checks.choice("bcd_partition", "order", order, ("sorted", "average", "given"))
    checks.shape("bcd_partition", lipschitz=(lipschitz, "D"))
    ok = isinstance(block_size, int) and not isinstance(block_size, bool) and block_size >= 1
    checks.value("bcd_partition", "block_size", ok, "be a Python int >= 1", block_size)
    bounds = np.asarray(lipschitz)
    checks.value("bcd_partition", "lipschitz", bounds.size > 0, "have at least one entry", bounds.size)
    ranked = np.arange(bounds.size) if order == "given" else np.argsort(-bounds, kind="stable")
    count = -(-bounds.size // block_size)
    padded = np.full(count * block_size, -1, np.int32)
    padded[: bounds.size] = ranked
    return padded.reshape(block_size, count).T.copy() if order == "average" else padded.reshape(count, block_size)


def _checked_blocks(blocks: Any) -> np.ndarray:
    checks.shape("bcd", blocks=(blocks, "K T"))
    given = np.asarray(blocks)
    checks.dtype("bcd", "integer", blocks=given)
    empty = [] if given.size else ["all"]
    empty += np.flatnonzero((given < 0).all(axis=1)).tolist() if given.size else []
    checks.value("bcd", "blocks", not empty, "have a coordinate in every block", f"empty blocks {empty[:5]}")
    missing = sorted(set(range(given.max() + 1)) - set(given.ravel().tolist()))
    checks.value("bcd", "blocks", not missing, "cover every coordinate", f"blocks without {missing[:5]}")
    twice = [i for i, row in enumerate(given) if len(set(row[row >= 0])) < np.sum(row >= 0)]
    checks.value("bcd", "blocks", not twice, "name a coordinate once in a block", f"it twice in blocks {twice[:5]}")
    return given.astype(np.int32)


def _init(hyper: _Hyper, x: PyTree, problem: Minimize) -> BCDState:
    z, tree = flat.flatten(x)
    remedy = "It has one row for each entry of x."
    checks.shape("bcd", remedy=remedy, lipschitz=(hyper.lipschitz, f"{z.size}"))
    checks.shape("bcd", remedy=remedy, hessian=(hyper.hessian, f"{z.size} {z.size}"))
    whole = hyper.coordinates in (None, z.size)
    checks.value("bcd", "blocks", whole, f"hold the {z.size} entries of x", f"{hyper.coordinates} coordinates")
    return BCDState(flat.gradient(problem, z, tree), jnp.int32(0), jnp.int32(0))


def _step(hyper: _Hyper, x: PyTree, state: BCDState, problem: Minimize) -> tuple[PyTree, BCDState]:
    z, tree = flat.flatten(x)
    g = state.gradient
    block = _choose(hyper, z, state, problem, tree)
    gb = block.of(g)
    if hyper.update == "newton":
        columns = _block_hessian(block, z, problem, tree)
        db = -jnp.linalg.solve(_positive(columns), gb)
    elif hyper.update == "matrix":
        db = -jnp.linalg.solve(_positive(block.matrix(hyper.hessian.astype(z.dtype))), gb)
    else:
        bound = rules.block_bound(block, _cast(hyper.lipschitz, z), _cast(hyper.hessian, z))
        db = -gb / jnp.where(bound > 0, bound, 1)
    d, mark = block.spread(db, z.size), state.mark
    if hyper.update == "newton":
        frozen = jax.lax.stop_gradient(problem)
        t = flat.armijo(flat.value(frozen, tree), z, d, jnp.sum(gb * db))
        d = t * d
        # Where the block's gradient is exactly zero there is nothing to gain, and nothing amiss.
        mark = jnp.where((t == 0) & jnp.any(gb != 0), jnp.int32(Status.stagnated), mark)
    z = z + d
    return tree(z), BCDState(flat.gradient(problem, z, tree), state.count + 1, mark)


def _cast(array: Any, z: jax.Array) -> Any:
    return None if array is None else array.astype(z.dtype)


def _choose(hyper: _Hyper, z: jax.Array, state: BCDState, problem: Minimize, tree: Any) -> rules.Block:
    """The block of this step. A choice has no derivative, so nothing is differentiated."""
    z, g, problem = jax.lax.stop_gradient((z, state.gradient, problem))
    rule, H = hyper.selection, _cast(hyper.hessian, z)
    bounds = jnp.diag(H) if hyper.lipschitz is None and H is not None else _cast(hyper.lipschitz, z)
    size = min(hyper.block_size, z.size) if hyper.blocks is None else hyper.blocks.shape[1]
    if rule == "gsn":
        product = hessian_product(flat.value(problem, tree), z)
        H = jax.vmap(product)(jnp.eye(z.size, dtype=z.dtype))
        # A direction of negative curvature has no finite best step: the rule takes it for what its size says.
        H = _positive((H + H.T) / 2)
    if rule == "gsd":
        bounds = size * bounds if H is None else jnp.sum(jnp.abs(H), axis=1)
    if bounds is not None:
        # A coordinate that f does not depend on has no gradient either.
        bounds = jnp.where(bounds > 0, bounds, 1)
    if hyper.blocks is not None:
        return rules.choose_fixed(rule, hyper.blocks, g, bounds, H, state.count, hyper.key)
    return rules.choose_variable(rule, size, g, bounds, H, state.count, hyper.key)


def _block_hessian(block: rules.Block, z: jax.Array, problem: Minimize, tree: Any) -> jax.Array:
    """The block of the Hessian at z, one product a column.  [tau, tau]"""
    product = hessian_product(flat.value(problem, tree), z)
    basis = jax.vmap(lambda i: (jnp.arange(z.size) == i).astype(z.dtype))(block.index)
    columns = jax.vmap(lambda e: product(e)[block.index], out_axes=1)(basis)
    return block.padded((columns + columns.T) / 2)


def _positive(H: jax.Array) -> jax.Array:
    """H where it is safely positive definite, else shifted by what turns its lowest eigenvalue positive."""
    values = jnp.linalg.eigvalsh(jax.lax.stop_gradient(H))
    size = jnp.max(jnp.abs(values))
    floor = jnp.where(size > 0, jnp.finfo(H.dtype).eps ** 0.5 * size, 1)
    lowest = values[0]
    shift = jnp.where(lowest > floor, 0, floor + jnp.maximum(-2 * lowest, 0))
    # NaN stays: the driver sees it in the gradient.
    return H + shift * jnp.eye(H.shape[0], dtype=H.dtype)


def _measure(hyper: _Hyper, x: PyTree, state: BCDState, problem: Minimize) -> Measure:
    residual = jnp.sqrt(jnp.sum(state.gradient**2))
    return Measure(residual, jnp.ones_like(residual), state.mark)
