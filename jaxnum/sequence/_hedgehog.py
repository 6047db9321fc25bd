"""Hedgehog: a learned feature map whose linear attention mimics softmax, and the loss that teaches it to."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.sequence import feature_map, layer
from kernels_pallas import checks

_LEAST = 1e-12
_HIGHEST = jax.lax.Precision.HIGHEST


def hedgehog(
    heads: int, dim: int, *, features: int | None = None, activation: str = "softmax", bias: bool = False
) -> feature_map.FeatureMap:
    """A learned feature map with sharp, monotone weights: [softmax(y); softmax(-y)] of y = W x, or [exp(y); exp(-y)].

    With W = I at the start, phi(q) . phi(k) = sum over c of 2 cosh(q_c + k_c) for "exp". Make one map for the queries
    and one for the keys, teach both by `hedgehog_distillation_loss`, and apply linear attention with scale 1 and a
    normaliser. Rotary encodings come before the map.

    Args:
      heads: of the attention; each has its own W.
      dim: of a head.
      features: rows of W; default `dim`. W starts as the identity, cut or filled up with zeros.
      activation: "softmax" (over the features of a token) or "exp".
      bias: add a learned vector to W x.

    Returns:
      A `FeatureMap` of width 2 * features with parameters {"weight": [heads, dim, features]} and, with `bias`,
      {"bias": [heads, features]}. Features are at least 1e-12, or the least normal number of their dtype.

    Raises:
      ValueError: an option is out of range; ShapeError, DtypeError: what it is applied to does not fit.

    Numerics: in float32 at least. "softmax" is safe for any input and weighs keys anew, on purpose. "exp" subtracts no
      maximum, which for keys would change the weights: |y| must stay below 40 in float32 and bfloat16, 5 in float16.

    Source: M. Zhang et al., "The hedgehog & the porcupine", 2024, arXiv 2402.04347, section 4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> phi = hedgehog(1, 2)
      >>> features = phi.apply(phi.init(jax.random.key(0)), jnp.zeros((5, 1, 2)))
      >>> features[0].tolist(), phi.width
      ([[0.5, 0.5, 0.5, 0.5]], 4)
    """
    rows = dim if features is None else features
    layer.check_sizes("hedgehog", {"heads": heads, "dim": dim, "features": rows})
    checks.choice("hedgehog", "activation", activation, ("softmax", "exp"))

    def init(key: jax.Array) -> feature_map.PyTree:
        params = {"weight": jnp.broadcast_to(jnp.eye(dim, rows), (heads, dim, rows))}
        return params | {"bias": jnp.zeros((heads, rows))} if bias else params

    def apply(params: feature_map.PyTree, x: jax.Array) -> jax.Array:
        y = feature_map.project(params, feature_map.enter("hedgehog", x, heads, dim))
        of = jax.nn.softmax if activation == "softmax" else jnp.exp
        phi = jnp.concatenate([of(y), of(-y)], -1)
        return jnp.maximum(phi, max(_LEAST, float(jnp.finfo(x.dtype).smallest_normal))).astype(x.dtype)

    return feature_map.FeatureMap(init, apply, 2 * rows)


def hedgehog_distillation_loss(
    q: jax.Array,
    k: jax.Array,
    feature_q: jax.Array,
    feature_k: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 128,
) -> jax.Array:
    """Cross-entropy of the weights of linear attention under those of softmax attention.

    loss = - mean over queries i and heads of sum_j p_ij log a_ij, with p_i = softmax(scale q_i . k_j) over the keys
    that query i sees and a_ij = phi_q(q_i) . phi_k(k_j) / sum over the same keys. Less the entropy of p, which no map
    can change, it is the Kullback-Leibler divergence. Queries come in chunks that the backward pass computes again, so
    that no [T, T] array is stored.

    Args:
      q: the teacher's queries [*B, T, H, D]; nothing is learned through them.
      k: the teacher's keys [*B, T, H, D], likewise.
      feature_q: the student's features of the queries [*B, T, H, F], >= 0.
      feature_k: of the keys [*B, T, H, F].
      scale: of the teacher's scores; default D ** -0.5.
      causal: query i sees keys up to i, else all.
      segment_ids: int32 [*B, T], packed documents, as in `kernels_pallas.linear_attention`: a new one starts where the
        id changes, and only tokens of one see each other. A negative id is padding and counts for nothing.
      chunk_size: queries at a time.

    Returns:
      loss [] in float32, or float64 for float64.

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit.

    Cost: T^2 (D + F) a head, memory of chunk_size * T scores a head and batch entry.

    Numerics: in float32 at least, log a as the difference of two logarithms. A product of features counts as 1e-12 at
      least, so that a query of which a key knows nothing costs much and not infinitely much.

    Source: see `hedgehog`; Zhang et al., equation 7, and its use in M. Zhang et al., "LoLCATs", 2024, arXiv 2410.10254.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> phi = hedgehog(2, 4)
      >>> q, k = jax.random.normal(jax.random.key(0), (2, 3, 10, 2, 4))
      >>> maps = [phi.init(key) for key in jax.random.split(jax.random.key(1))]
      >>> loss = lambda maps: hedgehog_distillation_loss(q, k, phi.apply(maps[0], q), phi.apply(maps[1], k))
      >>> jax.tree.map(jnp.shape, jax.grad(loss)(maps))
      [{'weight': (2, 4, 4)}, {'weight': (2, 4, 4)}]
    """
    name = "hedgehog_distillation_loss"
    arrays = {"q": (q, "*B T H D"), "k": (k, "*B T H D"), "feature_q": (feature_q, "*B T H F")}
    remedy = "The layout is [*batch, tokens, heads, dim]."
    sizes = checks.shape(
        name, remedy=remedy, **arrays, feature_k=(feature_k, "*B T H F"), segment_ids=(segment_ids, "*B T")
    )
    checks.dtype(name, "floating", q=q, k=k, feature_q=feature_q, feature_k=feature_k)
    checks.dtype(name, "integer", segment_ids=segment_ids)
    checks.value(name, "q", q.size > 0, "have at least one entry", q.shape, error=checks.ShapeError)
    layer.check_sizes(name, {"chunk_size": chunk_size})
    dtype = accumulator(jnp.result_type(q, feature_q))
    N, T = math.prod(sizes["B"]), sizes["T"]
    q, k, feature_q, feature_k = (x.astype(dtype).reshape(N, *x.shape[-3:]) for x in (q, k, feature_q, feature_k))
    q, k = jax.lax.stop_gradient((q * (sizes["D"] ** -0.5 if scale is None else scale), k))
    ids = jnp.zeros((N, T), jnp.int32)
    if segment_ids is not None:
        segments, valid = layer.segments_of(segment_ids.reshape(N, T))
        ids = jnp.where(valid, segments, -1)
    q, k, feature_q, feature_k = (jnp.where((ids >= 0)[..., None, None], x, 0) for x in (q, k, feature_q, feature_k))
    place = jnp.arange(T)
    chunk = min(chunk_size, T)

    def chunks(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
        """The axis of queries cut in chunks, which come first."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -T % chunk)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0)

    of_chunk = jax.checkpoint(partial(_cross_entropy, k, feature_k, ids, place, causal))
    rows = (chunks(q, 1), chunks(feature_q, 1), chunks(ids, 1, -1), chunks(place, 0))
    losses = jax.lax.map(lambda row: of_chunk(*row), rows)
    return jnp.sum(losses) / (jnp.maximum(jnp.sum(ids >= 0), 1) * sizes["H"])


