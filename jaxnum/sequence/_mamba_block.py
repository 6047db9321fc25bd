"""The Mamba block: a convolution and a selective state-space scan between two projections."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from jaxnum.sequence import layer as layers
from jaxnum.sequence._short_convolution import short_convolution, short_convolution_step
from kernels_pallas import checks, selective_scan, selective_scan_step

_NAME = "mamba_block"


class MambaCache(NamedTuple):
    """What a `mamba_block` carries from token to token."""

    state: jax.Array  # [*B, D, N], that of the scan
    convolution: jax.Array  # [*B, conv_width - 1, D]


class _Options(NamedTuple):
    width: int
    inner: int
    states: int
    rank: int
    conv_width: int
    eigenvalues: str
    chunk_size: int | None
    implementation: str | None


def mamba_block(
    width: int,
    *,
    inner: int | None = None,
    states: int = 16,
    rank: int | None = None,
    conv_width: int = 4,
    eigenvalues: str = "positive",
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> layers.Layer:
    """A Mamba block: u, z = W_in x; u <- silu(convolution(u)); y = W_out (scan(u) * silu(z)).

    `kernels_pallas.selective_scan` runs over u with A = -exp(A_log) and, read from u itself, [r, B, C] = W_x u and
    delta = W_dt r + bias. A residual connection and a norm around it are the model's.

    Args:
      width: of x.
      inner: channels D of the scan; default 2 width.
      states: N of each channel.
      rank: of r; default width / 16, rounded up.
      conv_width: taps of the causal convolution.
      eigenvalues: "positive", decays in (0, 1), or "symmetric", in (-1, 1): a state can then change its sign at each
        token, which counting modulo two needs.
      chunk_size: as in `kernels_pallas.selective_scan`; only speed and memory depend on it.
      implementation: as in `kernels_pallas.selective_scan`.

    Returns:
      A `Layer` whose cache is a `MambaCache`. Leave A_log, D and delta_bias out of weight decay.

    Raises:
      ValueError: an option is out of range; ShapeError, DtypeError: what it is applied to does not fit.

    Cost: linear in the tokens; a step costs the matrices of the block and about 7 D N flops.

    Numerics: step sizes, decays and states in float32 at least.

    Source: A. Gu and T. Dao, "Mamba", 2023, arXiv 2312.00752, section 3.4, with its defaults; symmetric eigenvalues: R.
      Grazzi, J. Siems et al., "Unlocking state-tracking in linear RNNs through negative eigenvalues", 2024, arXiv
      2411.12537.

    Example:
      >>> import jax
      >>> block = mamba_block(32)
      >>> params = block.init(jax.random.key(0))
      >>> y, cache = block.apply(params, jax.random.normal(jax.random.key(1), (3, 10, 32)))
      >>> y.shape, cache.state.shape, cache.convolution.shape
      ((3, 10, 32), (3, 64, 16), (3, 3, 64))
    """
    layers.check_sizes(_NAME, {"width": width})
    inner = 2 * width if inner is None else inner
    rank = -(-width // 16) if rank is None else rank
    layers.check_sizes(_NAME, {"inner": inner, "states": states, "rank": rank, "conv_width": conv_width})
    checks.choice(_NAME, "eigenvalues", eigenvalues, ("positive", "symmetric"))
    layers.check_implementation(_NAME, implementation)
    options = _Options(width, inner, states, rank, conv_width, eigenvalues, chunk_size, implementation)
    return layers.Layer(
        partial(_init, options), partial(_apply, options), partial(_step, options), partial(_init_cache, options)
    )


def _init(o: _Options, key: jax.Array) -> layers.PyTree:
    keys = jax.random.split(key, 7)
    limit = o.conv_width**-0.5
    time = jnp.exp(jax.random.uniform(keys[5], (o.inner,), minval=math.log(1e-3), maxval=math.log(0.1)))
    return {
        "in": layers.matrix(keys[0], o.width, 2 * o.inner),
        "convolution": jax.random.uniform(keys[1], (o.conv_width, o.inner), minval=-limit, maxval=limit),
        "convolution_bias": jax.random.uniform(keys[2], (o.inner,), minval=-limit, maxval=limit),
        "select": layers.matrix(keys[3], o.inner, o.rank + 2 * o.states),
        "delta": jax.random.uniform(keys[4], (o.rank, o.inner), minval=-1.0, maxval=1.0) * o.rank**-0.5,
        # What softplus turns into `time`.
        "delta_bias": time + jnp.log(-jnp.expm1(-time)),
        "A_log": jnp.broadcast_to(jnp.log(1.0 + jnp.arange(o.states)), (o.inner, o.states)),
        "D": jnp.ones(o.inner),
        "out": layers.matrix(keys[6], o.inner, o.width),
    }


def _apply(
    o: _Options,
    params: layers.PyTree,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: MambaCache | None = None,
) -> tuple[jax.Array, MambaCache]:
    x = layers.enter(_NAME, o.width, x, segment_ids)
    cache = layers.enter_cache(_NAME, cache, _init_cache(o, x.shape[:-2], x.dtype))
    u, z = jnp.split(layers.times(x, params["in"]), 2, -1)
    u, convolution = short_convolution(
        u,
        params["convolution"],
        params["convolution_bias"],
        activation="silu",
        initial_state=cache.convolution,
        segment_ids=segment_ids,
    )
    delta, A, B, C, D, bias = _scan_inputs(o, params, u)
    y, state = selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D=D,
        z=z,
        delta_bias=bias,
        initial_state=cache.state,
        segment_ids=segment_ids,
        eigenvalues=o.eigenvalues,
        chunk_size=o.chunk_size,
        implementation=o.implementation,
    )
    return layers.times(y, params["out"]), MambaCache(state, convolution)


def _step(o: _Options, params: layers.PyTree, x: jax.Array, cache: MambaCache) -> tuple[jax.Array, MambaCache]:
    layers.enter_step(_NAME, o.width, x)
    cache = layers.enter_cache(_NAME, cache, _init_cache(o, x.shape[:-1], x.dtype))
    u, z = jnp.split(layers.times(x, params["in"]), 2, -1)
    u, convolution = short_convolution_step(
        cache.convolution, u, params["convolution"], params["convolution_bias"], activation="silu"
    )
    delta, A, B, C, D, bias = _scan_inputs(o, params, u)
    y, state = selective_scan_step(cache.state, u, delta, A, B, C, D=D, z=z, delta_bias=bias, eigenvalues=o.eigenvalues)
    return layers.times(y, params["out"]), MambaCache(state, convolution)


def _init_cache(o: _Options, batch: int | tuple[int, ...] = (), dtype: Any = float) -> MambaCache:
    batch = layers.batch_axes(batch)
    state = jnp.zeros((*batch, o.inner, o.states), layers.sums(dtype))
    return MambaCache(state, jnp.zeros((*batch, o.conv_width - 1, o.inner), dtype))


def _scan_inputs(o: _Options, params: layers.PyTree, u: jax.Array) -> tuple[jax.Array, ...]:
    """Delta before bias and softplus, A, B, C, D and the bias, as the scan takes them."""
    dtype = accumulator(u.dtype)
    low, B, C = jnp.split(layers.times(u, params["select"]), (o.rank, o.rank + o.states), -1)
    A = -jnp.exp(params["A_log"].astype(dtype))
    return (
        layers.precisely(low, params["delta"]),
        A,
        B,
        C,
        params["D"].astype(dtype),
        params["delta_bias"].astype(dtype),
    )
