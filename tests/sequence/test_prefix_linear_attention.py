import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import hedgehog, prefix_linear_attention
from tests.sequence.layer_contract import check_layer
from tests.tolerances import tolerance

H, M, T = 2, 4, 9


def test_contract():
    check_layer(prefix_linear_attention(6, H, key_dim=3), 6, size=200, condition=10)


def dense(params, x, seen, prefix, phi):
    """The formula: every query against the encoder's keys of its prefix and the decoder's keys it sees."""
    q, k, v = (y.reshape(*x.shape[:2], H, -1) for y in jnp.split(x @ params["qkv"], (H * 3, 2 * H * 3), -1))
    e, w = (y.reshape(*x.shape[:2], H, -1) for y in jnp.split(x @ params["encoder"], (H * 3,), -1))
    q, k, e = (phi.apply(params[f"{n}_map"], y) for n, y in (("query", q), ("key", k), ("encoder", e)))
    a = jnp.concatenate(
        [
            jnp.einsum("bihf,bjhf->bhij", q, e) * prefix[:, None],
            jnp.einsum("bihf,bjhf->bhij", q, k) * seen[:, None],
        ],
        -1,
    )
    a = a / jnp.maximum(a.sum(-1, keepdims=True), 1e-6)
    y = jnp.einsum("bhij,bjhv->bihv", a, jnp.concatenate([w, v], 1))
    return y.reshape(*x.shape[:2], -1) @ params["out"]


def test_equals_the_formula_alone_and_packed_and_does_not_leak(x64, key):
    phi = hedgehog(H, 3, activation="exp")
    layer = prefix_linear_attention(6, H, prefix_length=M, key_dim=3, feature_map=phi)
    params = layer.init(key)
    x = jax.random.normal(jax.random.fold_in(key, 1), (2, T, 6))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((T, T))), (2, T, T))
    prefix = jnp.broadcast_to((jnp.arange(T) < M).astype(float), (2, T, T))
    # Two documents, of which the first has a prompt of two tokens behind padding, the second one of one.
    ids = jnp.array([[-1, 5, 5, 5, 8, 8, -1, 8, -1]] * 2)
    mask = jnp.array([[True, True, True, False, True, False, True, False, True]] * 2)
    own = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]

    @jax.jit
    def run(params, x):
        hidden = jnp.where((ids < 0)[..., None], jnp.nan, x)
        plain = layer.apply(params, x)[0], dense(params, x, causal, prefix, phi)
        masked = layer.apply(params, x, prefix_mask=jnp.arange(T) < M + jnp.zeros((2, T), int))[0], plain[0]
        packed = layer.apply(params, hidden, segment_ids=ids, prefix_mask=mask)
        want = dense(params, jnp.where(own.any(-1)[..., None], x, 0), causal * own, own * mask[:, None], phi)
        # Decoding goes on from the state of the last document.
        after = layer.step(params, x[:, 0], packed[1])[0]
        alone = layer.apply(params, x[:, jnp.array([4, 5, 7])], prefix_mask=mask[:, jnp.array([4, 5, 7])])
        slopes = jax.jacrev(lambda x: layer.apply(params, x)[0][0].sum(-1))(x)[:, 0]
        return plain, masked, (packed[0], want), (after, layer.step(params, x[:, 0], alone[1])[0]), slopes

    *pairs, slopes = run(params, x)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance("float64", 6 * 12 * T))
    moves = np.abs(np.asarray(slopes)).max(-1) > 0
    np.testing.assert_array_equal(moves, np.tril(np.ones((T, T), bool)) | (np.arange(T) < M))


def test_bad_input():
    with pytest.raises(
        ValueError, match="prefix_linear_attention: `prefix_length` must be an int of at least 0; got -1"
    ):
        prefix_linear_attention(6, H, prefix_length=-1)
    with pytest.raises(TypeError, match=r"`feature_map` must be a jaxnum.sequence.FeatureMap; got function"):
        prefix_linear_attention(6, H, feature_map=lambda x: x)
    layer = prefix_linear_attention(6, H, prefix_length=4)
    with pytest.raises(ValueError, match="`x` must have at least prefix_length=4 tokens; got 3"):
        layer.apply(layer.init(jax.random.key(0)), jnp.ones((2, 3, 6)))
    layer = prefix_linear_attention(6, H)
    params, x = layer.init(jax.random.key(0)), jnp.ones((2, 3, 6))
    with pytest.raises(TypeError, match="prefix_linear_attention: `prefix_mask` must have dtype bool; got int32"):
        layer.apply(params, x, prefix_mask=jnp.ones((2, 3), int))
