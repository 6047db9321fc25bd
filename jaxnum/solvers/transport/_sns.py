"""Sinkhorn sweeps, then Newton: small epsilon to high accuracy.

Cost: that of its two phases.
Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao & Ying 2024.
"""

from __future__ import annotations

import jax

from jaxnum.core.combinators import phase, then
from jaxnum.core.solver import Phases
from jaxnum.solvers.transport._newton import newton
from jaxnum.solvers.transport._sinkhorn import sinkhorn


def sns(
    *,
    sweeps: int = 20,
    epsilon_scaling: float | jax.Array | None = None,
    stage_sweeps: int | jax.Array = 1,
    linear: str = "auto",
    shift: float | jax.Array = 1e-3,
    entries: int = 128,
    kept: float | jax.Array = 0.999,
) -> Phases:
    """`sinkhorn` for a few sweeps, then `newton`: for small epsilon, where sweeps alone need thousands.

    Args:
      sweeps: limit of the sweeps, Python int >= 0.
      epsilon_scaling: None, or the factor by which epsilon falls during the sweeps; see `sinkhorn`. Give enough sweeps
        for epsilon to arrive: stage_sweeps log(max C / epsilon) / log(1 / epsilon_scaling), and a few at the target.
      stage_sweeps: sweeps at each epsilon above the target.
      linear: how `newton` solves its systems.
      shift: of `newton`.
      entries: of `newton`.
      kept: of `newton`.

    Returns:
      Phases for `Transport`, balanced and unbalanced; `Solution.phase_steps` counts sweeps and Newton steps apart.
      The status is Newton's: see `newton`.

    Raises:
      ValueError: an argument out of its range.

    Cost: two passes over the cost a sweep; see `newton` for its steps.

    Numerics: as `newton`.

    Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao & Ying, "Accelerating Sinkhorn algorithm with
      sparse Newton iterations" (2024), algorithm 1; the plan is sparse where `newton` finds that it pays.

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> cost = jax.random.uniform(jax.random.key(0), (20, 20))
      >>> a = jnp.full(20, 0.05)
      >>> solution = jaxnum.transport(cost, a, a, 0.01, solver=jaxnum.solvers.sns())
      >>> int(solution.phase_steps[1]) < 10
      True
    """
    first = sinkhorn(epsilon_scaling=epsilon_scaling, stage_sweeps=stage_sweeps)
    return then(phase(first, max_steps=sweeps), newton(linear=linear, shift=shift, entries=entries, kept=kept))
