"""What flax and equinox hold gives what the layer gives: outputs, gradients, decoding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.interop import to_equinox, to_flax
from jaxnum.sequence import bidirectional, gated_delta_net, hedgehog, mamba_block, prefix_linear_attention
from tests.tolerances import tolerance

LAYER = gated_delta_net(8, heads=2)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 8)), "float32")
IDS = jnp.asarray(np.repeat([[0, 1, -1]], [4, 4, 1], axis=1).repeat(2, 0), jnp.int32)


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_flax():
    module = to_flax(LAYER)
    variables = module.init(jax.random.key(1), X)
    params = variables["params"]["layer"]
    assert jax.tree.structure(params) == jax.tree.structure(LAYER.init(jax.random.key(1)))
    y, cache = module.apply(variables, X, segment_ids=IDS)
    equal((y, cache), LAYER.apply(params, X, segment_ids=IDS))
    equal(module.apply(variables, X[:, 0], cache, method="step"), LAYER.step(params, X[:, 0], cache))
    got = jax.grad(lambda v: jnp.sum(module.apply(v, X)[0] ** 2))(variables)["params"]["layer"]
    equal(got, jax.grad(lambda p: jnp.sum(LAYER.apply(p, X)[0] ** 2))(params))


def test_equinox():
    import equinox as eqx

    module = to_equinox(LAYER, jax.random.key(1))
    params = LAYER.init(jax.random.key(1))
    equal(module.params, params)
    y, cache = eqx.filter_jit(lambda m: m(X, segment_ids=IDS))(module)
    equal((y, cache), jax.jit(lambda p: LAYER.apply(p, X, segment_ids=IDS))(params))
    equal(module.step(X[:, 0], cache), LAYER.step(params, X[:, 0], cache))
    got = eqx.filter_grad(lambda m: jnp.sum(m(X)[0] ** 2))(module).params
    equal(got, jax.grad(lambda p: jnp.sum(LAYER.apply(p, X)[0] ** 2))(params))


def test_modules_of_one_layer_are_alike():
    modules = [to_equinox(LAYER, key) for key in jax.random.split(jax.random.key(0))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *modules)
    y = jax.vmap(lambda module: module(X)[0])(stacked)
    np.testing.assert_allclose(y[1], modules[1](X)[0], rtol=0, atol=tolerance("float32", 100, condition=10))
    assert to_flax(LAYER) == to_flax(LAYER) != to_flax(gated_delta_net(8, heads=1))
    for module in (modules[0], to_flax(LAYER)):
        equal(module.init_cache(2, "float32"), LAYER.init_cache(2, "float32"))


def test_prompts_of_different_lengths():
    layer = prefix_linear_attention(8, heads=2, key_dim=2)
    mask = jnp.arange(9) < jnp.array([[3], [5]])
    flax_module, module = to_flax(layer), to_equinox(layer, jax.random.key(1))
    variables = flax_module.init(jax.random.key(1), X)
    y = flax_module.apply(variables, X, prefix_mask=mask)
    equal(y, layer.apply(variables["params"]["layer"], X, prefix_mask=mask))
    equal(module(X, prefix_mask=mask), layer.apply(module.params, X, prefix_mask=mask))


def test_feature_maps():
    phi, x = hedgehog(2, 4), X.reshape(2, 9, 2, 4)
    flax_module, module = to_flax(phi), to_equinox(phi, jax.random.key(1))
    variables = flax_module.init(jax.random.key(1), x)
    equal(flax_module.apply(variables, x), phi.apply(variables["params"]["layer"], x))
    equal(module(x), phi.apply(phi.init(jax.random.key(1)), x))


def test_bidirectional_layers():
    layer = bidirectional(mamba_block(8, states=2))
    flax_module, module = to_flax(layer), to_equinox(layer, jax.random.key(1))
    variables = flax_module.init(jax.random.key(1), X)
    y = flax_module.apply(variables, X, segment_ids=IDS)
    equal(y, layer.apply(variables["params"]["layer"], X, segment_ids=IDS))
    equal(module(X, segment_ids=IDS), layer.apply(layer.init(jax.random.key(1)), X, segment_ids=IDS))


def test_bad_input():
    sentence = "`layer` must be a jaxnum.sequence.Layer, BidirectionalLayer or FeatureMap; got int."
    with pytest.raises(TypeError, match=re.escape(f"to_flax: {sentence}")):
        to_flax(3)
    with pytest.raises(TypeError, match=re.escape(f"to_equinox: {sentence}")):
        to_equinox(3, jax.random.key(0))
