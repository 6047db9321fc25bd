"""The network of deep conjugate directions: shapes, linearity, the paper's layout, other grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.solvers import dcdm_network, init_dcdm_network, linear_dcdm_network


@pytest.mark.parametrize("shape", [(8, 12), (4, 4, 8)])
def test_any_even_grid_and_both_dtypes(shape, float_dtype):
    params = init_dcdm_network(jax.random.key(0), dimensions=len(shape), filters=3, pairs=1, coarse_pairs=1)
    r = jax.random.normal(jax.random.key(1), shape, float_dtype)
    for network in (dcdm_network, linear_dcdm_network):
        out = jax.jit(network)(params, r)
        assert out.shape == shape
        assert out.dtype == float_dtype


def test_layout_of_the_paper():
    """One convolution, 2 + 3 + 2 residual pairs of three, one pointwise map: 23 layers."""
    params = jax.eval_shape(lambda: init_dcdm_network(jax.random.key(0)))
    count = sum(int(np.prod(layer.bias.shape[:-1])) for layer in jax.tree.leaves(params, is_leaf=_is_layer))
    assert count == 1 + 3 * (2 + 3 + 2) + 1


def _is_layer(node):
    return hasattr(node, "bias")


def test_the_linear_network_is_linear():
    params = init_dcdm_network(jax.random.key(0), filters=4, levels=3, pairs=1, coarse_pairs=1)
    u, v = jax.random.normal(jax.random.key(1), (2, 8, 8))
    mixed = lambda network: (network(params, 2 * u - 3 * v), 2 * network(params, u) - 3 * network(params, v))  # noqa: E731
    both, one = jax.jit(lambda: mixed(linear_dcdm_network))()
    np.testing.assert_allclose(both, one, rtol=2e-5, atol=2e-5 * float(jnp.max(jnp.abs(one))))
    both, one = jax.jit(lambda: mixed(dcdm_network))()
    assert float(jnp.max(jnp.abs(both - one))) > 0.1


def test_convolutions_equal_scipys():
    """One level, one pair, all by scipy.signal on padded arrays."""
    from scipy.signal import correlate2d

    params = init_dcdm_network(jax.random.key(2), filters=2, levels=1, coarse_pairs=1)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # biases that matter
    r = jax.random.normal(jax.random.key(3), (6, 8))

    def layer(weights, bias, x):
        out = [
            sum(correlate2d(x[i], weights[..., i, o], mode="same") for i in range(weights.shape[-2])) + bias[o]
            for o in range(weights.shape[-1])
        ]
        return np.stack(out)

    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    p = jax.tree.map(np.asarray, params)
    x = layer(*p.first, np.asarray(r * 48**0.5)[None])
    a = relu(layer(p.coarse.weights[0, 0], p.coarse.bias[0, 0], x))
    b = relu(layer(p.coarse.weights[0, 1], p.coarse.bias[0, 1], a))
    x = relu(layer(p.coarse.weights[0, 2], p.coarse.bias[0, 2], b)) + a
    want = layer(*p.last, x)[0]
    np.testing.assert_allclose(dcdm_network(params, r), want, rtol=1e-4, atol=1e-4)


def test_bad_input():
    params = init_dcdm_network(jax.random.key(0), levels=3)
    with pytest.raises(ValueError, match=r"dcdm_network: `r` must have sides divisible by 4; got \(8, 6\)"):
        dcdm_network(params, jnp.ones((8, 6)))
    with pytest.raises(ValueError, match="linear_dcdm_network: `r`"):
        linear_dcdm_network(params, jnp.ones((8, 8, 8)))
    with pytest.raises(ValueError, match="init_dcdm_network: `dimensions` must be one of"):
        init_dcdm_network(jax.random.key(0), dimensions=1)
    with pytest.raises(ValueError, match="init_dcdm_network: `levels` must be a Python int >= 1"):
        init_dcdm_network(jax.random.key(0), levels=0)
