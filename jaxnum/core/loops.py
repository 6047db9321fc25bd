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
    """What a loop hands from step to step.

    Attributes:
      x: the iterate.
      state: the solver's state.
      tally: int32 [4], see `_tally`. Four scalars would be four kernels to compile.
      residual: what was measured last.
      best: the smallest residual so far.
      history: the residuals so far, or None.
      checks: how many of them there are.
    """

    x: PyTree
    state: PyTree
    tally: jax.Array
    residual: jax.Array
    best: jax.Array
    history: jax.Array | None
    checks: jax.Array

    @property
    def step(self) -> jax.Array:
        """Steps taken."""
        return _entry(self.tally, 0)

    @property
    def status(self) -> jax.Array:
        """A `Status`, or RUNNING."""
        return _entry(self.tally, 1)

    @property
    def waited(self) -> jax.Array:
        """Checks since the best residual."""
        return _entry(self.tally, 2)

    @property
    def look(self) -> jax.Array:
        """Whether the next turn only looks."""
        return _entry(self.tally, 3) != 0


def _tally(step: Any, status: Any, waited: Any = 0, look: Any = False) -> jax.Array:
    return jnp.stack([jax.lax.convert_element_type(entry, jnp.int32) for entry in (step, status, waited, look)])


def _entry(tally: jax.Array, index: int) -> jax.Array:
    return jax.lax.index_in_dim(tally, index, keepdims=False)


class Limits(NamedTuple):
    """When a loop ends, and what it reports on the way. All but the tolerances are static."""

    rtol: jax.Array
    atol: jax.Array
    max_steps: int
    check_every: int
    refresh_every: int | None
    hook: Any


def begin(solver: Any, x: PyTree, problem: Any) -> PyTree:
    """The solver's state at x, ready to be measured and stepped from."""
    state = solver.init(solver.hyper, x, problem)
    if solver.refresh is None:
        return state
    return solver.step(solver.hyper, x, solver.refresh(solver.hyper, state, jnp.bool_(True)), problem)[1]


def start(solver: Any, x: PyTree, problem: Any, limits: Limits, history: jax.Array | None, checks: jax.Array) -> Carry:
    """Initialise the solver's state and judge the starting point, or leave the judging to the loop's first look."""
    state = solver.init(solver.hyper, x, problem)
    if solver.refresh is not None:
        dtype = jax.eval_shape(solver.measure, solver.hyper, x, state, problem).residual.dtype
        unknown = jnp.full((), jnp.inf, dtype)
        return Carry(x, state, _tally(0, RUNNING, look=True), unknown, unknown, history, checks)
    m = solver.measure(solver.hyper, x, state, problem)
    carry = Carry(x, state, _tally(0, _judge(m, limits)), m.residual, m.residual, history, checks)
    progress.report(limits.hook, carry.step, limits.max_steps, m.residual, jnp.bool_(False))
    return _record(carry)


def run(solver: Any, carry: Carry, problem: Any, limits: Limits) -> Carry:
    """Step until the solve has a status or the limit is reached.

    A solver with `refresh` begins with a look: a step that leaves x where it is, recomputes what the state caches, and
    does not count. With `refresh_every` it looks again every so many steps, at the step limit, and whenever it claims
    convergence, and goes on if the claim does not hold. A look is an ordinary turn of the one loop: a `cond` inside the
    step would run on every step of every lane under vmap, and a second loop would double what is compiled.
    """

    def unfinished(c: Carry) -> jax.Array:
        return (c.status == RUNNING) & ((c.step < limits.max_steps) | c.look)

    return jax.lax.while_loop(unfinished, lambda c: _chunk(solver, c, problem, limits, unrolled=False), carry)


def run_unrolled(solver: Any, carry: Carry, problem: Any, limits: Limits, checkpoint_every: int | None) -> Carry:
    """Exactly `max_steps` masked steps in a scan, which reverse mode can go through.

    Finished steps compute on the starting point and are thrown away, so that neither they nor their derivatives divide
    by a residual that has become zero.
    """
    trusting = limits._replace(refresh_every=None)
    if solver.refresh is not None:
        carry = _chunk(solver, carry, problem, trusting, unrolled=True)
    first = carry

    def step(c: Carry, _: None) -> tuple[Carry, None]:
        active = c.status == RUNNING
        safe = c._replace(x=trees.where(active, c.x, first.x), state=trees.where(active, c.state, first.state))
        return trees.where(active, _chunk(solver, safe, problem, trusting, unrolled=True), c), None

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
    if limits.refresh_every is None or limits.max_steps == 0:
        return carry
    due = carry._replace(tally=_tally(carry.step, carry.status, carry.waited, look=True))
    looked = _chunk(solver, due, problem, trusting, unrolled=True)
    claimed = (carry.status == RUNNING) | (carry.status == Status.converged)
    return trees.where(claimed, looked, carry)


