import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import mamba_block
from tests.sequence.layer_contract import check_layer
from tests.tolerances import tolerance


def test_contract():
    check_layer(mamba_block(6, states=3, eigenvalues="symmetric"), 6, size=6 * 12, condition=100)


def test_starts_as_the_paper_says():
    params = mamba_block(40).init(jax.random.key(0))
    assert params["delta"].shape == (3, 80)
    np.testing.assert_allclose(jnp.exp(params["A_log"][7]), np.arange(1, 17), rtol=tolerance("float32"))
    times = jax.nn.softplus(params["delta_bias"])
    assert 0.9e-3 < float(times.min()) < float(times.max()) < 0.11


def test_bad_input():
    with pytest.raises(ValueError, match="mamba_block: `eigenvalues` must be one of 'positive', 'symmetric'; got"):
        mamba_block(8, eigenvalues="sym")
    with pytest.raises(ValueError, match="mamba_block: `states` must be an int of at least 1; got 0"):
        mamba_block(8, states=0)
