"""The block of TransNormerLLM: lightning attention with an output gate, then a gated linear unit."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.sequence import layer as layers
from jaxnum.sequence._lightning_attention import lightning_attention, slopes_of
from kernels_pallas import checks, linear_attention_step

_NAME = "transnormer_block"


class TransnormerCache(NamedTuple):
    """What a `transnormer_block` carries from token to token."""

    state: jax.Array  # [*B, H, K, V], that of lightning attention
    position: jax.Array | None  # [*B] int32, tokens so far, where there is a relative phase


class _Options(NamedTuple):
    width: int
    heads: int
    head_dim: int
    hidden: int
    slopes: tuple[float, ...]
    gate: str
    value_activation: str | None
    relative_phase: bool
    eps: float
    implementation: str | None


def transnormer_block(
    width: int,
    heads: int,
    *,
    head_dim: int | None = None,
    hidden: int | None = None,
    layer: int = 0,
    num_layers: int | None = None,
    gate: str = "sigmoid",
    value_activation: str | None = "silu",
    relative_phase: bool = False,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> layers.Layer:
    """A block of TransNormerLLM: x <- x + mixer(norm(x)), then x <- x + unit(norm(x)).

    The mixer is `lightning_attention` of q, k, v = silu(W x), normed by `srmsnorm` over all heads together, times a
    gate, times W_o. The unit is W_3 ((W_1 x) * (W_2 x)), without an activation.

    Args:
      width: of x.
      heads: of the attention.
      head_dim: of q, k and v; default width / heads, which must then be whole.
      hidden: of the gated unit; default 8 width / 3, rounded up.
      layer: which block this is, from 0: deeper ones forget less; see `lightning_attention_slopes`.
      num_layers: blocks of the model; None leaves that factor out.
      gate: "sigmoid", sigmoid(W_b W_a x) through a bottleneck of head_dim; or "linear", a product W x without one.
      value_activation: "silu", or None for plain values as in the first paper.
      relative_phase: turn q and k into [q cos(t theta), q sin(t theta)] with learned theta, twice as wide, so that the
        attention knows distances (LRPE-d). The model does it in its first block.
      eps: of the norms.
      implementation: as in `kernels_pallas.linear_attention`.

    Returns:
      A `Layer` whose cache is a `TransnormerCache`.

    Raises:
      ValueError: an option is out of range; ShapeError, DtypeError: what it is applied to does not fit.

    Cost: linear in the tokens; a step costs the matrices of the block and 4 head_dim^2 a head.

    Source: Z. Qin et al., "TransNormerLLM", 2023, arXiv 2307.14995; "Various lengths, constant speed", 2024, arXiv
      2405.17381.

    Example:
      >>> import jax
      >>> block = transnormer_block(32, heads=4, layer=1, num_layers=6)
      >>> params = block.init(jax.random.key(0))
      >>> y, cache = block.apply(params, jax.random.normal(jax.random.key(1), (2, 10, 32)))
      >>> y.shape, cache.state.shape
      ((2, 10, 32), (2, 4, 8, 8))
    """
    layers.check_sizes(_NAME, {"width": width, "heads": heads})
    if head_dim is None:
        remedy = "Or give head_dim."
        checks.value(_NAME, "width", width % heads == 0, f"be a multiple of heads={heads}", width, remedy)
    head_dim = width // heads if head_dim is None else head_dim
    hidden = -(-8 * width // 3) if hidden is None else hidden
    layers.check_sizes(_NAME, {"head_dim": head_dim, "hidden": hidden})
    checks.choice(_NAME, "gate", gate, ("sigmoid", "linear"))
    checks.choice(_NAME, "value_activation", value_activation, ("silu", None))
    layers.check_eps(_NAME, eps)
    layers.check_implementation(_NAME, implementation)
    slopes = tuple(slopes_of(heads, layer, num_layers).tolist())
    options = _Options(
        width, heads, head_dim, hidden, slopes, gate, value_activation, relative_phase, eps, implementation
    )
    return layers.Layer(
        partial(_init, options), partial(_apply, options), partial(_step, options), partial(_init_cache, options)
    )


def _init(o: _Options, key: jax.Array) -> layers.PyTree:
    keys = jax.random.split(key, 8)
    inner = o.heads * o.head_dim
    params = {
        "qkv": layers.matrix(keys[0], o.width, 3 * inner),
        "out": layers.matrix(keys[1], inner, o.width),
        "up": layers.matrix(keys[2], o.width, 2 * o.hidden),
        "down": layers.matrix(keys[3], o.hidden, o.width),
    }
    if o.gate == "linear":
        params["gate"] = layers.matrix(keys[4], o.width, inner)
    else:
        params["gate_down"] = layers.matrix(keys[5], o.width, o.head_dim)
        params["gate_up"] = layers.matrix(keys[6], o.head_dim, inner)
    if o.relative_phase:
        # The frequencies of rotary encodings.
        rates = 10000.0 ** (-jnp.arange(o.head_dim) / o.head_dim)
        params["phase"] = jnp.broadcast_to(rates, (o.heads, o.head_dim))
    return params


def _apply(
    o: _Options,
    params: layers.PyTree,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: TransnormerCache | None = None,
) -> tuple[jax.Array, TransnormerCache]:
    x = layers.enter(_NAME, o.width, x, segment_ids)
    cache = layers.enter_cache(_NAME, cache, _init_cache(o, x.shape[:-2], x.dtype))
    position = cache.position
    normed = layers.rms_norm(x, eps=o.eps)
    q, k, v = _qkv(o, params, normed)
    if position is not None:
        places, position = _places(position, x.shape[-2], segment_ids)
        q, k = (_turn(params["phase"], y, places) for y in (q, k))
    q, k, v = layers.unbounded(q, k, v)
    mixed, state = lightning_attention(
        q,
        k,
        v,
        jnp.asarray(o.slopes),
        initial_state=cache.state,
        segment_ids=segment_ids,
        implementation=o.implementation,
    )
    return _finish(o, params, x, normed, mixed), TransnormerCache(state, position)


def _step(
    o: _Options, params: layers.PyTree, x: jax.Array, cache: TransnormerCache
) -> tuple[jax.Array, TransnormerCache]:
    layers.enter_step(_NAME, o.width, x)
    cache = layers.enter_cache(_NAME, cache, _init_cache(o, x.shape[:-1], x.dtype))
    position = cache.position
    normed = layers.rms_norm(x, eps=o.eps)
    q, k, v = _qkv(o, params, normed)
    if position is not None:
        q, k = (_turn(params["phase"], y, position) for y in (q, k))
        position = position + 1
    decay = -jnp.asarray(o.slopes, cache.state.dtype)
    q, k, v = layers.unbounded(q, k, v)
    mixed, state = linear_attention_step(cache.state, q, k, v, log_decay=decay, scale=1.0)
    return _finish(o, params, x, normed, mixed), TransnormerCache(state, position)


def _init_cache(o: _Options, batch: int | tuple[int, ...] = (), dtype: Any = float) -> TransnormerCache:
    batch = layers.batch_axes(batch)
    keys = o.head_dim * (2 if o.relative_phase else 1)
    state = jnp.zeros((*batch, o.heads, keys, o.head_dim), layers.sums(dtype))
    return TransnormerCache(state, jnp.zeros(batch, jnp.int32) if o.relative_phase else None)


def _qkv(o: _Options, params: layers.PyTree, normed: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v = jnp.split(layers.times(normed, params["qkv"]), 3, -1)
    v = v if o.value_activation is None else jax.nn.silu(v)
    return tuple(layers.split_heads(y, o.heads) for y in (jax.nn.silu(q), jax.nn.silu(k), v))


def _places(position: jax.Array, T: int, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The place of each token in its document [*B, T], padding not counted, and that of the token to come."""
    if segment_ids is None or T == 0:
        return position[..., None] + jnp.arange(T, dtype=jnp.int32), position + T
    segments, valid = layers.segments_of(segment_ids)
    axis = segments.ndim - 1
    before = jnp.cumsum(valid, axis, dtype=jnp.int32) - valid
    starts = jnp.diff(segments, axis=axis, prepend=0) > 0
    at = before - jax.lax.cummax(jnp.where(starts, before, 0), axis=axis)
    places = at + jnp.where(segments == 0, position[..., None], 0)
    return places, places[..., -1] + valid[..., -1]


def _turn(phase: jax.Array, x: jax.Array, places: jax.Array) -> jax.Array:
    """Queries or keys [..., H, D] at the places [...] as [..., H, 2 D]: their products depend on distances alone."""
    wide = accumulator(x.dtype)
    angle = places[..., None, None].astype(wide) * phase.astype(wide)
    turned = [x.astype(wide) * f(angle) for f in (jnp.cos, jnp.sin)]
    return jnp.concatenate(turned, -1).astype(x.dtype)


def _finish(o: _Options, params: layers.PyTree, x: jax.Array, normed: jax.Array, mixed: jax.Array) -> jax.Array:
    mixed = layers.rms_norm(layers.join_heads(mixed), eps=o.eps).astype(x.dtype)
    if o.gate == "linear":
        gate = layers.times(normed, params["gate"])
    else:
        gate = jax.nn.sigmoid(layers.times(layers.times(normed, params["gate_down"]), params["gate_up"]))
    x = x + layers.times(mixed * gate, params["out"])
    first, second = jnp.split(layers.times(layers.rms_norm(x, eps=o.eps), params["up"]), 2, -1)
    return x + layers.times(first * second, params["down"])
