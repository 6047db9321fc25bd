import jax
import jax.numpy as jnp
import numpy as np

import jaxnum
from jaxnum import Status, Transport
from jaxnum.solvers import sns


def assignment(n=100):
    return jnp.asarray(np.random.default_rng(0).random((n, n))), jnp.full(n, 1 / n)


def test_small_epsilon_takes_few_newton_steps(x64):
    C, a = assignment()
    for eta, most in ((400, 20), (1200, 40)):
        solution = jaxnum.transport(C, a, a, jnp.float64(1 / eta), solver=sns(), rtol=1e-9)
        assert int(solution.phase_steps[0]) == 20
        assert int(solution.phase_steps[1]) <= most
        plan = Transport(C, a, a, 1 / eta).plan(solution.x)
        assert float(jnp.sum(jnp.abs(plan.sum(0) - a)) + jnp.sum(jnp.abs(plan.sum(1) - a))) <= 1.1e-9


def test_the_limit_is_the_assignment(x64):
    import scipy.optimize as optimize

    C, a = assignment(20)
    rows, columns = optimize.linear_sum_assignment(np.asarray(C))
    want = float(np.asarray(C)[rows, columns].mean())
    for eta in (100.0, 2000.0):
        solver = sns(epsilon_scaling=0.5, sweeps=30)
        x = jaxnum.transport(C, a, a, jnp.float64(1 / eta), solver=solver, rtol=1e-9).x
        price = float(Transport(C, a, a, 1 / eta).primal_cost(x))
        # The entropy of a plan lies between log n and 2 log n.
        assert want - 1e-8 <= price <= want + np.log(20) / eta


def test_batches_equal_separate_solves(x64):
    C, a = assignment(12)
    costs = jnp.stack([C, C.T, C**2])
    solve = lambda C: jaxnum.transport(C, a, a, 0.01, solver=sns(sweeps=5))  # noqa: E731
    together = jax.vmap(solve)(costs)
    for i in range(3):
        alone = solve(costs[i])
        assert int(together.status[i]) == Status.converged
        assert abs(int(together.steps[i]) - int(alone.steps)) <= 1
        np.testing.assert_allclose(together.x[0][i], alone.x[0], rtol=0, atol=1e-8)
