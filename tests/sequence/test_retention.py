import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import retention
from tests.tolerances import tolerance


def test_equals_the_masked_product(x64, key):
    T, H, K = 41, 3, 4
    q, k, v = jax.random.normal(key, (3, 1, T, H, K))
    gamma = 1 - 2.0 ** (-5 - np.arange(H))
    apart = np.arange(T)[:, None] - np.arange(T)
    decay = np.where(apart >= 0, gamma[:, None, None] ** np.maximum(apart, 0), 0)
    want = jnp.einsum("bihd,bjhd,hij,bjhv->bihv", q, k, decay, v, optimize=True) * K**-0.5
    got, _ = retention(q, k, v)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance("float64", T * K, condition=10))


def test_bad_input():
    x = jnp.ones((1, 4, 2, 3))
    with pytest.raises(ValueError, match="must have shape"):
        retention(x, x[..., :2], x)
