"""The contract of every solver. A new method registers with one line in SOLVERS and is put through all of it.

Each check is a function of a member, so that the mutation tests can hand it a wrong twin and see it refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import Status
from jaxnum.core.solver import Solver
from tests.compiles import count_compiles
from tests.contracts.solver_problems import (
    ContractionCase,
    FiniteSumCase,
    InclusionCase,
    IndefiniteCase,
    LinearCase,
    MinimizeCase,
    NonsymmetricCase,
    TransportCase,
)
from tests.tolerances import tolerance


class SolverMember(NamedTuple):
    """One row of the table: a name, a factory, and the case (problem, references, bad inputs) it is tried on.

    `variant`: the problem has stood the test of second derivatives, which are its own, with another solver already.
    `exceptions`: checks that do not apply, by name, each with what the solver's docstring says of it.
    """

    name: str
    make: Callable[[], Solver]
    case: Any
    variant: bool = False
    exceptions: Mapping[str, str] = MappingProxyType({})

    def solve(self, params: Any, x0: Any = None, **options: Any) -> jaxnum.Solution:
        x0 = self.case.start(params) if x0 is None else x0
        return jaxnum.solve(self.make(), x0, self.case.problem(params), **options)


def _itself(params: Any, r: Any) -> Any:
    return r


SOLVERS = [
    SolverMember("picard", jaxnum.solvers.picard, ContractionCase()),
    SolverMember("damped picard", lambda: jaxnum.solvers.picard(damping=0.9), ContractionCase(), variant=True),
    SolverMember("halpern", lambda: jaxnum.solvers.halpern(contraction=0.7), ContractionCase(), variant=True),
    SolverMember(
        "restarted halpern", lambda: jaxnum.solvers.restarted(jaxnum.solvers.halpern()), ContractionCase(), variant=True
    ),
    SolverMember("anderson", lambda: jaxnum.solvers.anderson(3), ContractionCase(), variant=True),
    SolverMember("restarted feg", lambda: jaxnum.solvers.restarted(jaxnum.solvers.feg()), InclusionCase()),
    SolverMember(
        "restarted cocoercive halpern",
        lambda: jaxnum.solvers.restarted(jaxnum.solvers.cocoercive_halpern()),
        InclusionCase(),
        variant=True,
    ),
    SolverMember("cg", jaxnum.solvers.cg, LinearCase()),
    SolverMember("flexible cg", lambda: jaxnum.solvers.cg(flexible=2), LinearCase(), variant=True),
    SolverMember("dcdm", lambda: jaxnum.solvers.dcdm(_itself), LinearCase(), variant=True),
    SolverMember("gcro_dr", lambda: jaxnum.solvers.gcro_dr(m=4, k=2), NonsymmetricCase(), variant=True),
    SolverMember("minres", jaxnum.solvers.minres, IndefiniteCase(), variant=True),
    SolverMember("sinkhorn", jaxnum.solvers.sinkhorn, TransportCase()),
    SolverMember("unbalanced sinkhorn", jaxnum.solvers.sinkhorn, TransportCase(0.7, 0.8)),
    SolverMember(
        "scaled sinkhorn", lambda: jaxnum.solvers.sinkhorn(epsilon_scaling=0.5), TransportCase(), variant=True
    ),
    SolverMember("newton_cg", jaxnum.solvers.newton_cg, MinimizeCase(), variant=True),
    SolverMember("bcd", lambda: jaxnum.solvers.bcd(block_size=2), MinimizeCase()),
    SolverMember("newton", jaxnum.solvers.newton, TransportCase(), variant=True),
    SolverMember(
        "restarted vr_halpern",
        lambda: jaxnum.solvers.restarted(jaxnum.solvers.vr_halpern(jax.random.key(0), 2.0, step=0.9)),
        FiniteSumCase(),
        variant=True,
    ),
    SolverMember(
        "restarted inexact_halpern",
        lambda: jaxnum.solvers.restarted(jaxnum.solvers.inexact_halpern(jax.random.key(0), 2.0)),
        FiniteSumCase(),
        variant=True,
        exceptions={
            "check_step_limit": "even no step gives the resolvent at the start, where the residual is known",
            "check_adjoints": "the inner loop ends by a test and has no unrolled derivative",
        },
    ),
]

TIGHT = {"rtol": 1e-13, "atol": 1e-13}


def close(got: Any, want: Any, dtype: Any, condition: float = 1.0, of: str = "") -> None:
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        size = max(1, np.size(w))
        scale = max(1.0, float(np.max(np.abs(w), initial=0.0)))
        error = float(np.max(np.abs(np.asarray(g) - np.asarray(w)), initial=0.0)) / scale
        assert error <= tolerance(dtype, size, condition=condition), (of, error)


def total(tree: Any, of: Callable = jnp.square) -> jax.Array:
    """The sum of a function of every entry."""
    return sum(jnp.sum(of(leaf)) for leaf in jax.tree.leaves(tree))


def inner(a: Any, b: Any) -> jax.Array:
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def moved(params: Any, t: Any, direction: Any) -> Any:
    return jax.tree.map(lambda p, d: p + t * d, params, direction)


def check_reference(m: SolverMember, dtype: str) -> None:
    """The solution is the known one, in the dtype that was asked for."""
    params = m.case.params(dtype)
    rtol = 1e-8 if dtype == "float64" else 1e-5
    solution = m.solve(params, rtol=rtol)
    assert int(solution.status) == Status.converged
    for leaf in jax.tree.leaves(solution.x):
        assert leaf.dtype == dtype
    condition = m.case.condition * rtol / jnp.finfo(dtype).eps
    close(m.case.observe(params, solution.x), m.case.reference(params), dtype, condition=condition)


def check_derivatives(m: SolverMember) -> None:
    """Forward, reverse and second order against finite differences; the unknown has an unperturbed leaf."""
    params = m.case.params("float64")
    step = 1e-4

    def observed(p: Any) -> Any:
        return m.case.observe(p, m.solve(p, **TIGHT, on_failure="return").x)

    def numeric(fn: Callable, direction: Any) -> Any:
        forward, backward = fn(moved(params, step, direction)), fn(moved(params, -step, direction))
        return jax.tree.map(lambda a, b: (a - b) / (2 * step), forward, backward)

    def near(got: Any, want: Any, of: str) -> None:
        # Central differences are wrong by step^2 times the third derivative.
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.max(np.abs(g - w)) <= 100 * step**2 * (1 + np.max(np.abs(w))), of

    scalar = lambda p: total(observed(p), jnp.sin)  # noqa: E731
    primal, gradient = jax.jit(observed), jax.jit(jax.grad(scalar))
    along = jax.jit(lambda p, d: jax.jvp(observed, (p,), (d,))[1])
    pulled = gradient(params)
    for direction in m.case.directions(params):
        tangent = along(params, direction)
        near(tangent, numeric(primal, direction), "jvp differs from finite differences")
        forward = inner(jax.tree.map(jnp.cos, primal(params)), tangent)
        close(inner(pulled, direction), forward, "float64", condition=1e6, of="vjp differs from jvp")
    if m.variant:
        return
    direction = m.case.directions(params)[0]
    want = numeric(gradient, direction)
    near(jax.jit(lambda p, d: jax.jvp(jax.grad(scalar), (p,), (d,))[1])(params, direction), want, "forward of reverse")
    reverse = jax.grad(lambda p, d: inner(jax.grad(scalar)(p), d))
    near(jax.jit(reverse)(params, direction), want, "reverse of reverse")


def check_vmap(m: SolverMember) -> None:
    """vmap, vmap of vmap, vmap of grad and solve_batched equal the separate solves, beside a lane of NaN too."""
    lanes, stacked = _lanes(m, 4)
    observe = lambda p, s: (m.case.observe(p, s.x), s.steps, s.status)  # noqa: E731
    one = lambda p: observe(p, m.solve(p, rtol=1e-8, on_failure="return"))  # noqa: E731
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *map(one, lanes))
    square = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), stacked)
    twice = jax.tree.map(lambda leaf: leaf.reshape(4, *leaf.shape[2:]), jax.jit(jax.vmap(jax.vmap(one)))(square))
    together = jax.jit(jax.vmap(one))
    batched = jaxnum.solve_batched(m.make(), *jax.vmap(m.case.explicit)(stacked), rtol=1e-8)
    got = (together(stacked), twice, (jax.vmap(m.case.observe)(stacked, batched.x), batched.steps, batched.status))
    condition = m.case.condition * 1e-8 / jnp.finfo("float64").eps
    for x, steps, status in got:
        np.testing.assert_array_equal(status, want[2])
        assert np.max(np.abs(np.asarray(steps) - want[1])) <= 1
        close(x, want[0], "float64", condition=condition)
    spoilt = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), stacked)
    x, steps, status = together(spoilt)
    assert int(status[0]) != Status.converged
    rest = lambda tree: jax.tree.map(lambda leaf: leaf[1:], tree)  # noqa: E731
    np.testing.assert_array_equal(status[1:], want[2][1:])
    close(rest(x), rest(want[0]), "float64", condition=condition, of="a lane beside NaN")
    gradient = jax.grad(lambda p: total(m.case.observe(p, m.solve(p, **TIGHT, on_failure="return").x)))
    grads, single = jax.jit(jax.vmap(gradient))(stacked), jax.jit(gradient)(lanes[1])
    close(jax.tree.map(lambda g: g[1], grads), single, "float64", condition=m.case.condition * 1e4, of="vmap of grad")


def _lanes(m: SolverMember, count: int) -> tuple[list[Any], Any]:
    lanes = [m.case.params("float64", seed) for seed in range(count)]
    return lanes, jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)


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
    solved = m.solve(params, rtol=1e-9)
    again = m.solve(params, x0=solved.x, max_steps=0, rtol=1e-8)
    assert int(again.status) == Status.converged
    for limit, every in ((3, 2), (4, 1)):
        short = m.solve(params, max_steps=limit, check_every=every, on_failure="return", rtol=1e-300, atol=0.0)
        assert int(short.status) == Status.max_steps
        assert int(short.steps) == limit


def check_asked_too_much(m: SolverMember) -> None:
    """A tolerance below what float32 reaches ends in good time, with a status that says so, and near the solution."""
    params = m.case.params("float32")
    options = {"rtol": 1e-30, "atol": 0.0, "max_steps": 3000}
    solution = m.solve(params, **options, on_failure="return")
    exact = int(solution.status) == Status.converged and float(solution.residual) == 0
    assert exact or int(solution.status) in (Status.stagnated, Status.max_steps)
    close(m.case.observe(params, solution.x), m.case.reference(params), "float32", condition=10 * m.case.condition)
    if not exact:
        with pytest.raises(jaxnum.SolverError):
            m.solve(params, **options)


def check_warm_start(m: SolverMember) -> None:
    """Starting at the solution is not punished."""
    params = m.case.params("float64")
    cold = m.solve(params, rtol=1e-9)
    warm = m.solve(params, x0=cold.x, rtol=1e-8)
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

    def gradient(**options: Any) -> Any:
        frozen = jax.lax.stop_gradient(params)

        def scalar(p: Any) -> jax.Array:
            return total(m.case.observe(frozen, m.solve(p, on_failure="return", **options).x))

        return jax.jit(jax.grad(scalar))(params)

    steps = int(m.solve(params, **TIGHT, on_failure="return").steps)
    options = {"adjoint": "unrolled", "max_steps": steps + 7, **TIGHT}
    unrolled = gradient(**options)
    close(gradient(checkpoint_every=3, **options), unrolled, "float64", condition=1e3)
    close(unrolled, gradient(**TIGHT), "float64", condition=m.case.condition * 1e5, of="unrolled against implicit")
    for leaf in jax.tree.leaves(gradient(adjoint="none")):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def check_sharding(m: SolverMember) -> None:
    """Solutions and gradients under explicit sharding equal the unsharded ones."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = m.case.sharded_params("float64")
    solved = jax.jit(jax.value_and_grad(lambda p: total(m.case.sharded_solve(m.make(), p, TIGHT).x)))
    want, want_grad = solved(params)
    with jax.set_mesh(mesh):
        got, got_grad = solved(m.case.place(params, mesh))
        close(np.asarray(got), np.asarray(want), "float64", condition=1e4)
        close(jax.tree.map(np.asarray, got_grad), jax.tree.map(np.asarray, want_grad), "float64", condition=1e6)


def check_failed_lane_is_named(m: SolverMember) -> None:
    """solve_batched raises for a failed lane and says which."""
    x0, problem = jax.vmap(m.case.explicit)(_lanes(m, 3)[1])
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
    del seen[:]
    jax.vmap(lambda p: m.solve(p, progress=seen.append).x)(_lanes(m, 2)[1])
    jax.effects_barrier()
    assert sum(report.done for report in seen) == 2


CHECKS = [
    check_derivatives,
    check_vmap,
    check_compiles_once,
    check_jit_and_export,
    check_statuses,
    check_nonfinite_keeps_last,
    check_step_limit,
    check_asked_too_much,
    check_warm_start,
    check_history,
    check_adjoints,
    check_sharding,
    check_failed_lane_is_named,
    check_progress,
]
