"""The feature map of "Finetuning pretrained transformers into RNNs": a learned linear map and a relu."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnum.sequence import feature_map, layer


def t2r(heads: int, dim: int, *, features: int | None = None) -> feature_map.FeatureMap:
    """The feature map relu(W x + b), W and b learned a head.

    Args:
      heads: of the attention.
      dim: of a head.
      features: width of the map; default `dim`.

    Returns:
      A `FeatureMap` with parameters {"weight": [heads, dim, features], "bias": [heads, features]}.

    Raises:
      ValueError: a size is no positive int; ShapeError, DtypeError: what it is applied to does not fit.

    Numerics: all features of a token may be 0, and then it has no weights: the denominator of linear attention is 0.

    Source: J. Kasai et al., "Finetuning pretrained transformers into RNNs", 2021, arXiv 2103.13076, equation 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> phi = t2r(1, 2, features=6)
      >>> phi.apply(phi.init(jax.random.key(0)), jnp.ones((5, 1, 2))).shape, phi.width
      ((5, 1, 6), 6)
    """
    width = dim if features is None else features
    layer.check_sizes("t2r", {"heads": heads, "dim": dim, "features": width})

    def init(key: jax.Array) -> feature_map.PyTree:
        weight = jax.random.normal(key, (heads, dim, width)) * dim**-0.5
        return {"weight": weight, "bias": jnp.zeros((heads, width))}

    def apply(params: feature_map.PyTree, x: jax.Array) -> jax.Array:
        wide = feature_map.enter("t2r", x, heads, dim)
        return jax.nn.relu(feature_map.project(params, wide)).astype(x.dtype)

    return feature_map.FeatureMap(init, apply, width)
