"""The convolutional network of the deep conjugate direction method. Source: Kaneda et al. 2023, figure 2."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import checks

_FINE, _COARSE = 2, 3  # residual pairs on the grid, twice, and on the grid of half the size


class Convolution(NamedTuple):
    """Weights [3, .., 3, inputs, outputs] (or [1, .., 1, ..]) and bias [outputs]."""

    weights: jax.Array
    bias: jax.Array


class DCDMNetwork(NamedTuple):
    """The weights of `dcdm_network`; residual pairs are stacked along a leading axis, each of three layers."""

    first: Convolution
    down: tuple[Convolution, ...]
    coarse: Convolution
    up: tuple[Convolution, ...]
    last: Convolution


def dcdm_network(params: DCDMNetwork, r: jax.Array) -> jax.Array:
    """A direction for `dcdm` on a grid: a small U-net of convolutions that is linear at its ends.

    A linear convolution to `filters` channels; residual pairs a = relu(conv(x)), a + relu(conv(relu(conv(a)))) on the
    grid, on the grid averaged over 2^d cells and, with the sum of both, on the grid again; a pointwise linear map to one
    channel. Fully convolutional: weights trained on one grid serve another of any even sides.

    Args:
      params: what `init_dcdm_network` returns, for d = 2 or 3 dimensions.
      r: [n_1, .., n_d] floating point, every side even; residual of norm 1. It is scaled to entries of order 1.

    Returns:
      [n_1, .., n_d], dtype of r, computed in the dtype of params.

    Raises:
      ShapeError: another number of dimensions than the weights', or an odd side.

    Cost: about 350 filters^2 multiplications a cell in 2-D, three times that in 3-D.

    Source: Kaneda et al., "A deep conjugate direction method" (ICML 2023), figure 2, the network for 64^3.
    """
    dimensions = params.first.weights.ndim - 2
    remedy = "Pad the grid with cells in which the direction is set to zero."
    checks.shape("dcdm_network", r=(r, " ".join("xyz"[:dimensions])))
    even = all(side % 2 == 0 and side > 0 for side in r.shape)
    checks.value("dcdm_network", "r", even, "have even sides", r.shape, remedy, checks.ShapeError)
    x = (r * r.size**0.5).astype(params.first.weights.dtype)[None, ..., None]
    x = _convolve(params.first, x)
    skipped = []
    for layers in params.down:
        x = _pairs(layers, x)
        skipped.append(x)
        x = _halved(x)
    x = _pairs(params.coarse, x)
    for layers, fine in zip(params.up, reversed(skipped), strict=True):
        x = _pairs(layers, _doubled(x) + fine)
    return _convolve(params.last, x)[0, ..., 0].astype(r.dtype)


def init_dcdm_network(key: jax.Array, *, dimensions: int = 2, filters: int = 16, dtype: object = None) -> DCDMNetwork:
    """Random weights for `dcdm_network` (He's normal initialisation, biases zero).

    Args:
      key: typed PRNG key.
      dimensions: 2 or 3.
      filters: channels >= 1.
      dtype: floating dtype of the weights, default float32; training gains nothing from more.

    Returns:
      A `DCDMNetwork`.

    Raises:
      ValueError: dimensions or filters out of range.
    """
    checks.choice("init_dcdm_network", "dimensions", dimensions, (2, 3))
    checks.value("init_dcdm_network", "filters", filters >= 1, "be at least 1", filters)
    kind = jnp.dtype(jnp.float32 if dtype is None else dtype)
    keys = jax.random.split(key, 5)

    def convolution(key: jax.Array, side: int, inputs: int, outputs: int, pairs: int | None = None) -> Convolution:
        lead = () if pairs is None else (pairs, 3)
        shape = (*lead, *[side] * dimensions, inputs, outputs)
        scale = (2 / (side**dimensions * inputs)) ** 0.5
        return Convolution(scale * jax.random.normal(key, shape, kind), jnp.zeros((*lead, outputs), kind))

    return DCDMNetwork(
        first=convolution(keys[0], 3, 1, filters),
        down=convolution(keys[1], 3, filters, filters, _FINE),
        coarse=convolution(keys[2], 3, filters, filters, _COARSE),
        up=convolution(keys[3], 3, filters, filters, _FINE),
        last=convolution(keys[4], 1, filters, 1),
    )


def _convolve(layer: Convolution, x: jax.Array) -> jax.Array:
    grid = "xyz"[: x.ndim - 2]
    numbers = jax.lax.conv_dimension_numbers(x.shape, layer.weights.shape, (f"N{grid}C", f"{grid}IO", f"N{grid}C"))
    out = jax.lax.conv_general_dilated(x, layer.weights, (1,) * len(grid), "SAME", dimension_numbers=numbers)
    return out + layer.bias


def _pairs(layers: Convolution, x: jax.Array) -> jax.Array:
    for pair in range(layers.bias.shape[0]):
        for_one = [Convolution(layers.weights[pair, i], layers.bias[pair, i]) for i in range(3)]
        a = jax.nn.relu(_convolve(for_one[0], x))
        b = jax.nn.relu(_convolve(for_one[1], a))
        x = jax.nn.relu(_convolve(for_one[2], b)) + a
    return x


def _halved(x: jax.Array) -> jax.Array:
    """The mean over 2^d neighbours."""
    shape = [part for side in x.shape[1:-1] for part in (side // 2, 2)]
    return x.reshape(1, *shape, x.shape[-1]).mean(axis=tuple(range(2, 2 * (x.ndim - 2) + 1, 2)))


def _doubled(x: jax.Array) -> jax.Array:
    for axis in range(1, x.ndim - 1):
        x = jnp.repeat(x, 2, axis=axis)
    return x
