"""The feature map whose products are the second-order Taylor polynomial of exp."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.sequence import feature_map, layer


def taylor2(dim: int) -> feature_map.FeatureMap:
    """The feature map with phi(q) . phi(k) = 1 + u + u^2 / 2, u = q . k / sqrt(dim): softmax near 0.

    phi(x) = [1, y, y_i^2 / sqrt 2, y_i y_j for i < j] with y = x / dim^(1/4): the upper triangle of y yᵀ, so that
    nothing is stored twice.

    Args:
      dim: of a head, small: queries and keys of 16 have 153 features.

    Returns:
      A `FeatureMap` of width 1 + dim + dim (dim + 1) / 2 without parameters.

    Raises:
      ValueError: dim is no positive int; ShapeError, DtypeError: what it is applied to does not fit.

    Numerics: positive, but it stops growing like exp beyond |u| of 1 or so. phi(0) is not 0: hide padding after the
      map, as `segment_ids` do.

    Source: S. Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff", 2024,
      arXiv 2402.18668.

    Example:
      >>> import jax.numpy as jnp
      >>> phi, x = taylor2(4), jnp.array([[2.0, 0.0, 0.0, 0.0]])
      >>> phi.width, round(float(jnp.sum(phi.apply({}, x) ** 2)), 3)  # u = 2
      (15, 5.0)
    """
    layer.check_sizes("taylor2", {"dim": dim})
    rows, columns = (i.astype(np.int32) for i in np.triu_indices(dim))
    scale = np.where(rows == columns, math.sqrt(0.5), 1.0)

    def apply(params: feature_map.PyTree, x: jax.Array) -> jax.Array:
        wide = feature_map.enter("taylor2", x, None, dim) * dim**-0.25
        products = wide[..., rows] * wide[..., columns] * scale.astype(wide.dtype)
        return jnp.concatenate([jnp.ones_like(wide[..., :1]), wide, products], -1).astype(x.dtype)

    return feature_map.FeatureMap(lambda key: {}, apply, 1 + dim + rows.size)
