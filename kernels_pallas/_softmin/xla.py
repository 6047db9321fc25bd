"""Softmin in blocks of rows: what CPUs run, and the backward pass everywhere.

A block of rows of the matrix is as large as a CPU's cache, whatever the number of columns. Costs are sums of
differences, unrolled over the few coordinates of a point: XLA makes one vectorised loop of each pass over a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas._softmin.config import Config, Operands

# Bytes of a block: with more than about this, passes over a block wait for memory.
_BLOCK = 4 << 20
_FEWEST, _MOST = 8, 64
# Up to so many coordinates are written out; beyond, the graph would grow with them.
_UNROLLED = 32


def forward(config: Config, operands: Operands) -> tuple[jax.Array]:
    """The log-sum-exps [B, n], in the dtype of v."""
    return (_over_batch(lambda one: _forward(config, one), operands),)


def backward(config: Config, operands: Operands, lse: jax.Array, cotangent: jax.Array) -> Operands:
    """Cotangents of the operands; blocks are computed again.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      lse: [B, n], as the forward pass gave it.
      cotangent: like lse; what it holds where nothing has mass, NaN included, does not matter.
    """
    return _over_batch(lambda one: _backward(config, *one), (operands, lse, cotangent))


def _over_batch(run: Callable, arrays: Any) -> Any:
    if jax.tree.leaves(arrays)[0].shape[0] == 1:
        return jax.tree.map(lambda out: out[None], run(jax.tree.map(lambda x: x[0], arrays)))
    return jax.lax.map(run, arrays)


def _forward(config: Config, operands: Operands) -> jax.Array:
    x, y, v, epsilon = operands

    def block(x: jax.Array) -> jax.Array:
        exponents = v - _cost(config.kind, x, y, v.dtype) / epsilon
        top = jnp.max(exponents, axis=1)
        top = jnp.where(jnp.isfinite(top), top, 0)
        return jnp.log(jnp.sum(jnp.exp(exponents - top[:, None]), axis=1)) + top

    return jax.lax.map(block, _blocks(x, v)).reshape(-1)[: x.shape[0]]


def _backward(config: Config, operands: Operands, lse: jax.Array, cotangent: jax.Array) -> Operands:
    x, y, v, epsilon = operands
    empty = lse == -jnp.inf
    lse, cotangent = jnp.where(empty, 0, lse), jnp.where(empty, 0, cotangent)

    @jax.checkpoint
    def block(sums: tuple, rows: tuple) -> tuple:
        x, lse, cotangent = rows
        cost = _cost(config.kind, x, y, v.dtype)
        weights = cotangent[:, None] * jnp.exp(v - cost / epsilon - lse[:, None])
        dx, dy = _pulled(config.kind, x, y, cost, weights)
        dy, dv, depsilon = (
            a + b for a, b in zip(sums, (dy, jnp.sum(weights, 0), jnp.sum(weights * cost)), strict=True)
        )
        return (dy, dv, depsilon), dx

    rows = tuple(_blocks(a, v) for a in (x, lse, cotangent))
    # A loop's carry must keep its type, with it the axes of a mesh that inputs are divided over.
    zero = jnp.zeros_like(cotangent, shape=()) + 0 * jnp.sum(cotangent)
    sums = (jnp.zeros(y.shape, v.dtype) + zero, jnp.zeros_like(v) + zero, zero)
    (dy, dv, depsilon), dx = jax.lax.scan(block, sums, rows)
    dx = dx.reshape(-1, x.shape[1])[: x.shape[0]]
    return Operands(
        (-dx / epsilon).astype(x.dtype), (-dy / epsilon).astype(y.dtype), dv, depsilon / (epsilon * epsilon)
    )


def _blocks(a: jax.Array, v: jax.Array) -> jax.Array:
    """[n, ...] as [blocks, rows, ...], with zeros behind the end."""
    n, m = a.shape[0], v.shape[0]
    rows = min(max(_FEWEST, min(_MOST, _BLOCK // (m * v.dtype.itemsize))), n)
    count = -(-n // rows)
    a = jnp.pad(a, [(0, count * rows - n)] + [(0, 0)] * (a.ndim - 1))
    return a.reshape(count, rows, *a.shape[1:])


def _cost(kind: str, x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    """Costs [k, m] of a block of rows."""
    x, y = x.astype(dtype), y.astype(dtype)

    def term(x: jax.Array, y: jax.Array) -> jax.Array:
        difference = x[:, None] - y
        # jnp.abs has derivative 1 at 0, this has 0: the backward pass is differentiated.
        return difference * (jnp.sign(difference) if kind == "cityblock" else difference)

    d = x.shape[1]
    if d <= _UNROLLED:
        total = sum((term(x[:, k], y[:, k]) for k in range(d)), jnp.zeros((x.shape[0], y.shape[0]), dtype))
    else:
        terms = lambda total, pair: (total + term(*pair), None)  # noqa: E731
        start = term(x[:, 0], y[:, 0])
        total = jax.lax.scan(terms, start, (x[:, 1:].T, y[:, 1:].T))[0]
    if kind != "euclidean":
        return total
    apart = total > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, total, 1)), 0)


def _pulled(kind: str, x: jax.Array, y: jax.Array, cost: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cotangents of x and y by weights of the costs, each of the other sign in the other cloud."""
    dtype = cost.dtype
    if kind == "euclidean":
        apart = cost > 0
        weights = jnp.where(apart, weights / jnp.where(apart, cost, 1), 0)

    def along(pair: tuple) -> tuple[jax.Array, jax.Array]:
        difference = pair[0].astype(dtype)[:, None] - pair[1].astype(dtype)
        each = {"cityblock": jnp.sign(difference), "sqeuclidean": 2 * difference}.get(kind, difference) * weights
        return jnp.sum(each, axis=1), -jnp.sum(each, axis=0)

    if x.shape[1] <= _UNROLLED:
        found = [along((x[:, k], y[:, k])) for k in range(x.shape[1])]
        dx, dy = (jnp.stack(parts, axis=-1) for parts in zip(*found, strict=True))
        return dx, dy
    dx, dy = jax.lax.map(along, (x.T, y.T))
    return dx.T, dy.T
