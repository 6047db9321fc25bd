"""Prefix linear attention of "Just read twice": a prompt read as a whole, then a causal decoder."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.sequence import layer as layers
from jaxnum.sequence._taylor2 import taylor2
from jaxnum.sequence.feature_map import FeatureMap
from kernels_pallas import checks, linear_attention, linear_attention_step

_NAME = "prefix_linear_attention"


class PrefixLinearAttentionCache(NamedTuple):
    """What a `prefix_linear_attention` carries from token to token: one state of the prefix and the tokens together."""

    state: jax.Array  # [*B, H, F, V + 1], the sums of phi(k) [v, 1]ᵀ


class _Options(NamedTuple):
    width: int
    heads: int
    key_dim: int
    value_dim: int
    prefix_length: int
    features: FeatureMap
    chunk_size: int | None
    implementation: str | None


def prefix_linear_attention(
    width: int,
    heads: int,
    *,
    prefix_length: int = 0,
    key_dim: int = 16,
    value_dim: int | None = None,
    feature_map: FeatureMap | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> layers.Layer:
    """Linear attention that reads a prefix without a mask, by projections of its own, and goes on causally.

    y_i = phi(q_i)ᵀ (sum over the prefix of phi(e_j) w_jᵀ + sum_{j <= i} phi(k_j) v_jᵀ) over the same with 1 for w and
    v; e, w are the keys and values of the encoder, k, v those of the decoder, both linear in x, and every token, the
    prefix included, is a query and a decoder's key. The heads of y, joined, are projected back.

    Args:
      width: of x.
      heads: of the attention.
      prefix_length: how many places of a call without a cache are the prefix. `apply` takes `prefix_mask` instead, bool
        [*B, T], True in the prefix, for prompts of different lengths, packed documents, or a prefix behind a cache.
      key_dim: of q, k and e before the feature map.
      value_dim: of v and w; default width / heads, which must then be whole.
      feature_map: phi of `key_dim`, a `FeatureMap` with values >= 0 or of positive products; default
        `taylor2(key_dim)`. Queries and keys learn their own parameters of it.
      chunk_size: tokens computed at once; only speed depends on it.
      implementation: as in `kernels_pallas.linear_attention`.

    Returns:
      A `Layer` whose cache is a `PrefixLinearAttentionCache`. Its `apply` has `prefix_mask=None` as one argument more.
      With segment_ids, each document is read with its own prefix. A prefix is read by one call: cut a sequence behind
      it, not inside; and a cache, an empty one too, and `step` go on without one.

    Raises:
      ValueError: an option is out of range; ShapeError, DtypeError: what it is applied to does not fit.

    Cost: linear in the tokens; a step costs 4 F V flops a head.

    Numerics: padding and what is no prefix are hidden after the map, since phi(0) may not be 0. Outputs at prefix
      tokens have seen the whole prefix: no next-token loss there.

    Source: S. Arora et al., "Just read twice: closing the recall gap for recurrent language models", 2024, arXiv
      2407.05483, section 4.

    Example:
      >>> import jax
      >>> layer = prefix_linear_attention(32, heads=2, prefix_length=6, key_dim=4)
      >>> params = layer.init(jax.random.key(0))
      >>> y, cache = layer.apply(params, jax.random.normal(jax.random.key(1), (3, 10, 32)))
      >>> y.shape, cache.state.shape
      ((3, 10, 32), (3, 2, 15, 17))
    """
    layers.check_sizes(_NAME, {"width": width, "heads": heads, "key_dim": key_dim})
    if value_dim is None:
        checks.value(_NAME, "width", width % heads == 0, f"be a multiple of heads={heads}", width, "Or give value_dim.")
        value_dim = width // heads
    layers.check_sizes(_NAME, {"value_dim": value_dim})
    layers.check_implementation(_NAME, implementation)
    valid = isinstance(prefix_length, int) and prefix_length >= 0
    checks.value(_NAME, "prefix_length", valid, "be an int of at least 0", prefix_length)
    features = taylor2(key_dim) if feature_map is None else feature_map
    known, found = isinstance(features, FeatureMap), type(features).__name__
    checks.value(_NAME, "feature_map", known, "be a jaxnum.sequence.FeatureMap", found, error=TypeError)
    options = _Options(width, heads, key_dim, value_dim, prefix_length, features, chunk_size, implementation)
    return layers.Layer(
        partial(_init, options), partial(_apply, options), partial(_step, options), partial(_init_cache, options)
    )


def _init(o: _Options, key: jax.Array) -> layers.PyTree:
    keys = jax.random.split(key, 6)
    keys_out, values_out = o.heads * o.key_dim, o.heads * o.value_dim
    return {
        "qkv": layers.matrix(keys[0], o.width, 2 * keys_out + values_out),
        "encoder": layers.matrix(keys[1], o.width, keys_out + values_out),
        "out": layers.matrix(keys[2], values_out, o.width),
        "query_map": o.features.init(keys[3]),
        "key_map": o.features.init(keys[4]),
        "encoder_map": o.features.init(keys[5]),
    }


def _apply(
    o: _Options,
    params: layers.PyTree,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: PrefixLinearAttentionCache | None = None,
    prefix_mask: jax.Array | None = None,
) -> tuple[jax.Array, PrefixLinearAttentionCache]:
    x = layers.enter(_NAME, o.width, x, segment_ids)
    if prefix_mask is not None:
        checks.shape(_NAME, prefix_mask=(prefix_mask, " ".join(map(str, x.shape[:-1]))))
        checks.dtype(_NAME, "bool", prefix_mask=prefix_mask)
    elif cache is None and o.prefix_length:
        fits, wanted = o.prefix_length <= x.shape[-2], f"have at least prefix_length={o.prefix_length} tokens"
        remedy = "Give prefix_mask for shorter prompts, or a cache to read on without a prefix."
        checks.value(_NAME, "x", fits, wanted, x.shape[-2], remedy, error=checks.ShapeError)
        prefix_mask = jnp.broadcast_to(jnp.arange(x.shape[-2]) < o.prefix_length, x.shape[:-1])
    cache = layers.enter_cache(_NAME, cache, _init_cache(o, x.shape[:-2], x.dtype))
    q, k, v = _qkv(o, params, x)
    attend = partial(
        linear_attention, scale=1.0, normalize=True, chunk_size=o.chunk_size, implementation=o.implementation
    )
    if prefix_mask is None or x.shape[-2] == 0:
        y, state = attend(q, k, v, initial_state=cache.state, segment_ids=segment_ids)
    elif segment_ids is None:
        state = cache.state + _encode(o, params, x, prefix_mask)
        y, state = attend(q, k, v, initial_state=state)
    else:
        e, w = _encoder(o, params, x)
        y, state = _by_document(attend, (q, k, v), (e, w), prefix_mask, segment_ids, cache.state)
    return layers.times(layers.join_heads(y), params["out"]), PrefixLinearAttentionCache(state)


def _step(
    o: _Options, params: layers.PyTree, x: jax.Array, cache: PrefixLinearAttentionCache
) -> tuple[jax.Array, PrefixLinearAttentionCache]:
    layers.enter_step(_NAME, o.width, x)
    cache = layers.enter_cache(_NAME, cache, _init_cache(o, x.shape[:-1], x.dtype))
    y, state = linear_attention_step(cache.state, *_qkv(o, params, x), scale=1.0, normalize=True)
    return layers.times(layers.join_heads(y), params["out"]), PrefixLinearAttentionCache(state)


def _init_cache(o: _Options, batch: int | tuple[int, ...] = (), dtype: Any = float) -> PrefixLinearAttentionCache:
    shape = (*layers.batch_axes(batch), o.heads, o.features.width, o.value_dim + 1)
    return PrefixLinearAttentionCache(jnp.zeros(shape, layers.sums(dtype)))


def _qkv(o: _Options, params: layers.PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features of queries and keys [..., H, F] and values [..., H, V] of the decoder."""
    cuts = (o.heads * o.key_dim, 2 * o.heads * o.key_dim)
    q, k, v = (layers.split_heads(y, o.heads) for y in jnp.split(layers.times(x, params["qkv"]), cuts, -1))
    return o.features.apply(params["query_map"], q), o.features.apply(params["key_map"], k), v


