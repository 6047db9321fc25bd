"""Layer norm of queries and keys: attention logits that cannot grow with the projections' weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import checks


def qk_layernorm(
    q: jax.Array,
    k: jax.Array,
    scale_q: jax.Array | None = None,
    scale_k: jax.Array | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[jax.Array, jax.Array]:
    """Normalise queries and keys over the dimension of a head, before their dot product.

    LN(x) = scale (x - mean(x)) / sqrt(var(x) + eps), without a bias, each head of each token by itself. With scale 1,
    |q . k| <= D after it, so that logits q . k / sqrt(D) are at most sqrt(D), however large the learning rate makes
    the projections. Call it before rotary embeddings, which keep lengths, unless the model says otherwise.

    Args:
      q: [..., D] floating-point, as [B, T, H, D].
      k: [..., D] floating-point; its heads and tokens may be others than those of q.
      scale_q: [D], learned, 1 at first, shared by the heads; None is 1.
      scale_k: [D], likewise.
      eps: > 0, added to the variance.

    Returns:
      q and k, normalised, in their dtypes.

    Raises:
      ShapeError: the last axes differ.
      DtypeError: something is not floating-point.
      ValueError: eps is not positive.

    Cost: one pass over q and k, which XLA fuses.

    Numerics: statistics in float32 at least, in two passes. A constant vector, or D = 1, gives 0 with a finite
    gradient, of eps ** -0.5 at most.

    Source: M. Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023, arXiv 2302.05442,
      section 2; M. Wortsman et al., 2023, arXiv 2309.14322, section 3.1.1.

    Example:
      >>> import jax.numpy as jnp
      >>> q, k = qk_layernorm(jnp.array([1.0, 3.0]), jnp.array([500.0, 100.0]))
      >>> print(q.round(3).tolist(), k.round(3).tolist())
      [-1.0, 1.0] [1.0, -1.0]
    """
    name = "qk_layernorm"
    checks.shape(
        name,
        remedy="The last axis is that of a head.",
        q=(q, "*B D"),
        k=(k, "*C D"),
        scale_q=(scale_q, "D"),
        scale_k=(scale_k, "D"),
    )
    checks.dtype(name, "floating", q=q, k=k, scale_q=scale_q, scale_k=scale_k)
    checks.value(name, "eps", eps > 0, "be greater than 0", eps)
    return _layernorm(q, scale_q, eps), _layernorm(k, scale_k, eps)


def _layernorm(x: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
    wide = x.astype(accumulator(x.dtype))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (normal if scale is None else normal * scale).astype(x.dtype)
