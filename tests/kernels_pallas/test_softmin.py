"""softmin against scipy; what every kernel must pass is in tests/contracts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

import kernels_pallas
from kernels_pallas import softmin
from tests.tolerances import tolerance

KINDS = ("sqeuclidean", "euclidean", "cityblock")


def inputs(dtype, n=37, m=150, d=3, seed=0):
    rng = np.random.default_rng(seed)
    v = np.where(rng.random(m) < 0.2, -np.inf, rng.normal(size=m))
    return tuple(jnp.asarray(a, dtype) for a in (rng.normal(size=(n, d)), rng.normal(size=(m, d)), v))


def truth(x, y, v, epsilon, kind):
    x, y, v = (np.asarray(a, np.float64) for a in (x, y, v))
    return logsumexp(v - cdist(x, y, kind) / epsilon, axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_scipy(float_dtype, kind):
    x, y, v = inputs(float_dtype)
    for implementation in ("reference", "xla", None):
        got = softmin(x, y, v, 0.1, kind=kind, implementation=implementation)
        want = truth(x, y, v, 0.1, kind)
        assert got.dtype == float_dtype
        # An exponent is rounded in units of itself.
        scale = np.max(np.abs(want))
        np.testing.assert_allclose(got, want, atol=tolerance(float_dtype, 3) * scale)


def test_16_bits_are_summed_in_32():
    x, y, v = (a.astype(jnp.bfloat16) for a in inputs("float32"))
    got = softmin(x, y, v, 0.5)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, truth(x, y, v, 0.5, "sqeuclidean"), rtol=tolerance("float32", 150))


def test_small_distances_far_from_the_origin_are_kept(x64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(1e6 + 1e-4 * rng.normal(size=(5, 2)))
    y = jnp.asarray(1e6 + 1e-4 * rng.normal(size=(7, 2)))
    got = softmin(x, y, jnp.zeros(7), 1e-8)
    np.testing.assert_allclose(got, truth(x, y, np.zeros(7), 1e-8, "sqeuclidean"), rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_finite_differences(x64, kind):
    x, y, v = inputs("float64", n=4, m=6, d=2)
    v = jnp.where(jnp.isfinite(v), v, 0)
    w = jnp.arange(1.0, 5.0)
    f = lambda *a: jnp.sum(w * softmin(*a, kind=kind) ** 2)  # noqa: E731
    jax.test_util.check_grads(f, (x, y, v, jnp.asarray(0.7)), order=2, modes=("rev",), rtol=1e-5)


def test_extreme_exponents_neither_overflow_nor_vanish(x64):
    x, y = jnp.zeros((1, 1)), jnp.asarray([[0.0], [1.0], [2.0]])
    v = jnp.asarray([-1e5, 1e5, -jnp.inf])
    np.testing.assert_allclose(softmin(x, y, v, 1e-4), truth(x, y, v, 1e-4, "sqeuclidean"), rtol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_coinciding_points_have_finite_derivatives(kind):
    x = jnp.zeros((3, 2))
    gradient = jax.grad(lambda x, y: jnp.sum(softmin(x, y, jnp.zeros(3), 1.0, kind=kind)), (0, 1))(x, x)
    assert all(bool(jnp.all(g == 0)) for g in gradient)


def test_nan_is_seen():
    x, y, v = inputs("float32", n=2, m=3)
    assert bool(jnp.all(jnp.isnan(softmin(x, y, v.at[0].set(jnp.nan), 1.0))))


def test_memory_stays_linear():
    n = 4096
    x, v = jax.ShapeDtypeStruct((n, 3), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.float32)
    f = lambda x, y, v: jnp.sum(softmin(x, y, v, 0.1) ** 2)  # noqa: E731
    for fn in (f, jax.grad(f, (0, 1, 2)), jax.grad(lambda *a: jnp.sum(jax.grad(f)(*a) ** 2))):
        memory = jax.jit(fn).lower(x, x, v).compile().memory_analysis()
        assert memory.temp_size_in_bytes < n * n * 4 / 2


def test_empty_clouds():
    x, y, v = inputs("float32")
    assert softmin(x[:0], y, v, 1.0).shape == (0,)
    np.testing.assert_array_equal(softmin(x, y[:0], v[:0], 1.0), -np.inf)


def test_arguments_are_checked():
    x, y, v = inputs("float32")
    with pytest.raises(kernels_pallas.checks.ShapeError, match=r"^softmin: `y` must have shape \(m, 3\)"):
        softmin(x, y[:, :2], v, 1.0)
    with pytest.raises(kernels_pallas.checks.ShapeError, match=r"^softmin: `v` must have shape \(150,\)"):
        softmin(x, y, v[1:], 1.0)
    with pytest.raises(kernels_pallas.checks.DtypeError, match=r"^softmin: `y` must have dtype float32"):
        softmin(x, y.astype(jnp.bfloat16), v, 1.0)
    with pytest.raises(ValueError, match=r"^softmin: `epsilon` must be positive and finite"):
        softmin(x, y, v, 0.0)
    with pytest.raises(TypeError, match=r"^softmin: `epsilon` must be a real scalar"):
        softmin(x, y, v, None)
    with pytest.raises(ValueError, match=r"^softmin: `kind` must be one of"):
        softmin(x, y, v, 1.0, kind="cosine")
    with pytest.raises(NotImplementedError, match=r"^softmin: implementation 'gpu' cannot do this call: it has no"):
        softmin(x, y, v, 1.0, implementation="gpu")


def test_a_coordinate_that_ties_has_cityblock_derivative_zero(x64):
    x, y = jnp.asarray([[0.0, 1.0]]), jnp.asarray([[0.0, 0.0]])
    for implementation in ("reference", "xla"):
        f = lambda x, of=implementation: softmin(x, y, jnp.zeros(1), 1.0, kind="cityblock", implementation=of)[0]  # noqa: E731
        np.testing.assert_array_equal(jax.grad(f)(x), [[0.0, -1.0]])
