"""Solvers made of solvers: phases, restarts and computed starting points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.loops import Measure, begin
from jaxnum.core.solver import Phase, Phases, Solver
from kernels_pallas import checks

PyTree = Any


def phase(solver: Solver, *, rtol: Any = None, atol: Any = None, max_steps: int | None = None) -> Phase:
    """One loop of a composite solver, with its own stopping rule.

    Args:
      solver: the solver of this phase.
      rtol: relative tolerance of this phase, or None for the one given to `solve`.
      atol: absolute tolerance of this phase, or None for the one given to `solve`.
      max_steps: step limit of this phase, or None for the solver's.

    Returns:
      A Phase for `then`.
    """
    ok = max_steps is None or (isinstance(max_steps, int) and max_steps >= 0)
    checks.value("phase", "max_steps", ok, "be a Python int >= 0", max_steps)
    return Phase(solver, rtol, atol, max_steps)


def then(*members: Phase | Phases | Solver) -> Phases:
    """Solvers that run one after the other, each from where the last stopped.

    A phase that reaches its step limit hands over what it has; only the last phase decides the status. Each phase has a
    loop of its own, so under vmap no lane pays for a phase it is not in.

    Args:
      *members: phases, or solvers where the arguments of `solve` are to hold.

    Returns:
      Phases, which `solve` takes wherever it takes a Solver. `Solution.phase_steps` has one entry a phase.

    Example:
      >>> from jaxnum.solvers import halpern, phase, picard, then
      >>> quick_then_sure = then(phase(picard(), rtol=1e-2, max_steps=10), halpern())
    """
    checks.value("then", "members", len(members) >= 1, "hold at least one solver", len(members))
    phases: list[Phase] = []
    for member in members:
        if isinstance(member, Phases):
            phases += member.phases
        else:
            phases.append(member if isinstance(member, Phase) else Phase(member))
    return Phases(tuple(phases))


def warm_started(solver: Solver, start: Callable[[PyTree, Any], PyTree]) -> Phases:
    """A solver that computes its starting point from the problem: coarse solutions, closed forms, predictors.

    A starting point that is simply known is passed as x0.

    Args:
      solver: the solver to start.
      start: `start(x0, problem) -> x`, a module-level function (a fresh lambda costs a fresh compilation).

    Returns:
      Phases of one phase.
    """
    return Phases((Phase(solver, start=start),))


class RestartState(NamedTuple):
    """State of `restarted`: the inner state, steps since the restart, length of the last run, residual at its start."""

    inner: PyTree
    since: jax.Array
    length: jax.Array
    anchor: jax.Array


class _RestartHyper(NamedTuple):
    solver: Solver
    factor: jax.Array
    every: jax.Array


def restarted(solver: Solver, *, factor: float | jax.Array = 0.5, every: int | jax.Array | None = None) -> Solver:
    """Restart a solver from its current iterate: when the residual has fallen enough, or every so many steps.

    With `every=None` a restart happens when residual <= factor * (residual at the last restart), or, as a safeguard,
    when the residual exceeds that at the last restart after twice the length of the last run. Restarted Halpern is
    linearly convergent where the problem is sharp.

    Args:
      solver: the solver to restart.
      factor: real scalar in (0, 1), the fall that triggers a restart.
      every: restart after exactly this many steps instead, or None.

    Returns:
      A Solver of the same problem.

    Raises:
      ValueError: factor outside (0, 1), every below 1.

    Source: Applegate, Hinder, Lu & Lubin, "Faster first-order primal-dual methods for linear programming using
      restarts and sharpness" (2023), adaptive restarts; the safeguard is ours.

    Cost: one `init` of the inner solver at each restart (under vmap: at each step).
    """
    if not checks.traced(factor):
        checks.value("restarted", "factor", 0 < float(factor) < 1, "be in (0, 1)", factor)
    if every is not None and not checks.traced(every):
        checks.value("restarted", "every", int(every) >= 1, "be at least 1", every)
    hyper = _RestartHyper(solver, jnp.asarray(factor), jnp.asarray(0 if every is None else every, jnp.int32))
    return replace(
        solver,
        name=f"restarted {solver.name}",
        init=_restart_init,
        step=_restart_step,
        measure=_restart_measure,
        finish=_restart_finish if solver.finish else None,
        refresh=_restart_refresh if solver.refresh else None,
        hyper=hyper,
    )


def _restart_init(hyper: _RestartHyper, x: PyTree, problem: Any) -> RestartState:
    inner = begin(hyper.solver, x, problem)
    residual = hyper.solver.measure(hyper.solver.hyper, x, inner, problem).residual
    return RestartState(inner, jnp.int32(0), jnp.int32(1), residual)


def _restart_step(hyper: _RestartHyper, x: PyTree, state: RestartState, problem: Any) -> tuple[PyTree, RestartState]:
    solver = hyper.solver
    x, inner = solver.step(solver.hyper, x, state.inner, problem)
    residual = solver.measure(solver.hyper, x, inner, problem).residual
    since = state.since + 1
    fallen = residual <= hyper.factor * state.anchor
    risen = (residual > state.anchor) & (since >= 2 * state.length)
    due = jnp.where(hyper.every > 0, since >= hyper.every, fallen | risen)

    def fresh() -> RestartState:
        return RestartState(begin(solver, x, problem), jnp.zeros_like(since), since, residual)

    return x, jax.lax.cond(due, fresh, lambda: RestartState(inner, since, state.length, state.anchor))


def _restart_measure(hyper: _RestartHyper, x: PyTree, state: RestartState, problem: Any) -> Measure:
    return hyper.solver.measure(hyper.solver.hyper, x, state.inner, problem)


def _restart_finish(hyper: _RestartHyper, x: PyTree, state: RestartState, problem: Any) -> PyTree:
    finish: Callable = hyper.solver.finish  # pyright: ignore[reportAssignmentType]  # used only where there is one
    return finish(hyper.solver.hyper, x, state.inner, problem)


def _restart_refresh(hyper: _RestartHyper, state: RestartState, due: jax.Array) -> RestartState:
    refresh: Callable = hyper.solver.refresh  # pyright: ignore[reportAssignmentType]  # used only where there is one
    return state._replace(inner=refresh(hyper.solver.hyper, state.inner, due))
