"""Three ways to multiply with a transport plan: the whole array, its largest entries, or block by block from the cost.

A plan P [n, m] here has `apply(w)` = P w, `apply_transpose(z)` = P^T z and `squares(z)` = (P * P)^T z.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.transport import Transport

# What a selection misses is shared out among the entries it holds by so many sweeps over them.
_SWEEPS = 3


class Whole(NamedTuple):
    """Every entry, stored.

    Attributes:
      P: [n, m].
    """

    P: jax.Array

    def apply(self, w: jax.Array) -> jax.Array:
        """P w [n]."""
        return jnp.matmul(self.P, w, precision=jax.lax.Precision.HIGHEST)

    def apply_transpose(self, z: jax.Array) -> jax.Array:
        """P^T z [m]."""
        return jnp.matmul(z, self.P, precision=jax.lax.Precision.HIGHEST)

    def squares(self, z: jax.Array) -> jax.Array:
        """(P * P)^T z [m]."""
        return jnp.matmul(z, self.P * self.P, precision=jax.lax.Precision.HIGHEST)


class Recomputed(NamedTuple):
    """Every entry, computed from the cost whenever it is needed: as slow as a sweep, and nothing is stored.

    Attributes:
      cost: the cost, [n, m].
      u: log scalings of the rows [n].
      v: of the columns [m].
      epsilon: real scalar.
    """

    cost: Any
    u: jax.Array
    v: jax.Array
    epsilon: jax.Array

    def apply(self, w: jax.Array) -> jax.Array:
        """P w [n]."""
        return self.cost.apply(self.u, self.v, self.epsilon, w)

    def apply_transpose(self, z: jax.Array) -> jax.Array:
        """P^T z [m]."""
        return self.cost.T.apply(self.v, self.u, self.epsilon, z)

    def squares(self, z: jax.Array) -> jax.Array:
        """(P * P)^T z [m]."""
        return self.cost.T.apply(2 * self.v, 2 * self.u, self.epsilon / 2, z)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "columns"], meta_fields=["width"])
@dataclass(frozen=True)
class Kept:
    """As many entries of each row.

    Attributes:
      values: [n, k].
      columns: where they stand, int32 [n, k], no column twice in a row.
      width: m, static.
    """

    values: jax.Array
    columns: jax.Array
    width: int

    def apply(self, w: jax.Array) -> jax.Array:
        """P w [n]."""
        return jnp.sum(self.values * w.at[self.columns].get(mode="promise_in_bounds"), axis=1)

    def apply_transpose(self, z: jax.Array) -> jax.Array:
        """P^T z [m]."""
        return self._added(self.values * z[:, None])

    def squares(self, z: jax.Array) -> jax.Array:
        """(P * P)^T z [m]."""
        return self._added(self.values * self.values * z[:, None])

    def balanced(self, rows: jax.Array, cols: jax.Array) -> tuple[Kept, jax.Array]:
        """The same entries scaled to sum to `rows`, nearly, and to `cols` where a column has any; the row sums then.

        A plan without its small entries has smaller marginals. Newton's matrix of such a plan with the diagonal of the
        whole one is off by the missing mass in every direction, and the directions in which the dual is nearly flat
        converge no faster than that allows. With marginals restored it is off by a small factor in each of them.
        """
        plan, ones = self, jnp.ones_like(cols)
        for _ in range(_SWEEPS):
            plan = plan._scaled(_ratio(rows, plan.apply(ones))[:, None])
            factor = _ratio(cols, plan.apply_transpose(jnp.ones_like(rows)))
            plan = plan._scaled(factor.at[self.columns].get(mode="promise_in_bounds"))
        return plan, plan.apply(ones)

    def _scaled(self, factors: jax.Array) -> Kept:
        return Kept(self.values * factors, self.columns, self.width)

    def _added(self, entries: jax.Array) -> jax.Array:
        sums = jnp.zeros(self.width, entries.dtype)
        return sums.at[self.columns].add(entries, mode="promise_in_bounds")


def _ratio(wanted: jax.Array, got: jax.Array) -> jax.Array:
    """Zero where there is nothing to scale."""
    return jnp.where(got > 0, wanted / jnp.where(got > 0, got, 1), 0)


def kept(u: jax.Array, v: jax.Array, columns: jax.Array, problem: Transport) -> Kept:
    """The entries of the plan with log scalings u and v that stand at `columns` [n, k]."""
    C = problem.cost.at(columns).astype(v.dtype)
    values = jnp.exp(u[:, None] + v.at[columns].get(mode="promise_in_bounds") - C / problem.scalars[0])
    return Kept(values, columns, v.size)


def heaviest(v: jax.Array, count: int, problem: Transport) -> jax.Array:
    """The columns of the largest entries of each row, int32 [n, count], for any row scalings.

    Compared in float32: XLA's selection sorts whole rows of float64 on a CPU, and which of two nearly equal entries is
    kept does not matter.
    """
    v, epsilon = v.astype(problem.dtype), problem.scalars[0]

    def select(C: jax.Array) -> jax.Array:
        exponents = v - C.astype(v.dtype) / epsilon
        # The top of each row is what must be told apart.
        exponents -= jnp.max(exponents, axis=1, keepdims=True)
        return jax.lax.top_k(exponents.astype(jnp.float32), count)[1].astype(jnp.int32)

    return jax.lax.stop_gradient(problem.cost.over_rows(select))
