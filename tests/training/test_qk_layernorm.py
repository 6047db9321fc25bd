"""Layer norm of queries and keys: flax's attention, invariance to the projections' scale, degenerate heads."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import qk_layernorm
from kernels_pallas.checks import ShapeError
from tests.tolerances import tolerance


@functools.partial(jax.jit, static_argnames="normalize")
def attend(x, p, normalize=True, **widths):
    """Attention with the weights of flax's module; one of the projections may be widened."""
    q, k, v = (
        widths.get(name, 1.0) * (jnp.einsum("btd,dhe->bthe", x, p[name]["kernel"]) + p[name]["bias"])
        for name in ("query", "key", "value")
    )
    if normalize:
        q, k = qk_layernorm(q, k, p["query_ln"]["scale"], p["key_ln"]["scale"])
    weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k) / jnp.sqrt(q.shape[-1]))
    out = jnp.einsum("bhts,bshe->bthe", weights, v)
    return jnp.einsum("bthe,hed->btd", out, p["out"]["kernel"]) + p["out"]["bias"]


@pytest.fixture(scope="module")
def flaxes():
    module = nn.MultiHeadDotProductAttention(num_heads=2, normalize_qk=True)
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    params = module.init(jax.random.key(1), x)["params"]
    for index, name in enumerate(("query_ln", "key_ln")):
        params[name]["scale"] = 1 + 0.3 * jax.random.normal(jax.random.key(2 + index), (8,))
    return x, params, module.apply({"params": params}, x)


def test_flax_agrees(flaxes):
    x, params, want = flaxes
    limit = tolerance("float32", 16, condition=4)
    np.testing.assert_allclose(attend(x, params, query=1.0, key=1.0), want, rtol=limit, atol=limit)


def test_wider_projections_change_nothing(flaxes):
    x, params, _ = flaxes
    plain = attend(x, params, query=1.0, key=1.0)
    for query, key in ((10.0, 1.0), (1.0, 10.0)):
        np.testing.assert_allclose(attend(x, params, query=query, key=key), plain, rtol=1e-5, atol=1e-5)
    bare, wide = (attend(x, params, normalize=False, query=query, key=1.0) for query in (1.0, 10.0))
    assert float(jnp.abs(wide - bare).max()) > 1e-2


def test_heads_are_normalised_apart_and_logits_bounded(key):
    q, k = 100 * jax.random.normal(key, (2, 3, 2, 4)), jax.random.normal(key, (2, 7, 1, 4)) + 5
    got_q, got_k = qk_layernorm(q, k)
    want = (np.asarray(q) - np.mean(q, -1, keepdims=True)) / np.std(q, -1, keepdims=True)
    np.testing.assert_allclose(got_q, want, rtol=tolerance("float32", 4, condition=8), atol=1e-5)
    assert float(jnp.abs(jnp.einsum("bthe,bske->bthsk", got_q, got_k)).max()) <= 4 * (1 + 1e-6)


def test_constant_and_single_heads_have_finite_gradients():
    for x in (jnp.full((3, 8), 2.5), jnp.ones((3, 1))):
        total = jax.jit(jax.value_and_grad(lambda q: jnp.sum(qk_layernorm(q, q)[0] * jnp.arange(q.shape[-1]))))
        value, gradient = total(x)
        assert float(value) == 0.0
        assert bool(jnp.isfinite(gradient).all())


def test_dtypes_stay_and_bad_arguments_are_named(key):
    q = jax.random.normal(key, (4, 8)) + 300
    low, _ = qk_layernorm(q.astype("bfloat16"), q)
    assert low.dtype == jnp.bfloat16
    want, _ = qk_layernorm(q.astype("bfloat16").astype("float32"), q)
    np.testing.assert_allclose(low.astype("float32"), want, rtol=tolerance("bfloat16"), atol=1e-3)
    assert bool(jnp.isnan(qk_layernorm(q.at[0, 0].set(jnp.nan), q)[0][0]).all())
    with pytest.raises(ShapeError, match="^qk_layernorm: `k` must have shape"):
        qk_layernorm(q, q[:, :4])
    with pytest.raises(ShapeError, match="^qk_layernorm: `scale_q` must have shape"):
        qk_layernorm(q, q, jnp.ones(4))
    with pytest.raises(ValueError, match="^qk_layernorm: `eps` must be greater than 0"):
        qk_layernorm(q, q, eps=0.0)
