"""A sequence of related linear systems by SOR, whose relaxation a bandit learns from the steps that each solve took.

Cost: the solves, and O(arms) a system. Source: Khodak, Chow, Balcan & Talwalkar 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.problems import Linear
from jaxnum.core.solver import solve
from jaxnum.core.status import Status
from jaxnum.solvers.linear import sweeps
from jaxnum.solvers.linear._sor import sor
from jaxnum.solvers.linear._tsallis_inf import Bandit, tsallis_inf
from jaxnum.solvers.linear.sweeps import Colours, Schedule
from kernels_pallas import checks

PyTree = Any


class LearnedRelaxation(NamedTuple):
    """What a sequence of solves returns, the first four with a leading axis over the systems.

    Attributes:
      x: the solutions.
      steps: int32, SOR steps each took.
      arms: int32, which of the omegas each was solved with.
      status: int32, a `jaxnum.Status` each.
      bandit: the bandit's last state.
    """

    x: jax.Array
    steps: jax.Array
    arms: jax.Array
    status: jax.Array
    bandit: PyTree


def learned_relaxation(
    make_problem: Callable[[PyTree], Linear],
    contexts: PyTree,
    key: jax.Array,
    *,
    omegas: jax.Array | None = None,
    bandit: Bandit | None = None,
    bandit_contexts: jax.Array | None = None,
    schedule: Schedule | Colours | None = None,
    rtol: Any = None,
    max_steps: int = 10_000,
) -> LearnedRelaxation:
    """Solve a sequence of linear systems by `sor`, each from x = 0, and learn omega on the way.

    The bandit draws one of the omegas for each system and is told how many steps the solve took, no more: neither a
    spectral radius nor a derivative. With `tsallis_inf` the mean steps approach those of the best fixed omega of the
    grid as O(sqrt(arms / systems)). With `cheb_cb`, or `tsallis_inf` with `context_bins`, and a number known of each
    system before it is solved, such as a shift or a diffusivity, they may fall below.

    Args:
      make_problem: `make_problem(context)` -> `Linear` whose A is an array [n, n], or an operator of
        `jaxnum.sparse_operator`, traced once.
      contexts: what the systems differ in, arrays with a leading axis over them: shifts, right-hand sides, keys.
      key: typed PRNG key.
      omegas: real [arms], each in (0, 2). Default: 20 from 1 to 1.95, evenly.
      bandit: default `tsallis_inf(arms)`; any three functions of its kind.
      bandit_contexts: real [systems], what a contextual bandit looks at before it draws; None for one that does not.
      schedule: `sor_schedule(A)` for a sparse A, which all systems share.
      rtol: see `jaxnum.solve`.
      max_steps: Python int >= 1, limit of a solve, and so of what one bad omega may cost.

    Returns:
      A `LearnedRelaxation`. A solve that did not converge says so in its status, and its loss is max_steps, however
      early it stopped.

    Raises:
      ValueError: omegas outside (0, 2), or a schedule missing or not wanted.
      TypeError: A is a function.

    Cost: one scan over the systems, so every one is solved with what those before it taught. Compile it once with
      `jax.jit` around the call if it runs again.

    Numerics: solutions are constants: no derivative passes the choice.

    Source: Khodak, Chow, Balcan & Talwalkar, "Learning to Relax: Setting Solver Parameters Across a Sequence of Linear
      System Instances" (2024), arXiv 2310.02246, sections 2 and 3.

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> A = jnp.array([[2.0, -1.0], [-1.0, 2.0]])
      >>> make = lambda shift: jaxnum.Linear(A + shift * jnp.eye(2), jnp.ones(2))
      >>> run = jaxnum.solvers.learned_relaxation(make, jnp.linspace(0, 1, 4), jax.random.key(0))
      >>> run.status.tolist(), run.x[0].round(3).tolist()
      ([0, 0, 0, 0], [1.0, 1.0])
    """
    omegas = jnp.linspace(1, 1.95, 20) if omegas is None else jnp.asarray(omegas)
    checks.shape("learned_relaxation", omegas=(omegas, "arms"))
    sweeps.check_relaxation("learned_relaxation", omegas, "omegas")
    init, sample, update = tsallis_inf(omegas.size) if bandit is None else bandit
    seen = () if bandit_contexts is None else (jnp.asarray(bandit_contexts),)
    systems = jnp.shape(jax.tree.leaves(contexts)[0])[0]
    for array in seen:
        checks.shape("learned_relaxation", bandit_contexts=(array, f"{systems}"))

    def solved(state: PyTree, inputs: tuple) -> tuple[PyTree, tuple]:
        key, context, seen = inputs
        arm, state = sample(state, key, *seen)
        problem = make_problem(context)
        solution = solve(
            sor(omegas[arm], schedule=schedule),
            jnp.zeros_like(problem.b),
            problem,
            rtol=rtol,
            max_steps=max_steps,
            adjoint="none",
            on_failure="return",
        )
        # One that broke down at once was no cheap one.
        loss = jnp.where(solution.status == Status.converged, solution.steps, max_steps)
        return update(state, loss), (solution.x, solution.steps, arm, solution.status)

    state, outputs = jax.lax.scan(solved, init(), (jax.random.split(key, systems), contexts, seen))
    x, steps, arms, status = outputs
    return LearnedRelaxation(x, steps, arms, status, state)
