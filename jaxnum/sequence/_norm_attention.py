"""NormAttention of TransNormer: linear attention that norms its output in the place of a denominator."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.sequence import layer
from kernels_pallas import checks, linear_attention

_NAME = "norm_attention"


def norm_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention O = norm(phi(Q) phi(K)ᵀ V), phi = 1 + elu, normed over all heads of a token together.

    The usual quotient has derivatives without bound where the sum of scores is small; a norm has not.

    Args:
      q: queries [*B, T, H, K].
      k: keys [*B, T, H, K].
      v: values [*B, T, H, V].
      causal: token t sees tokens up to t, else all of its segment.
      initial_state: [*B, H, K, V], the state after the tokens before; default 0.
      segment_ids: int32 [*B, T], packed documents; negative is padding.
      eps: of the norm; see `srmsnorm`.
      chunk_size: tokens computed at once; only speed depends on it.
      implementation: as in `kernels_pallas.linear_attention`.

    Returns:
      o [*B, T, H, V] in the dtype of q, and the state after the last token [*B, H, K, V], a sum of phi(k) vᵀ.

    Raises:
      ShapeError, DtypeError, ValueError, NotImplementedError: as `kernels_pallas.linear_attention`.

    Cost: that of `kernels_pallas.linear_attention`; twice that where it is not causal and packed.

    Source: Z. Qin et al., "The devil in linear transformer", 2022, arXiv 2210.10340, section 4.1.

    Example:
      >>> import jax
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 4, 8))
      >>> o, state = norm_attention(q, k, v)
      >>> o.shape, state.shape
      ((1, 100, 4, 8), (1, 4, 8, 8))
    """
    checks.dtype(_NAME, "floating", q=q, k=k)
    checks.same_dtype(_NAME, remedy="Cast them to one dtype.", q=q, k=k, v=v)
    layer.check_eps(_NAME, eps)
    checks.shape(_NAME, q=(q, "*B T H K"), k=(k, "*B T H K"), v=(v, "*B T H V"), segment_ids=(segment_ids, "*B T"))
    dtype = q.dtype
    q, k, v = layer.unbounded(q, k, v)
    if segment_ids is not None:
        # phi of what the padding holds must not reach a derivative.
        q, k = (jnp.where(segment_ids[..., None, None] >= 0, x, 0) for x in (q, k))
    q, k = (1 + jax.nn.elu(x) for x in (q, k))
    o, state = linear_attention(
        q,
        k,
        v,
        initial_state=initial_state,
        segment_ids=segment_ids,
        scale=1.0,
        prefix_length=None if causal or segment_ids is not None else q.shape[-3],
        chunk_size=chunk_size,
        implementation=implementation,
    )
    if not causal and segment_ids is not None:
        o = _add_later(o, q, k, v, segment_ids, chunk_size, implementation)
    return layer.split_heads(layer.rms_norm(layer.join_heads(o), eps=eps), o.shape[-2]).astype(dtype), state


def _add_later(o: jax.Array, q, k, v, segment_ids, chunk_size, implementation) -> jax.Array:
    """To what each token sees of those up to itself, add those behind it."""
    behind, _ = linear_attention(
        q,
        k,
        v,
        segment_ids=segment_ids,
        scale=1.0,
        reverse=True,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    dtype = accumulator(o.dtype)
    valid = segment_ids[..., None, None] >= 0
    own = jnp.sum(q.astype(dtype) * k.astype(dtype), -1, keepdims=True) * jnp.where(valid, v, 0).astype(dtype)
    return (o.astype(dtype) + behind.astype(dtype) - jnp.where(valid, own, 0)).astype(o.dtype)
