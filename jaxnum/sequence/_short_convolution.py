"""Short causal convolution along the tokens, a channel at a time, with carried inputs and packed sequences.

The local mixing that stands before most recurrent layers. For long filters use an FFT.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import checks, recurrence

_NAME, _STEP = "short_convolution", "short_convolution_step"
_ACTIVATIONS = (None, "silu")


def short_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal depthwise convolution along the tokens, with its last inputs given back as a state.

    y_t = activation(bias + sum over w < W of kernel_w * x_{t - W + 1 + w}), elementwise in the channels. The W - 1
    inputs before the first token are those of `initial_state`, else 0.

    Args:
      x: inputs [*B, T, D], floating point.
      kernel: taps [W, D], W >= 1; the last one meets the token itself.
      bias: [D], or None for 0.
      activation: "silu" or None.
      initial_state: the W - 1 inputs before the first token [*B, W - 1, D], oldest first, in the dtype of x; None for
        zeros.
      segment_ids: int32 [*B, T]. A token sees those of its own segment only: a new one starts where the id differs from
        that of the last token that is not padding. The first segment continues `initial_state`. A negative id is
        padding: it may hold anything, NaN included, its output is 0, and what follows sees through it.

    Returns:
      y [*B, T, D] in the dtype of x, and the state after the last token [*B, W - 1, D]: pass it on as `initial_state`.

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit, at trace time.

    Cost: W multiplications an entry, one pass over x; with `segment_ids` two gathers of x more.

    Numerics: summed in float32, or float64 for float64.

    Derivatives: all modes and orders, the state's included.

    Source: the convolution of A. Gu and T. Dao, "Mamba", 2023, arXiv 2312.00752, section 3.4; D. Fu et al., "Hungry
      hungry hippos", 2022, arXiv 2212.14052.

    Example:
      >>> import jax.numpy as jnp
      >>> x, kernel = jnp.arange(1.0, 7.0)[:, None], jnp.ones((3, 1))
      >>> y, state = short_convolution(x, kernel)
      >>> y[:, 0].tolist(), state[:, 0].tolist()
      ([1.0, 3.0, 6.0, 9.0, 12.0, 15.0], [5.0, 6.0])
      >>> y, _ = short_convolution(x, kernel, segment_ids=jnp.array([0, 0, 0, 1, 1, 1]))
      >>> y[:, 0].tolist()
      [1.0, 3.0, 6.0, 4.0, 9.0, 15.0]
    """
    checks.shape(_NAME, remedy="The layout is [*batch, tokens, channels].", x=(x, "*B T D"))
    *batch, T, D = x.shape
    _check(_NAME, x, kernel, bias, activation, {"initial_state": initial_state}, batch)
    width = kernel.shape[0]
    if segment_ids is not None:
        checks.shape(_NAME, segment_ids=(segment_ids, " ".join(map(str, (*batch, T)))))
        checks.dtype(_NAME, "integer", segment_ids=segment_ids)
    rows = math.prod(batch)
    flat = x.reshape(rows, T, D)
    if initial_state is None:
        state = jnp.zeros((rows, width - 1, D), x.dtype)
    else:
        state = initial_state.reshape(rows, width - 1, D)
    if segment_ids is None or T == 0:
        held = jnp.concatenate([state, flat], 1)
        taps = [held[:, w : w + T] for w in range(width)]
        y, state = _finish(taps, kernel, bias, activation), held[:, T:]
    else:
        y, state = _packed(flat, kernel, bias, activation, state, segment_ids.reshape(rows, T))
    return y.reshape(x.shape), state.reshape(*batch, width - 1, D)


