import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import elu1
from tests.tolerances import tolerance


def test_values_and_derivatives():
    phi, x = elu1(3), jnp.array([[-2.0, 0.5, 3.0]])
    np.testing.assert_allclose(phi.apply({}, x), [[np.exp(-2), 1.5, 4]], rtol=tolerance("float32"))
    slope = jax.grad(lambda x: jnp.sum(phi.apply({}, x)))(x)
    np.testing.assert_allclose(slope, [[np.exp(-2), 1, 1]], rtol=tolerance("float32"))
    assert phi.init(jax.random.key(0)) == {}


def test_bad_input():
    with pytest.raises(ValueError, match=r"elu1: `x` must have shape \(\*B, H, 3\)"):
        elu1(3).apply({}, jnp.ones((2, 4)))
