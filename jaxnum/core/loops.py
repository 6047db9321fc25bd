"""The loops behind every solver: a while loop that stops when it may, and a scan that can be differentiated."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, progress, trees
from jaxnum.core.status import RUNNING, Status

PyTree = Any

# Residuals this many roundings above zero that have not fallen for `_PATIENCE` checks will not fall any more.
_ROUNDINGS = 256.0
_PATIENCE = 50


class Measure(NamedTuple):
    """What `Solver.measure` reports.

    Attributes:
      residual: real scalar that is zero at a solution.
      scale: real scalar, the natural size of the residual: the loop ends when residual <= atol + rtol scale.
      flag: int32 scalar, a `Status` the solver itself has found (breakdown, stagnated, infeasible), else 0.
    """

    residual: jax.Array
    scale: jax.Array
    flag: jax.Array


class Carry(NamedTuple):
    """What a loop hands from step to step."""

    x: PyTree
    state: PyTree
    step: jax.Array
    residual: jax.Array
    status: jax.Array
    best: jax.Array
    waited: jax.Array
    history: jax.Array | None
    checks: jax.Array


class Limits(NamedTuple):
    """When a loop ends, and what it reports on the way. All but the tolerances are static."""

    rtol: jax.Array
    atol: jax.Array
    max_steps: int
    check_every: int
    refresh_every: int | None
    hook: Any


def start(solver: Any, x: PyTree, problem: Any, limits: Limits, history: jax.Array | None, checks: jax.Array) -> Carry:
    """Initialise the solver's state and judge the starting point."""
    state = solver.init(solver.hyper, x, problem)
    m = solver.measure(solver.hyper, x, state, problem)
    residual = m.residual
    zero = jnp.int32(0)
    carry = Carry(x, state, zero, residual, _judge(m, limits), residual, zero, history, checks)
    progress.report(limits.hook, carry.step, limits.max_steps, residual, jnp.bool_(False))
    return _record(carry)


def run(solver: Any, carry: Carry, problem: Any, limits: Limits) -> Carry:
    """Step until the solve has a status or the limit is reached.

    A solver with `refresh` (it recomputes what its recurrences have drifted from) is asked to do so every
    `refresh_every` steps and whenever it claims convergence, and goes on if the claim does not hold. The refresh sits
    in an outer loop: a `cond` inside the step would run it on every step of every lane under vmap.
    """
    every = limits.refresh_every or limits.max_steps

    def unfinished(c: Carry) -> jax.Array:
        return (c.status == RUNNING) & (c.step < limits.max_steps)

    def loop(c: Carry) -> Carry:
        end = c.step + every
        return jax.lax.while_loop(
            lambda c: unfinished(c) & (c.step < end),
            lambda c: _chunk(solver, c, problem, limits, unrolled=False),
            c,
        )

    if solver.refresh is None:
        return loop(carry)
    return jax.lax.while_loop(unfinished, lambda c: _refresh(solver, loop(c), problem, limits), carry)


