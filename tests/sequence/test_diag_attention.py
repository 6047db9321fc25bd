import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import diag_attention, srmsnorm
from tests.tolerances import tolerance

T, H, D, V, W = 21, 2, 4, 3, 8


@pytest.mark.parametrize("kind", ["softmax", "relu"])
def test_equals_dense_attention_with_a_mask_of_blocks(kind, x64, key):
    q, k = jax.random.normal(key, (2, 1, T, H, D))
    v = jax.random.normal(jax.random.fold_in(key, 1), (1, T, H, V))
    ids = jnp.array([[-1] + 9 * [4] + 2 * [-1] + 8 * [1] + [-1]])
    place = jnp.arange(T)
    block = (place[:, None] // W == place // W)[None]
    own = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)

    def dense(seen):
        s = jnp.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
        seen = seen[:, None]
        if kind == "relu":
            o = jnp.einsum("bhij,bjhv->bihv", jnp.where(seen, jax.nn.relu(s), 0), v)
            return srmsnorm(o.reshape(1, T, H * V)).reshape(o.shape)
        p = jnp.where(jnp.any(seen, -1, keepdims=True), jax.nn.softmax(jnp.where(seen, s, -1e30), -1), 0)
        return jnp.einsum("bhij,bjhv->bihv", p, v)

    @jax.jit
    def run(q, k, v):
        dirty = [jnp.where(ids[..., None, None] < 0, jnp.nan, x) for x in (q, k, v)]
        return [
            (diag_attention(q, k, v, block_size=W, kind=kind), dense(jnp.tril(block))),
            (diag_attention(q, k, v, block_size=W, kind=kind, causal=False), dense(block)),
            (diag_attention(*dirty, block_size=W, kind=kind, segment_ids=ids), dense(jnp.tril(block & own))),
            (diag_attention(q, k, v, kind=kind), dense(jnp.tril(jnp.ones((1, T, T), bool)))),
        ]

    for got, want in run(q, k, v):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance("float64", T * D))


def test_sums_beyond_float16_are_normed():
    q, k, v = 30 * jnp.abs(jax.random.normal(jax.random.key(0), (3, 1, 64, 1, 64), jnp.float16))
    o = diag_attention(q, k, v, kind="relu")
    assert o.dtype == jnp.float16
    assert bool(jnp.all(jnp.isfinite(o)))


def test_bad_input():
    x = jnp.ones((1, 4, 2, 3))
    with pytest.raises(ValueError, match="diag_attention: `kind` must be one of 'softmax', 'relu'; got 'elu'"):
        diag_attention(x, x, x, kind="elu")
    with pytest.raises(ValueError, match="diag_attention: `block_size` must be an int of at least 1; got 0"):
        diag_attention(x, x, x, block_size=0)
