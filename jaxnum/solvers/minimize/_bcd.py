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

from jaxnum.core import trees
from jaxnum.core.problems import Minimize
from jaxnum.core.solver import Measure, Solver
from jaxnum.curvature import hessian_product
from jaxnum.solvers.minimize import active as identification
from jaxnum.solvers.minimize import flat, updates
from jaxnum.solvers.minimize import selection as rules
from jaxnum.solvers.minimize._forest_solve import Forest
from kernels_pallas import checks

PyTree = Any

_SELECTIONS = ("gs", "gsl", "gsd", "gsq", "gsn", "cyclic", "random")
_UPDATES = ("newton", "matrix", "gradient")
# Steps after which A x is computed anew.
_RECOMPUTE = 500


class BCDState(NamedTuple):
    """What the next step starts from.

    Attributes:
      gradient: [d] at x, of the smooth part; None where only the block's is computed.
      image: [n] A x, None for a problem without A.
      bounds: [d] of the second derivatives, as far as they have been found; None where they are given.
      active: what has been seen of the active set, None unless it is looked for.
      count: [] int32, steps taken.
      mark: [] int32, a Status found on the way, else 0.
    """

    gradient: Any
    image: Any
    bounds: Any
    active: Any
    count: jax.Array
    mark: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["lipschitz", "hessian", "blocks", "identify_after", "key"],
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
    identify_after: Any
    key: Any


