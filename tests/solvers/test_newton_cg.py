"""Truncated Newton: SciPy's minima, fast convergence, saddles, and its place as the default of `minimize`."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import jaxnum
from jaxnum import Status
from jaxnum.solvers import newton_cg


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def test_rosenbrock_equals_scipy(x64):
    x0 = np.array([1.3, 0.7, 0.8, 1.9, 1.2])
    want = scipy.optimize.minimize(
        scipy.optimize.rosen,
        x0,
        method="Newton-CG",
        jac=scipy.optimize.rosen_der,
        hessp=scipy.optimize.rosen_hess_prod,
        options={"xtol": 1e-12},
    )
    solution = jaxnum.minimize(rosenbrock, jnp.asarray(x0))
    np.testing.assert_allclose(solution.x, want.x, atol=1e-7)
    assert int(solution.steps) <= 2 * want.nit


def test_logistic_regression_on_a_tree_converges_faster_than_linearly(x64):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 6)), rng.choice([-1.0, 1.0], size=80)
    f = lambda p: jnp.mean(jnp.logaddexp(0, -y * (x @ p["w"] + p["b"]))) + 0.01 * jnp.sum(p["w"] ** 2)  # noqa: E731
    start = {"w": jnp.zeros(6), "b": jnp.zeros(())}
    solution = jaxnum.minimize(f, start, history=True, rtol=1e-12)
    flat = lambda z: float(f({"w": z[:6], "b": z[6]}))  # noqa: E731
    want = scipy.optimize.minimize(flat, np.zeros(7), method="BFGS", options={"gtol": 1e-7}).x
    np.testing.assert_allclose(np.r_[solution.x["w"], solution.x["b"]], want, atol=1e-5)
    residuals = np.asarray(solution.history)[: int(solution.steps) + 1]
    ratios = residuals[1:] / residuals[:-1]
    assert ratios[-1] < 1e-2 * ratios[0]


def test_a_saddle_is_left(x64):
    f = lambda x: x[0] ** 2 - x[1] ** 2 + 0.25 * x[1] ** 4  # noqa: E731
    np.testing.assert_allclose(jaxnum.minimize(f, jnp.array([1.0, 1e-3])).x, [0, 2**0.5], atol=1e-7)


def test_a_function_without_minimum_ends_with_a_status(x64):
    solution = jaxnum.minimize(lambda x: jnp.sum(x), jnp.zeros(2), max_steps=50, on_failure="return")
    assert int(solution.status) == Status.max_steps


@pytest.mark.parametrize("inner_steps", [0, 1.5, True])
def test_inner_steps_outside_their_range(inner_steps):
    with pytest.raises(ValueError, match="newton_cg: `inner_steps` must be a Python int >= 1"):
        newton_cg(inner_steps=inner_steps)