def _encoder(o: _Options, params: layers.PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features of keys [..., H, F] and values [..., H, V] of the encoder."""
    parts = jnp.split(layers.times(x, params["encoder"]), (o.heads * o.key_dim,), -1)
    e, w = (layers.split_heads(y, o.heads) for y in parts)
    return o.features.apply(params["encoder_map"], e), w


def _encode(o: _Options, params: layers.PyTree, x: jax.Array, prefix_mask: jax.Array) -> jax.Array:
    """What the encoder adds to the state [*B, H, F, V + 1]."""
    e, w = _encoder(o, params, x)
    dtype = accumulator(x.dtype)
    e = jnp.where(prefix_mask[..., None, None], e, 0).astype(dtype)
    w = jnp.concatenate([w, jnp.ones_like(w[..., :1])], -1).astype(dtype)
    return jnp.einsum("...thf,...thv->...hfv", e, w, precision=jax.lax.Precision.HIGHEST)


def _by_document(attend, decoder, encoder, prefix_mask, segment_ids, state) -> tuple[jax.Array, jax.Array]:
    """One causal pass over rows in which the encoder's tokens of each document stand before the decoder's."""
    T = segment_ids.shape[-1]
    segments, valid = layers.segments_of(segment_ids)
    ids = jnp.concatenate([jnp.where(valid & prefix_mask, segments, -1), jnp.where(valid, segments, -1)], -1)
    order = jnp.argsort(jnp.concatenate([2 * segments, 2 * segments + 1], -1), axis=-1, stable=True)
    places = jnp.argsort(order, axis=-1)[..., T:]

    def rows(x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, at[..., None, None], -3)

    (q, k, v), (e, w) = decoder, encoder
    pairs = ((jnp.zeros_like(q), q), (e, k), (w, v))
    q, k, v = (rows(jnp.concatenate(pair, -3), order) for pair in pairs)
    ids = jnp.take_along_axis(ids, order, -1).astype(jnp.int32)
    y, state = attend(q, k, v, initial_state=state, segment_ids=ids)
    return rows(y, places), state
