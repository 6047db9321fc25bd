"""The convolutional network of the deep conjugate direction method. Source: Kaneda et al. 2023, figure 2."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import checks


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
    """A direction for `dcdm` on a grid: the paper's small U-net, linear at its ends.

    A convolution to `filters` channels; on each level residual pairs a = relu(conv(x)), a + relu(conv(relu(conv(a))))
    and the mean over 2^d cells; pairs on the coarsest grid; on the way back pairs on the sum of the coarse result and
    of what the level had; a pointwise map to one channel. Fully convolutional: weights of one grid serve others.

    Args:
      params: what `init_dcdm_network` returns, for d = 2 or 3 dimensions.
      r: [n_1, .., n_d] floating point, sides divisible by 2^(levels - 1); residual of norm 1. It is scaled to entries
        of order 1.

    Returns:
      [n_1, .., n_d], dtype of r, computed in the dtype of params.

    Raises:
      ShapeError: another number of dimensions than the weights', or sides that cannot be halved as often.

    Cost: 9 pairs filters^2 multiplications a cell and pair in 2-D, three times that in 3-D.

    Source: Kaneda et al., "A deep conjugate direction method" (ICML 2023), figure 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnum.solvers import dcdm_network, init_dcdm_network
      >>> params = init_dcdm_network(jax.random.key(0), filters=4)
      >>> dcdm_network(params, jnp.ones((8, 8)) / 8).shape
      (8, 8)
    """
    return _network("dcdm_network", params, r, jax.nn.relu)


def linear_dcdm_network(params: DCDMNetwork, r: jax.Array) -> jax.Array:
    """The network of `dcdm_network` without its nonlinearities and biases: a learned multigrid cycle.

    The inverse it is to imitate is linear. With four or five levels it needs far fewer steps than the paper's network
    after the same training, and as few for right-hand sides and grids it has not seen.

    Args:
      params: what `init_dcdm_network` returns; the biases are not used.
      r: as for `dcdm_network`.

    Returns:
      [n_1, .., n_d], dtype of r, linear in r.

    Raises:
      ShapeError: as `dcdm_network`.

    Cost: as `dcdm_network`.

    Source: ours, after Kaneda et al. (ICML 2023).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnum.solvers import init_dcdm_network, linear_dcdm_network
      >>> params = init_dcdm_network(jax.random.key(0), filters=4)
      >>> float(jnp.max(jnp.abs(linear_dcdm_network(params, jnp.zeros((8, 8))))))
      0.0
    """
    return _network("linear_dcdm_network", params, r, None)


def init_dcdm_network(
    key: jax.Array,
    *,
    dimensions: int = 2,
    filters: int = 16,
    levels: int = 2,
    pairs: int = 2,
    coarse_pairs: int = 3,
    dtype: Any = None,
) -> DCDMNetwork:
    """Random weights for `dcdm_network` or `linear_dcdm_network` (He's normal initialisation, biases zero).

    The defaults are the paper's for 64^3. Residual pairs see 3 cells a level farther each; for the solution of an
    elliptic problem to see the whole grid, levels of about log2(n) - 1 are cheaper than pairs.

    Args:
      key: typed PRNG key.
      dimensions: 2 or 3.
      filters: channels >= 1.
      levels: grids, each of half the size, >= 1.
      pairs: residual pairs on each grid but the coarsest, twice, >= 1.
      coarse_pairs: residual pairs on the coarsest grid, >= 1.
      dtype: floating dtype of the weights, default float32; training gains nothing from more.

    Returns:
      A `DCDMNetwork`.

    Raises:
      ValueError: an argument out of its range.

    Source: Kaneda et al. (ICML 2023), figure 2; He, Zhang, Ren & Sun (2015) for the initialisation.

    Example:
      >>> import jax
      >>> from jaxnum.solvers import init_dcdm_network
      >>> params = init_dcdm_network(jax.random.key(0), filters=4, levels=3)
      >>> len(params.down), params.coarse.weights.shape
      (2, (3, 3, 3, 3, 4, 4))
    """
    checks.choice("init_dcdm_network", "dimensions", dimensions, (2, 3))
    sizes = {"filters": filters, "levels": levels, "pairs": pairs, "coarse_pairs": coarse_pairs}
    for name, given in sizes.items():
        checks.value("init_dcdm_network", name, isinstance(given, int) and given >= 1, "be a Python int >= 1", given)
    kind = jnp.dtype(jnp.float32 if dtype is None else dtype)
    return _draw(key, dimensions, filters, levels, pairs, coarse_pairs, kind)


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _draw(
    key: jax.Array, dimensions: int, filters: int, levels: int, pairs: int, coarse_pairs: int, kind: Any
) -> DCDMNetwork:
    def shape(side: int, inputs: int, outputs: int, count: int | None = None) -> tuple[int, ...]:
        return (*(() if count is None else (count, 3)), *[side] * dimensions, inputs, outputs)

    level = shape(3, filters, filters, pairs)
    shapes = [shape(3, 1, filters), shape(3, filters, filters, coarse_pairs), shape(1, filters, 1)]
    shapes += [level] * (2 * (levels - 1))
    # One draw for all: each of its own would be a program to compile.
    noise = jnp.split(jax.random.normal(key, (sum(map(math.prod, shapes)),), kind), _offsets(shapes))

    def convolution(part: jax.Array, shape: tuple[int, ...]) -> Convolution:
        scale = (2 / math.prod(shape[-2 - dimensions : -1])) ** 0.5
        return Convolution(scale * part.reshape(shape), jnp.zeros((*shape[: -2 - dimensions], shape[-1]), kind))

    first, coarse, last, *rest = map(convolution, noise, shapes)
    return DCDMNetwork(first, tuple(rest[: levels - 1]), coarse, tuple(rest[levels - 1 :]), last)


def _offsets(shapes: list[tuple[int, ...]]) -> list[int]:
    return list(itertools.accumulate(map(math.prod, shapes)))[:-1]


def _network(function: str, params: DCDMNetwork, r: jax.Array, activation: Callable | None) -> jax.Array:
    dimensions = params.first.weights.ndim - 2
    divisor = 2 ** len(params.down)
    checks.shape(function, r=(r, " ".join("xyz"[:dimensions])))
    fits = all(side > 0 and side % divisor == 0 for side in r.shape)
    remedy = "Pad the grid with cells in which the direction is set to zero, or use fewer levels."
    wanted = f"have sides divisible by {divisor}"
    checks.value(function, "r", fits, wanted, r.shape, remedy, checks.ShapeError)

    def convolve(layer: Convolution, x: jax.Array, *, ends: bool = False) -> jax.Array:
        out = _convolve(layer.weights, x)
        if activation is None:
            # The weights are drawn for relu, which halves the power; without it the signal would double at every layer.
            return out * 0.5**0.5
        return out + layer.bias if ends else activation(out + layer.bias)

    def residual_pairs(layers: Convolution, x: jax.Array) -> jax.Array:
        for pair in range(layers.bias.shape[0]):
            first, second, third = (Convolution(layers.weights[pair, i], layers.bias[pair, i]) for i in range(3))
            a = convolve(first, x)
            x = convolve(third, convolve(second, a)) + a
        return x

    x = (r * r.size**0.5).astype(params.first.weights.dtype)[None, ..., None]
    x = convolve(params.first, x, ends=True)
    skipped = []
    for layers in params.down:
        x = residual_pairs(layers, x)
        skipped.append(x)
        x = _halved(x)
    x = residual_pairs(params.coarse, x)
    for layers, fine in zip(params.up, reversed(skipped), strict=True):
        x = residual_pairs(layers, _doubled(x) + fine)
    return convolve(params.last, x, ends=True)[0, ..., 0].astype(r.dtype)


def _convolve(weights: jax.Array, x: jax.Array) -> jax.Array:
    grid = "xyz"[: x.ndim - 2]
    numbers = jax.lax.conv_dimension_numbers(x.shape, weights.shape, (f"N{grid}C", f"{grid}IO", f"N{grid}C"))
    return jax.lax.conv_general_dilated(x, weights, (1,) * len(grid), "SAME", dimension_numbers=numbers)


def _halved(x: jax.Array) -> jax.Array:
    """The mean over 2^d neighbours."""
    shape = [part for side in x.shape[1:-1] for part in (side // 2, 2)]
    return x.reshape(1, *shape, x.shape[-1]).mean(axis=tuple(range(2, 2 * (x.ndim - 2) + 1, 2)))


def _doubled(x: jax.Array) -> jax.Array:
    for axis in range(1, x.ndim - 1):
        x = jnp.repeat(x, 2, axis=axis)
    return x
