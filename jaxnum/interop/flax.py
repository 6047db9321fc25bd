"""Layers and feature maps of `jaxnum.sequence` as modules of flax.linen."""

from __future__ import annotations

from functools import cache
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
      An unbound module. Of a layer, `module(x, *, segment_ids=None, cache=None)` gives (y, cache), with `prefix_mask`
      too where the layer takes one; its method `step` takes (x, cache) of one token, and `module.init_cache` makes the
      first cache. Of a bidirectional layer, `module(x, *, segment_ids=None)` gives y; of a feature map, `module(x)`
      gives features.

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
    recurrent, other = _modules()
    return recurrent(layer) if isinstance(layer, Layer) else other(layer)


@cache
def _modules() -> tuple[Any, Any]:
    """The modules of layers with a cache and of those without; one of each, so that equal ones are equal."""
    import flax.linen as nn

    class FlaxLayer(nn.Module):
        of: Layer

        def setup(self) -> None:
            self.layer = self.param("layer", self.of.init)

        def __call__(
            self,
            x: jax.Array,
            *,
            segment_ids: jax.Array | None = None,
            cache: Any = None,
            prefix_mask: jax.Array | None = None,
        ) -> Any:
            more = {} if prefix_mask is None else {"prefix_mask": prefix_mask}
            return self.of.apply(self.layer, x, segment_ids=segment_ids, cache=cache, **more)

        def step(self, x: jax.Array, cache: Any) -> Any:
            return self.of.step(self.layer, x, cache)

        @nn.nowrap
        def init_cache(self, batch: int | tuple[int, ...] = (), dtype: Any = float) -> Any:
            return self.of.init_cache(batch, dtype)

    class FlaxMap(nn.Module):
        of: BidirectionalLayer | FeatureMap

        @nn.compact
        def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
            more = {} if segment_ids is None else {"segment_ids": segment_ids}
            return self.of.apply(self.param("layer", self.of.init), x, **more)

    return FlaxLayer, FlaxMap
