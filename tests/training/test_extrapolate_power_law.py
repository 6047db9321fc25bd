"""A power law that is one, a noisy one against NumPy's fit, and its inverse."""

import jax
import numpy as np
import pytest

from jaxnum.training import extrapolate_power_law
from kernels_pallas.checks import ShapeError
from tests.tolerances import tolerance

SIZES = np.array([1e6, 3e6, 2e7, 1e8])


def test_a_law_is_found_again(float_dtype):
    limit = tolerance(float_dtype, 4, condition=np.log(1e9))
    law = jax.jit(extrapolate_power_law)(SIZES.astype(float_dtype), (0.02 * SIZES**0.4).astype(float_dtype))
    np.testing.assert_allclose(law.exponent, 0.4, rtol=limit)
    np.testing.assert_allclose(law(np.array([1e9, 1e10])), 0.02 * np.array([1e9, 1e10]) ** 0.4, rtol=2 * limit)
    np.testing.assert_allclose(law.reaches(1e4), (1e4 / 0.02) ** 2.5, rtol=10 * limit)


def test_noise_is_fitted_as_numpy_does(x64):
    values = SIZES**-0.3 * np.array([1.1, 0.8, 1.3, 0.95])
    law = extrapolate_power_law(SIZES, values)
    slope, offset = np.polyfit(np.log(SIZES), np.log(values), 1)
    np.testing.assert_allclose([law.exponent, np.log(law.coefficient)], [slope, offset], rtol=1e-10)


def test_what_is_no_law_is_nan_or_named():
    for sizes, values in (([1.0, 2.0], [1.0, -1.0]), ([1.0, 2.0], [0.0, 1.0]), ([2.0, 2.0], [1.0, 3.0])):
        assert np.isnan(extrapolate_power_law(sizes, values)(4.0))
    with pytest.raises(ShapeError, match="^extrapolate_power_law: `values` must have shape"):
        extrapolate_power_law(SIZES, SIZES[:2])
    with pytest.raises(ValueError, match="^extrapolate_power_law: `sizes` must have at least 2"):
        extrapolate_power_law([1.0], [1.0])


def test_sizes_beyond_int32_and_equal_sizes():
    for sizes in ([5 * 10**9, 10**10, 4 * 10**10], np.array([5 * 10**9, 10**10, 4 * 10**10])):
        np.testing.assert_allclose(extrapolate_power_law(sizes, [1, 2, 8]).exponent, 1, rtol=tolerance("float32", 100))
    for size in (10, 1000, 12345):
        assert np.isnan(extrapolate_power_law([size] * 7, np.arange(1.0, 8.0)).exponent)
