import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import bidirectional, gated_delta_net, hedgehog, mamba_block
from tests.tolerances import tolerance

FORWARD, BACKWARD = mamba_block(6, states=3), gated_delta_net(6, heads=2)
# Two documents, with padding before, in, between and behind them.
IDS = np.array([-1, 3, -1, 3, -1, 9, -1, 9, 9, -1])
DOCUMENTS = ([1, 3], [5, 7, 8])


def test_every_document_is_read_from_both_of_its_ends():
    with jax.enable_x64(True):
        layer = bidirectional(FORWARD, BACKWARD)
        params = layer.init(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (2, len(IDS), 6))
        weight = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        ids = jnp.broadcast_to(IDS, x.shape[:2]).astype(jnp.int32)

        def packed(params, x):
            return layer.apply(params, jnp.where((ids < 0)[..., None], jnp.nan, x), segment_ids=ids)

        def separate(params, x):
            y = jnp.zeros_like(x)
            for places in map(np.array, DOCUMENTS):
                own = x[:, places]
                ahead, _ = FORWARD.apply(params["forward"], own)
                behind, _ = BACKWARD.apply(params["backward"], own[:, ::-1])
                y = y.at[:, places].set(ahead + behind[:, ::-1])
            return y

        def found(of):
            def loss(params, x):
                y = of(params, x)
                return jnp.sum(y * weight), y

            return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

        tol = tolerance("float64", x.size, condition=100)
        jax.tree.map(
            lambda got, want: np.testing.assert_allclose(got, want, rtol=tol, atol=tol), found(packed), found(separate)
        )


def test_directions_have_their_own_parameters_and_keep_the_dtype():
    layer = bidirectional(FORWARD)
    params = layer.init(jax.random.key(0))
    assert not np.array_equal(params["forward"]["in"], params["backward"]["in"])
    y = jax.eval_shape(layer.apply, params, jax.ShapeDtypeStruct((3, 4, 5, 6), jnp.bfloat16))
    assert (y.shape, y.dtype) == ((3, 4, 5, 6), jnp.bfloat16)


def test_bad_input():
    sentence = "bidirectional: `backward` must be a jaxnum.sequence.Layer; got FeatureMap."
    with pytest.raises(TypeError, match=re.escape(sentence)):
        bidirectional(FORWARD, hedgehog(2, 4))
    layer = bidirectional(FORWARD)
    with pytest.raises(ValueError, match=r"bidirectional: `segment_ids` must have shape"):
        layer.apply(layer.init(jax.random.key(0)), jnp.zeros((2, 5, 6)), segment_ids=jnp.zeros((2, 4), jnp.int32))
