"""Two recurrent layers over one sequence, one from each end."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.sequence import layer as layers
from kernels_pallas import checks

_NAME = "bidirectional"


def bidirectional(forward: layers.Layer, backward: layers.Layer | None = None) -> layers.BidirectionalLayer:
    """A layer in which every token sees what precedes it and what follows: y = f(x) + flip(g(flip(x))).

    f and g have parameters of their own, and each starts from an empty cache. Each document of a packed row is read
    from its own two ends, and padding, wherever it stands, is read by neither.

    Args:
      forward: f, read from the first token to the last, for example a `mamba_block`.
      backward: g, read from the last token to the first; default f, with parameters of its own.

    Returns:
      A `BidirectionalLayer`, with parameters {"forward": those of f, "backward": those of g}. It has no cache and no
      step: with one token more, all outputs change.

    Raises:
      TypeError: forward or backward is not a `Layer`; what the two layers raise.

    Cost: that of f and g.

    Source: Z. Wang et al., "Is Mamba effective for time series forecasting?" (S-Mamba), 2024, arXiv 2403.11144, where f
      and g are Mamba blocks.

    Example:
      >>> import jax
      >>> from jaxnum.sequence import mamba_block
      >>> layer = bidirectional(mamba_block(16))
      >>> params = layer.init(jax.random.key(0))
      >>> layer.apply(params, jax.random.normal(jax.random.key(1), (3, 10, 16))).shape
      (3, 10, 16)
    """
    backward = forward if backward is None else backward
    for name, layer in (("forward", forward), ("backward", backward)):
        known = isinstance(layer, layers.Layer)
        checks.value(_NAME, name, known, "be a jaxnum.sequence.Layer", type(layer).__name__, error=TypeError)
    return layers.BidirectionalLayer(partial(_init, forward, backward), partial(_apply, forward, backward))


def _init(forward: layers.Layer, backward: layers.Layer, key: jax.Array) -> layers.PyTree:
    ahead, behind = jax.random.split(key)
    return {"forward": forward.init(ahead), "backward": backward.init(behind)}


def _apply(
    forward: layers.Layer,
    backward: layers.Layer,
    params: layers.PyTree,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    checks.shape(_NAME, remedy="The layout is [*batch, tokens, width].", x=(x, "*B T C"))
    if segment_ids is not None:
        checks.shape(_NAME, segment_ids=(segment_ids, " ".join(map(str, x.shape[:-1]))))

    def flipped(y: Any, axis: int) -> Any:
        return None if y is None else jnp.flip(y, axis)

    ahead, _ = forward.apply(params["forward"], x, segment_ids=segment_ids)
    behind, _ = backward.apply(params["backward"], flipped(x, -2), segment_ids=flipped(segment_ids, -1))
    return ahead + flipped(behind, -2)