def _cross_entropy(
    k: jax.Array,
    feature_k: jax.Array,
    ids: jax.Array,
    place: jax.Array,
    causal: bool,
    q: jax.Array,
    feature_q: jax.Array,
    own: jax.Array,
    at: jax.Array,
) -> jax.Array:
    """Sum of the cross-entropies of one chunk of queries."""
    seen = (own[:, :, None] == ids[:, None, :]) & (own[:, :, None] >= 0)  # [N, chunk, T]
    if causal:
        seen = seen & (place <= at[:, None])
    seen = seen[:, None]  # [N, 1, chunk, T]
    scores = jnp.einsum("nihd,njhd->nhij", q, k, precision=_HIGHEST)
    products = jnp.einsum("nihf,njhf->nhij", feature_q, feature_k, precision=_HIGHEST)
    products = jnp.maximum(products, _LEAST)
    # A query of the padding sees nothing; its row is hidden whole, with numbers that stay finite.
    alive = jnp.any(seen, -1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(seen | ~alive, scores, -jnp.inf), -1)
    total = jnp.sum(jnp.where(seen, products, 0), -1, keepdims=True)
    logs = jnp.log(jnp.where(seen, products, 1)) - jnp.log(jnp.where(alive, total, 1))
    return -jnp.sum(jnp.where(seen, weights * logs, 0))
