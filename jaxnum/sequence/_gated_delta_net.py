"""The gated delta net: a layer whose state is a memory that each token reads, corrects and lets fade."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.sequence import layer as layers
from jaxnum.sequence._short_convolution import short_convolution, short_convolution_step
from kernels_pallas import checks, delta_rule, delta_rule_step

_NAME = "gated_delta_net"


class GatedDeltaNetCache(NamedTuple):
    """What a `gated_delta_net` carries from token to token."""

    state: jax.Array  # [*B, value_heads, K, V]
    convolution: jax.Array | None  # [*B, conv_width - 1, channels], where there is a convolution


class _Options(NamedTuple):
    width: int
    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    updates: int
    conv_width: int
    decay: str | None
    eigenvalues: str
    gate: bool
    eps: float
    chunk_size: int | None
    implementation: str | None

    @property
    def parts(self) -> tuple[int, ...]:
        """Channels of q, k and v."""
        q, v = self.heads * self.key_dim, self.value_heads * self.value_dim
        return q, self.updates * q, self.updates * v


def gated_delta_net(
    width: int,
    heads: int,
    *,
    value_heads: int | None = None,
    key_dim: int | None = None,
    value_dim: int | None = None,
    updates_per_token: int = 1,
    eigenvalues: str = "positive",
    decay: str | None = "token",
    conv_width: int = 4,
    gate: bool = True,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> layers.Layer:
    """A gated delta net: `kernels_pallas.delta_rule` of projections of x, normed, gated and projected back.

    q, k, v = silu(convolution(W x)), q and k of length 1; beta = sigmoid(W_b x); and, for "token", the log decay
    g = -exp(a) softplus(W_a x + b). The state follows S <- e^g (I - beta k kᵀ) S + beta k vᵀ, o = Sᵀ q / sqrt(key_dim),
    and y = W_o (rms_norm(o) * silu(W_g x)), with one norm a head.

    With symmetric eigenvalues, beta = 2 sigmoid(W_b x): the transitions have eigenvalues in [-1, 1] instead of [0, 1],
    and one layer can count modulo two. Several updates a token multiply as many transitions: two can rotate, which
    counting modulo three needs.

    Args:
      width: of x.
      heads: of queries and keys.
      value_heads: of values and of the state, a multiple of `heads`; default `heads`.
      key_dim: of a query or key; default width / heads, which must then be whole.
      value_dim: of a value; default 2 key_dim.
      updates_per_token: delta rules a token, each with its own key, value and beta (DeltaProduct).
      eigenvalues: "positive", beta below 1, or "symmetric", beta below 2.
      decay: None (DeltaNet), "token", one a head (Gated DeltaNet), or "channel", one a key channel through a bottleneck
        of key_dim (Kimi delta attention).
      conv_width: taps of the causal convolution of q, k and v; 1 leaves it out.
      gate: multiply by silu(W_g x).
      eps: of the norm of the output.
      chunk_size: tokens computed at once; only speed depends on it.
      implementation: as in `kernels_pallas.delta_rule`.

    Returns:
      A `Layer` whose cache is a `GatedDeltaNetCache`.

    Raises:
      ValueError: an option is out of range; ShapeError, DtypeError: what it is applied to does not fit.

    Cost: linear in the tokens; a step costs the matrices of the layer and about 6 K V flops a head and update.

    Numerics: beta, decays and the state in float32 at least; q and k are normed inside `delta_rule`.

    Source: S. Yang et al., "Gated delta networks", 2024, arXiv 2412.06464; R. Grazzi, J. Siems et al., "Unlocking
      state-tracking in linear RNNs through negative eigenvalues", 2024, arXiv 2411.12537; J. Siems et al.,
      "DeltaProduct", 2025, arXiv 2502.10297; Kimi Team, "Kimi Linear", 2025, arXiv 2510.26692.

    Example:
      >>> import jax
      >>> layer = gated_delta_net(32, heads=2, eigenvalues="symmetric")
      >>> params = layer.init(jax.random.key(0))
      >>> y, cache = layer.apply(params, jax.random.normal(jax.random.key(1), (3, 10, 32)))
      >>> y.shape, cache.state.shape
      ((3, 10, 32), (3, 2, 16, 32))
    """
    layers.check_sizes(_NAME, {"width": width, "heads": heads})
    value_heads = heads if value_heads is None else value_heads
    if key_dim is None:
        checks.value(_NAME, "width", width % heads == 0, f"be a multiple of heads={heads}", width, "Or give key_dim.")
        key_dim = width // heads
    value_dim = 2 * key_dim if value_dim is None else value_dim
    sizes = {"value_heads": value_heads, "key_dim": key_dim, "value_dim": value_dim}
    layers.check_sizes(_NAME, sizes | {"updates_per_token": updates_per_token, "conv_width": conv_width})
    checks.value(_NAME, "value_heads", value_heads % heads == 0, f"be a multiple of heads={heads}", value_heads)
    checks.choice(_NAME, "eigenvalues", eigenvalues, ("positive", "symmetric"))
    checks.choice(_NAME, "decay", decay, (None, "token", "channel"))
    layers.check_eps(_NAME, eps)
    layers.check_implementation(_NAME, implementation)
    options = _Options(
        width,
        heads,
        value_heads,
        key_dim,
        value_dim,
        updates_per_token,
        conv_width,
        decay,
        eigenvalues,
        gate,
        eps,
        chunk_size,
        implementation,
    )
    return layers.Layer(
        partial(_init, options), partial(_apply, options), partial(_step, options), partial(_init_cache, options)
    )


def _init(o: _Options, key: jax.Array) -> layers.PyTree:
    keys = jax.random.split(key, 9)
    inner = o.value_heads * o.value_dim
    params = {
        "qkv": layers.matrix(keys[0], o.width, sum(o.parts)),
        "beta": layers.matrix(keys[1], o.width, o.updates * o.value_heads),
        "norm": jnp.ones(o.value_dim),
        "out": layers.matrix(keys[2], inner, o.width),
    }
    if o.conv_width > 1:
        limit = o.conv_width**-0.5
        params["convolution"] = jax.random.uniform(keys[3], (o.conv_width, sum(o.parts)), minval=-limit, maxval=limit)
    if o.gate:
        params["gate"] = layers.matrix(keys[4], o.width, inner)
    if o.decay is not None:
        gates = o.value_heads * (o.key_dim if o.decay == "channel" else 1)
        # Time constants of the usual recipe: exp(a) uniform up to 16, softplus(b) log-uniform from 1e-3 to 0.1.
        rate = jax.random.uniform(keys[5], (o.value_heads,), minval=1e-3, maxval=16.0)
        time = jnp.exp(jax.random.uniform(keys[6], (gates,), minval=math.log(1e-3), maxval=math.log(0.1)))
        params |= {"log_rate": jnp.log(rate), "decay_bias": time + jnp.log(-jnp.expm1(-time))}
        if o.decay == "channel":
            params["decay_down"] = layers.matrix(keys[7], o.width, o.key_dim)
            params["decay"] = layers.matrix(keys[8], o.key_dim, gates)
        else:
            params["decay"] = layers.matrix(keys[7], o.width, gates)
    return params


def _apply(
    o: _Options,
    params: layers.PyTree,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: GatedDeltaNetCache | None = None,
) -> tuple[jax.Array, GatedDeltaNetCache]:
    x = layers.enter(_NAME, o.width, x, segment_ids)
    cache = layers.enter_cache(_NAME, cache, _init_cache(o, x.shape[:-2], x.dtype))
    mixed, convolution = layers.times(x, params["qkv"]), None
    if o.conv_width == 1:
        mixed = jax.nn.silu(mixed)
    else:
        mixed, convolution = short_convolution(
            mixed,
            params["convolution"],
            activation="silu",
            initial_state=cache.convolution,
            segment_ids=segment_ids,
        )
    q, k, v = _heads(o, mixed)
    # The updates of all tokens stand one after the other.
    lead = (*x.shape[:-2], x.shape[-2] * o.updates)
    k, v = (y.reshape(*lead, *y.shape[-2:]) for y in (k, v))
    beta = _beta(o, params, x).reshape(*lead, o.value_heads)
    read, state = delta_rule(
        q,
        k,
        v,
        beta,
        log_decay=_log_decay(o, params, x),
        initial_state=cache.state,
        segment_ids=segment_ids,
        l2norm=True,
        updates_per_token=o.updates,
        chunk_size=o.chunk_size,
        implementation=o.implementation,
    )
    return _finish(o, params, x, read), GatedDeltaNetCache(state, convolution)


def _step(
    o: _Options, params: layers.PyTree, x: jax.Array, cache: GatedDeltaNetCache
) -> tuple[jax.Array, GatedDeltaNetCache]:
    layers.enter_step(_NAME, o.width, x)
    cache = layers.enter_cache(_NAME, cache, _init_cache(o, x.shape[:-1], x.dtype))
    mixed, convolution = layers.times(x, params["qkv"]), None
    if cache.convolution is None:
        mixed = jax.nn.silu(mixed)
    else:
        mixed, convolution = short_convolution_step(cache.convolution, mixed, params["convolution"], activation="silu")
    q, k, v = _heads(o, mixed)
    beta = _beta(o, params, x)
    if o.updates == 1:
        k, v, beta = jnp.squeeze(k, -3), jnp.squeeze(v, -3), jnp.squeeze(beta, -2)
    read, state = delta_rule_step(
        cache.state,
        q,
        k,
        v,
        beta,
        log_decay=_log_decay(o, params, x),
        l2norm=True,
        updates_per_token=o.updates,
    )
    return _finish(o, params, x, read), GatedDeltaNetCache(state, convolution)


def _init_cache(o: _Options, batch: int | tuple[int, ...] = (), dtype: Any = float) -> GatedDeltaNetCache:
    batch = layers.batch_axes(batch)
    state = jnp.zeros((*batch, o.value_heads, o.key_dim, o.value_dim), layers.sums(dtype))
    inputs = jnp.zeros((*batch, o.conv_width - 1, sum(o.parts)), dtype) if o.conv_width > 1 else None
    return GatedDeltaNetCache(state, inputs)


def _heads(o: _Options, mixed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Q [..., H, K], k [..., updates, H, K] and v [..., updates, HV, V] of the channels [..., sum(parts)]."""
    q, k, v = jnp.split(mixed, (o.parts[0], o.parts[0] + o.parts[1]), -1)
    lead = mixed.shape[:-1]
    return (
        q.reshape(*lead, o.heads, o.key_dim),
        k.reshape(*lead, o.updates, o.heads, o.key_dim),
        v.reshape(*lead, o.updates, o.value_heads, o.value_dim),
    )


