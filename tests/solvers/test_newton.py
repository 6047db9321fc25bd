import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import DenseCost, PointCloudCost, Status, Transport
from jaxnum.solvers import newton, sinkhorn
from jaxnum.solvers.transport import plans
from tests.solvers.test_sinkhorn import data


@pytest.mark.parametrize("linear", ["direct", "cg", "sparse"])
def test_plan_equals_pot(linear, x64):
    import ot

    C, a, b, x, y = data(30, 20)
    a = (a / (1 - a[0])).at[0].set(0)
    plan = ot.sinkhorn(
        *map(np.asarray, (a[1:], b, C[1:])), 0.01, method="sinkhorn_log", stopThr=1e-13, numItermax=10**5
    )
    solver = newton(linear=linear, entries=14)
    solution = jaxnum.transport(PointCloudCost(x, y), a, b, 0.01, solver=solver, rtol=1e-11)
    assert int(solution.state.whole) == 0
    np.testing.assert_allclose(Transport(C, a, b, 0.01).plan(solution.x)[1:], plan, rtol=0, atol=1e-9)
    assert float(solution.x[0][0]) == -np.inf


def test_unbalanced_equals_sinkhorn(x64):
    C, a, b, _, _ = data(15, 12)
    args = (C, a, 2 * b, 0.02)
    want = jaxnum.transport(*args, tau_a=0.9, rtol=1e-12).x
    for linear in ("direct", "cg", "sparse"):
        got = jaxnum.transport(*args, tau_a=0.9, solver=newton(linear=linear, entries=8), rtol=1e-12).x
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=0, atol=1e-9)


def test_convergence_is_quadratic(x64):
    C, a, b, _, _ = data(20, 20)
    solution = jaxnum.transport(C, a, b, 0.02, solver=newton(), history=True, rtol=1e-12)
    errors = np.asarray(solution.history)
    errors = errors[~np.isnan(errors) & (errors > 1e-14)]
    close = errors[errors < 1e-2]
    assert close.size >= 3
    assert np.all(close[1:] <= 100 * close[:-1] ** 2 + 1e-13)


def test_gradients_equal_finite_differences(x64):
    _, a, b, x, y = data(8, 7)
    weights = jnp.linspace(0, 1, 7)

    def value(x, tilt, log_epsilon):
        tilted = a * jnp.exp(tilt) / jnp.sum(a * jnp.exp(tilt))
        problem = Transport(PointCloudCost(x, y), tilted, b, jnp.exp(log_epsilon))
        start = (jnp.zeros_like(a), jnp.zeros_like(b))
        return jnp.sum(problem.apply(jaxnum.solve(newton(), start, problem, rtol=1e-12).x, weights) ** 2)

    at = (x, jnp.zeros(8), jnp.log(0.02))
    gradient = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*at)
    rng = np.random.default_rng(2)
    fn = jax.jit(value)
    for i in range(3):
        along = [jnp.asarray(rng.normal(size=np.shape(leaf))) * (i == j) for j, leaf in enumerate(at)]
        ends = [fn(*(leaf + s * d for leaf, d in zip(at, along, strict=True))) for s in (1e-5, -1e-5)]
        got = sum(float(jnp.sum(g * d)) for g, d in zip(gradient, along, strict=True))
        np.testing.assert_allclose(got, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-9)


def test_float32_ends_with_a_status():
    C, a, b, _, _ = data(20, 20, "float32")
    solution = jaxnum.transport(C, a, b, 0.02, solver=newton())
    assert solution.x[0].dtype == jnp.float32
    below = jaxnum.transport(C, a, b, 0.02, solver=newton(), rtol=1e-12, on_failure="return")
    assert int(below.status) == Status.stagnated
    assert float(below.residual) < 1e-4


@jax.tree_util.register_dataclass
class Contradiction(DenseCost):
    """Its matrix is not the one that its log-sum-exps belong to."""

    def matrix(self):
        return -self.C


def test_a_cost_that_contradicts_itself_breaks_down(x64):
    C, a, b, _, _ = data(12, 12)
    solution = jaxnum.transport(Contradiction(C), a, b, 0.02, solver=newton(), on_failure="return")
    assert int(solution.status) == Status.breakdown
    assert np.all(np.isfinite(solution.x[1]))


def test_starts_far_away_and_keeps_solutions(x64):
    C, a, b, _, _ = data(12, 12)
    far = (jnp.zeros_like(a), jnp.linspace(-5.0, 5.0, 12))
    solution = jaxnum.transport(C, a, b, 0.02, x0=far, solver=newton())
    again = jaxnum.transport(C, a, b, 0.02, x0=solution.x, solver=newton())
    assert int(again.steps) == 0
    swept = jaxnum.transport(C, a, b, 0.02, solver=sinkhorn(), rtol=1e-9)
    np.testing.assert_allclose(solution.x[1], swept.x[1], rtol=0, atol=1e-8)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="linear"):
        newton(linear="qr")
    with pytest.raises(ValueError, match="entries"):
        newton(entries=0)
    with pytest.raises(ValueError, match="kept"):
        newton(kept=0.0)
    with pytest.raises(ValueError, match="shift"):
        newton(shift=-1.0)


