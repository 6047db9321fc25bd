"""The feature map 1 + elu: positive, nothing to learn."""

from __future__ import annotations

import jax

from jaxnum.sequence import feature_map, layer


def elu1(dim: int) -> feature_map.FeatureMap:
    """The feature map 1 + elu(x): 1 + x where x > 0, exp(x) elsewhere.

    The cheapest positive map. Its weights are flatter than those of softmax; `hedgehog` learns sharper ones.

    Args:
      dim: of a head.

    Returns:
      A `FeatureMap` of width `dim` without parameters.

    Raises:
      ValueError: dim is no positive int; ShapeError, DtypeError: what it is applied to does not fit.

    Source: A. Katharopoulos et al., "Transformers are RNNs", 2020, arXiv 2006.16236, equation 7.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> phi = elu1(2)
      >>> phi.apply(phi.init(jax.random.key(0)), jnp.array([[3.0, 0.0]])).tolist()
      [[4.0, 1.0]]
    """
    layer.check_sizes("elu1", {"dim": dim})

    def apply(params: feature_map.PyTree, x: jax.Array) -> jax.Array:
        wide = feature_map.enter("elu1", x, None, dim)
        return (1 + jax.nn.elu(wide)).astype(x.dtype)

    return feature_map.FeatureMap(lambda key: {}, apply, dim)
