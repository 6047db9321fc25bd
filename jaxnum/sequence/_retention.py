"""Retention: the linear attention of RetNet, with a decay of 1 - 2^(-5 - h) in head h."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import linear_attention


def retention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal linear attention with weights scale gamma_h^(t - s) q_t . k_s, gamma_h = 1 - 2^(-5 - h).

    `kernels_pallas.linear_attention` with those decays. RetNet turns q and k by a rotary encoding before, and norms
    each head after.

    Args:
      q: queries [*B, T, H, K].
      k: keys [*B, T, H, K].
      v: values [*B, T, H, V].
      initial_state: [*B, H, K, V], the state after the tokens before; default 0.
      segment_ids: int32 [*B, T], packed documents; negative is padding.
      scale: of q . k; default K ** -0.5.
      chunk_size: tokens computed at once; only speed depends on it.
      implementation: as in `kernels_pallas.linear_attention`.

    Returns:
      o [*B, T, H, V] in the dtype of q, and the state after the last token [*B, H, K, V].

    Raises:
      ShapeError, DtypeError, ValueError, NotImplementedError: as `kernels_pallas.linear_attention`.

    Source: Y. Sun et al., "Retentive network", 2023, arXiv 2307.08621, equation 8.

    Example:
      >>> import jax
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 4, 8))
      >>> o, state = retention(q, k, v)
      >>> o.shape, state.shape
      ((1, 100, 4, 8), (1, 4, 8, 8))
    """
    # Heads of q, k and v are checked by the kernel, which lets some be fewer.
    heads = max((x.shape[-2] for x in (q, k, v) if jnp.ndim(x) > 1), default=0)
    decays = [math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]
    return linear_attention(
        q,
        k,
        v,
        log_decay=jnp.array(decays, accumulator(jnp.result_type(q))),
        initial_state=initial_state,
        segment_ids=segment_ids,
        scale=scale,
        chunk_size=chunk_size,
        implementation=implementation,
    )