def bcd(
    *,
    selection: str = "gs",
    update: str = "newton",
    block_size: int = 8,
    blocks: Any = None,
    lipschitz: Any = None,
    hessian: Any = None,
    identify_after: int | None = None,
    key: jax.Array | None = None,
) -> Solver:
    """Block coordinate descent x_B <- x_B + d_B, the block B chosen anew at each step; for the lasso and bounds too.

    It minimises f + h, f smooth, h separable, 0 or given by its resolvent (see `jaxnum.Minimize`). With the gradient g
    of f, blocks B of tau coordinates, H a bound of the Hessian (H - f'' positive semidefinite) and L_B that of its
    block, the selections are

    - "gs" (Gauss-Southwell): the largest |g_B|;
    - "gsl": the largest |g_B|² / L_B; without fixed blocks the tau largest g_i² / L_i;
    - "gsd": the largest sum of g_i² / D_i over B, D a diagonal bound of every block: the row sums of |H|, or tau L_i;
    - "gsq": the largest g_Bᵀ H_BB⁻¹ g_B, the decrease that an exact step promises; over all blocks of tau coordinates,
      which is combinatorial, ten iterations of hard thresholding towards it;
    - "gsn": the same with the Hessian at x, formed densely;
    - "cyclic", "random": whatever the gradient.

    With a resolvent, "gs", "gsl" and "gsd" put in place of g_i² / 2 c, for c the largest L_i, L_i or D_i, how far
    g_i d + c d² / 2 + h_i(x_i + d) - h_i(x_i) falls below 0 at its best d; where the problem has no penalty, c d² / 2,
    which is a lower bound of that.

    The updates are "newton", d_B = -t f''(x)_BB⁻¹ g_B, with t by Armijo backtracking (an indefinite block is shifted
    until it is not); "matrix", d_B = -H_BB⁻¹ g_B; "gradient", d_B = -g_B / L_B. With a resolvent they minimise the same
    models plus h: by five Gauss-Seidel sweeps, and the gradient's in closed form. Greedy choice, variable blocks and
    "newton" or "matrix" converge in the fewest steps.

    Args:
      selection: one of the above; the first three for a problem with a resolvent, or one that ignores the gradient.
      update: one of the above.
      block_size: tau, Python int >= 1, of variable blocks; more than there are unknowns means all of them, which is
        Newton's method. Ignored with `blocks`.
      blocks: None, or fixed blocks: int [K, tau] of coordinates in the order in which the leaves of x are raveled, -1
        where a block is shorter (see `bcd_partition`); or forests in the graph of the Hessian, which "newton" solves
        for exactly whatever their size (see `bcd_partition_forests`; "gs", "gsd", or rules that ignore the gradient).
        "cyclic" without blocks goes through the coordinates in order.
      lipschitz: None, or [d] > 0 bounds of the second derivatives along the coordinates. With neither it nor `hessian`,
        "gradient" estimates them: from a low guess, the largest of the block is doubled until the step decreases f as
        it promises, and kept for each of its coordinates. "gs" suits these best: "gsl" visits every low guess first.
      hessian: None, or [d, d] a bound of the Hessian, as AᵀA for 0.5 |A x - b|², AᵀA / 4 for the logistic loss. It
        serves as `lipschitz` too, by its diagonal.
      identify_after: None, or for a problem with a resolvent a Python int >= 1: when the coordinates at a kink or a
        bound have been the same for so many steps, Newton steps are taken on all others, by conjugate gradients, for
        as long as each halves the residual. Near a solution that is not degenerate the end is quadratic.
      key: typed random key for "random".

    Returns:
      A Solver for `Minimize`. It stops at |gradient| <= atol + rtol (scale 1, as the gtol of scipy.optimize), with a
      resolvent at |x - resolvent(x - g, 1)|. Bounds that are too small make "matrix" and "gradient" diverge:
      `nonfinite`, with the last finite x. `stagnated`: no step along the Newton direction decreases f, or no constant
      is large enough.

    Raises:
      ValueError: an unknown option, an option that the rule needs is missing, options that do not go together, a block
        is empty, a coordinate is in no block, a bound of `lipschitz` is not positive; at the solve, an option does not
        fit a problem with a resolvent, or one without.
      ShapeError, DtypeError: an array has the wrong shape or dtype; at the solve, one does not fit x.

    Cost: one gradient of f a step (f is any function, so a partial gradient costs no less), and for "newton" tau
      Hessian products and a factorisation of tau³; of a forest three products, and as many turns of four short loops as
      it has levels. "gsq" over variable blocks costs ten products with H, "gsn" d
      Hessian products. For a problem f(A x) with A [n, d] the image A x is kept: a step costs O(n tau) beside its one
      product with Aᵀ, and "cyclic" and "random" take only the rows that they need of that, so that with
      `check_every=d // tau` a pass over all blocks costs about one gradient. Estimating costs a gradient or two more.

    Numerics: f is compared up to 8 roundings. float32 runs end near |gradient| of 1e-6 times its terms. A x is computed
      anew every 500 steps.

    Source: Nutini, Laradji & Schmidt, "Let's make block coordinate descent converge faster" (2022), sections 2 to 6.
      Here a Newton step on the coordinates that are free is a semismooth one, and judged by the residual.

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
    ok = identify_after is None or (
        isinstance(identify_after, int) and not isinstance(identify_after, bool) and identify_after >= 1
    )
    checks.value("bcd", "identify_after", ok, "be None or a Python int >= 1", identify_after)
    bounded = hessian is not None or lipschitz is not None
    needs_bound = bounded or selection not in ("gsl", "gsd") or update == "gradient"
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
        if not checks.traced(lipschitz):
            least = float(jnp.min(lipschitz, initial=jnp.inf))
            checks.value("bcd", "lipschitz", least > 0, "be greater than 0 everywhere", least)
    coordinates = None
    if isinstance(blocks, Forest):
        coordinates = rules.check_forests(blocks, selection, update)
    elif blocks is not None:
        blocks = jnp.asarray(rules.checked(blocks))
        coordinates = int(blocks.max()) + 1
    patience = None if identify_after is None else jnp.asarray(identify_after, jnp.int32)
    hyper = _Hyper(selection, update, block_size, coordinates, lipschitz, hessian, blocks, patience, key)
    return Solver(name="bcd", init=_init, step=_step, measure=_measure, problem=Minimize, hyper=hyper)


def _init(hyper: _Hyper, x: PyTree, problem: Minimize) -> BCDState:
    z, tree = flat.flatten(x)
    _check_fit(hyper, z.size, problem)
    image = problem.image(z) if problem.A is not None else None
    here = updates.Here(problem, tree, z, flat.gradient(problem, z, tree, image), image)
    bounds = updates.first_guess(here) if _estimates(hyper) else None
    active = None if hyper.identify_after is None else identification.start(z.size, z.dtype)
    gradient = None if _lazy(hyper, problem) else here.gradient
    return BCDState(gradient, image, bounds, active, jnp.int32(0), jnp.int32(0))


def _check_fit(hyper: _Hyper, size: int, problem: Minimize) -> None:
    remedy = "It has one row for each entry of x."
    checks.shape("bcd", remedy=remedy, lipschitz=(hyper.lipschitz, f"{size}"))
    checks.shape("bcd", remedy=remedy, hessian=(hyper.hessian, f"{size} {size}"))
    whole = hyper.coordinates in (None, size)
    checks.value("bcd", "blocks", whole, f"hold the {size} entries of x", f"{hyper.coordinates} coordinates")
    smooth = problem.resolvent is None
    solid = smooth or not isinstance(hyper.blocks, Forest)
    checks.value("bcd", "blocks", solid, "be no forests for a problem with a resolvent", "forests")
    known = smooth or hyper.selection not in ("gsq", "gsn")
    wanted = "be 'gs', 'gsl' or 'gsd' for a problem with a resolvent"
    checks.value("bcd", "selection", known, wanted, hyper.selection, "These add up what each coordinate promises.")
    valued = smooth or problem.penalty is not None or hyper.update != "newton"
    wanted = "have a penalty beside its resolvent for 'newton'"
    checks.value("bcd", "problem", valued, wanted, "none", "Give it, or take the update gradient.")
    kinked = not smooth or hyper.identify_after is None
    checks.value("bcd", "identify_after", kinked, "be None for a problem without a resolvent", "another")


def _estimates(hyper: _Hyper) -> bool:
    """Whether the bounds are found by doubling."""
    return hyper.update == "gradient" and hyper.lipschitz is None and hyper.hessian is None


def _lazy(hyper: _Hyper, problem: Minimize) -> bool:
    """Whether the gradient is needed on the block alone."""
    return problem.A is not None and hyper.selection in ("cyclic", "random") and hyper.identify_after is None


def _step(hyper: _Hyper, x: PyTree, state: BCDState, problem: Minimize) -> tuple[PyTree, BCDState]:
    z, tree = flat.flatten(x)
    block, number = _choose(hyper, z, state, problem, tree)
    g = state.gradient
    if g is None:
        rows = problem.A.T[block.index]
        g = block.spread(jnp.matmul(rows, jax.grad(problem.outer)(state.image), precision="highest"), z.size)
    here = updates.Here(problem, tree, z, g, state.image)
    bounds, mark, zero = state.bounds, state.mark, jnp.int32(0)
    if isinstance(hyper.blocks, Forest):
        target, found = updates.forest(here, block, jax.tree.map(lambda leaf: leaf[number], hyper.blocks))
    elif hyper.update == "newton":
        target, found = updates.newton(here, block)
    elif hyper.update == "matrix":
        target, found = updates.matrix(here, block, _cast(hyper.hessian, z)), zero
    elif bounds is None:
        target, found = (
            updates.gradient(here, block, rules.block_bound(block, _given(hyper, z), _cast(hyper.hessian, z))),
            zero,
        )
    else:
        L, found = updates.doubled(here, block, jnp.max(block.of(bounds)))
        target, bounds = updates.gradient(here, block, L), block.put(bounds, jnp.full(block.index.shape, L))
    z1 = block.put(z, target)
    mark = jnp.where(found != 0, found, mark)
    if state.active is None:
        image = None if state.image is None else _moved_image(here, block, z1, state.count)
        g1 = None if state.gradient is None else flat.gradient(problem, z1, tree, image)
        return tree(z1), BCDState(g1, image, bounds, None, state.count + 1, mark)
    return _identified(hyper, here, state, z1, bounds, mark)


def _moved_image(here: updates.Here, block: rules.Block, z1: jax.Array, count: jax.Array) -> jax.Array:
    """A z1, by the columns of the block; now and then as a whole, lest roundings add up."""
    tracked = here.image + here.shift(block, (z1 - here.z)[block.index])
    return jax.lax.cond((count + 1) % _RECOMPUTE == 0, lambda: here.problem.image(z1), lambda: tracked)


def _identified(
    hyper: _Hyper, here: updates.Here, state: BCDState, z1: jax.Array, bounds: Any, mark: jax.Array
) -> tuple[PyTree, BCDState]:
    """The step to z1, or a Newton step where the active set has stayed the same for long enough."""
    problem, tree, z, g, active = here.problem, here.tree, here.z, here.gradient, state.active
    steps = 1 / _curvature(hyper, state, z)
    tried = active.waited >= hyper.identify_after
    z1 = jnp.where(tried, identification.newton(problem, z, g, steps, tree, tried), z1)
    image = None if state.image is None else problem.image(z1)
    g1 = flat.gradient(problem, z1, tree, image)
    before, after = (flat.residual(problem, *pair, tree) for pair in ((z, g), (z1, g1)))
    taken = ~tried | identification.better(active, before, after)
    z1, g1, image = trees.where(taken, (z1, g1, image), (z, g, state.image))
    free = identification.linearized(problem, z1, g1, steps, tree)[1] > 0
    active = identification.seen(active, free, after, tried, taken)
    mark = jnp.where(tried, state.mark, mark)
    return tree(z1), BCDState(g1, image, bounds, active, state.count + 1, mark)


def _cast(array: Any, z: jax.Array) -> Any:
    return None if array is None else array.astype(z.dtype)


def _given(hyper: _Hyper, z: jax.Array) -> Any:
    """The bounds of the coordinates that the caller gave, or None."""
    if hyper.lipschitz is None and hyper.hessian is not None:
        return jnp.diag(_cast(hyper.hessian, z))
    return _cast(hyper.lipschitz, z)


def _curvature(hyper: _Hyper, state: BCDState, z: jax.Array) -> jax.Array:
    """Bounds of the coordinates, as given, as found so far, or 1; a coordinate that f ignores has 1 too.  [d]"""
    bounds = _given(hyper, z) if state.bounds is None else state.bounds
    return jnp.ones_like(z) if bounds is None else jnp.where(bounds > 0, bounds, 1)


def _choose(hyper: _Hyper, z: jax.Array, state: BCDState, problem: Minimize, tree: Any) -> tuple[rules.Block, Any]:
    """The block of this step, and its number where blocks are fixed. No derivative goes through a choice."""
    z, state, problem = jax.lax.stop_gradient((z, state, problem))
    rule, H, g = hyper.selection, _cast(hyper.hessian, z), state.gradient
    bounds = _curvature(hyper, state, z)
    size = min(hyper.block_size, z.size) if hyper.blocks is None else rules.width(hyper.blocks)
    if rule == "gsn":
        product = hessian_product(flat.value(problem, tree), z)
        H = jax.vmap(product)(jnp.eye(z.size, dtype=z.dtype))
        # A direction of negative curvature has no finite best step: the rule takes it for what its size says.
        H = updates.positive((H + H.T) / 2)
    if rule == "gsd":
        bounds = size * bounds if H is None else jnp.sum(jnp.abs(H), axis=1)
        bounds = jnp.where(bounds > 0, bounds, 1)
    if problem.resolvent is not None and g is not None:
        curvature = jnp.full_like(z, jnp.max(bounds)) if rule == "gs" else bounds
        penalty = None if problem.penalty is None else lambda v: flat.penalty(problem, v, tree)
        g = rules.promised(g, z, curvature, lambda v, t: flat.backward(problem, v, t, tree), penalty)
    if hyper.blocks is None:
        return rules.choose_variable(rule, size, z.size, g, bounds, H, state.count, hyper.key), None
    blocks = rules.fixed(hyper.blocks)
    number = rules.choose_fixed(rule, blocks, g, bounds, H, state.count, hyper.key)
    return jax.tree.map(lambda leaf: leaf[number], blocks), number


def _measure(hyper: _Hyper, x: PyTree, state: BCDState, problem: Minimize) -> Measure:
    z, tree = flat.flatten(x)
    g = flat.gradient(problem, z, tree, state.image) if state.gradient is None else state.gradient
    residual = flat.residual(problem, z, g, tree)
    return Measure(residual, jnp.ones_like(residual), state.mark)
