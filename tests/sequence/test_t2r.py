import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import t2r
from tests.tolerances import tolerance


def test_each_head_has_its_own_map(key):
    phi, x = t2r(2, 3, features=5), jax.random.normal(key, (7, 2, 3))
    params = phi.init(key)
    params["bias"] = params["bias"] + 0.3
    want = [jax.nn.relu(x[:, h] @ params["weight"][h] + 0.3) for h in range(2)]
    np.testing.assert_allclose(phi.apply(params, x), jnp.stack(want, 1), rtol=0, atol=tolerance("float32", 3))


def test_bad_input():
    with pytest.raises(TypeError, match="t2r: `x` must have a floating-point dtype"):
        t2r(1, 3).apply({}, jnp.ones((1, 3), int))
