"""The Walsh-Hadamard transform against scipy's matrix, its own inverse and its own adjoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from jaxnum.training import fwht
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance


def test_known_values():
    got = fwht(jnp.array([1.0, 0, 1, 0, 0, 1, 1, 0]))
    np.testing.assert_array_equal(got, [4, 2, 0, -2, 0, 2, 0, 2])
    np.testing.assert_array_equal(fwht(jnp.ones(1)), [1.0])


@pytest.mark.parametrize("size", [2, 8, 256])
def test_equals_scipys_matrix_and_undoes_itself(size, key):
    x = jax.random.normal(key, (size, 3))
    want = hadamard(size) @ np.asarray(x, np.float64)
    tol = tolerance("float32", size)
    got = fwht(x, axis=0)
    assert np.linalg.norm(got - want) < tol * np.linalg.norm(want)
    twice = fwht(fwht(x.T, normalize=True), normalize=True)
    np.testing.assert_allclose(twice, x.T, rtol=tol, atol=tol)


def test_every_derivative_is_the_transform(x64, key):
    x, t = jax.random.normal(key, (2, 8))
    H = hadamard(8)
    np.testing.assert_array_equal(jax.jit(jax.jacfwd(fwht))(x), H)
    np.testing.assert_array_equal(jax.jit(jax.jacrev(fwht))(x), H)
    hessian = jax.jit(jax.hessian(lambda x: jnp.sum(fwht(x) ** 3)))(x)
    np.testing.assert_allclose(hessian, 6 * H @ np.diag(H @ x) @ H, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(jnp.vdot(fwht(x), t), jnp.vdot(x, fwht(t)), rtol=1e-12)


def test_short_dtypes_complex_and_nan():
    ones = jnp.ones(1024, jnp.bfloat16)
    assert fwht(ones).dtype == jnp.bfloat16
    assert float(fwht(ones)[0]) == 1024
    huge = jnp.full(16, 3e38)
    np.testing.assert_allclose(fwht(huge / 4, normalize=True)[0], 3e38, rtol=1e-6)
    z = jnp.array([1 + 2j, 3.0])
    np.testing.assert_array_equal(fwht(z), [4 + 2j, -2 + 2j])
    assert np.isnan(fwht(jnp.ones(8).at[3].set(jnp.nan))).all()


def test_bad_input_is_named():
    with pytest.raises(ShapeError, match="^fwht: `x` must have a power of two along axis -1; got 6. Pad it"):
        fwht(jnp.ones(6))
    with pytest.raises(ShapeError, match="^fwht: `axis` must be an axis of `x`"):
        fwht(jnp.ones(4), axis=1)
    with pytest.raises(DtypeError, match="^fwht: `x` must have a floating-point"):
        fwht(jnp.arange(4))
