"""Costs of moving mass: a matrix, or two point clouds whose matrix is never formed.

Potentials enter as log scalings, v = g / epsilon, so that a point without mass is -inf there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core import precision, trees
from kernels_pallas import checks, softmin

__all__ = ["Cost", "DenseCost", "PointCloudCost", "as_cost"]

_KINDS = ("sqeuclidean", "euclidean", "cityblock")


def as_cost(cost: Any) -> Any:
    """An array as a DenseCost; costs, and the placeholders of tree code, pass."""
    return DenseCost(cost) if isinstance(cost, (jax.Array, np.ndarray)) else cost


class Cost:
    """What a cost C [n, m] can do; a registered dataclass inherits it.

    Subclasses give `shape`, `dtype`, `T`, `matrix()`, `largest()`, `check()` and `over_rows`; the rest follows.
    """

    shape: tuple[int, int]
    dtype: Any

    @property
    def T(self) -> Cost:
        """The transposed cost [m, n]."""
        raise NotImplementedError

    def matrix(self) -> jax.Array:
        """C as an array [n, m]; this does form it."""
        raise NotImplementedError

    def largest(self) -> jax.Array:
        """An upper bound of C, scalar: where epsilon scaling starts."""
        raise NotImplementedError

    def check(self, function: str) -> None:
        """Raise the house errors if the cost's arrays do not fit together."""
        raise NotImplementedError

    def over_rows(self, reduce: Callable, *rows: jax.Array) -> jax.Array:
        """`reduce(C, *rows)` over blocks of rows; C [k, m] and rows [k, ...] give [k, ...], joined to [n, ...]."""
        raise NotImplementedError

    def lse_rows(self, v: jax.Array, epsilon: jax.Array) -> jax.Array:
        """log sum_j exp(v_j - C_ij / epsilon) [n], for v [m] that may hold -inf."""
        return self.over_rows(lambda C: _logsumexp(v - C.astype(v.dtype) / epsilon))

    def lse_cols(self, u: jax.Array, epsilon: jax.Array) -> jax.Array:
        """log sum_i exp(u_i - C_ij / epsilon) [m], for u [n] that may hold -inf."""
        return self.T.lse_rows(u, epsilon)

    def apply(self, u: jax.Array, v: jax.Array, epsilon: jax.Array, w: jax.Array) -> jax.Array:
        """sum_j P_ij w_j with P_ij = exp(u_i + v_j - C_ij / epsilon), for w [m] or [m, k]."""

        def block(C: jax.Array, u: jax.Array) -> jax.Array:
            P = jnp.exp(u[:, None] + v - C.astype(v.dtype) / epsilon)
            return jnp.matmul(P, w, precision=jax.lax.Precision.HIGHEST)

        return self.over_rows(block, u)

    def total(self, u: jax.Array, v: jax.Array, epsilon: jax.Array) -> jax.Array:
        """sum_ij P_ij C_ij, scalar."""

        def block(C: jax.Array, u: jax.Array) -> jax.Array:
            C = C.astype(v.dtype)
            return jnp.sum(jnp.exp(u[:, None] + v - C / epsilon) * C, axis=1)

        return jnp.sum(self.over_rows(block, u))

    def at(self, columns: jax.Array) -> jax.Array:
        """C_ij for the j in row i of columns, int [n, k]; [n, k]."""
        return self.over_rows(lambda C, columns: jnp.take_along_axis(C, columns, axis=1), columns)


def _logsumexp(M: jax.Array, axis: int = -1) -> jax.Array:
    """Over one axis; NaN where no entry is finite.

    jax.nn's handles signs and weights too, which would double the graph of a solve.
    """
    top = jax.lax.stop_gradient(jnp.max(M, axis=axis, keepdims=True))
    return jnp.log(jnp.sum(jnp.exp(M - top), axis=axis)) + jnp.squeeze(top, axis)


@partial(jax.tree_util.register_dataclass, data_fields=["C"], meta_fields=[])
@dataclass(frozen=True)
class DenseCost(Cost):
    """A cost given as its matrix.

    Attributes:
      C: array [n, m], floating point. Finite where derivatives are wanted; +inf forbids a pair.
    """

    C: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return jnp.shape(self.C)  # pyright: ignore[reportReturnType]  # `check` refuses other ranks

    @property
    def dtype(self) -> Any:
        """Dtype of C."""
        return jnp.result_type(self.C)

    @property
    def T(self) -> DenseCost:
        """The transposed matrix."""
        return DenseCost(self.C.T)

    def matrix(self) -> jax.Array:
        """C."""
        return self.C

    def largest(self) -> jax.Array:
        """The largest finite entry."""
        return jnp.max(jnp.where(jnp.isfinite(self.C), self.C, 0))

    def check(self, function: str) -> None:
        """C must be a floating-point matrix."""
        checks.shape(function, cost=(self.C, "n m"))
        checks.dtype(function, "floating", cost=self.C)

    def lse_cols(self, u: jax.Array, epsilon: jax.Array) -> jax.Array:
        """As of every cost, but C stays as it lies: a transposed copy would be made on every call."""
        return _logsumexp(u[:, None] - self.C.astype(u.dtype) / epsilon, axis=0)

    def over_rows(self, reduce: Callable, *rows: jax.Array) -> jax.Array:
        """All rows are one block."""
        return reduce(self.C, *rows)


