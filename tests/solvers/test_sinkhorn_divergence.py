import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import Status
from jaxnum.solvers import sinkhorn_divergence


def clouds(n=9, m=7):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 2)), rng.normal(size=(m, 2)) + 0.5
    a, b = rng.uniform(0.5, 1.5, n), rng.uniform(0.5, 1.5, m)
    return tuple(map(jnp.asarray, (x, y, a / a.sum(), b / b.sum())))


def test_value_equals_that_of_pot_plans(x64):
    import ot

    x, y, a, b = map(np.asarray, clouds())

    def price(x, y, a, b):
        C = ((x[:, None] - y[None]) ** 2).sum(-1)
        P = ot.sinkhorn(a, b, C, 0.5, method="sinkhorn_log", stopThr=1e-14, numItermax=100_000)
        return np.sum(P * C) + 0.5 * np.sum(P * np.log(P / np.outer(a, b)))

    want = price(x, y, a, b) - (price(x, x, a, a) + price(y, y, b, b)) / 2
    got = sinkhorn_divergence(*clouds()[:2], 0.5, a=clouds()[2], b=clouds()[3], rtol=1e-12)
    np.testing.assert_allclose(got.value, want, rtol=1e-9)
    assert np.all(np.asarray(got.status) == Status.converged)


def test_unbalanced_value_is_the_minimum_that_defines_it(x64):
    """Masses differ, weights too; scipy minimises the primal as it is written."""
    from scipy.optimize import minimize

    x, y, a, b = map(np.asarray, clouds(4, 3))
    b, epsilon, tau = 1.7 * b, 0.5, 0.6
    rho = epsilon * tau / (1 - tau)

    def kl(p, q):
        return np.sum(p * np.log(p / q) - p + q)

    def price(x, y, a, b):
        C = ((x[:, None] - y[None]) ** 2).sum(-1)

        def primal(t):
            P = np.exp(t).reshape(C.shape)
            row = np.log(P.sum(1) / a)
            column = np.log(P.sum(0) / b)
            gradient = C + epsilon * np.log(P / np.outer(a, b)) + rho * (row[:, None] + column[None])
            value = np.sum(P * C) + epsilon * kl(P, np.outer(a, b)) + rho * (kl(P.sum(1), a) + kl(P.sum(0), b))
            return value, (gradient * P).ravel()

        start = np.log(np.outer(a, b)).ravel()
        return minimize(primal, start, jac=True, method="BFGS", options={"gtol": 1e-12}).fun

    want = price(x, y, a, b) - (price(x, x, a, a) + price(y, y, b, b)) / 2 + epsilon * (a.sum() - b.sum()) ** 2 / 2
    points = tuple(map(jnp.asarray, (x, y)))
    got = sinkhorn_divergence(*points, epsilon, a=jnp.asarray(a), b=jnp.asarray(b), tau=tau, rtol=1e-12)
    np.testing.assert_allclose(got.value, want, rtol=1e-9)
    assert abs(float(sinkhorn_divergence(points[0], points[0], epsilon, tau=tau, rtol=1e-12).value)) < 1e-11
    shares = jax.grad(lambda a: sinkhorn_divergence(*points, epsilon, a=a, b=b, tau=tau, rtol=1e-12).value)(a)
    ahead, behind = (
        sinkhorn_divergence(*points, epsilon, a=a * (1 + t), b=b, tau=tau, rtol=1e-12).value for t in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(np.sum(shares * a), (ahead - behind) / 2e-5, rtol=1e-6)


def test_weights_that_vanish_are_not_missed():
    x, y, a, _ = clouds()
    a = jnp.asarray(a, jnp.float32).at[0].set(1e-30)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    assert np.isnan(sinkhorn_divergence(x, y, 0.5, a=a, tau=0.5, on_failure="return").value)
    with pytest.raises(ValueError, match=r"sinkhorn_divergence: `tau` must be in \(0, 1\]; got 1.5"):
        sinkhorn_divergence(x, y, 0.5, tau=1.5)


def test_equal_clouds_are_at_distance_zero(x64):
    x, _, a, _ = clouds()
    order = jnp.arange(x.shape[0])[::-1]
    assert abs(float(sinkhorn_divergence(x, x[order], 0.5, a=a, b=a[order], rtol=1e-12).value)) < 1e-11
    assert float(sinkhorn_divergence(x, x + 0.1, 0.5, a=a, b=a, rtol=1e-12).value) > 0


def test_gradients_equal_finite_differences(x64):
    x, y, a, b = clouds()

    def value(x, a):
        return sinkhorn_divergence(x, y, 0.5, a=a, b=b, rtol=1e-12).value

    rng = np.random.default_rng(1)
    dx, da = jnp.asarray(rng.normal(size=x.shape)), jnp.asarray(rng.normal(size=a.shape))
    da = 0.1 * (da - jnp.mean(da))
    gx, ga = jax.grad(value, (0, 1))(x, a)
    step = 1e-5
    for got, ahead, behind in (
        (jnp.sum(gx * dx), value(x + step * dx, a), value(x - step * dx, a)),
        (jnp.sum(ga * da), value(x, a + step * da), value(x, a - step * da)),
    ):
        np.testing.assert_allclose(got, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)


def test_failure_is_not_missed():
    x, y, _, _ = clouds()
    with pytest.raises(jaxnum.SolverError):
        sinkhorn_divergence(x, y, 0.01, max_steps=1)
    found = sinkhorn_divergence(x, y, 0.01, max_steps=1, on_failure="return")
    assert int(found.status[0]) == Status.max_steps
    with pytest.raises(ValueError, match="sinkhorn_divergence: `y` must have a point"):
        sinkhorn_divergence(x, y[:0], 0.01)


def test_whole_numbers_are_weights_and_tau_is_a_scalar():
    x, y, a = jnp.array([[0.0], [1.0]]), jnp.array([[2.0], [4.0]]), jnp.array([1, 2])
    whole, real = (sinkhorn_divergence(x, y, 0.5, a=w, b=w, tau=0.5).value for w in (a, a.astype(x.dtype)))
    assert whole == real
    with pytest.raises(ValueError, match="sinkhorn_divergence: `tau` must be a scalar"):
        sinkhorn_divergence(x, y, 0.5, tau=jnp.array([0.5, 0.6]))