def _beta(o: _Options, params: layers.PyTree, x: jax.Array) -> jax.Array:
    """How much of an error each update corrects, [..., updates, HV]."""
    beta = jax.nn.sigmoid(layers.precisely(x, params["beta"]))
    beta = 2 * beta if o.eigenvalues == "symmetric" else beta
    return beta.reshape(*x.shape[:-1], o.updates, o.value_heads)


def _log_decay(o: _Options, params: layers.PyTree, x: jax.Array) -> jax.Array | None:
    """[..., HV] or [..., HV, K]."""
    if o.decay is None:
        return None
    if o.decay == "channel":
        x = layers.precisely(x, params["decay_down"])
    time = jax.nn.softplus(layers.precisely(x, params["decay"]) + params["decay_bias"])
    rate = jnp.exp(params["log_rate"]).astype(time.dtype)
    if o.decay == "channel":
        return -rate[:, None] * layers.split_heads(time, o.value_heads)
    return -rate * time


def _finish(o: _Options, params: layers.PyTree, x: jax.Array, read: jax.Array) -> jax.Array:
    y = layers.join_heads(layers.rms_norm(read, params["norm"], o.eps))
    if o.gate:
        y = y * jax.nn.silu(layers.times(x, params["gate"]))
    return layers.times(y, params["out"])