def clusters(n=60, surplus=1e-4):
    """Two clouds far apart: a little mass has to cross, in entries too small to be kept."""
    rng = np.random.default_rng(0)
    place = np.repeat([[0.0, 0.0], [3.0, 0.0]], n // 2, axis=0)
    C = ((rng.random((n, 2)) + place)[:, None] - (rng.random((n, 2)) + place)[None]) ** 2
    a, tilt = np.full(n, 1 / n), np.repeat([1 + surplus, 1 - surplus], n // 2)
    return tuple(jnp.asarray(v) for v in (C.sum(-1), a, a * tilt))


def test_mass_between_clusters_is_found(x64):
    C, a, b = clusters()
    solution = jaxnum.transport(C, a, b, 0.05, solver=newton(linear="sparse", entries=25), rtol=1e-11, max_steps=35)
    # Sweeps would take millions of steps; no other plan of this form has these marginals.
    P = np.exp((np.asarray(solution.x[0])[:, None] + np.asarray(solution.x[1]) - np.asarray(C)) / 0.05)
    assert np.abs(P.sum(1) - a).sum() + np.abs(P.sum(0) - b).sum() <= 2e-11
    # Steps with the whole plan come when the kept entries do not help.
    assert 0 < int(solution.state.whole) < int(solution.steps) / 2


def test_a_plan_that_is_not_sparse_is_used_whole(x64):
    C, a, b, x, y = data(20, 20)
    whole = jaxnum.transport(C, a, b, 0.1, solver=newton(linear="cg"))
    for cost in (C, PointCloudCost(x, y)):
        solution = jaxnum.transport(cost, a, b, 0.1, solver=newton(linear="sparse", entries=2))
        assert int(solution.state.whole) == int(solution.steps) == int(whole.steps)
        np.testing.assert_allclose(solution.x[1], whole.x[1], rtol=0, atol=1e-10)


def test_kept_entries_make_a_convex_system(x64):
    _, a, b, x, y = data(15, 12)
    problem = Transport(PointCloudCost(x, y), a, b, 0.02)
    u, v = problem.log_scalings(jaxnum.transport(problem.cost, a, b, 0.02, rtol=1e-3).x)
    P = np.exp(np.asarray(u)[:, None] + np.asarray(v) - np.asarray(problem.cost.matrix()) / 0.02)
    columns = plans.heaviest(v, 3, problem)
    np.testing.assert_array_equal(np.sort(columns, axis=1), np.sort(np.argsort(-P, axis=1)[:, :3], axis=1))
    dense = np.zeros_like(P)
    plan, sums = plans.kept(u, v, columns, problem).balanced(P.sum(1), P.sum(0))
    np.put_along_axis(dense, np.asarray(columns), np.asarray(plan.values), axis=1)
    reached = dense.sum(0) > 0
    np.testing.assert_allclose(dense.sum(0)[reached], P.sum(0)[reached], rtol=1e-13)
    S = np.diag(P.sum(0)) - dense.T @ np.diag(1 / np.asarray(sums)) @ dense
    assert np.linalg.eigvalsh(S)[0] >= -1e-14
    whole = plans.Recomputed(problem.cost, u, v, jnp.float64(0.02))
    for ours, want in ((plan, dense), (plans.Whole(jnp.asarray(P)), P), (whole, P)):
        np.testing.assert_allclose(ours.apply(b), want @ np.asarray(b), rtol=1e-13)
        np.testing.assert_allclose(ours.apply_transpose(a), np.asarray(a) @ want, rtol=1e-13)
        np.testing.assert_allclose(ours.squares(a), np.asarray(a) @ want**2, rtol=1e-13)


def test_sparse_steps_store_no_plan(x64):
    n = 3000
    points, a = jax.ShapeDtypeStruct((n, 2), jnp.float64), jax.ShapeDtypeStruct((n,), jnp.float64)

    def solve(x, y, a):
        options = {"solver": newton(linear="sparse", entries=32), "adjoint": "none"}
        return jaxnum.transport(PointCloudCost(x, y), a, a, 1e-3, **options).x

    memory = jax.jit(solve).lower(points, points, a).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < n * n * 8 / 4


def test_auto_is_sparse_where_that_was_faster():
    def columns(n, m, **options):
        a, b = weights(n, m)
        problem = Transport(DenseCost(jax.ShapeDtypeStruct((n, m), jnp.float32)), a, b, 0.1)
        solver = newton(**options)
        return jax.eval_shape(solver.init, solver.hyper, (a, b), problem).columns

    def weights(*sizes):
        return tuple(jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes)

    assert columns(2900, 2900) is None
    assert columns(4000, 4000).shape == (4000, 128)
    assert columns(2000, 8000, entries=64).shape == (2000, 256)
    assert columns(10**6, 100) is None
