"""Entropic optimal transport, balanced and unbalanced, as a problem in its two potentials."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core import precision
from jaxnum.core.costs import as_cost
from jaxnum.core.problem import Problem
from kernels_pallas import checks

__all__ = ["Transport"]

Pair = tuple[jax.Array, jax.Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cost", "a", "b", "epsilon", "tau_a", "tau_b"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Transport(Problem):
    """Find the potentials (f [n], g [m]) of entropic optimal transport between weights a and b.

    The plan P_ij = exp((f_i + g_j - C_ij) / epsilon), without a reference measure, minimises
    <C, P> + epsilon sum_ij P_ij (log P_ij - 1) + rho_a KL(P 1 | a) + rho_b KL(P^T 1 | b), with
    rho = epsilon tau / (1 - tau). tau = 1 (rho infinite) demands the marginal exactly. The optimality conditions are
    P 1 = a exp(-k_a f / epsilon), P^T 1 = b exp(-k_b g / epsilon), k = (1 - tau) / tau.

    With tau_a = tau_b = 1 the potentials are defined up to (f + c, g - c); those with sum a f = sum b g are returned.
    tau may be traced, so no Python branch asks for it: a mask applies the gauge where both are 1.

    Attributes:
      cost: a `DenseCost`, a `PointCloudCost`, any `jaxnum.core.costs.Cost`, or an array [n, m].
      a: weights [n] >= 0. Where a_i = 0, f_i = -inf, the row of P is zero, and so is the derivative of f_i.
      b: weights [m] >= 0; sum b = sum a in the balanced case.
      epsilon: real scalar > 0, in units of C.
      tau_a: real scalar in (0, 1].
      tau_b: real scalar in (0, 1].

    Derivatives: with respect to C (or the points), a, b, epsilon, and each tau < 1. At tau = 1 the problem changes its
      kind, and there is no derivative with respect to tau. In the balanced case only changes with sum da = sum db
      keep the problem solvable; from any other the part along (1, -1) is projected out.
    """

    cost: Any
    a: Any
    b: Any
    epsilon: Any
    tau_a: Any = 1.0
    tau_b: Any = 1.0

    symmetric = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "cost", as_cost(self.cost))
        for name in ("epsilon", "tau_a", "tau_b"):
            given = getattr(self, name)
            if isinstance(given, int) and not isinstance(given, bool):
                object.__setattr__(self, name, float(given))

    @property
    def dtype(self) -> Any:
        """The dtype sums are kept in."""
        return precision.accumulator(jnp.result_type(self.a))

    @property
    def scalars(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Epsilon, tau_a and tau_b in that dtype."""
        epsilon, tau_a, tau_b = (jnp.asarray(s).astype(self.dtype) for s in (self.epsilon, self.tau_a, self.tau_b))
        return epsilon, tau_a, tau_b

    @property
    def balanced(self) -> jax.Array:
        """Whether both marginals are demanded exactly, boolean scalar."""
        _, tau_a, tau_b = self.scalars
        return (tau_a == 1) & (tau_b == 1)

    @property
    def masses(self) -> tuple[jax.Array, jax.Array]:
        """Sum a and sum b, NaN where a weight is negative or NaN."""
        mass_a, mass_b = (jnp.sum(jnp.where(w >= 0, w, jnp.nan).astype(self.dtype)) for w in (self.a, self.b))
        return mass_a, mass_b

    def log_scalings(self, x: Pair, epsilon: jax.Array | None = None) -> Pair:
        """(f, g) / epsilon, -inf where there is no weight."""
        epsilon = self.scalars[0] if epsilon is None else epsilon
        f, g = finite(x, (self.a, self.b))
        return (
            jnp.where(self.a > 0, f.astype(self.dtype) / epsilon, -jnp.inf),
            jnp.where(self.b > 0, g.astype(self.dtype) / epsilon, -jnp.inf),
        )

    def root(self, x: Pair) -> Pair:
        """What is wrong with the marginals: (P 1 - a exp(-k_a f / epsilon), P^T 1 - b exp(-k_b g / epsilon))."""
        epsilon, tau_a, tau_b = self.scalars
        u, v = self.log_scalings(x)
        return (
            _excess(u, self.cost.lse_rows(v, epsilon), self.a, tau_a),
            _excess(v, self.cost.lse_cols(u, epsilon), self.b, tau_b),
        )

    def project(self, v: Pair) -> Pair:
        """A tangent without entries that bear no weight and, in the balanced case, without its part along (1, -1)."""
        rows, cols = ((w > 0).astype(t.dtype) for w, t in zip((self.a, self.b), v, strict=True))
        along = (jnp.sum(rows * v[0]) - jnp.sum(cols * v[1])) / jnp.maximum(jnp.sum(rows) + jnp.sum(cols), 1)
        along = jnp.where(self.balanced, along, 0)
        return rows * (v[0] - along), cols * (v[1] + along)

    def canonical(self, x: Pair) -> Pair:
        """The potentials with sum a f = sum b g in the balanced case; -inf where there is no weight."""
        f, g = finite(x, (self.a, self.b))
        total = sum(self.masses)
        # NaN where a weight is negative: the status says so, and x stays as it is.
        part = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)

        def shifted(potential: jax.Array, w: jax.Array, own: jax.Array, other: jax.Array) -> jax.Array:
            shift = jnp.where(self.balanced, (own - other) * part, 0).astype(potential.dtype)
            return jnp.where(w > 0, potential - shift, -jnp.inf)

        # Of x itself: XLA compiles a kernel for the masked potentials where they are used twice. Both sides subtract,
        # so that one kernel does for both.
        ours, theirs = jnp.sum(self.a * f), jnp.sum(self.b * g)
        return shifted(x[0], self.a, ours, theirs), shifted(x[1], self.b, theirs, ours)

    def preconditioned(self, v: Pair) -> Pair:
        """V divided by the diagonal of the Jacobian, epsilon^-1 P 1 / tau with P 1 taken as a."""
        epsilon, tau_a, tau_b = self.scalars

        def divide(t: jax.Array, w: jax.Array, tau: jax.Array) -> jax.Array:
            return jnp.where(w > 0, t * epsilon * tau / jnp.where(w > 0, w, 1), 0).astype(t.dtype)

        return divide(v[0], self.a, tau_a), divide(v[1], self.b, tau_b)

    def plan(self, x: Pair) -> jax.Array:
        """P [n, m] of the potentials x; it forms the matrix."""
        u, v = self.log_scalings(x)
        return jnp.exp(u[:, None] + v - self.cost.matrix().astype(self.dtype) / self.scalars[0])

    def apply(self, x: Pair, w: jax.Array) -> jax.Array:
        """P w for w [m] or [m, k], without forming P. With w = y / b: the barycentric images, up to the factor a."""
        return self.cost.apply(*self.log_scalings(x), self.scalars[0], w)

    def apply_transpose(self, x: Pair, w: jax.Array) -> jax.Array:
        """P^T w for w [n] or [n, k], without forming P."""
        u, v = self.log_scalings(x)
        return self.cost.T.apply(v, u, self.scalars[0], w)

    def primal_cost(self, x: Pair) -> jax.Array:
        """<C, P>, the price of the plan without the entropy, scalar."""
        return self.cost.total(*self.log_scalings(x), self.scalars[0])

    def dual_cost(self, x: Pair) -> jax.Array:
        """The dual value, equal to the minimum at the solution, scalar.

        rho_a <a, 1 - exp(-f / rho_a)> + rho_b <b, 1 - exp(-g / rho_b)> - epsilon sum P, whose first two terms are
        <a, f> + <b, g> in the balanced case. It is stationary in x at the solution, so with `adjoint="none"` its
        gradient is already exact: P with respect to C, and in the balanced case f with respect to a.
        """
        epsilon, tau_a, tau_b = self.scalars
        u, v = self.log_scalings(x)
        mass = jnp.sum(jnp.exp(u + self.cost.lse_rows(v, epsilon)))
        return epsilon * (gain(u, self.a, tau_a) + gain(v, self.b, tau_b) - mass)

    def check(self, function: str, x: Pair) -> None:
        """Weights are floating-point vectors that fit the cost; epsilon and tau are scalars in their ranges."""
        has = all(hasattr(self.cost, name) for name in ("lse_rows", "lse_cols", "check", "shape"))
        wanted = "be an array [n, m], a DenseCost or a PointCloudCost"
        checks.value(function, "cost", has, wanted, type(self.cost).__name__, error=TypeError)
        self.cost.check(function)
        remedy = "Did you pass a batch? Use jax.vmap or jaxnum.solve_batched."
        n, m = self.cost.shape
        checks.value(function, "cost", min(n, m) > 0, "have at least one row and one column", (n, m))
        checks.shape(function, remedy=remedy, a=(self.a, f"{n}"), b=(self.b, f"{m}"))
        checks.dtype(function, "floating", remedy="Weights are real numbers.", a=self.a, b=self.b)
        checks.same_dtype(function, cost=jax.ShapeDtypeStruct((), self.cost.dtype), a=self.a, b=self.b)
        checks.same_tree(function, ("(a, b)", (self.a, self.b)), dtypes=True, x0=x)
        for name, top in (("epsilon", jnp.inf), ("tau_a", 1.0), ("tau_b", 1.0)):
            given = getattr(self, name)
            scalar = isinstance(given, float) or hasattr(given, "dtype")
            checks.value(function, name, scalar, "be a real scalar", given, error=TypeError)
            checks.shape(function, remedy="Use vmap for several.", **{name: (given, "")})
            checks.dtype(function, "floating", remedy="Use a real number.", **{name: given})
            if not (checks.traced(given) or isinstance(given, jax.ShapeDtypeStruct)):
                ok = 0 < float(given) <= top and float(given) < jnp.inf
                checks.value(function, name, ok, "be in (0, 1]" if top == 1.0 else "be positive and finite", given)


def finite(x: Pair, weights: Pair) -> Pair:
    """Potentials with 0 in place of whatever stands where there is no weight: -inf times zero would be NaN."""
    return jnp.where(weights[0] > 0, x[0], 0), jnp.where(weights[1] > 0, x[1], 0)


def _excess(u: jax.Array, lse: jax.Array, weights: jax.Array, tau: jax.Array) -> jax.Array:
    held = weights > 0
    u = jnp.where(held, u, 0)
    excess = jnp.exp(u + lse) - weights * jnp.exp(-u * (1 - tau) / tau)
    return jnp.where(held, excess, 0).astype(weights.dtype)


def gain(u: jax.Array, weights: jax.Array, tau: jax.Array) -> jax.Array:
    """<w, 1 - exp(-k u)> / k, which is <w, u> for k = 0."""
    u = jnp.where(weights > 0, u, 0)
    k = (1 - tau) / tau
    safe = jnp.where(k > 0, k, 1)
    return jnp.sum(weights * jnp.where(k > 0, -jnp.expm1(-safe * u) / safe, u))
