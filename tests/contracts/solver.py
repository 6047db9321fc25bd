"""The contract of every solver. A new method registers with one line in SOLVERS and is put through all of it.

Each check is a function of a member, so that the mutation tests can hand it a wrong twin and see it refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxnum
from jaxnum import Status
from jaxnum.core.solver import Solver
from tests.compiles import count_compiles
from tests.contracts.solver_problems import ContractionCase, LinearCase
from tests.tolerances import tolerance


class SolverMember(NamedTuple):
    """One row of the table: a name, a factory, and the case (problem, references, bad inputs) it is tried on."""

    name: str
    make: Callable[[], Solver]
    case: Any

    def solve(self, params: Any, x0: Any = None, **options: Any) -> jaxnum.Solution:
        x0 = self.case.start(params) if x0 is None else x0
        return jaxnum.solve(self.make(), x0, self.case.problem(params), **options)


SOLVERS = [
    SolverMember("picard", jaxnum.solvers.picard, ContractionCase()),
    SolverMember("damped picard", lambda: jaxnum.solvers.picard(damping=0.9), ContractionCase()),
    SolverMember("halpern", lambda: jaxnum.solvers.halpern(contraction=0.7), ContractionCase()),
    SolverMember("restarted halpern", lambda: jaxnum.solvers.restarted(jaxnum.solvers.halpern()), ContractionCase()),
    SolverMember("cg", jaxnum.solvers.cg, LinearCase()),
    SolverMember("flexible cg", lambda: jaxnum.solvers.cg(flexible=2), LinearCase()),
]

TIGHT = {"rtol": 1e-13, "atol": 1e-13}


def close(got: Any, want: Any, dtype: Any, condition: float = 1.0, of: str = "") -> None:
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        size = max(1, np.size(w))
        scale = max(1.0, float(np.max(np.abs(w), initial=0.0)))
        error = float(np.max(np.abs(np.asarray(g) - np.asarray(w)), initial=0.0)) / scale
        assert error <= tolerance(dtype, size, condition=condition), (of, error)


def check_reference(m: SolverMember, dtype: str) -> None:
    """The solution is the known one, in the dtype that was asked for."""
    params = m.case.params(dtype)
    solution = m.solve(params)
    want = m.case.reference(params)
    assert int(solution.status) == Status.converged
    for leaf in jax.tree.leaves(solution.x):
        assert leaf.dtype == dtype
    rtol = 1e-8 if dtype == "float64" else 1e-5
    close(m.case.observe(params, solution.x), want, dtype, condition=m.case.condition * rtol / jnp.finfo(dtype).eps)


def check_derivatives(m: SolverMember) -> None:
    """Forward, reverse and second order against finite differences; the unknown has an unperturbed leaf."""
    params = m.case.params("float64")

    def observed(p: Any) -> Any:
        return m.case.observe(p, m.solve(p, **TIGHT, on_failure="return").x)

    for direction in m.case.directions(params):
        line = lambda t, d=direction: observed(jax.tree.map(lambda p, v: p + t * v, params, d))  # noqa: E731
        step = 1e-4
        forward, backward = line(step), line(-step)
        numeric = jax.tree.map(lambda a, b: (a - b) / (2 * step), forward, backward)
        _, tangent = jax.jvp(line, (jnp.zeros(()),), (jnp.ones(()),))
        # Central differences are wrong by step^2 times the third derivative.
        for got, want in zip(jax.tree.leaves(tangent), jax.tree.leaves(numeric), strict=True):
            scale = 1 + np.max(np.abs(want))
            assert np.max(np.abs(got - want)) <= 100 * step**2 * scale, "jvp differs from finite differences"

    scalar = lambda p: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(observed(p)))  # noqa: E731
    gradient = jax.grad(scalar)(params)
    for direction in m.case.directions(params):
        _, forward = jax.jvp(scalar, (params,), (direction,))
        backward = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
        close(backward, forward, "float64", condition=1e6, of="vjp differs from jvp")
    if m.case.second_order:
        direction = m.case.directions(params)[0]
        line = lambda t: scalar(jax.tree.map(lambda p, v: p + t * v, params, direction))  # noqa: E731
        check_grads(line, (jnp.zeros(()),), order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


def check_vmap(m: SolverMember) -> None:
    """vmap, vmap of vmap, vmap of grad and solve_batched equal the separate solves."""
    lanes = [m.case.params("float64", seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    observe = lambda p, s: (m.case.observe(p, s.x), s.steps, s.status)  # noqa: E731
    one = lambda p: observe(p, m.solve(p, on_failure="return"))  # noqa: E731
    separate = [one(p) for p in lanes]
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *separate)
    square = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), stacked)
    twice = jax.tree.map(lambda leaf: leaf.reshape(4, *leaf.shape[2:]), jax.vmap(jax.vmap(one))(square))
    problems = jax.vmap(m.case.problem)(stacked) if m.case.batchable else None
    got = [jax.vmap(one)(stacked), twice]
    if problems is not None:
        batched = jaxnum.solve_batched(m.make(), jax.vmap(m.case.start)(stacked), problems)
        got.append((jax.vmap(m.case.observe)(stacked, batched.x), batched.steps, batched.status))
    for x, steps, status in got:
        np.testing.assert_array_equal(status, want[2])
        assert np.max(np.abs(np.asarray(steps) - want[1])) <= m.case.check_every
        close(x, want[0], "float64", condition=m.case.condition * 1e-8 / jnp.finfo("float64").eps)
    scalar = lambda p: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(one(p)[0]))  # noqa: E731
    grads = jax.vmap(jax.grad(scalar))(stacked)
    single = jax.grad(scalar)(lanes[1])
    close(jax.tree.map(lambda g: g[1], grads), single, "float64", condition=m.case.condition * 1e10, of="vmap of grad")


def check_compiles_once(m: SolverMember) -> None:
    """The second eager call, with a fresh function and other numbers, compiles nothing; nor do new tolerances."""
    first, second = (m.case.params("float64", seed) for seed in (0, 1))
    m.solve(first)
    # A call of its own for the arrays, so that only the solve is counted.
    problem, x0 = m.case.problem(second), m.case.start(second)
    with count_compiles() as compiled:
        jaxnum.solve(m.make(), x0, problem, rtol=2e-8)
    assert compiled() == 0


def check_jit_and_export(m: SolverMember) -> None:
    """jit equals no jit; lower().compile() and an export round trip run."""
    params = m.case.params("float64")
    fn = jax.jit(lambda p: m.case.observe(p, m.solve(p).x))
    want = m.case.observe(params, m.solve(params).x)
    close(fn.lower(params).compile()(params), want, "float64", condition=1e4)
    exported = jax.export.export(fn)(params)
    close(jax.export.deserialize(exported.serialize()).call(params), want, "float64", condition=1e4)


def check_statuses(m: SolverMember) -> None:
    """Every status the case names is reached; eager calls raise it with its sentence, x stays finite."""
    params = m.case.params("float64")
    for status, (problem, x0, options) in m.case.failures(params).items():
        solution = jaxnum.solve(m.make(), x0, problem, on_failure="return", **options)
        assert int(solution.status) == status, (status.name, Status(int(solution.status)).name)
        with pytest.raises(jaxnum.SolverError, match=status.name) as raised:
            jaxnum.solve(m.make(), x0, problem, **options)
        assert raised.value.status == status
        assert jaxnum.sentence(status) in str(raised.value)


def check_nonfinite_keeps_last(m: SolverMember) -> None:
    """A run that turns NaN returns the last finite iterate."""
    problem, x0 = m.case.poisoned(m.case.params("float64"))
    solution = jaxnum.solve(m.make(), x0, problem, on_failure="return")
    assert int(solution.status) == Status.nonfinite
    for leaf in jax.tree.leaves(solution.x):
        assert np.all(np.isfinite(leaf))


def check_step_limit(m: SolverMember) -> None:
    """max_steps = 0 returns x0, converged only if it is; any limit is exact, whatever check_every."""
    params = m.case.params("float64")
    x0 = m.case.start(params)
    none = m.solve(params, max_steps=0, on_failure="return")
    assert int(none.steps) == 0
    assert int(none.status) == Status.max_steps
    close(m.case.observe(params, none.x), m.case.observe(params, m.case.gauge(params, x0)), "float64")
    solved = m.solve(params)
    again = m.solve(params, x0=solved.x, max_steps=0, rtol=1e-6)
    assert int(again.status) == Status.converged
    for limit, every in ((3, 2), (5, 4), (4, 1)):
        short = m.solve(params, max_steps=limit, check_every=every, on_failure="return", rtol=1e-300, atol=0.0)
        assert int(short.steps) <= limit
        assert int(short.status) in (Status.max_steps, Status.converged)


def check_warm_start(m: SolverMember) -> None:
    """Starting at the solution is not punished."""
    params = m.case.params("float64")
    cold = m.solve(params)
    warm = m.solve(params, x0=cold.x, rtol=1e-7)
    assert int(warm.status) == Status.converged
    assert int(warm.steps) <= int(cold.steps) // 2


def check_history(m: SolverMember) -> None:
    """Index 0 is the start; the last entry before the NaN padding is the final residual."""
    params = m.case.params("float64")
    solution = m.solve(params, history=True, check_every=1)
    history = np.asarray(solution.history)
    recorded = int(solution.steps) + 1
    assert np.all(np.isfinite(history[:recorded]))
    assert np.all(np.isnan(history[recorded:]))
    assert history[0] > history[recorded - 1]
    none = m.solve(params, max_steps=0, history=True, on_failure="return")
    assert none.history.shape == (1,)
    np.testing.assert_allclose(none.history[0], history[0])


def check_adjoints(m: SolverMember) -> None:
    """The unrolled derivative tends to the implicit one, with and without checkpoints; "none" gives zero."""
    params = m.case.params("float64")

    def scalar(p: Any, **options: Any) -> jax.Array:
        solution = m.solve(p, on_failure="return", **options)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(m.case.observe(m.case.detached(p), solution.x)))

    implicit = jax.grad(lambda p: scalar(p, **TIGHT))(params)
    steps = int(m.solve(params, **TIGHT, on_failure="return").steps)
    options = {"adjoint": "unrolled", "max_steps": steps + 7, **TIGHT}
    unrolled = jax.grad(lambda p: scalar(p, **options))(params)
    segments = jax.grad(lambda p: scalar(p, checkpoint_every=3, **options))(params)
    close(segments, unrolled, "float64", condition=1e3)
    if m.case.unrolled_converges:
        close(unrolled, implicit, "float64", condition=m.case.condition * 1e9, of="unrolled against implicit")
    nothing = jax.grad(lambda p: scalar(p, adjoint="none"))(params)
    for leaf in jax.tree.leaves(nothing):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def check_sharding(m: SolverMember) -> None:
    """Solutions and gradients under explicit sharding equal the unsharded ones."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = m.case.sharded_params("float64")
    scalar = jax.jit(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(m.case.sharded_solve(m.make(), p, TIGHT).x)))
    want, want_grad = jax.value_and_grad(scalar)(params)
    with jax.set_mesh(mesh):
        placed = m.case.place(params, mesh)
        got, got_grad = jax.value_and_grad(scalar)(placed)
        close(np.asarray(got), np.asarray(want), "float64", condition=1e4)
        close(jax.tree.map(np.asarray, got_grad), jax.tree.map(np.asarray, want_grad), "float64", condition=1e6)


