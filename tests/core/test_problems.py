"""Problems without a solver of their own yet: their roots, their traced functions, their implicit derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import FiniteSum, Inclusion, Minimize
from jaxnum.core.adjoints import implicit
from jaxnum.core.solver import Defaults, Measure, Solver
from jaxnum.core.trees import norm
from tests.tolerances import tolerance


def test_inclusion_root_is_the_natural_residual(x64):
    soft = lambda x, step: jnp.sign(x) * jnp.maximum(jnp.abs(x) - step, 0)  # noqa: E731
    problem = Inclusion(lambda x, b: x - b, soft, (jnp.array([3.0, 0.5, -2.0]),))
    problem.check("solve", jnp.zeros(3))
    traced = problem.traced(jnp.zeros(3))
    np.testing.assert_allclose(traced.root(jnp.array([2.0, 0.0, -1.0])), 0)  # soft thresholding solves the lasso
    np.testing.assert_allclose(Inclusion(lambda x: 2 * x).root(jnp.ones(2)), 2)

    x, b = jnp.array([2.0, 0.0, -1.0]), jnp.array([3.0, 0.5, -2.0])
    lasso = lambda b: Inclusion(lambda x: x - b, soft)  # noqa: E731
    # x = soft(b, 1) moves with b where |b| > 1 and not elsewhere.
    np.testing.assert_allclose(jax.grad(lambda b: implicit(lasso(b).traced(x), x).sum())(b), [1, 0, 1])
    # Without the hoisting that `solve` does, the captured b would silently count as a constant.
    with pytest.raises(ValueError, match="implicit: `problem` must have its functions traced"):
        jax.grad(lambda b: implicit(lasso(b), x).sum())(b)


def test_finite_sum_root_is_the_mean(x64):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
    problem = FiniteSum(lambda x, i, r: jnp.mean(x - r[i], axis=0), 6, (rows,))
    problem.check("solve", jnp.zeros(3))
    traced = problem.traced(jnp.zeros(3))
    np.testing.assert_allclose(traced.root(jnp.ones(3)), 1 - rows.mean(0), atol=tolerance("float64", 6))
    np.testing.assert_allclose(traced.mean(jnp.ones(3), jnp.array([1, 4])), 1 - rows[jnp.array([1, 4])].mean(0))
    with pytest.raises(ValueError, match="solve: `n` must be at least 1; got 0"):
        FiniteSum(problem.F_batch, 0, (rows,)).check("solve", jnp.zeros(3))


# A user's own solver, written as the README says: three functions and a factory.
def _descent_init(hyper, x, problem):
    return problem.root(x)


def _descent_step(hyper, x, state, problem):
    x = jax.tree.map(lambda leaf, g: leaf - hyper * g, x, state)
    return x, problem.root(x)


def _descent_measure(hyper, x, state, problem):
    return Measure(norm(state), jnp.ones_like(norm(state)), jnp.int32(0))


def gradient_descent(rate):
    return Solver(
        name="gradient_descent",
        init=_descent_init,
        step=_descent_step,
        measure=_descent_measure,
        problem=Minimize,
        hyper=jnp.asarray(rate),
        defaults=Defaults(max_steps=2000),
    )


def test_a_solver_of_three_functions_gets_everything_else(x64):
    Q = jnp.array([[2.0, 0.5], [0.5, 1.0]])

    def argmin(b, rate=0.3):
        problem = Minimize(lambda x, b: 0.5 * x["u"] @ Q @ x["u"] - b @ x["u"] + 0.5 * jnp.sum(x["w"] ** 2), (b,))
        x0 = {"u": jnp.zeros(2), "w": jnp.ones(1)}
        return jaxnum.solve(gradient_descent(rate), x0, problem, rtol=1e-12).x["u"]

    b = jnp.array([1.0, -1.0])
    np.testing.assert_allclose(argmin(b), jnp.linalg.solve(Q, b), atol=1e-11)
    np.testing.assert_allclose(jax.jacrev(argmin)(b), jnp.linalg.inv(Q), atol=1e-10)
    np.testing.assert_allclose(jax.jacfwd(argmin)(b), jnp.linalg.inv(Q), atol=1e-10)
    many = jax.vmap(argmin)(jnp.stack([b, 2 * b]), jnp.array([0.3, 0.2]))
    np.testing.assert_allclose(many[1], 2 * jnp.linalg.solve(Q, b), atol=1e-10)
    wanted = r"solve: `f\(x0\)` must have shape \(\); got \(2,\). Sum or average the loss."
    with pytest.raises(ValueError, match=wanted):
        jaxnum.solve(gradient_descent(0.1), jnp.zeros(2), Minimize(lambda x: x))
