"""DiagAttention of TransNormer: exact attention inside short blocks of tokens, for the lower layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.sequence import layer
from kernels_pallas import attention, checks

_NAME = "diag_attention"


def diag_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    block_size: int = 64,
    kind: str = "softmax",
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> jax.Array:
    """Attention of each token to those of its own block: tokens 0 to w - 1, w to 2 w - 1, and so on.

    "softmax": O = softmax(scale Q Kᵀ) V inside each block. "relu": O = norm(relu(scale Q Kᵀ) V), with hidden scores 0
    and the norm over all heads of a token together.

    Args:
      q: queries [*B, T, H, D].
      k: keys [*B, T, H, D].
      v: values [*B, T, H, V].
      block_size: w; the last block may be shorter.
      kind: "softmax" or "relu".
      causal: token t sees tokens up to t, else all of its block.
      segment_ids: int32 [*B, T], packed documents: a token sees those of its own alone. Negative is padding, which may
        hold anything and gets 0. Blocks are cut by the place in the row, not in the document.
      scale: of q . k; default D ** -0.5.
      eps: of the norm; see `srmsnorm`.

    Returns:
      o [*B, T, H, V] in the dtype of q.

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit, at trace time.

    Cost: T w (D + V) a head.

    Numerics: scores, weights and sums in float32 at least.

    Source: Z. Qin et al., "The devil in linear transformer", 2022, arXiv 2210.10340, section 4.2.

    Example:
      >>> import jax
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 4, 8))
      >>> diag_attention(q, k, v, block_size=16).shape
      (1, 100, 4, 8)
    """
    remedy = "The layout is [*batch, tokens, heads, head dimension]."
    arrays = {"q": (q, "*B T H D"), "k": (k, "*B T H D"), "v": (v, "*B T H V"), "segment_ids": (segment_ids, "*B T")}
    sizes = checks.shape(_NAME, remedy=remedy, **arrays)
    checks.dtype(_NAME, "floating", q=q)
    checks.same_dtype(_NAME, remedy="Cast them to one dtype.", q=q, k=k, v=v)
    checks.dtype(_NAME, "integer", segment_ids=segment_ids)
    checks.choice(_NAME, "kind", kind, ("softmax", "relu"))
    layer.check_sizes(_NAME, {"block_size": block_size})
    layer.check_eps(_NAME, eps)
    dtype = q.dtype
    T = sizes["T"]
    scale = float(sizes["D"] ** -0.5 if scale is None else scale)
    if T == 0:
        return jnp.zeros(v.shape, q.dtype)
    # An id that returns is a new document here as elsewhere.
    ids = jnp.zeros(q.shape[:-2], jnp.int32)
    if segment_ids is not None:
        segments, valid = layer.segments_of(segment_ids)
        ids = jnp.where(valid, segments, -1)
    width = min(block_size, T)
    q, k, v = (_blocks(x, width, T) for x in (q, k, v))
    ids = _blocks(ids[..., None, None], width, T, fill=-1)[..., 0, 0]
    if kind == "softmax":
        o = attention(q, k, v, segment_ids=ids, causal=causal, scale=scale)
    else:
        o = _relu(q, k, v, ids, causal, scale)
    o = o.reshape(*sizes["B"], -1, *o.shape[-2:])[..., :T, :, :]
    if kind == "softmax":
        return o
    return layer.split_heads(layer.rms_norm(layer.join_heads(o), eps=eps), sizes["H"]).astype(dtype)


def _blocks(x: jax.Array, width: int, T: int, fill: int = 0) -> jax.Array:
    """[*B, T, H, D] as [blocks, width, H, D], the last ones filled up."""
    widths = [(0, 0)] * x.ndim
    widths[-3] = (0, -T % width)
    x = jnp.pad(x, widths, constant_values=fill)
    return x.reshape(-1, width, *x.shape[-2:])


def _relu(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, causal: bool, scale: float) -> jax.Array:
    dtype, highest = accumulator(q.dtype), jax.lax.Precision.HIGHEST
    alive = (ids >= 0)[..., None, None]
    wide_q, wide_k, wide_v = (jnp.where(alive, x, 0).astype(dtype) for x in (q, k, v))
    seen = ids[:, :, None] == ids[:, None, :]
    seen = jnp.tril(seen) if causal else seen
    scores = scale * jnp.einsum("bihd,bjhd->bhij", wide_q, wide_k, precision=highest)
    weights = jnp.where(seen[:, None], jax.nn.relu(scores), 0)
    return jnp.einsum("bhij,bjhv->bihv", weights, wide_v, precision=highest)
