import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import taylor2
from tests.tolerances import tolerance


def test_products_are_the_polynomial(x64, key):
    q, k = jax.random.normal(key, (2, 9, 2, 16))
    phi = taylor2(16)
    u = jnp.sum(q * k, -1) / 4
    got = jnp.sum(phi.apply({}, q) * phi.apply({}, k), -1)
    np.testing.assert_allclose(got, 1 + u + u**2 / 2, rtol=tolerance("float64", phi.width, condition=10))
    assert phi.width == 153


def test_bad_input():
    with pytest.raises(ValueError, match="taylor2: `dim` must be an int of at least 1"):
        taylor2(2.0)