@partial(jax.tree_util.register_dataclass, data_fields=["x", "y"], meta_fields=["kind", "block"])
@dataclass(frozen=True)
class PointCloudCost(Cost):
    """The cost between two point clouds, recomputed block by block: memory O(block m), never O(n m).

    Attributes:
      x: points [n, d], floating point.
      y: points [m, d], of the same dtype.
      kind: "sqeuclidean" (sum of squares), "euclidean" or "cityblock" (sum of absolute values).
      block: rows computed at once, Python int >= 1, in derivatives, `apply` and `total`; log-sum-exps come from
        `kernels_pallas.softmin`, which has blocks of its own. Small ones stay in a CPU's cache; accelerators like 1024.

    Derivatives: any order in linear memory; blocks are recomputed in the backward pass. Where points coincide, the
      euclidean and cityblock costs have derivative zero.

    Numerics: distances come from differences, not from |x|^2 + |y|^2 - 2 x.y, which loses the small ones.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> cost = jaxnum.PointCloudCost(jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [3.0]]))
      >>> cost.matrix().tolist()
      [[0.0, 9.0], [1.0, 4.0]]
    """

    x: Any
    y: Any
    kind: str = "sqeuclidean"
    block: int = 64

    def __post_init__(self) -> None:
        checks.choice("PointCloudCost", "kind", self.kind, _KINDS)
        ok = isinstance(self.block, int) and not isinstance(self.block, bool) and self.block >= 1
        checks.value("PointCloudCost", "block", ok, "be a Python int >= 1", self.block)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return jnp.shape(self.x)[0], jnp.shape(self.y)[0]

    @property
    def dtype(self) -> Any:
        """Dtype of x."""
        return jnp.result_type(self.x)

    @property
    def T(self) -> PointCloudCost:
        """The clouds exchanged; every kind is symmetric."""
        return PointCloudCost(self.y, self.x, self.kind, self.block)

    def matrix(self) -> jax.Array:
        """C [n, m]; for inspection and small problems."""
        return _distances(self.kind, self.x, self.y)

    def largest(self) -> jax.Array:
        """The cost across the box that holds both clouds."""
        low = jnp.minimum(jnp.min(self.x, axis=0), jnp.min(self.y, axis=0))
        high = jnp.maximum(jnp.max(self.x, axis=0), jnp.max(self.y, axis=0))
        return _distances(self.kind, low[None], high[None])[0, 0]

    def check(self, function: str) -> None:
        """The clouds must be matrices of one dtype and one dimension."""
        remedy = "A cloud has one point a row."
        checks.shape(function, remedy=remedy, **{"cost.x": (self.x, "n d"), "cost.y": (self.y, "m d")})
        checks.dtype(function, "floating", **{"cost.x": self.x, "cost.y": self.y})
        checks.same_dtype(function, **{"cost.x": self.x, "cost.y": self.y})

    def lse_rows(self, v: jax.Array, epsilon: jax.Array) -> jax.Array:
        """As of every cost, by the kernel; explicitly sharded clouds, which it does not take, by blocks of rows."""
        if trees.explicitly_sharded((self.x, self.y, v)):
            return super().lse_rows(v, epsilon)
        return _online((self.kind, self.block), self.x, self.y, v, jnp.asarray(epsilon, v.dtype))

    def at(self, columns: jax.Array) -> jax.Array:
        """As of every cost, but only these distances are computed."""

        def row(x: jax.Array, columns: jax.Array) -> jax.Array:
            return _distances(self.kind, x[None], self.y[columns])[0]

        return jax.vmap(row)(self.x, columns)

    def over_rows(self, reduce: Callable, *rows: jax.Array) -> jax.Array:
        """Blocks one after the other; each is recomputed when derivatives need it."""
        n = self.shape[0]
        block = min(self.block, n)
        count = -(-n // block)

        def padded(leaf: jax.Array) -> jax.Array:
            return jnp.pad(leaf, [(0, count * block - n)] + [(0, 0)] * (leaf.ndim - 1))

        @jax.checkpoint
        def body(members: tuple) -> jax.Array:
            return reduce(_distances(self.kind, members[0], self.y), *members[1:])

        def fill(i: jax.Array, out: jax.Array) -> jax.Array:
            def at(leaf: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(leaf, i * block, block, allow_negative_indices=False)

            part = body(jax.tree.map(at, members))
            return jax.lax.dynamic_update_slice_in_dim(out, part, i * block, 0, allow_negative_indices=False)

        members = jax.tree.map(padded, (self.x, *rows))
        part = jax.eval_shape(body, jax.tree.map(lambda leaf: leaf[:block], members))
        out = jax.lax.fori_loop(0, count, fill, jnp.zeros((count * block, *part.shape[1:]), part.dtype))
        return out[:n]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _online(static: tuple, x: jax.Array, y: jax.Array, v: jax.Array, epsilon: jax.Array) -> jax.Array:
    return softmin(x, y, v, epsilon, kind=static[0]).astype(v.dtype)


@_online.defjvp
def _online_jvp(static: tuple, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """By blocks of rows: implicit derivatives need forward mode, which the kernel does not have."""

    def blocks(x: jax.Array, y: jax.Array, v: jax.Array, epsilon: jax.Array) -> jax.Array:
        return Cost.lse_rows(PointCloudCost(x, y, *static), v, epsilon)

    return _online(static, *primals), jax.jvp(blocks, primals, tangents)[1]


def _distances(kind: str, x: jax.Array, y: jax.Array) -> jax.Array:
    acc = precision.accumulator(x.dtype)
    difference = x[:, None, :].astype(acc) - y[None, :, :].astype(acc)
    if kind == "cityblock":
        # Not jnp.abs, whose derivative at 0 is 1.
        return jnp.sum(difference * jnp.sign(difference), axis=-1)
    squares = jnp.sum(difference * difference, axis=-1)
    if kind == "sqeuclidean":
        return squares
    apart = squares > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1)), 0)
