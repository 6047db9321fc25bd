"""The implicit derivative of a solution: one custom_jvp whose tangent is one custom_linear_solve.

With F(x, p) = 0 the tangent solves F_x dx = -F_p dp. jvp, vjp and derivatives of any order follow from the
transposition and differentiation rules of `jax.lax.custom_linear_solve`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxnum.core import lanczos, precision, trees
from jaxnum.core.functions import Function
from kernels_pallas import checks

PyTree = Any
Matvec = Callable[[PyTree], PyTree]

# Below this many unknowns the Jacobian is formed and factorised: exact, and cheaper than a Krylov loop to compile.
DENSE_BELOW = 256
_KRYLOV_STEPS = 1000
_GMRES_RESTART = 50


def implicit(problem: Any, x: PyTree) -> PyTree:
    """The solution x of `problem` as a differentiable function of the problem's leaves.

    Args:
      problem: a traced problem; see `jaxnum.core.problems.Problem`.
      x: its solution. It carries no derivative of its own.

    Returns:
      x unchanged.

    Raises:
      ValueError: a function of the problem is not traced: the arrays it captures would silently have derivative zero.

    Derivatives: tangents solve root_x dx = -root_p dp in the complement of the null space, by LU below 256 unknowns,
      else by projected preconditioned CG or MINRES (`problem.symmetric` True or "indefinite") or by GMRES. A tangent
      whose residual is not small is NaN: a singular Jacobian must not look like an answer.
    """
    members = jax.tree.leaves(problem, is_leaf=lambda member: isinstance(member, Function))
    raw = [member.fn for member in members if isinstance(member, Function) and member.consts is None]
    wanted = "have its functions traced and the arrays they capture hoisted"
    checks.value("implicit", "problem", not raw, wanted, raw, "Call problem.traced(x) first.")
    return _implicit(problem, x)


@jax.custom_jvp
def _implicit(problem: Any, x: PyTree) -> PyTree:
    return x


@_implicit.defjvp
def _implicit_jvp(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
    problem, x = primals
    # The recursion makes x depend on the problem inside the rule too: that is the second derivative.
    x = _implicit(problem, x)
    _, rhs = jax.jvp(lambda p: p.root(x), (problem,), (tangents[0],))
    rhs = problem.project(jax.tree.map(jnp.negative, _coupled(rhs)))
    _, jacobian = jax.linearize(problem.root, x)

    def matvec(v: PyTree) -> PyTree:
        return _coupled(problem.project(jacobian(problem.project(_coupled(v)))))

    solve = partial(_solve_tangent, problem=problem)
    tangent = jax.lax.custom_linear_solve(matvec, rhs, solve, transpose_solve=solve)
    return x, problem.project(tangent)


def _coupled(tree: PyTree) -> PyTree:
    # The transpose of custom_linear_solve asserts when one leaf of its right-hand side is unperturbed; a zero that
    # depends on every leaf makes each one perturbed. The right-hand sides of higher derivatives come from the linear
    # map and its transpose, so both ends of the map are coupled too.
    leaves = jax.tree.leaves(tree)
    if len(leaves) == 1:
        return tree
    total = sum(jnp.sum(leaf) for leaf in leaves)
    return jax.tree.map(lambda leaf: leaf + jnp.astype(0 * total, leaf.dtype), tree)


def _solve_tangent(matvec: Matvec, rhs: PyTree, *, problem: Any) -> PyTree:
    """Solve one projected system, and return NaN where its residual is not small."""
    size = _size(rhs)
    rhs = jax.tree.map(lambda leaf: leaf / size.astype(leaf.dtype), rhs)
    if trees.size(rhs) < DENSE_BELOW:
        solution = _replicated(_dense, matvec, rhs, problem)
    elif problem.symmetric == "indefinite":
        solution = _minimal_residuals(matvec, rhs, problem)
    elif problem.symmetric:
        solution = _conjugate_gradients(matvec, rhs, problem)
    else:
        solution = _replicated(_gmres, matvec, rhs, problem)
    residual = trees.norm(problem.project(trees.sub(rhs, matvec(solution))))
    good = residual <= _tolerance(rhs) ** 0.5 * trees.norm(rhs)
    return jax.tree.map(lambda leaf: jnp.where(good, size.astype(leaf.dtype) * leaf, jnp.nan), solution)


def _size(rhs: PyTree) -> jax.Array:
    """The largest entry, or 1: in float32 a gradient of 1e-20 has no square, hence no norm."""
    real = precision.coarsest(rhs)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0).astype(real) for leaf in jax.tree.leaves(rhs)]))
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)


def _tolerance(tree: PyTree) -> float:
    return 64.0 * precision.attainable(tree)


def _replicated(solve: Callable, matvec: Matvec, rhs: PyTree, problem: Any) -> PyTree:
    """Run a solver that reshapes or contracts across leaves on unsharded copies, when the sharding is explicit."""
    if not trees.explicitly_sharded(rhs):
        return solve(matvec, rhs, problem.project)
    shardings = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, rhs)

    def spread(v: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf, s: jax.sharding.reshard(leaf, s), v, shardings)

    def gather(v: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, PartitionSpec(*[None] * leaf.ndim)), v)

    def gathered(fn: Matvec) -> Matvec:
        return lambda v: gather(fn(spread(v)))

    return spread(solve(gathered(matvec), gather(rhs), gathered(problem.project)))


def _dense(matvec: Matvec, rhs: PyTree, project: Matvec) -> PyTree:
    flat, unflatten = _ravel_real(rhs)
    basis = jnp.eye(flat.size, dtype=flat.dtype)

    def column(e: jax.Array) -> jax.Array:
        # P J P + (I - P) is regular where J is regular off its null space.
        v = unflatten(e)
        return _ravel_real(trees.add(matvec(v), trees.sub(v, project(v))))[0]

    # One step of refinement: LU without it loses digits that the residual test of the caller would miss.
    factors = jax.scipy.linalg.lu_factor(jax.vmap(column, out_axes=1)(basis))
    solution = jax.scipy.linalg.lu_solve(factors, flat)
    solution = solution + jax.scipy.linalg.lu_solve(factors, flat - _ravel_real(matvec(unflatten(solution)))[0])
    return project(unflatten(solution))


def _ravel_real(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """One real vector of all leaves, complex ones as two parts, and the way back."""
    leaves, treedef = jax.tree.flatten(tree)
    parts = [p for leaf in leaves for p in ((leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,))]
    flat = jnp.concatenate([jnp.ravel(p) for p in parts])

    def unflatten(vector: jax.Array) -> PyTree:
        out, start = [], 0
        for leaf in leaves:
            pieces = []
            for _ in range(2 if jnp.iscomplexobj(leaf) else 1):
                pieces.append(vector[start : start + leaf.size].reshape(leaf.shape))
                start += leaf.size
            value = jax.lax.complex(*pieces) if len(pieces) == 2 else pieces[0]
            out.append(value.astype(leaf.dtype))
        return jax.tree.unflatten(treedef, out)

    return flat, unflatten


def _gmres(matvec: Matvec, rhs: PyTree, project: Matvec) -> PyTree:
    rounds = _KRYLOV_STEPS // _GMRES_RESTART
    solution, _ = jax.scipy.sparse.linalg.gmres(
        matvec, rhs, tol=_tolerance(rhs), atol=0.0, restart=_GMRES_RESTART, maxiter=rounds
    )
    return solution


def _conjugate_gradients(matvec: Matvec, rhs: PyTree, problem: Any) -> PyTree:
    """Projected preconditioned CG. jax.scipy's cannot be used: its vdot fails on explicitly sharded operands."""

    def precondition(r: PyTree) -> PyTree:
        return problem.project(problem.preconditioned(r))

    goal = _tolerance(rhs) * trees.norm(rhs)

    def unfinished(carry: tuple) -> jax.Array:
        _, r, _, rz, k = carry
        return (trees.norm(r) > goal) & (k < _KRYLOV_STEPS) & (rz > 0)

    def step(carry: tuple) -> tuple:
        x, r, p, rz, k = carry
        q = matvec(p)
        alpha = rz / trees.vdot(p, q)
        x, r = trees.add_scaled(x, alpha, p), trees.add_scaled(r, -alpha, q)
        z = precondition(r)
        rz_new = trees.vdot(r, z)
        return x, r, trees.add_scaled(z, rz_new / rz, p), rz_new, k + 1

    z = precondition(rhs)
    start = (jax.tree.map(jnp.zeros_like, rhs), rhs, z, trees.vdot(rhs, z), jnp.int32(0))
    return jax.lax.while_loop(unfinished, step, start)[0]


def _minimal_residuals(matvec: Matvec, rhs: PyTree, problem: Any) -> PyTree:
    """Projected preconditioned MINRES, which CG's search along directions of negative curvature is no match for."""

    def precondition(r: PyTree) -> tuple[PyTree, jax.Array]:
        z = problem.project(problem.preconditioned(r))
        return z, jnp.sqrt(jnp.maximum(trees.vdot(r, z), 0))

    goal = _tolerance(rhs) * trees.norm(rhs)

    def unfinished(carry: tuple) -> jax.Array:
        _, r, state, k = carry
        return (trees.norm(r) > goal) & (k < _KRYLOV_STEPS) & (state.gamma > 0)

    def step(carry: tuple) -> tuple:
        x, r, state, k = carry
        p = lanczos.normal(state)
        v, delta = lanczos.orthogonalised(state, p, matvec(p))
        return *lanczos.advanced(x, r, state, p, delta, v, *precondition(v)), k + 1

    start = (jax.tree.map(jnp.zeros_like, rhs), rhs, lanczos.started(rhs, *precondition(rhs)), jnp.int32(0))
    return jax.lax.while_loop(unfinished, step, start)[0]