def finish(carry: Carry, limits: Limits) -> jax.Array:
    """The status at the end of a loop, which may have run out of steps; say that it is over."""
    progress.report(limits.hook, carry.step, limits.max_steps, carry.residual, jnp.bool_(True))
    return jnp.where(carry.status == RUNNING, jnp.int32(Status.max_steps), carry.status)


def _chunk(solver: Any, c: Carry, problem: Any, limits: Limits, *, unrolled: bool) -> Carry:
    """Up to `check_every` steps and one judgement. A non-finite residual gives back the x before them."""

    def once(_: Any, pair: tuple) -> tuple:
        return solver.step(solver.hyper, *pair, problem)

    def masked(pair: tuple, i: jax.Array) -> tuple[tuple, None]:
        return trees.where(i < steps, once(i, pair), pair), None

    # The last chunk is cut short, so that the step limit is exact; a look is a chunk of its own and counts nothing.
    steps = counted = jnp.int32(1)
    if limits.check_every > 1:
        steps = counted = jnp.minimum(limits.check_every, limits.max_steps - c.step)
    state, look = c.state, c.look
    if solver.refresh is not None:
        steps, counted = jnp.where(look, 1, steps), jnp.where(look, 0, counted)
        state = solver.refresh(solver.hyper, state, look)
    if limits.check_every == 1:
        x, state = once(0, (c.x, state))
    elif unrolled:  # reverse mode needs a fixed trip count
        (x, state), _ = jax.lax.scan(masked, (c.x, state), jnp.arange(limits.check_every, dtype=jnp.int32))
    else:
        x, state = jax.lax.fori_loop(0, steps, once, (c.x, state))
    m = solver.measure(solver.hyper, x, state, problem)
    bad = ~_finite(m)
    step, waited = c.step + counted, jnp.where(m.residual < c.best, 0, c.waited + 1)
    rounding = m.residual <= _ROUNDINGS * precision.attainable(m.residual) * m.scale
    status = _judge(m, limits)
    status = jnp.where((status == RUNNING) & rounding & (waited >= _PATIENCE), jnp.int32(Status.stagnated), status)
    due = jnp.bool_(False)
    if solver.refresh is not None and limits.refresh_every is not None:
        claimed = (status == Status.converged) & ~look
        status = jnp.where(claimed, jnp.int32(RUNNING), status)
        due = ~look & (claimed | (step % limits.refresh_every < counted) | (step >= limits.max_steps))
    turned = Carry(
        x=trees.where(bad, c.x, x),
        # Only `finish` looks at the state after the end.
        state=state if solver.finish is None else trees.where(bad, c.state, state),
        tally=_tally(step, status, waited, due),
        residual=m.residual,
        best=jnp.minimum(c.best, m.residual),
        history=c.history,
        checks=c.checks,
    )
    progress.report(limits.hook, step, limits.max_steps, m.residual, jnp.bool_(False))
    # A later look corrects a residual that is recorded already.
    return _record(turned, None if solver.refresh is None else ~look | (step == 0))


def _judge(m: Measure, limits: Limits) -> jax.Array:
    met = m.residual <= limits.atol + limits.rtol * m.scale
    flag = m.flag.astype(jnp.int32)
    status = jnp.where(met, jnp.int32(Status.converged), jnp.where(flag != 0, flag, jnp.int32(RUNNING)))
    status = jnp.where(_finite(m), status, jnp.int32(Status.nonfinite))
    # What the problem itself rules out is worse than any residual.
    return jnp.where(flag == Status.infeasible, jnp.int32(Status.infeasible), status)


def _finite(m: Measure) -> jax.Array:
    """Whether a measure can be judged: every residual is small beside a scale that has overflowed."""
    return jnp.isfinite(m.residual) & jnp.isfinite(m.scale)


def _record(c: Carry, new: jax.Array | None = None) -> Carry:
    """Write the residual as the next entry of the history, or over the last one where it is not `new`."""
    if c.history is None:
        return c
    at = c.checks if new is None else jnp.where(new, c.checks, c.checks - 1)
    return c._replace(history=c.history.at[at].set(c.residual.astype(c.history.dtype)), checks=at + 1)
