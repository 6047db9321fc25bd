"""Layers and feature maps of `jaxnum.sequence` as modules of equinox."""

from __future__ import annotations

from typing import Any

import jax

from jaxnum.sequence import BidirectionalLayer, FeatureMap, Layer
from kernels_pallas import checks


def to_equinox(layer: Layer | BidirectionalLayer | FeatureMap, key: jax.Array) -> Any:
    """An `equinox.Module` that holds the parameters of a layer or a feature map.

    Its field `params` is the tree that `layer.init(key)` makes; everything else is static.

    Args:
      layer: a `jaxnum.sequence.Layer`, `BidirectionalLayer` or `FeatureMap`.
      key: a typed key, for the parameters.

    Returns:
      A module. Of a layer, `module(x, *, segment_ids=None, cache=None)` gives (y, cache), and `module.step(x, cache)`
      takes one token more; of a bidirectional layer, `module(x, *, segment_ids=None)` gives y; of a feature map,
      `module(x)` gives features.

    Raises:
      TypeError: anything else.
      ImportError: equinox is missing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnum.interop import to_equinox
      >>> from jaxnum.sequence import gated_delta_net
      >>> module = to_equinox(gated_delta_net(16, heads=2), jax.random.key(0))
      >>> y, cache = module(jnp.ones((3, 10, 16)))
      >>> y.shape
      (3, 10, 16)
    """
    wanted = "be a jaxnum.sequence.Layer, BidirectionalLayer or FeatureMap"
    known = isinstance(layer, Layer | BidirectionalLayer | FeatureMap)
    checks.value("to_equinox", "layer", known, wanted, type(layer).__name__, error=TypeError)
    import equinox as eqx

    if isinstance(layer, FeatureMap):

        class EquinoxFeatureMap(eqx.Module):
            params: Any

            def __call__(self, x: jax.Array) -> jax.Array:
                return layer.apply(self.params, x)

        return EquinoxFeatureMap(layer.init(key))

    if isinstance(layer, BidirectionalLayer):

        class EquinoxBidirectionalLayer(eqx.Module):
            params: Any

            def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
                return layer.apply(self.params, x, segment_ids=segment_ids)

        return EquinoxBidirectionalLayer(layer.init(key))

    class EquinoxLayer(eqx.Module):
        params: Any

        def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None, cache: Any = None) -> Any:
            return layer.apply(self.params, x, segment_ids=segment_ids, cache=cache)

        def step(self, x: jax.Array, cache: Any) -> Any:
            return layer.step(self.params, x, cache)

    return EquinoxLayer(layer.init(key))