def short_convolution_step(
    state: jax.Array, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, activation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of `short_convolution`, for decoding.

    Args:
      state: the W - 1 inputs before it [*B, W - 1, D], in the dtype of x.
      x: the token's input [*B, D].
      kernel: taps [W, D].
      bias: [D], or None for 0.
      activation: "silu" or None.

    Returns:
      y [*B, D] in the dtype of x, and the next state [*B, W - 1, D].

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit, at trace time.

    Source: see `short_convolution`.

    Example:
      >>> import jax.numpy as jnp
      >>> y, state = short_convolution_step(jnp.array([[1.0], [2.0]]), jnp.array([3.0]), jnp.ones((3, 1)))
      >>> y.tolist(), state[:, 0].tolist()
      ([6.0], [2.0, 3.0])
    """
    checks.shape(_STEP, remedy="The layout is [*batch, channels].", x=(x, "*B D"))
    _check(_STEP, x, kernel, bias, activation, {"state": state}, x.shape[:-1])
    held = jnp.concatenate([state, x[..., None, :]], -2)
    taps = [held[..., w, :] for w in range(kernel.shape[0])]
    return _finish(taps, kernel, bias, activation), held[..., 1:, :]


def _check(
    name: str,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    activation: str | None,
    state: dict[str, Any],
    batch,
) -> None:
    """Check the arguments of a function, with its state under the name that it has there."""
    D = x.shape[-1]
    W = checks.shape(name, kernel=(kernel, f"W {D}"), bias=(bias, f"{D}"))["W"]
    checks.value(name, "kernel", W > 0, "have at least one tap", W, error=checks.ShapeError)
    checks.dtype(name, "floating", x=x, kernel=kernel, bias=bias)
    checks.choice(name, "activation", activation, _ACTIVATIONS)
    remedy = "It holds the inputs before the token, one fewer than the kernel has taps."
    spec = " ".join(map(str, (*batch, W - 1, D)))
    checks.shape(name, remedy=remedy, **{argument: (given, spec) for argument, given in state.items()})
    checks.same_dtype(name, x=x, **state)


def _finish(taps: list[jax.Array], kernel: jax.Array, bias: jax.Array | None, activation: str | None) -> jax.Array:
    """The weighted sum of the inputs that each tap of the kernel meets."""
    dtype = accumulator(taps[0].dtype)
    kernel = kernel.astype(dtype)
    y = kernel[0] * taps[0].astype(dtype)
    for w, tap in enumerate(taps[1:], 1):
        y = y + kernel[w] * tap.astype(dtype)
    if bias is not None:
        y = y + bias.astype(dtype)
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(taps[0].dtype)


def _packed(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    activation: str | None,
    state: jax.Array,
    segment_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """With padding moved behind the other tokens, so that neighbours in the array are neighbours in the text."""
    (N, T, _), before = x.shape, state.shape[1]
    segments, valid = recurrence.canonical_segments(segment_ids)
    # Padding must not reach the gradient of the kernel either, where 0 times NaN is NaN.
    (x,) = recurrence.hide_padding(valid, x)
    count = jnp.sum(valid, 1, dtype=jnp.int32)
    ranks = jnp.cumsum(jnp.stack([valid, ~valid]), 2, dtype=jnp.int32) - 1
    places = jnp.where(valid, ranks[0], count[:, None] + ranks[1])
    rows = jnp.arange(N, dtype=jnp.int32)[:, None]
    order = jnp.zeros_like(places).at[rows, places].set(jnp.arange(T, dtype=jnp.int32), unique_indices=True)
    held = jnp.concatenate([state, x[rows, order]], 1)
    own = segments[rows, order]
    # Segment 0 continues the state.
    owners = jnp.pad(own, ((0, 0), (before, 0)))
    taps = [jnp.where((owners[:, w : w + T] == own)[..., None], held[:, w : w + T], 0) for w in range(kernel.shape[0])]
    (y,) = recurrence.hide_padding(valid, _finish(taps, kernel, bias, activation)[rows, places])
    last = count[:, None] + jnp.arange(before, dtype=jnp.int32)
    belongs = owners[rows, last] == segments[:, -1:]
    return y, jnp.where(belongs[..., None], held[rows, last], 0)
