"""Many problems of one shape, each with its own steps and status."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core import progress as progress_
from jaxnum.core.solver import Phases, Solution, Solver, drive
from jaxnum.core.status import SolverError, Status, sentence
from kernels_pallas import checks

PyTree = Any


def solve_batched(
    solver: Solver | Phases,
    x0: PyTree,
    problem: Any,
    *,
    in_axes: Any = 0,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int | None = None,
    check_every: int | None = None,
    history: bool = False,
    adjoint: str = "implicit",
    checkpoint_every: int | None = None,
    progress: Any = None,
    on_failure: str = "raise",
) -> Solution:
    """Solve a batch of problems as if each were solved alone.

    `vmap` runs every lane of a loop until the slowest has ended. Here a CPU runs the lanes one after the other
    (`jax.lax.map`), each as long as it needs; an accelerator runs them side by side (`vmap`).

    Args:
      solver: as for `solve`.
      x0: starting points; leaves [batch, ...] along their axis of `in_axes`.
      problem: a problem whose leaves are batched likewise.
      in_axes: an int for every leaf that is not a scalar (scalars are shared), or a pair (axes of x0, axes of problem),
        each an int, None, or a tree prefix as for `jax.vmap`.
      rtol: as for `solve`, shared by the lanes.
      atol: as for `solve`, shared by the lanes.
      max_steps: as for `solve`.
      check_every: as for `solve`.
      history: as for `solve`.
      adjoint: as for `solve`.
      checkpoint_every: as for `solve`.
      progress: as for `solve`; the lanes report one after the other or interleaved.
      on_failure: "raise" makes an eager call with a failed lane raise SolverError and name the lanes.

    Returns:
      A Solution whose every leaf has a leading batch axis. Equal to separate solves; steps within 1, since rounding may
      flip a threshold.

    Raises:
      ShapeError: leaves that disagree about the batch size.
      SolverError: an eager call in which a lane did not converge.
    """
    name = "solve_batched"
    arguments = (x0, problem)
    axes = (in_axes, in_axes) if not isinstance(in_axes, (tuple, list)) else tuple(in_axes)
    checks.value(name, "in_axes", len(axes) == 2, "be an int or a pair (x0 axes, problem axes)", in_axes)
    flat, treedef = jax.tree.flatten(arguments)
    flat_axes = _leaf_axes(arguments, axes, shared_scalars=isinstance(in_axes, int))
    sizes = {jnp.shape(leaf)[axis] for leaf, axis in zip(flat, flat_axes, strict=True) if axis is not None}
    checks.value(
        name,
        "in_axes",
        len(sizes) == 1,
        "select axes of one size",
        sorted(sizes),
        "Mark unbatched leaves with None.",
        checks.ShapeError,
    )

    # User functions are traced on one lane here, so that the compiled batch is found again on the next call.
    lane = [
        leaf if axis is None else _Lane(jnp.shape(leaf), jnp.result_type(leaf), axis, leaf)
        for leaf, axis in zip(flat, flat_axes, strict=True)
    ]
    x_lane, problem_lane = jax.tree.unflatten(treedef, lane)
    leaves, treedef = jax.tree.flatten((x_lane, problem_lane.traced(x_lane)))
    hook = progress_.resolve(name, progress)
    progress_.announce(hook, 0 if max_steps is None else max_steps)
    options = _Options(
        treedef,
        tuple(isinstance(leaf, _Lane) for leaf in leaves),
        max_steps,
        check_every,
        history,
        adjoint,
        checkpoint_every,
        hook,
    )
    mapped = [jnp.moveaxis(jnp.asarray(leaf.batch), leaf.axis, 0) for leaf in leaves if isinstance(leaf, _Lane)]
    shared = [leaf for leaf in leaves if not isinstance(leaf, _Lane)]
    solution = _solve_lanes(options, solver, mapped, shared, rtol, atol)
    if on_failure == "raise":
        raise_unless_all_converged(name, solution)
    return solution


class _Options(NamedTuple):
    """The static part of a batched call."""

    treedef: Any
    is_mapped: tuple[bool, ...]
    max_steps: int | None
    check_every: int | None
    history: bool
    adjoint: str
    checkpoint_every: int | None
    hook: Any


class _Lane(jax.ShapeDtypeStruct):
    """The abstract value of one lane of a batched leaf, which remembers the batch."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, axis: int, batch: Any):
        axis = range(len(shape))[axis]
        super().__init__(shape[:axis] + shape[axis + 1 :], dtype)
        self.axis = axis
        self.batch = batch


@partial(jax.jit, static_argnames=("options",))
def _solve_lanes(
    options: _Options, solver: Solver | Phases, mapped: list, shared: list, rtol: Any, atol: Any
) -> Solution:
    def one(lane: list[jax.Array]) -> Solution:
        own, common = iter(lane), iter(shared)
        leaves = [next(own) if is_mapped else next(common) for is_mapped in options.is_mapped]
        x0, problem = jax.tree.unflatten(options.treedef, leaves)
        return drive(
            "solve_batched",
            solver,
            x0,
            problem,
            rtol=rtol,
            atol=atol,
            max_steps=options.max_steps,
            check_every=options.check_every,
            history=options.history,
            adjoint=options.adjoint,
            checkpoint_every=options.checkpoint_every,
            progress=options.hook,
            on_failure="return",
        )

    return jax.lax.platform_dependent(mapped, cpu=partial(jax.lax.map, one), default=jax.vmap(one))


def _leaf_axes(arguments: tuple, axes: tuple, *, shared_scalars: bool) -> list[int | None]:
    """One axis, or None, for every leaf, from an axis tree that is a prefix of the arguments."""
    out: list[int | None] = []
    for tree, prefix in zip(arguments, axes, strict=True):
        if isinstance(prefix, int):
            out += [None if shared_scalars and jnp.ndim(x) == 0 else prefix for x in jax.tree.leaves(tree)]
        elif prefix is None:
            out += [None] * len(jax.tree.leaves(tree))
        else:
            spread = jax.tree.map(
                lambda axis, sub: [axis] * len(jax.tree.leaves(sub)),
                prefix,
                tree,
                is_leaf=lambda a: a is None,
            )
            out += [a for a in jax.tree.leaves(spread, is_leaf=lambda a: a is None)]
    return out


def raise_unless_all_converged(name: str, solution: Solution) -> None:
    """Raise SolverError if a concrete batch has a lane that did not converge; traced solutions pass."""
    if checks.traced(solution.status):
        return
    status = np.asarray(solution.status)
    failed = np.flatnonzero(status != Status.converged)
    if failed.size == 0:
        return
    shown = ", ".join(
        f"{i} ({Status(int(status[i])).name}, residual {float(solution.residual[i]):.3e})" for i in failed[:8]
    )
    more = f" and {failed.size - 8} more" if failed.size > 8 else ""
    first = Status(int(status[failed[0]]))
    text = f"{name}: {failed.size} of {status.size} lanes failed: {shown}{more}. {sentence(first)}"
    raise SolverError(text, solution, first)
