import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import Status
from jaxnum.solvers import sinkhorn_barycenter


def data():
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, 12)
    p = rng.uniform(size=(3, 12))
    p[0, :5] = 0
    return tuple(map(jnp.asarray, ((t[:, None] - t) ** 2, p / p.sum(1, keepdims=True), np.array([0.5, 0.3, 0.2]))))


def test_barycenter_equals_pot(x64):
    import ot

    C, p, w = data()
    # POT's method="sinkhorn" starts from an unweighted mean, which is not forgotten where the weights differ.
    histograms = np.maximum(np.asarray(p).T, 1e-300)
    options = dict(weights=np.asarray(w), method="sinkhorn_log", stopThr=1e-15, numItermax=5000)
    want = ot.bregman.barycenter(histograms, np.asarray(C), 0.05, **options)
    found = sinkhorn_barycenter(C, p, w, 0.05, rtol=1e-12)
    np.testing.assert_allclose(found.barycenter, want, rtol=1e-7)
    np.testing.assert_allclose(jnp.sum(found.barycenter), 1, rtol=1e-9)


def test_gradient_equals_finite_differences_and_maps(x64):
    C, p, w = data()
    probe = jnp.arange(12.0) ** 2

    @jax.jit
    def value(p):
        return probe @ sinkhorn_barycenter(C, p, w, 0.05, rtol=1e-12).barycenter

    change = jnp.where(p > 0, jnp.sin(jnp.arange(36.0).reshape(3, 12)), 0)
    change -= jnp.where(p > 0, jnp.sum(change, 1, keepdims=True) / jnp.sum(p > 0, 1, keepdims=True), 0)
    change *= 0.01
    step = 1e-4
    want = (value(p + step * change) - value(p - step * change)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(jax.grad(value)(p) * change), want, rtol=1e-5)
    both = jax.vmap(value)(jnp.stack([p, p[::-1]]))
    np.testing.assert_allclose(both, jnp.stack([value(p), value(p[::-1])]), rtol=1e-8)


def test_failure_is_not_missed():
    C, p, w = data()
    with pytest.raises(jaxnum.SolverError):
        sinkhorn_barycenter(C, p, w, 0.01, max_steps=1)
    for measures, weights in ((-p, w), (p * jnp.array([[1.0], [1.0], [1.1]]), w), (p, jnp.array([1.0, 1.0, -0.5]))):
        found = sinkhorn_barycenter(C, measures, weights, 0.05, on_failure="return")
        assert int(found.solution.status) == Status.nonfinite
    backwards = jax.jit(lambda epsilon: sinkhorn_barycenter(C, p, w, epsilon).solution.status)(-0.05)
    assert int(backwards) == Status.nonfinite
    with pytest.raises(TypeError, match="sinkhorn_barycenter: `weights` must have dtype float32 to match `measures`"):
        sinkhorn_barycenter(C, p, w.astype(jnp.float16), 0.05)
