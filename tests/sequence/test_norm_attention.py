import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import norm_attention, srmsnorm
from tests.tolerances import tolerance

T, H, V = 21, 2, 3


def dense(q, k, v, seen):
    q, k = 1 + jax.nn.elu(q), 1 + jax.nn.elu(k)
    o = jnp.einsum("bihd,bjhd,bij,bjhv->bihv", q, k, seen, v, optimize=True)
    return srmsnorm(o.reshape(1, T, H * V)).reshape(1, T, H, V)


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_dense_form_packed_or_not(causal, x64, key):
    q, k = jax.random.normal(key, (2, 1, T, H, 4))
    v = jax.random.normal(jax.random.fold_in(key, 1), (1, T, H, V))
    ids = jnp.array([[-1] + 8 * [4] + 2 * [-1] + 9 * [1] + [-1]])
    seen = jnp.ones((1, T, T)) if not causal else jnp.tril(jnp.ones((1, T, T)))
    own = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)

    @jax.jit
    def run(q, k, v):
        dirty = [jnp.where(ids[..., None, None] < 0, jnp.nan, x) for x in (q, k, v)]
        plain, _ = norm_attention(q, k, v, causal=causal)
        packed, _ = norm_attention(*dirty, causal=causal, segment_ids=ids)
        return plain, dense(q, k, v, seen), packed, dense(q, k, v, seen * own)

    plain, want, packed, want_packed = run(q, k, v)
    np.testing.assert_allclose(plain, want, rtol=0, atol=tolerance("float64", T * 4))
    np.testing.assert_allclose(packed, want_packed, rtol=0, atol=tolerance("float64", T * 4, condition=10))


def test_the_norm_bounds_what_the_quotient_does_not():
    scores = jnp.exp(jax.random.uniform(jax.random.key(0), (64, 64), minval=np.log(1e-4), maxval=0.0))
    slopes = [jnp.abs(jax.vmap(jax.jacrev(f))(scores)).max() for f in (jax.nn.softmax, lambda s: s / jnp.sum(s))]
    small = jnp.geomspace(1e-5, 1e-4, 64)
    quotient = jnp.abs(jax.jacrev(lambda s: s / jnp.sum(s))(small)).max()
    assert slopes[0] <= 0.25
    assert quotient > 10 * slopes[1]
    assert quotient > 100
    # The norm's derivative stops growing where eps does the rest: at eps ** -0.5.
    normed = [jnp.abs(jax.jacrev(lambda s: srmsnorm(s, eps=1e-4))(small * f)).max() for f in (1, 1e-3, 1e-6)]
    assert max(normed) <= 1e4**0.5 * (1 + tolerance("float32"))


def test_sums_beyond_float16_are_normed():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 1024, 1, 64), jnp.float16)
    o, _ = norm_attention(jnp.abs(q), jnp.abs(k), 5 * jnp.abs(v))
    assert o.dtype == jnp.float16
    assert bool(jnp.all(jnp.isfinite(o)))


def test_bad_input():
    x = jnp.ones((1, 4, 2, 3))
    with pytest.raises(ValueError, match="norm_attention: `eps` must be >= 0; got -1"):
        norm_attention(x, x, x, eps=-1)
    with pytest.raises(TypeError, match="norm_attention: `q` must have a floating-point dtype"):
        norm_attention(x.astype(int), x, x)
