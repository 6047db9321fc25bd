import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import srmsnorm
from tests.tolerances import tolerance


def test_equals_flax_without_a_scale(key):
    from flax import linen

    x = jax.random.normal(key, (4, 7, 12))
    want = linen.RMSNorm(use_scale=False, epsilon=1e-6).apply({}, x)
    np.testing.assert_allclose(srmsnorm(x), want, rtol=tolerance("float32", 12))
    zero = jax.grad(lambda x: jnp.sum(srmsnorm(x)))(jnp.zeros(3))
    np.testing.assert_allclose(zero, 1e3, rtol=tolerance("float32"))


def test_bad_input():
    with pytest.raises(ValueError, match="srmsnorm: `eps` must be >= 0"):
        srmsnorm(jnp.ones(3), eps=-1.0)
