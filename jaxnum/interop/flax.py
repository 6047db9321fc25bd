"""Layers and feature maps of `jaxnum.sequence` as modules of flax.linen."""

from __future__ import annotations

from typing import Any

import jax

from jaxnum.sequence import BidirectionalLayer, FeatureMap, Layer
from kernels_pallas import checks


def to_flax(layer: Layer | BidirectionalLayer | FeatureMap) -> Any:
    """A `flax.linen.Module` with the parameters and the arithmetic of a layer or a feature map.

    The module holds one parameter, named "layer", with the tree that `layer.init` makes.

    Args:
      layer: a `jaxnum.sequence.Layer`, `BidirectionalLayer` or `FeatureMap`.

    Returns:
      An unbound module. Of a layer, `module(x, *, segment_ids=None, cache=None)` gives (y, cache), and its method
      `step` takes (x, cache) of one token; of a bidirectional layer, `module(x, *, segment_ids=None)` gives y; of a
      feature map, `module(x)` gives features.

    Raises:
      TypeError: anything else.
      ImportError: flax is missing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnum.interop import to_flax
      >>> from jaxnum.sequence import gated_delta_net
      >>> module = to_flax(gated_delta_net(16, heads=2))
      >>> x = jnp.ones((3, 10, 16))
      >>> variables = module.init(jax.random.key(0), x)
      >>> y, cache = module.apply(variables, x)
      >>> y.shape
      (3, 10, 16)
    """
    wanted = "be a jaxnum.sequence.Layer, BidirectionalLayer or FeatureMap"
    known = isinstance(layer, Layer | BidirectionalLayer | FeatureMap)
    checks.value("to_flax", "layer", known, wanted, type(layer).__name__, error=TypeError)
    import flax.linen as nn

    if isinstance(layer, FeatureMap):

        class FlaxFeatureMap(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return layer.apply(self.param("layer", layer.init), x)

        return FlaxFeatureMap()

    if isinstance(layer, BidirectionalLayer):

        class FlaxBidirectionalLayer(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
                return layer.apply(self.param("layer", layer.init), x, segment_ids=segment_ids)

        return FlaxBidirectionalLayer()

    class FlaxLayer(nn.Module):
        def setup(self) -> None:
            self.layer = self.param("layer", layer.init)

        def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None, cache: Any = None) -> Any:
            return layer.apply(self.layer, x, segment_ids=segment_ids, cache=cache)

        def step(self, x: jax.Array, cache: Any) -> Any:
            return layer.step(self.layer, x, cache)

    return FlaxLayer()
