"""The verbs: each builds its problem and calls `solve` with a good default solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core.combinators import restarted
from jaxnum.core.costs import Cost, DenseCost
from jaxnum.core.problems import FixedPoint, Inclusion, Linear, Minimize, Transport
from jaxnum.core.solver import Phases, Solution, Solver, drive
from jaxnum.solvers.fixed_point._picard import picard
from jaxnum.solvers.linear._cg import cg
from jaxnum.solvers.minimize._newton_cg import newton_cg
from jaxnum.solvers.monotone._feg import feg
from jaxnum.solvers.transport._sinkhorn import sinkhorn
from kernels_pallas import checks

PyTree = Any


def fixed_point(
    T: Callable,
    x0: PyTree,
    *args: PyTree,
    solver: Solver | Phases | None = None,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int | None = None,
    check_every: int | None = None,
    history: bool = False,
    adjoint: str = "implicit",
    checkpoint_every: int | None = None,
    progress: Any = None,
    on_failure: str = "raise",
) -> Solution:
    """Find x with x = T(x, *args).

    Args:
      T: map of a pytree of floating-point arrays to a tree of the same structure, shapes and dtypes. Arrays it captures
        are differentiated; a captured Python scalar that varies from call to call recompiles: pass it in `args`.
      x0: starting point.
      *args: further arguments of T, differentiable.
      solver: default `jaxnum.solvers.picard()`, for contractions; `jaxnum.solvers.halpern()` serves every nonexpansive
        map.
      rtol: stop at ||x - T(x)|| <= atol + rtol ||T(x)||; see `jaxnum.solve`.
      atol: see `jaxnum.solve`; default 1e-12 (float64) or 1e-7 through the solver.
      max_steps: see `jaxnum.solve`.
      check_every: see `jaxnum.solve`.
      history: see `jaxnum.solve`.
      adjoint: see `jaxnum.solve`.
      checkpoint_every: see `jaxnum.solve`.
      progress: see `jaxnum.solve`.
      on_failure: see `jaxnum.solve`.

    Returns:
      A `jaxnum.Solution`.

    Raises:
      TreeError, ShapeError, DtypeError: T(x0) is not a tree like x0.
      SolverError: an eager call that did not converge.

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> solution = jaxnum.fixed_point(lambda x, a: jnp.cos(a * x), jnp.float32(0.5), 1.0)
      >>> print(f"{float(solution.x):.4f}")
      0.7391
    """
    return drive(
        "fixed_point",
        picard() if solver is None else solver,
        x0,
        FixedPoint(T, args),
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        check_every=check_every,
        history=history,
        adjoint=adjoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
        on_failure=on_failure,
    )


def inclusion(
    F: Callable,
    x0: PyTree,
    *args: PyTree,
    resolvent: Callable | None = None,
    solver: Solver | Phases | None = None,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int | None = None,
    check_every: int | None = None,
    history: bool = False,
    adjoint: str = "implicit",
    checkpoint_every: int | None = None,
    progress: Any = None,
    on_failure: str = "raise",
) -> Solution:
    """Find x with 0 in F(x, *args) + G(x), F monotone and G given by its resolvent.

    Zeros of F (G = 0), saddle points and equilibria of games (F the players' gradients), variational inequalities (G
    the normal cone of a set), composite minimisation (F a gradient, G a subdifferential).

    Args:
      F: map of a pytree of floating-point arrays to a tree of the same structure, shapes and dtypes. Arrays it captures
        are differentiated; a captured Python scalar that varies from call to call recompiles: pass it in `args`.
      x0: starting point.
      *args: further arguments of F, differentiable.
      resolvent: `resolvent(x, step)` = (I + step G)^{-1}(x), such as those of `jaxnum.solvers.resolvents`; None for
        G = 0. Arrays it captures are differentiated.
      solver: default `restarted(feg())` of `jaxnum.solvers`: it needs no constant and no more than a monotone Lipschitz
        F, and restarts make it linear where the problem is sharp. `cocoercive_halpern` takes one F a step in place of
        two where F is a gradient or strongly monotone; `extragradient` is the classical peer.
      rtol: see the solver for the residual; `jaxnum.solve`.
      atol: see `jaxnum.solve`; default 1e-12 (float64) or 1e-7 through the solver.
      max_steps: see `jaxnum.solve`.
      check_every: see `jaxnum.solve`.
      history: see `jaxnum.solve`.
      adjoint: see `jaxnum.solve`.
      checkpoint_every: see `jaxnum.solve`.
      progress: see `jaxnum.solve`.
      on_failure: see `jaxnum.solve`.

    Returns:
      A `jaxnum.Solution`.

    Raises:
      TreeError, ShapeError, DtypeError: F(x0) or resolvent(x0, 1) is not a tree like x0.
      SolverError: an eager call that did not converge.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> resolvents = jaxnum.solvers.resolvents
      >>> payoff = jnp.array([[3.0, -1.0], [-2.0, 1.0]])  # the first player wins this
      >>> game = lambda z: (-payoff @ z[1], payoff.T @ z[0])
      >>> mixed = resolvents.product((resolvents.simplex(), resolvents.simplex()))
      >>> p, q = jaxnum.inclusion(game, (jnp.ones(2) / 2, jnp.ones(2) / 2), resolvent=mixed).x
      >>> [f"{float(share):.3f}" for share in (*p, *q)]
      ['0.429', '0.571', '0.286', '0.714']
    """
    return drive(
        "inclusion",
        restarted(feg()) if solver is None else solver,
        x0,
        Inclusion(F, resolvent, args),
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        check_every=check_every,
        history=history,
        adjoint=adjoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
        on_failure=on_failure,
    )


def linear_solve(
    A: Any,
    b: PyTree,
    x0: PyTree | None = None,
    *,
    preconditioner: Any = None,
    null_space: Any = None,
    symmetric: bool | str = True,
    solver: Solver | Phases | None = None,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int | None = None,
    check_every: int | None = None,
    history: bool = False,
    adjoint: str = "implicit",
    checkpoint_every: int | None = None,
    progress: Any = None,
    on_failure: str = "raise",
) -> Solution:
    """Solve A x = b, by default for a symmetric (Hermitian) positive definite A.

    Several right-hand sides that share A: `jax.vmap(lambda b: linear_solve(A, b).x, in_axes=1, out_axes=1)(B)`.

    Args:
      A: array [n, n], a linear function v -> A v on trees like b, an object with a method `mv` (a lineax operator), an
        operator, or a sparse matrix, which is converted at every call: `jaxnum.sparse_operator` does it once.
      b: right-hand side, array [n] or a pytree of floating-point or complex arrays.
      x0: starting point like b; default zeros.
      preconditioner: symmetric positive definite approximation of the inverse of A, given like A.
      null_space: orthonormal basis [k, ...] of the null space of a singular consistent system, as for a Poisson problem
        with Neumann boundaries.
      symmetric: True for a positive definite A, "indefinite" for a symmetric one (`jaxnum.solvers.minres`), else False;
        it chooses the solver of the derivative, see `jaxnum.Linear`.
      solver: default `jaxnum.solvers.cg()`.
      rtol: stop at ||b - A x|| <= atol + rtol ||b||; see `jaxnum.solve`.
      atol: see `jaxnum.solve`.
      max_steps: see `jaxnum.solve`.
      check_every: see `jaxnum.solve`.
      history: see `jaxnum.solve`.
      adjoint: see `jaxnum.solve`.
      checkpoint_every: see `jaxnum.solve`.
      progress: see `jaxnum.solve`.
      on_failure: see `jaxnum.solve`.

    Returns:
      A `jaxnum.Solution`.

    Raises:
      ShapeError, DtypeError, TreeError: A, b, x0 or the preconditioner do not fit.
      SolverError: an eager call that did not converge; `breakdown` when A is not symmetric positive definite.

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> jaxnum.linear_solve(jnp.diag(jnp.array([1.0, 2.0, 4.0])), jnp.ones(3)).x.round(4).tolist()
      [1.0, 0.5, 0.25]

      >>> A, B = jnp.diag(jnp.array([1.0, 2.0, 4.0])), jnp.eye(3)
      >>> jax.vmap(lambda b: jaxnum.linear_solve(A, b).x, in_axes=1, out_axes=1)(B).diagonal().round(4).tolist()
      [1.0, 0.5, 0.25]
    """
    b = jax.tree.map(jnp.asarray, b)
    leaves = jax.tree_util.tree_flatten_with_path(b)[0]
    checks.dtype("linear_solve", "inexact", **{f"b{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves})
    return drive(
        "linear_solve",
        cg() if solver is None else solver,
        jax.tree.map(jnp.zeros_like, b) if x0 is None else x0,
        Linear(A, b, preconditioner, null_space, symmetric),
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        check_every=check_every,
        history=history,
        adjoint=adjoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
        on_failure=on_failure,
    )


def minimize(
    f: Callable,
    x0: PyTree,
    *args: PyTree,
    solver: Solver | Phases | None = None,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int | None = None,
    check_every: int | None = None,
    history: bool = False,
    adjoint: str = "implicit",
    checkpoint_every: int | None = None,
    progress: Any = None,
    on_failure: str = "raise",
) -> Solution:
    """Find a local minimum of f(x, *args) over x, without constraints.

    With bounds or an l1 term: `jaxnum.solve` on a `jaxnum.Minimize` that has their resolvent, by `jaxnum.solvers.bcd`.

    Args:
      f: smooth real scalar function of a pytree of floating-point arrays. Arrays it captures are differentiated; a
        captured Python scalar that varies from call to call recompiles: pass it in `args`.
      x0: starting point.
      *args: further arguments of f, differentiable.
      solver: default `jaxnum.solvers.newton_cg()`, which needs no bounds and no dense Hessian; `jaxnum.solvers.bcd()`
        moves a few coordinates a step.
      rtol: stop at |gradient| <= atol + rtol, in units of f over x: set it to what is small for this f; see
        `jaxnum.solve`.
      atol: see `jaxnum.solve`.
      max_steps: see `jaxnum.solve`.
      check_every: see `jaxnum.solve`.
      history: see `jaxnum.solve`.
      adjoint: see `jaxnum.solve`.
      checkpoint_every: see `jaxnum.solve`.
      progress: see `jaxnum.solve`.
      on_failure: see `jaxnum.solve`.

    Returns:
      A `jaxnum.Solution`.

    Raises:
      ShapeError, DtypeError: f(x0) is not one real scalar.
      SolverError: an eager call that did not converge.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> solution = jaxnum.minimize(lambda x, a: jnp.sum(jnp.cosh(x - a)), jnp.zeros(2), 3.0)
      >>> [f"{float(entry):.3f}" for entry in solution.x]
      ['3.000', '3.000']
    """
    return drive(
        "minimize",
        newton_cg() if solver is None else solver,
        x0,
        Minimize(f, args),
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        check_every=check_every,
        history=history,
        adjoint=adjoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
        on_failure=on_failure,
    )


def transport(
    cost: Any,
    a: Any,
    b: Any,
    epsilon: Any,
    *,
    tau_a: Any = 1.0,
    tau_b: Any = 1.0,
    x0: PyTree | None = None,
    solver: Solver | Phases | None = None,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int | None = None,
    check_every: int | None = None,
    history: bool = False,
    adjoint: str = "implicit",
    checkpoint_every: int | None = None,
    progress: Any = None,
    on_failure: str = "raise",
) -> Solution:
    """Entropic optimal transport between weights a and b: the potentials (f, g) of the plan.

    The plan is P_ij = exp((f_i + g_j - C_ij) / epsilon); see `jaxnum.Transport` for what it minimises, and for
    `plan`, `apply`, `primal_cost` and `dual_cost` of the potentials.

    Args:
      cost: array [n, m], or a `jaxnum.PointCloudCost`, which never forms it.
      a: weights [n] >= 0, floating point.
      b: weights [m] >= 0; sum b = sum a unless a tau is below 1.
      epsilon: real scalar > 0, in units of the cost.
      tau_a: real scalar in (0, 1]: rho / (rho + epsilon) for the penalty rho KL(P 1 | a); 1 demands P 1 = a.
      tau_b: the same for b.
      x0: starting potentials (f [n], g [m]); default zeros.
      solver: default `jaxnum.solvers.sinkhorn()`; give it `epsilon_scaling=0.5` for epsilon below 1e-2 max C.
      rtol: see `jaxnum.solvers.sinkhorn` for the residual; default 1e-6 (float64) or 1e-4.
      atol: see `jaxnum.solve`.
      max_steps: see `jaxnum.solve`.
      check_every: see `jaxnum.solve`.
      history: see `jaxnum.solve`.
      adjoint: see `jaxnum.solve`.
      checkpoint_every: see `jaxnum.solve`.
      progress: see `jaxnum.solve`.
      on_failure: see `jaxnum.solve`.

    Returns:
      A `jaxnum.Solution` whose x is (f [n], g [m]), with sum a f = sum b g in the balanced case.

    Raises:
      ShapeError, DtypeError, ValueError: the cost, the weights, epsilon or tau do not fit.
      SolverError: an eager call that did not converge; `infeasible` for weights that no plan can have.

    Example:
      >>> import jax.numpy as jnp, jaxnum
      >>> x = jnp.linspace(0, 1, 5)[:, None]
      >>> a = jnp.full(5, 0.2)
      >>> problem = jaxnum.Transport(jaxnum.PointCloudCost(x, x + 1), a, a, 0.05)
      >>> f, g = jaxnum.transport(problem.cost, a, a, 0.05).x
      >>> print(f"{float(problem.primal_cost((f, g))):.2f}")
      1.02
    """
    array = not (callable(cost) or isinstance(cost, str) or cost is None)
    wanted = "be an array [n, m], a DenseCost or a PointCloudCost"
    checks.value("transport", "cost", array, wanted, type(cost).__name__, error=TypeError)
    a, b = jnp.asarray(a), jnp.asarray(b)
    checks.dtype("transport", "floating", remedy="Weights are real numbers.", a=a, b=b)
    return drive(
        "transport",
        sinkhorn() if solver is None else solver,
        (jnp.zeros_like(a), jnp.zeros_like(b)) if x0 is None else x0,
        Transport(cost if isinstance(cost, Cost) else DenseCost(jnp.asarray(cost)), a, b, epsilon, tau_a, tau_b),
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        check_every=check_every,
        history=history,
        adjoint=adjoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
        on_failure=on_failure,
    )
