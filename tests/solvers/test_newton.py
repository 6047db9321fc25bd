import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import DenseCost, PointCloudCost, Status, Transport
from jaxnum.solvers import newton, sinkhorn
from tests.solvers.test_sinkhorn import data


@pytest.mark.parametrize("linear", ["direct", "cg"])
def test_plan_equals_pot(linear, x64):
    import ot

    C, a, b, x, y = data(30, 20)
    a = (a / (1 - a[0])).at[0].set(0)
    plan = ot.sinkhorn(
        *map(np.asarray, (a[1:], b, C[1:])), 0.01, method="sinkhorn_log", stopThr=1e-13, numItermax=10**5
    )
    solution = jaxnum.transport(PointCloudCost(x, y), a, b, 0.01, solver=newton(linear=linear), rtol=1e-11)
    np.testing.assert_allclose(Transport(C, a, b, 0.01).plan(solution.x)[1:], plan, rtol=0, atol=1e-9)
    assert float(solution.x[0][0]) == -np.inf


def test_unbalanced_equals_sinkhorn(x64):
    C, a, b, _, _ = data(15, 12)
    args = (C, a, 2 * b, 0.02)
    want = jaxnum.transport(*args, tau_a=0.9, rtol=1e-12).x
    for linear in ("direct", "cg"):
        got = jaxnum.transport(*args, tau_a=0.9, solver=newton(linear=linear), rtol=1e-12).x
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
    with pytest.raises(ValueError, match="shift"):
        newton(shift=-1.0)
