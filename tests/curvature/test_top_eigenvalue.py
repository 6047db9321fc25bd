"""The top eigenvalue: NumPy's, every status, and gradient descent at the edge of stability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import Status
from jaxnum.curvature import hessian_product, top_eigenvalue
from tests.curvature.problems import dense
from tests.curvature.test_lanczos import start, with_spectrum


@pytest.mark.parametrize(("which", "want"), [("largest", 5.0), ("smallest", -7.0), ("magnitude", -7.0)])
def test_finds_the_one_that_is_asked_for(which, want, x64):
    A = with_spectrum(np.r_[-7.0, np.linspace(-1, 1, 57), 4.9, 5.0])
    top = top_eigenvalue(A, start(60), which=which, subspace=8)
    np.testing.assert_allclose(top.value, want, rtol=1e-10)
    assert float(np.linalg.norm(A @ top.vector - want * top.vector)) < 1e-6
    assert 8 < int(top.steps) < 200


def test_every_status():
    A = with_spectrum(np.linspace(0, 1, 50)).astype(np.float32)
    v = start(50, np.float32)
    cases = {
        Status.max_steps: (A, v, {"max_steps": 3, "subspace": 2}),
        Status.breakdown: (A, jnp.zeros(50), {}),
        Status.nonfinite: (np.full((50, 50), np.nan, np.float32), v, {}),
    }
    for status, (op, v0, options) in cases.items():
        assert int(top_eigenvalue(op, v0, on_failure="return", **options).status) == status
        with pytest.raises(jaxnum.SolverError, match=f"top_eigenvalue: {status.name}"):
            top_eigenvalue(op, v0, **options)
    assert float(top_eigenvalue(np.zeros((50, 50), np.float32), v).value) == 0


def test_bad_input():
    with pytest.raises(ValueError, match="top_eigenvalue: `which` must be one of"):
        top_eigenvalue(jnp.eye(2), jnp.ones(2), which="top")
    with pytest.raises(ValueError, match="top_eigenvalue: `subspace` must be a Python int >= 2; got 1"):
        top_eigenvalue(jnp.eye(2), jnp.ones(2), subspace=1)


@pytest.mark.slow
def test_gradient_descent_trains_at_the_edge_of_stability(x64):
    """A tanh network of width 32 on 200 points: the sharpness rises to 2 / step and stays within 15 % of it."""
    x = jnp.linspace(-1, 1, 200)[:, None]
    y = jnp.sin(3 * x) + 0.5 * jnp.sign(x)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "in": jax.random.normal(keys[0], (1, 32)),
        "bias": jax.random.normal(keys[1], (32,)),
        "out": jax.random.normal(keys[2], (32, 1)) / 32**0.5,
    }
    loss = lambda p: 0.5 * jnp.mean((jnp.tanh(x @ p["in"] + p["bias"]) @ p["out"] - y) ** 2)  # noqa: E731
    step = 0.2

    @jax.jit
    def train(p):
        descend = lambda _, p: jax.tree.map(lambda w, g: w - step * g, p, jax.grad(loss)(p))  # noqa: E731
        return jax.lax.fori_loop(0, 2000, descend, p)

    v = jax.tree.map(jnp.ones_like, params)
    sharpness = []
    for _ in range(11):
        params = train(params)
        top = top_eigenvalue(hessian_product(loss, params), v)
        v, sharpness = top.vector, [*sharpness, float(top.value)]
    want = np.linalg.eigvalsh(dense(hessian_product(loss, params), params))[-1]
    np.testing.assert_allclose(sharpness[-1], want, rtol=1e-4)
    assert sharpness[0] < 0.95 * 2 / step
    assert np.max(np.abs(np.array(sharpness[-5:]) * step / 2 - 1)) < 0.15
