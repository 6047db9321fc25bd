import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import PointCloudCost, Status, Transport


def data(n=8, m=6, zeros=True, seed=0):
    rng = np.random.default_rng(seed)
    C, a, b = rng.uniform(size=(n, m)), rng.uniform(0.5, 1.5, n), rng.uniform(0.5, 1.5, m)
    if zeros:
        a[1] = b[2] = 0
    return jnp.asarray(C), jnp.asarray(a / a.sum()), jnp.asarray(b / b.sum())


def observables(n, m, zeros, tau_b, cloud):
    """(t, epsilon, tau_a) -> numbers made of the plan and of the potentials; t moves C or points, a and b."""
    C, a, b = data(n, m, zeros)
    rng = np.random.default_rng(1)
    W, w, dC = (jnp.asarray(rng.normal(size=s)) for s in ((n, m), (n,), (n, m)))
    x, y = (jnp.asarray(rng.uniform(size=(k, 2))) for k in (n, m))

    def balanced_direction(weights):
        d = jnp.where(weights > 0, jnp.asarray(rng.normal(size=weights.size)), 0)
        return 0.01 * jnp.where(weights > 0, d - jnp.sum(d) / jnp.sum(weights > 0), 0)

    da, db = balanced_direction(a), balanced_direction(b)

    def observe(t, epsilon, tau_a, adjoint="implicit"):
        cost = PointCloudCost(x + t[0] * dC[:, :2], y - t[0] * dC[:m, 1:3], block=3) if cloud else C + t[0] * dC
        problem = Transport(cost, a + t[1] * da, b + t[2] * db, epsilon, tau_a, tau_b)
        f, g = jaxnum.solve(jaxnum.solvers.sinkhorn(), (0 * a, 0 * b), problem, rtol=1e-13, adjoint=adjoint).x
        return jnp.stack([jnp.sum(W * problem.plan((f, g))), jnp.sum(jnp.where(a > 0, w * jnp.where(a > 0, f, 0), 0))])

    return observe


CASES = {
    "balanced": (8, 6, False, 1.0, 1.0, False),
    "zero weights": (8, 6, True, 1.0, 1.0, False),
    "unbalanced": (8, 6, True, 0.7, 0.8, False),
    "half balanced": (8, 6, False, 0.7, 1.0, False),
    "points": (8, 6, True, 1.0, 1.0, True),
    "krylov": (140, 130, True, 1.0, 1.0, False),
    "krylov unbalanced": (140, 130, True, 0.7, 0.8, False),
}


@pytest.mark.parametrize("case", CASES)
def test_derivatives_match_finite_differences(x64, case):
    n, m, zeros, tau_a, tau_b, cloud = CASES[case]
    observe = observables(n, m, zeros, tau_b, cloud)
    at = (jnp.zeros(3), jnp.float64(0.1), jnp.float64(tau_a))
    argnums = (0, 1, 2) if tau_a < 1 else (0, 1)
    reverse = jax.jit(jax.jacrev(observe, argnums))(*at)
    plain = jax.jit(lambda *args: observe(*args, adjoint="none"))
    h = 1e-5
    for k in range(4 if tau_a == 1 else 5):

        def moved(s, k=k):
            return (at[0].at[k].add(s) if k < 3 else at[0], at[1] + s * (k == 3), at[2] + s * (k == 4))

        got = reverse[0][:, k] if k < 3 else reverse[k - 2]
        want = (plain(*moved(h)) - plain(*moved(-h))) / (2 * h)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_gauge_and_masks(x64):
    C, a, b = data()
    problem = Transport(C, a, b, 0.1)
    f, g = jaxnum.transport(C, a, b, 0.1, rtol=1e-12).x
    assert f[1] == -jnp.inf
    assert g[2] == -jnp.inf
    held = jnp.isfinite(f), jnp.isfinite(g)
    centred = jnp.sum(a * jnp.where(held[0], f, 0)) - jnp.sum(b * jnp.where(held[1], g, 0))
    assert abs(float(centred)) < 1e-14
    null = (held[0] * 1.0, held[1] * -1.0)
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in problem.project(null)) < 1e-15
    plan = problem.plan((f, g))
    assert not plan[1].any()
    assert not plan[:, 2].any()
    np.testing.assert_allclose(plan @ b, problem.apply((f, g), b), rtol=1e-13)
    np.testing.assert_allclose(plan.T @ a, problem.apply_transpose((f, g), a), rtol=1e-13)
    np.testing.assert_allclose(jnp.sum(plan * C), problem.primal_cost((f, g)), rtol=1e-13)


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_dual_value_equals_primal_and_its_gradient_is_the_plan(x64, tau):
    C, a, b = data(zeros=False)
    solved = jaxnum.transport(C, a, b, 0.1, tau_a=tau, tau_b=tau, rtol=1e-13).x
    problem = Transport(C, a, b, 0.1, tau, tau)
    plan = problem.plan(solved)
    np.testing.assert_allclose(
        jax.grad(lambda C: Transport(C, a, b, 0.1, tau, tau).dual_cost(solved))(C), plan, rtol=1e-9
    )
    primal = jnp.sum(plan * C) + 0.1 * jnp.sum(plan * (jnp.log(plan) - 1))
    if tau < 1:
        rho = 0.1 * tau / (1 - tau)
        for got, want in ((plan.sum(1), a), (plan.sum(0), b)):
            primal += rho * jnp.sum(got * jnp.log(got / want) - got + want)
    np.testing.assert_allclose(problem.dual_cost(solved), primal, rtol=1e-11)


def test_only_the_balanced_problem_asks_for_equal_masses(x64):
    C, a, b = data()
    assert jaxnum.transport(C, 2 * a, b, 0.1, tau_a=0.9).status == Status.converged
