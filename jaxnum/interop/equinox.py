"""Layers and feature maps of `jaxnum.sequence` as modules of equinox."""

from __future__ import annotations

from functools import cache
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
      A module. Of a layer, `module(x, *, segment_ids=None, cache=None)` gives (y, cache), with `prefix_mask` too where
      the layer takes one; `module.step(x, cache)` takes one token more, and `module.init_cache` makes the first cache.
      Of a bidirectional layer, `module(x, *, segment_ids=None)` gives y; of a feature map, `module(x)` gives features.

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
    recurrent, other = _modules()
    return (recurrent if isinstance(layer, Layer) else other)(layer, layer.init(key))


@cache
def _modules() -> tuple[Any, Any]:
    """The modules of layers with a cache and of those without; one of each, so that modules of a layer can map."""
    import equinox as eqx

    class EquinoxLayer(eqx.Module):
        layer: Layer = eqx.field(static=True)
        params: Any

        def __call__(
            self,
            x: jax.Array,
            *,
            segment_ids: jax.Array | None = None,
            cache: Any = None,
            prefix_mask: jax.Array | None = None,
        ) -> Any:
            more = {} if prefix_mask is None else {"prefix_mask": prefix_mask}
            return self.layer.apply(self.params, x, segment_ids=segment_ids, cache=cache, **more)

        def step(self, x: jax.Array, cache: Any) -> Any:
            return self.layer.step(self.params, x, cache)

        def init_cache(self, batch: int | tuple[int, ...] = (), dtype: Any = float) -> Any:
            return self.layer.init_cache(batch, dtype)

    class EquinoxMap(eqx.Module):
        layer: BidirectionalLayer | FeatureMap = eqx.field(static=True)
        params: Any

        def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
            more = {} if segment_ids is None else {"segment_ids": segment_ids}
            return self.layer.apply(self.params, x, **more)

    return EquinoxLayer, EquinoxMap