def run_unrolled(solver: Any, carry: Carry, problem: Any, limits: Limits, checkpoint_every: int | None) -> Carry:
    """Exactly `max_steps` masked steps in a scan, which reverse mode can go through.

    Finished steps compute on the starting point and are thrown away, so that neither they nor their derivatives divide
    by a residual that has become zero.
    """
    first = carry

    def step(c: Carry, _: None) -> tuple[Carry, None]:
        active = c.status == RUNNING
        safe = c._replace(x=trees.where(active, c.x, first.x), state=trees.where(active, c.state, first.state))
        return trees.where(active, _chunk(solver, safe, problem, limits, unrolled=True), c), None

    chunks = -(-limits.max_steps // limits.check_every)
    if not checkpoint_every:
        carry, _ = jax.lax.scan(step, carry, None, length=chunks)
    else:
        whole, rest = divmod(chunks, checkpoint_every)

        @jax.checkpoint
        def segment(c: Carry, _: None) -> tuple[Carry, None]:
            return jax.lax.scan(step, c, None, length=checkpoint_every)

        carry, _ = jax.lax.scan(segment, carry, None, length=whole)
        carry, _ = jax.lax.scan(step, carry, None, length=rest)
    return carry if solver.refresh is None else _refresh(solver, carry, problem, limits)


def finish(carry: Carry, limits: Limits) -> Carry:
    """Give a loop that ran out of steps its status, and say that it is over."""
    status = jnp.where(carry.status == RUNNING, jnp.int32(Status.max_steps), carry.status)
    progress.report(limits.hook, carry.step, limits.max_steps, carry.residual, jnp.bool_(True))
    return carry._replace(status=status)


def _chunk(solver: Any, c: Carry, problem: Any, limits: Limits, *, unrolled: bool) -> Carry:
    """Up to `check_every` steps and one judgement. A non-finite residual gives back the x and state before them."""

    def once(_: Any, pair: tuple) -> tuple:
        return solver.step(solver.hyper, *pair, problem)

    def masked(pair: tuple, i: jax.Array) -> tuple[tuple, None]:
        return trees.where(i < steps, once(i, pair), pair), None

    # The last chunk is cut short, so that the step limit is exact.
    steps = jnp.minimum(limits.check_every, limits.max_steps - c.step)
    if limits.check_every == 1:
        x, state = once(0, (c.x, c.state))
    elif unrolled:  # reverse mode needs a fixed trip count
        (x, state), _ = jax.lax.scan(masked, (c.x, c.state), jnp.arange(limits.check_every, dtype=jnp.int32))
    else:
        x, state = jax.lax.fori_loop(0, steps, once, (c.x, c.state))
    m = solver.measure(solver.hyper, x, state, problem)
    bad = ~jnp.isfinite(m.residual)
    improved = m.residual < c.best
    waited = jnp.where(improved, 0, c.waited + 1)
    rounding = m.residual <= _ROUNDINGS * precision.attainable(m.residual) * m.scale
    status = _judge(m, limits)
    status = jnp.where((status == RUNNING) & rounding & (waited >= _PATIENCE), jnp.int32(Status.stagnated), status)
    c = Carry(
        x=trees.where(bad, c.x, x),
        state=trees.where(bad, c.state, state),
        step=c.step + steps,
        residual=m.residual,
        status=status,
        best=jnp.minimum(c.best, m.residual),
        waited=waited,
        history=c.history,
        checks=c.checks,
    )
    progress.report(limits.hook, c.step, limits.max_steps, c.residual, jnp.bool_(False))
    return _record(c)


def _refresh(solver: Any, c: Carry, problem: Any, limits: Limits) -> Carry:
    state = solver.refresh(solver.hyper, c.x, c.state, problem)
    m = solver.measure(solver.hyper, c.x, state, problem)
    claimed = (c.status == RUNNING) | (c.status == Status.converged)
    status = jnp.where(claimed, _judge(m, limits), c.status)
    residual = jnp.where(claimed, m.residual, c.residual)
    return c._replace(state=trees.where(claimed, state, c.state), status=status, residual=residual)


def _judge(m: Measure, limits: Limits) -> jax.Array:
    met = m.residual <= limits.atol + limits.rtol * m.scale
    flag = m.flag.astype(jnp.int32)
    status = jnp.where(met, jnp.int32(Status.converged), jnp.where(flag != 0, flag, jnp.int32(RUNNING)))
    status = jnp.where(jnp.isfinite(m.residual), status, jnp.int32(Status.nonfinite))
    # What the problem itself rules out is worse than any residual.
    return jnp.where(flag == Status.infeasible, jnp.int32(Status.infeasible), status)


def _record(c: Carry) -> Carry:
    if c.history is None:
        return c
    return c._replace(history=c.history.at[c.checks].set(c.residual.astype(c.history.dtype)), checks=c.checks + 1)
