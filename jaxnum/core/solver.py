"""`Solver`, `Solution` and `solve`: one protocol and one driver for every iterative method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import adjoints, loops, precision, trees
from jaxnum.core import progress as progress_
from jaxnum.core.loops import Measure
from jaxnum.core.status import SolverError, Status, sentence
from kernels_pallas import checks

__all__ = ["ByPrecision", "Defaults", "Measure", "Phase", "Phases", "Solution", "Solver", "solve"]

PyTree = Any


class Solution(NamedTuple):
    """What a solve returns.

    Attributes:
      x: the solution, a tree like x0. Differentiable with respect to the leaves of the problem.
      state: the solver's last state, a NamedTuple of arrays (of the last phase).
      steps: int32 scalar, steps taken over all phases.
      phase_steps: int32 [phases], steps taken by each phase.
      residual: real scalar, what the solver measured last.
      status: int32 scalar, a `jaxnum.Status`.
      history: residuals at every check, index 0 the start, padded with NaN; None unless asked for.
    """

    x: PyTree
    state: PyTree
    steps: jax.Array
    phase_steps: jax.Array
    residual: jax.Array
    status: jax.Array
    history: jax.Array | None

    def __repr__(self) -> str:
        def show(leaf: Any) -> str:
            return str(leaf) if jnp.ndim(leaf) == 0 else f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"

        try:
            status = Status(int(self.status)).name
        except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
            status = show(self.status)
        x = jax.tree.map(show, self.x)
        return f"Solution(x={x}, status={status}, steps={show(self.steps)}, residual={show(self.residual)})"


class ByPrecision(NamedTuple):
    """A tolerance for float64, and one for everything shorter."""

    float64: float
    shorter: float

    def pick(self, tree: PyTree) -> float:
        """The one for the coarsest leaf of a tree."""
        return self.float64 if precision.coarsest(tree).itemsize == 8 else self.shorter


class Defaults(NamedTuple):
    """Settings a factory chooses for its method; None leaves the choice to the dtype. Arguments of `solve` win."""

    rtol: ByPrecision | None = None
    atol: ByPrecision = ByPrecision(0.0, 0.0)
    max_steps: int = 10_000
    check_every: int = 1
    refresh_every: int | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hyper"],
    meta_fields=["name", "init", "step", "measure", "finish", "refresh", "problem", "defaults"],
)
@dataclass(frozen=True)
class Solver:
    """One iterative method: module-level pure functions, and a pytree of array hyperparameters.

    Attributes:
      name: the method's name, first word of its errors.
      init: `(hyper, x, problem) -> state`; allocates everything once.
      step: `(hyper, x, state, problem) -> (x, state)`; pure, no Python branch on values.
      measure: `(hyper, x, state, problem) -> Measure(residual, scale, flag)`; cheap, from what the state caches.
      problem: the problem class the method solves.
      hyper: pytree of arrays: damping, keys, inner solvers. Leaves: traced, batched, never a reason to retrace.
      finish: `(hyper, x, state, problem) -> x`, or None: what is returned instead of the iterate.
      refresh: `(hyper, state, due) -> state`, or None: where `due`, have the next step leave x where it is and
        recompute from it all that the state caches. `init` then need not evaluate anything, because the driver begins
        with such a look, which shares its code with the steps; with `Defaults.refresh_every` it repeats it, always
        before convergence is declared, for recurrences that drift.
      defaults: tolerances and limits of this method.
    """

    name: str
    init: Callable
    step: Callable
    measure: Callable
    problem: type
    hyper: PyTree = None
    finish: Callable | None = None
    refresh: Callable | None = None
    defaults: Defaults = field(default_factory=Defaults)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["solver", "rtol", "atol"],
    meta_fields=["max_steps", "start"],
)
@dataclass(frozen=True)
class Phase:
    """One loop of a composite solver. None takes what `solve` is given. See `jaxnum.solvers.phase`."""

    solver: Solver
    rtol: Any = None
    atol: Any = None
    max_steps: int | None = None
    start: Callable | None = None


class Phases(NamedTuple):
    """Solvers that run one after the other; `solve` takes it wherever it takes a Solver."""

    phases: tuple[Phase, ...]


class _Options(NamedTuple):
    """The static part of a call of `solve`."""

    max_steps: tuple[int, ...]
    check_every: tuple[int, ...]
    history: bool
    adjoint: str
    checkpoint_every: int | None
    hook: Any


def solve(
    solver: Solver | Phases,
    x0: PyTree,
    problem: Any,
    *,
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
    """Run a solver on a problem from x0 until residual <= atol + rtol scale.

    Args:
      solver: what a factory of `jaxnum.solvers` returns, or phases made by `jaxnum.solvers.then`.
      x0: starting point, a pytree of floating-point or complex arrays.
      problem: a problem of `jaxnum.core.problems`; its array leaves may be differentiated and batched.
      rtol: relative tolerance >= 0, real scalar; scale is named by the solver. Default: the solver's, else the dtype's
        (1e-8 for float64, 1e-5 for float32).
      atol: absolute tolerance >= 0, real scalar. Default: the solver's.
      max_steps: Python int >= 0, limit of steps (of the last phase, when there are several).
      check_every: Python int >= 1, steps between two looks at the residual.
      history: record the residual at every check.
      adjoint: "implicit" (derivative of the solution itself; any order, any mode), "unrolled" (derivative of the
        iteration: a scan of exactly max_steps masked steps) or "none" (the solution is a constant).
      checkpoint_every: with "unrolled", recompute segments of this many checks in the backward pass.
      progress: None, "text", "tqdm", or a callable that takes `jaxnum.core.progress.Progress`.
      on_failure: "raise" makes an eager call that did not converge raise SolverError; "return" returns the status.
        Traced calls always return the status.

    Returns:
      A `Solution`.

    Raises:
      ValueError, ShapeError, DtypeError, TreeError: arguments that do not fit, at trace time.
      SolverError: an eager call that did not converge, with the status's sentence; it carries the solution.

    Cost: one compilation per shapes, dtypes, solver and static options; a fresh lambda with the same program costs
      none. Under vmap every lane runs as long as the slowest: see `solve_batched`.

    Derivatives: with respect to the leaves of the problem. x0, the tolerances and hyperparameters have derivative zero
      under "implicit". At a point that is not a solution the implicit derivative is not the derivative of anything:
      look at the status.
    """
    return drive(
        "solve",
        solver,
        x0,
        problem,
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        check_every=check_every,
        history=history,
        adjoint=adjoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
        on_failure=on_failure,
    )


def drive(
    name: str,
    solver: Solver | Phases,
    x0: PyTree,
    problem: Any,
    *,
    rtol: Any,
    atol: Any,
    max_steps: int | None,
    check_every: int | None,
    history: bool,
    adjoint: str,
    checkpoint_every: int | None,
    progress: Any,
    on_failure: str,
) -> Solution:
    """`solve` under the name of the public function that was called, which its errors bear."""
    wanted = "be what a factory of jaxnum.solvers returns"
    remedy = "Call the factory, as in jaxnum.solvers.picard()."
    checks.value(name, "solver", isinstance(solver, (Solver, Phases)), wanted, solver, remedy, TypeError)
    phases = solver.phases if isinstance(solver, Phases) else (Phase(solver),)
    _check_arguments(name, phases, problem, x0, max_steps, check_every, adjoint, checkpoint_every, on_failure)
    x0 = trees.strong(x0)
    problem.check(name, x0)
    problem = problem.traced(x0)
    hook = progress_.resolve(name, progress)
    limits = [p.solver.defaults.max_steps if p.max_steps is None else p.max_steps for p in phases]
    if max_steps is not None:
        limits[-1] = max_steps
    options = _Options(
        max_steps=tuple(limits),
        check_every=tuple(check_every or p.solver.defaults.check_every for p in phases),
        history=history,
        adjoint=adjoint,
        checkpoint_every=checkpoint_every,
        hook=hook,
    )
    real = precision.coarsest(x0)
    tolerances = tuple(
        (
            _tolerance(name, "rtol", p.rtol if p.rtol is not None else rtol, _default_rtol(p.solver, x0), real),
            _tolerance(name, "atol", p.atol if p.atol is not None else atol, p.solver.defaults.atol.pick(x0), real),
        )
        for p in phases
    )
    progress_.announce(hook, sum(limits))
    solution = _solve(options, phases, x0, tolerances, problem)
    if on_failure == "raise":
        raise_unless_converged(phases[-1].solver.name, solution)
    return solution


def raise_unless_converged(name: str, solution: Solution) -> None:
    """Raise SolverError if a concrete solution did not converge; traced solutions pass."""
    if checks.traced(solution.status) or int(solution.status) == Status.converged:
        return
    status = Status(int(solution.status))
    steps, residual = int(solution.steps), float(solution.residual)
    raise SolverError(
        f"{name}: {status.name} after {steps} steps, residual {residual:.3e}. {sentence(status)}",
        solution,
        status,
    )


@partial(jax.jit, static_argnames=("options",))
def _solve(options: _Options, phases: tuple[Phase, ...], x0: PyTree, tolerances: tuple, problem: Any) -> Solution:
    if options.adjoint == "unrolled":
        solution = _run(options, phases, x0, tolerances, problem)
        return solution._replace(x=problem.canonical(solution.x))
    frozen = jax.lax.stop_gradient((phases, x0, tolerances, problem))
    solution = _run(options, *frozen)
    if options.adjoint == "none":
        return solution._replace(x=frozen[-1].canonical(solution.x))
    # The gauge is fixed outside the implicit rule: inside it, the projector alone gives wrong gradients.
    return solution._replace(x=problem.canonical(adjoints.implicit(problem, solution.x)))


def _run(options: _Options, phases: tuple[Phase, ...], x0: PyTree, tolerances: tuple, problem: Any) -> Solution:
    x, checked = x0, jnp.int32(0)
    history = _empty_history(options, x0) if options.history else None
    steps = []
    for i, phase in enumerate(phases):
        solver = phase.solver
        if phase.start is not None:
            x = phase.start(x, problem)
        rtol, atol = tolerances[i]
        limits = loops.Limits(
            rtol,
            atol,
            options.max_steps[i],
            options.check_every[i],
            solver.defaults.refresh_every,
            options.hook,
        )
        carry = loops.start(solver, x, problem, limits, history, checked)
        if options.adjoint == "unrolled":
            carry = loops.run_unrolled(solver, carry, problem, limits, options.checkpoint_every)
        else:
            carry = loops.run(solver, carry, problem, limits)
        status = loops.finish(carry, limits)
        x, history, checked = carry.x, carry.history, carry.checks
        if solver.finish is not None:
            x = solver.finish(solver.hyper, x, carry.state, problem)
        steps.append(carry.step)
    phase_steps = jnp.stack(steps)
    total = jnp.sum(phase_steps, dtype=jnp.int32)
    return Solution(x, carry.state, total, phase_steps, carry.residual, status, history)


def _empty_history(options: _Options, x0: PyTree) -> jax.Array:
    counts = zip(options.max_steps, options.check_every, strict=True)
    length = sum(1 + -(-steps // every) for steps, every in counts)
    return jnp.full((length,), jnp.nan, precision.accumulator(precision.coarsest(x0)))


def _default_rtol(solver: Solver, x0: PyTree) -> float:
    chosen = solver.defaults.rtol
    return precision.default_rtol(x0) if chosen is None else chosen.pick(x0)


def _tolerance(function: str, argument: str, given: Any, default: float, real: Any) -> jax.Array:
    chosen = default if given is None else given
    remedy = "Use vmap for one tolerance a problem."
    checks.shape(function, remedy=remedy, **{argument: (chosen, "")})
    if not checks.traced(chosen):
        ok = not jnp.iscomplexobj(chosen) and 0 <= float(chosen) < jnp.inf
        checks.value(function, argument, ok, "be a finite real number >= 0", chosen)
    return jnp.asarray(chosen, precision.accumulator(real))


def _check_arguments(
    name: str,
    phases: tuple[Phase, ...],
    problem: Any,
    x0: PyTree,
    max_steps: Any,
    check_every: Any,
    adjoint: str,
    checkpoint_every: Any,
    on_failure: str,
) -> None:
    for phase in phases:
        wanted = phase.solver.problem
        checks.value(
            name,
            "problem",
            isinstance(problem, wanted),
            f"be a {wanted.__name__} for {phase.solver.name}",
            type(problem).__name__,
            error=TypeError,
        )
    checks.choice(name, "adjoint", adjoint, ("implicit", "unrolled", "none"))
    checks.choice(name, "on_failure", on_failure, ("raise", "return"))
    for argument, got, least in (
        ("max_steps", max_steps, 0),
        ("check_every", check_every, 1),
        ("checkpoint_every", checkpoint_every, 1),
    ):
        ok = got is None or (isinstance(got, int) and not isinstance(got, bool) and got >= least)
        checks.value(name, argument, ok, f"be a Python int >= {least}", got, "It fixes the shape of the loop.")
    checks.value(
        name,
        "checkpoint_every",
        checkpoint_every is None or adjoint == "unrolled",
        'be None unless adjoint="unrolled"',
        checkpoint_every,
    )
    leaves = jax.tree_util.tree_flatten_with_path(x0)[0]
    checks.value(name, "x0", bool(leaves), "have at least one array leaf", x0)
    checks.value(name, "x0", trees.size(x0) > 0, "have at least one entry", x0)
    checks.dtype(
        name,
        "inexact",
        remedy="Start from floating-point zeros.",
        **{f"x0{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves},
    )
