import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import PointCloudCost, Status, Transport
from jaxnum.solvers import phase, sinkhorn, then
from tests.tolerances import tolerance


def data(n=100, m=100, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(size=(n, 2)), rng.uniform(size=(m, 2))
    a, b = rng.uniform(0.5, 1.5, n), rng.uniform(0.5, 1.5, m)
    C = ((x[:, None] - y[None]) ** 2).sum(-1)
    return tuple(jnp.asarray(v, dtype) for v in (C, a / a.sum(), b / b.sum(), x, y))


def test_plan_equals_pot(x64):
    ot = pytest.importorskip("ot")
    C, a, b, x, y = data()
    want = ot.sinkhorn(*map(np.asarray, (a, b, C)), 0.01, method="sinkhorn_log", stopThr=1e-13, numItermax=100_000)
    for solver in (sinkhorn(), sinkhorn(epsilon_scaling=0.5), sinkhorn(momentum=1.3)):
        for cost in (C, PointCloudCost(x, y)):
            solution = jaxnum.transport(cost, a, b, 0.01, rtol=1e-12, solver=solver)
            np.testing.assert_allclose(Transport(cost, a, b, 0.01).plan(solution.x), want, rtol=0, atol=1e-9)


def test_unbalanced_plan_equals_pot(x64):
    ot = pytest.importorskip("ot")
    C, a, b, _, _ = data(20, 15)
    rho, epsilon = 0.5, 0.05
    kwargs = dict(method="sinkhorn", c=np.ones(C.shape), reg_type="kl", stopThr=1e-14, numItermax=10_000)
    want = ot.unbalanced.sinkhorn_unbalanced(*map(np.asarray, (a, b, C)), epsilon, rho, **kwargs)
    tau = rho / (rho + epsilon)
    solution = jaxnum.transport(C, a, b, epsilon, tau_a=tau, tau_b=tau, rtol=1e-12)
    np.testing.assert_allclose(Transport(C, a, b, epsilon).plan(solution.x), want, rtol=0, atol=1e-9)


def test_gaussians_have_a_closed_form(x64):
    t = jnp.linspace(-9, 11, 400)

    def density(mean, s):
        p = jnp.exp(-((t - mean) ** 2) / (2 * s * s))
        return p / jnp.sum(p)

    a, b, sigma = density(0.0, 0.8), density(1.0, 1.2), 0.5
    problem = Transport(PointCloudCost(t[:, None], t[:, None]), a, b, sigma)
    x = jaxnum.transport(problem.cost, a, b, sigma, rtol=1e-10).x
    # The plan of C = |x - y|^2 is the Gaussian whose covariance c solves c^2 + (epsilon/2) c = s1^2 s2^2.
    covariance = (-sigma / 2 + (sigma**2 / 4 + 4 * 0.8**2 * 1.2**2) ** 0.5) / 2
    want = 1.0 + 0.8**2 + 1.2**2 - 2 * covariance
    np.testing.assert_allclose(problem.primal_cost(x), want, rtol=1e-6)


def test_precision_and_marginals(float_dtype):
    C, a, b, _, _ = data(30, 20, float_dtype)
    solution = jaxnum.transport(C, a, b, 0.05)
    assert all(leaf.dtype == float_dtype for leaf in solution.x)
    plan = Transport(C, a, b, 0.05).plan(solution.x)
    bound = (1e-6 if float_dtype == "float64" else 1e-4) + tolerance(float_dtype, 50, condition=10.0)
    assert float(jnp.sum(jnp.abs(plan.sum(1) - a)) + jnp.sum(jnp.abs(plan.sum(0) - b))) <= bound


def test_epsilon_scaling_needs_a_third_of_the_steps(x64):
    C, a, b, _, _ = data(500, 500)
    epsilon = 1e-3 * float(jnp.max(C))
    steps = [
        int(jaxnum.transport(C, a, b, epsilon, solver=s, rtol=1e-3, on_failure="return").steps)
        for s in (sinkhorn(), sinkhorn(epsilon_scaling=0.5))
    ]
    assert 3 * steps[1] <= steps[0]


def test_epsilon_scaling_is_not_judged_early_and_keeps_warm_starts(x64):
    C, a, b, _, _ = data(20, 20)
    solver = sinkhorn(epsilon_scaling=0.5, stage_sweeps=3)
    cold = jaxnum.transport(C, a, b, 0.02, solver=solver, atol=10.0, check_every=1)
    assert int(cold.steps) > 3
    solved = jaxnum.transport(C, a, b, 0.02, solver=solver, rtol=1e-10)
    assert int(jaxnum.transport(C, a, b, 0.02, solver=solver, x0=solved.x, rtol=1e-9).steps) == 0


def test_start_limits_history_and_phases(x64):
    C, a, b, _, _ = data(20, 15)
    solved = jaxnum.transport(C, a, b, 0.05, rtol=1e-11)
    again = jaxnum.transport(C, a, b, 0.05, x0=solved.x, max_steps=0)
    assert int(again.steps) == 0
    assert int(again.status) == Status.converged
    cold = jaxnum.transport(C, a, b, 0.05, max_steps=0, on_failure="return")
    assert int(cold.status) == Status.max_steps
    # Rows that fit alone must not pass for a solution.
    g = jnp.zeros_like(b)
    f = 0.05 * (jnp.log(a) - Transport(C, a, b, 0.05).cost.lse_rows(g, 0.05))
    assert jaxnum.transport(C, a, b, 0.05, x0=(f, g), max_steps=0, on_failure="return").status == Status.max_steps
    solution = jaxnum.transport(C, a, b, 0.05, max_steps=200, check_every=10, history=True)
    history = np.asarray(solution.history)
    assert history.shape == (21,)
    assert history[int(solution.steps) // 10] == solution.residual
    phases = jaxnum.transport(C, a, b, 0.05, solver=then(phase(sinkhorn(), rtol=1e-2), sinkhorn(momentum=1.2)))
    assert phases.phase_steps.shape == (2,)
    assert int(phases.status) == Status.converged


def test_batches_equal_separate_solves(x64):
    problems = [data(64, 64, seed=i)[:3] for i in range(4)]
    C, a, b = (jnp.stack(leaves) for leaves in zip(*problems, strict=True))
    x0 = (jnp.zeros_like(a), jnp.zeros_like(b))
    together = jaxnum.solve_batched(sinkhorn(), x0, Transport(C, a, b, 0.02, 1.0, 1.0))
    mapped = jax.vmap(lambda C, a, b: jaxnum.transport(C, a, b, 0.02))(C, a, b)
    for i, problem in enumerate(problems):
        alone = jaxnum.transport(*problem, 0.02)
        for many in (together, mapped):
            assert int(many.steps[i]) == int(alone.steps)
            assert int(many.status[i]) == Status.converged
            np.testing.assert_allclose(many.x[0][i], alone.x[0], rtol=1e-9, atol=1e-11)


def test_arguments_are_checked():
    for kwargs in ({"epsilon_scaling": 1.0}, {"momentum": 2.0}, {"stage_sweeps": 0}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            sinkhorn(**kwargs)


@pytest.mark.parametrize("solver", [sinkhorn(), jaxnum.solvers.newton()], ids=lambda s: s.name)
def test_the_mass_sets_the_scale_of_the_error(solver, x64):
    C = jax.random.uniform(jax.random.key(0), (20, 20))
    plans = []
    for mass in (1.0, 1e-7):
        a = jnp.full(20, mass / 20)
        solution = jaxnum.transport(C, a, a, 0.05, solver=solver, rtol=1e-8)
        plans.append(jaxnum.Transport(C, a, a, 0.05).plan(solution.x) / mass)
    np.testing.assert_allclose(plans[1], plans[0], atol=1e-8)
