"""The largest attention logit against the dense matrix of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import max_attention_logit
from kernels_pallas.checks import ShapeError
from tests.tolerances import tolerance


@pytest.mark.parametrize("causal", [False, True])
def test_dense_logits_agree(key, causal):
    q = np.asarray(jax.random.normal(key, (2, 7, 4, 3)))
    k = np.asarray(jax.random.normal(jax.random.fold_in(key, 1), (2, 7, 2, 3)))
    logits = np.einsum("bthd,bshd->bhts", q, np.repeat(k, 2, axis=2)) / np.sqrt(3)
    logits = np.where(np.tril(np.ones((7, 7), bool)) | (not causal), logits, -np.inf)
    got = jax.jit(lambda q, k: max_attention_logit(q, k, causal=causal, block=3))(q, k)
    np.testing.assert_allclose(got, logits.max((0, 2, 3)), rtol=tolerance("float32", 3))


def test_scale_dtype_and_what_is_wrong(key):
    q = jax.random.normal(key, (1, 4, 1, 8), jnp.bfloat16)
    assert max_attention_logit(q, q).dtype == jnp.float32
    want = jnp.max(jnp.sum(jnp.square(q.astype("float32")), axis=-1))
    np.testing.assert_allclose(max_attention_logit(q, q, scale=2.0)[0], 2 * want, rtol=tolerance("float32", 8))
    assert bool(jnp.isnan(max_attention_logit(q.at[0, 0, 0, 0].set(jnp.nan), q)[0]))
    with pytest.raises(ShapeError, match="^max_attention_logit: `k` must have shape"):
        max_attention_logit(q, q[..., :4])
    with pytest.raises(ValueError, match="^max_attention_logit: `k` must have 4 tokens"):
        max_attention_logit(q, q[:, :2], causal=True)
    with pytest.raises(ValueError, match="^max_attention_logit: `k` must have a number of heads"):
        max_attention_logit(q, jnp.tile(q, (1, 1, 2, 1)))
    with pytest.raises(ValueError, match="^max_attention_logit: `block` must be"):
        max_attention_logit(q, q, block=0)


def test_a_nan_shows_in_its_head(key):
    q = jax.random.normal(key, (2, 64, 4, 16)).at[1, 32, 0, 1].set(jnp.nan)
    k = jax.random.normal(jax.random.fold_in(key, 1), (2, 64, 4, 16))
    assert jnp.isnan(max_attention_logit(q, k)).tolist() == [True, False, False, False]


def test_empty_axes_and_many_scales_are_named():
    q = jnp.ones((2, 5, 4, 3))
    with pytest.raises(ValueError, match="max_attention_logit: `k` must have no axis of size 0"):
        max_attention_logit(q, q[:, :0])
    with pytest.raises(ShapeError, match=r"max_attention_logit: `scale` must have shape \(\)"):
        max_attention_logit(q, q, scale=jnp.ones(4))