def check_failed_lane_is_named(m: SolverMember) -> None:
    """solve_batched raises for a failed lane and says which."""
    if not m.case.batchable:
        return
    lanes = [m.case.params("float64", seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    problem, x0 = jax.vmap(m.case.problem)(stacked), jax.vmap(m.case.start)(stacked)
    with pytest.raises(jaxnum.SolverError, match=r"solve_batched: 3 of 3 lanes failed: 0 \(max_steps"):
        jaxnum.solve_batched(m.make(), x0, problem, max_steps=1)


def check_progress(m: SolverMember) -> None:
    """A hook hears of the start before the first step and of the end, alone and under vmap."""
    params = m.case.params("float64")
    seen: list[Any] = []
    plain = m.solve(params, progress=seen.append)
    jax.effects_barrier()
    assert seen[0].step == 0
    assert not seen[0].done
    assert seen[-1].done
    assert seen[-1].step == int(plain.steps)
    lanes = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, m.case.params("float64", 1))
    jax.vmap(lambda p: m.solve(p, progress=seen.append).x)(lanes)
    jax.effects_barrier()
    close(m.case.observe(params, plain.x), m.case.observe(params, m.solve(params).x), "float64")


CHECKS = [
    check_derivatives,
    check_vmap,
    check_compiles_once,
    check_jit_and_export,
    check_statuses,
    check_nonfinite_keeps_last,
    check_step_limit,
    check_warm_start,
    check_history,
    check_adjoints,
    check_sharding,
    check_failed_lane_is_named,
    check_progress,
]
