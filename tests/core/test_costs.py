import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from tests.tolerances import tolerance

KINDS = ("sqeuclidean", "euclidean", "cityblock")


def clouds(dtype, n=11, m=7):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(n, 2)), dtype), jnp.asarray(rng.normal(size=(m, 2)), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_point_cloud_equals_its_matrix(float_dtype, kind):
    x, y = clouds(float_dtype)
    cloud = jaxnum.PointCloudCost(x, y, kind, block=4)
    dense = jaxnum.DenseCost(cloud.matrix())
    power = {"sqeuclidean": 2, "euclidean": 1}.get(kind)
    difference = np.asarray(x)[:, None] - np.asarray(y)[None]
    want = np.abs(difference).sum(-1) if power is None else np.linalg.norm(difference, axis=-1) ** power
    rtol = tolerance(float_dtype, 20, condition=10.0)
    np.testing.assert_allclose(dense.C, want, rtol=rtol)
    u, v = jnp.linspace(-1, 1, 11, dtype=float_dtype), jnp.linspace(0, 1, 7, dtype=float_dtype).at[2].set(-jnp.inf)
    epsilon, w = jnp.asarray(0.3, float_dtype), jnp.stack([v.at[2].set(1), v.at[2].set(3)], axis=1)
    for name, args in (("lse_rows", (v,)), ("lse_cols", (u,))):
        np.testing.assert_allclose(
            getattr(cloud, name)(*args, epsilon), getattr(dense, name)(*args, epsilon), rtol=rtol, atol=rtol
        )
    np.testing.assert_allclose(cloud.apply(u, v, epsilon, w), dense.apply(u, v, epsilon, w), rtol=rtol)
    np.testing.assert_allclose(cloud.total(u, v, epsilon), dense.total(u, v, epsilon), rtol=rtol)
    columns = np.array([[i % 7, (3 * i + 1) % 7] for i in range(11)])
    for cost in (cloud, dense):
        np.testing.assert_allclose(cost.at(columns), np.take_along_axis(want, columns, axis=1), rtol=rtol)
    assert cloud.shape == dense.shape == (11, 7)
    assert float(cloud.largest()) >= float(dense.largest()) * (1 - rtol)


def test_logsumexp_equals_scipy(x64):
    from scipy.special import logsumexp

    C, v = np.random.default_rng(1).normal(size=(5, 6)) * 100, np.array([0.0, -np.inf, 3.0, -700.0, 700.0, 1.0])
    np.testing.assert_allclose(
        jaxnum.DenseCost(jnp.asarray(C)).lse_rows(jnp.asarray(v), 0.1), logsumexp(v - C / 0.1, axis=1), rtol=1e-14
    )


@pytest.mark.parametrize("kind", KINDS)
def test_coinciding_points_have_finite_derivatives(x64, kind):
    x = jnp.zeros((3, 2))
    grad = jax.grad(lambda x: jnp.sum(jaxnum.PointCloudCost(x, x, kind).lse_rows(jnp.zeros(3), 1.0)))(x)
    assert bool(jnp.all(grad == 0))


def test_memory_stays_linear(x64):
    n = 4096
    x, a = jax.ShapeDtypeStruct((n, 2), jnp.float64), jax.ShapeDtypeStruct((n,), jnp.float64)

    def value(x, y, a):
        cost = jaxnum.PointCloudCost(x, y)
        f, g = jaxnum.transport(cost, a, a, 0.1).x
        return jnp.sum(f**2) + jnp.sum(g**3)

    for fn in (value, jax.grad(value)):
        memory = jax.jit(fn).lower(x, x, a).compile().memory_analysis()
        assert memory.temp_size_in_bytes < n * n * 8 / 4


def test_arguments_are_checked():
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"`kind` must be one of"):
        jaxnum.PointCloudCost(x, x, "cosine")
    with pytest.raises(ValueError, match=r"`block` must be a Python int"):
        jaxnum.PointCloudCost(x, x, block=0)
    with pytest.raises(ValueError, match=r"`cost.y` must have shape"):
        jaxnum.transport(jaxnum.PointCloudCost(x, jnp.ones((3, 1))), x[:, 0], x[:, 0], 1.0)
