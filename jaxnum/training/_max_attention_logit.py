"""The largest attention logit of each head: the number that grows before attention diverges."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import checks


def max_attention_logit(
    q: jax.Array, k: jax.Array, *, scale: float | jax.Array | None = None, causal: bool = False, block: int = 128
) -> jax.Array:
    """The largest scale q_i . k_j of each head over batch, queries and keys.

    Fitted over model sizes at one learning rate by `extrapolate_power_law`, it foretells where training diverges:
    the paper saw no model survive logits beyond about 1e4.

    Args:
      q: [B, T, H, D] floating-point, as they enter attention: after any norm and rotary embedding.
      k: [B, S, K, D] floating-point; K divides H, and key head j serves the query heads from j H / K on.
      scale: [], of the products; None is D ** -0.5.
      causal: leave out keys behind the query's position; needs S = T.
      block: queries at a time, >= 1.

    Returns:
      [H], float32 at least.

    Raises:
      ShapeError: shapes that do not fit; DtypeError: not floating-point.
      ValueError: an axis of size 0, `block` below 1, or causal with S != T.

    Cost: the products of attention, once, B H block S numbers at a time; one head's or one batch entry's worth is
    enough to watch a run.

    Numerics: products are summed in float32 at least; NaN in q or k ends in the heads that meet it.

    Source: M. Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023,
      arXiv 2309.14322, sections 3.1.1 and 3.4.

    Example:
      >>> import jax.numpy as jnp
      >>> q = jnp.array([1.0, 2.0]).reshape(1, 2, 1, 1)
      >>> k = jnp.array([3.0, -5.0]).reshape(1, 2, 1, 1)
      >>> max_attention_logit(q, k).tolist(), max_attention_logit(-q, k, causal=True).tolist()
      ([6.0], [10.0])
    """
    name = "max_attention_logit"
    sizes = checks.shape(name, remedy="The layout is [B, T, H, D].", q=(q, "B T H D"), k=(k, "B S K D"))
    checks.dtype(name, "floating", q=q, k=k)
    T, S, heads, groups, D = (sizes[axis] for axis in "TSHKD")
    for argument, entries in (("q", sizes["B"] * T * heads), ("k", sizes["B"] * S * groups)):
        checks.value(name, argument, entries > 0, "have no axis of size 0", jnp.shape(q if argument == "q" else k))
    checks.shape(name, remedy="One number scales all products.", scale=(scale, ""))
    checks.value(name, "k", heads % groups == 0, f"have a number of heads that divides {heads}", groups)
    checks.value(name, "k", T == S or not causal, f"have {T} tokens, as many as q, where causal", S)
    checks.value(name, "block", isinstance(block, int) and block >= 1, "be an int of at least 1", block)
    factor = D**-0.5 if scale is None else scale
    wide = jnp.promote_types(accumulator(q.dtype), accumulator(k.dtype))

    def row(place: tuple[jax.Array, jax.Array]) -> jax.Array:
        t, query = place
        query = query.reshape(sizes["B"], groups, heads // groups, D)
        products = jnp.einsum("bkgd,bskd->bskg", query, k, preferred_element_type=wide, precision="highest") * factor
        hidden = causal & (jnp.arange(S) > t)
        return largest(jnp.where(hidden[:, None, None], -jnp.inf, products), (0, 1)).reshape(heads)

    def largest(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
        # XLA's maximum leaves NaN out on CPUs, in some compiled shapes.
        return jnp.where(jnp.isnan(x).any(axis), jnp.nan, jnp.max(x, axis))

    return largest(jax.lax.map(row, (jnp.arange(T), jnp.moveaxis(q, 1, 0)), batch_size=block), 0)
