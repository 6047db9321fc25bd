"""Problems as pytrees: what may be differentiated, batched or sharded is an array leaf.

Each knows its optimality function `root(x)` (zero at a solution), the tangent space in which its solution is unique
(`project`), a differentiable choice among equivalent solutions (`canonical`), and whether the Jacobian of `root` is
symmetric. The implicit derivative follows from these four alone, so all solvers of one problem are interchangeable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from jaxnum.core import functions, operators, trees
from jaxnum.core.functions import Function
from jaxnum.core.minimize import Minimize
from jaxnum.core.operators import Operator
from jaxnum.core.problem import Problem
from jaxnum.core.transport import Transport
from kernels_pallas import checks

__all__ = ["FiniteSum", "FixedPoint", "Inclusion", "Linear", "Minimize", "Problem", "Transport"]

PyTree = Any
C = TypeVar("C")


@dataclass_transform(frozen_default=True)
def _problem(*, data: list[str], meta: tuple[str, ...] = ()) -> Callable[[type[C]], type[C]]:
    register = partial(jax.tree_util.register_dataclass, data_fields=data, meta_fields=list(meta))
    return lambda cls: register(dataclass(frozen=True)(cls))


def _wrap(problem: Any, *names: str) -> None:
    # Tree code rebuilds dataclasses with placeholders and with Functions; only raw callables are wrapped.
    for name in names:
        object.__setattr__(problem, name, functions.as_function(getattr(problem, name)))


def _check_map(function: str, argument: str, fn: Function, x: PyTree, *args: PyTree) -> None:
    checks.value(function, argument, isinstance(fn, Function), "be a function", type(fn).__name__, error=TypeError)
    out = jax.eval_shape(fn, x, *args)
    remedy = f"`{argument}` must return a tree like x; cast inside it if it promotes."
    checks.same_tree(function, ("x0", x), dtypes=True, remedy=remedy, **{f"{argument}(x0)": out})


@_problem(data=["T", "args"])
class FixedPoint(Problem):
    """Find x with x = T(x, *args).

    Attributes:
      T: map of a pytree x of floating-point leaves to a tree of the same structure, shapes and dtypes.
      args: further arguments of T, differentiable.
    """

    T: Any
    args: tuple = ()

    def __post_init__(self) -> None:
        _wrap(self, "T")

    def map(self, x: PyTree) -> PyTree:
        """T(x, *args)."""
        return self.T(x, *self.args)

    def root(self, x: PyTree) -> PyTree:
        """X - T(x)."""
        return trees.sub(x, self.map(x))

    def traced(self, x: PyTree) -> FixedPoint:
        """Trace T at x."""
        return replace(self, T=functions.trace(self.T, x, *self.args))

    def check(self, function: str, x: PyTree) -> None:
        """T must return a tree like x."""
        _check_map(function, "T", self.T, x, *self.args)


@_problem(data=["F", "resolvent", "args"])
class Inclusion(Problem):
    """Find x with 0 in F(x, *args) + G(x), F single-valued and monotone, G maximal monotone.

    Attributes:
      F: operator, pytree to pytree of the same structure.
      resolvent: `resolvent(x, step)` = (I + step G)^-1 (x), or None when G = 0.
      args: further arguments of F, differentiable.
    """

    F: Any
    resolvent: Any = None
    args: tuple = ()

    def __post_init__(self) -> None:
        _wrap(self, "F", "resolvent")

    def operator(self, x: PyTree) -> PyTree:
        """F(x, *args)."""
        return self.F(x, *self.args)

    def backward(self, x: PyTree, step: jax.Array) -> PyTree:
        """The resolvent at x, or x itself when G = 0."""
        return x if self.resolvent is None else self.resolvent(x, step)

    def root(self, x: PyTree) -> PyTree:
        """The natural residual x - J_G(x - F(x)) with unit step; F(x) itself when G = 0."""
        return _natural(self, x)

    def traced(self, x: PyTree) -> Inclusion:
        """Trace F and the resolvent at x."""
        one = jnp.ones((), trees_dtype(x))
        resolvent = functions.trace(self.resolvent, x, one)
        return replace(self, F=functions.trace(self.F, x, *self.args), resolvent=resolvent)

    def check(self, function: str, x: PyTree) -> None:
        """F and the resolvent must return trees like x."""
        _check_map(function, "F", self.F, x, *self.args)
        if self.resolvent is not None:
            _check_map(function, "resolvent", self.resolvent, x, jnp.ones((), trees_dtype(x)))


@_problem(data=["F_batch", "args", "resolvent"], meta=("n",))
class FiniteSum(Problem):
    """Find x with 0 in (1/n) sum_i F_i(x, *args) + G(x), G maximal monotone.

    Attributes:
      F_batch: `F_batch(x, indices, *args)` = mean of F_i(x) over int32 indices [k], for any k.
      n: number of terms.
      args: further arguments, differentiable.
      resolvent: `resolvent(x, step)` = (I + step G)^-1 (x), or None when G = 0.
    """

    F_batch: Any
    n: int
    args: tuple = ()
    resolvent: Any = None

    def __post_init__(self) -> None:
        _wrap(self, "F_batch", "resolvent")

    @property
    def batch(self) -> int:
        """The batch size, beside 1 and n, at which F_batch is traced as a whole: ceil(sqrt n)."""
        return 1 + math.isqrt(self.n - 1)

    def mean(self, x: PyTree, indices: jax.Array) -> PyTree:
        """The mean of F_i(x) over int32 indices [k]: one call of F_batch, or a map of terms for other k."""
        F_batch = self.F_batch
        if not isinstance(F_batch, functions.SizedFunction) or indices.shape[0] in F_batch.fn:
            return F_batch(x, indices, *self.args)
        terms = jax.vmap(lambda i: F_batch(x, i[None], *self.args))(indices)
        return jax.tree.map(lambda t: jnp.mean(t, axis=0), terms)

    def operator(self, x: PyTree) -> PyTree:
        """The mean over all n terms."""
        return self.mean(x, jnp.arange(self.n, dtype=jnp.int32))

    def backward(self, x: PyTree, step: jax.Array) -> PyTree:
        """The resolvent at x, or x itself when G = 0."""
        return x if self.resolvent is None else self.resolvent(x, step)

    def root(self, x: PyTree) -> PyTree:
        """The natural residual with unit step, or the mean over all n terms when G = 0."""
        return _natural(self, x)

    def traced(self, x: PyTree) -> FiniteSum:
        """Trace F_batch at x and batches of 1, ceil(sqrt n) and n terms, and the resolvent at x."""
        sizes = tuple(sorted({1, self.batch, self.n}))
        resolvent = functions.trace(self.resolvent, x, jnp.ones((), trees_dtype(x)))
        return replace(self, F_batch=functions.trace_sizes(self.F_batch, x, sizes, *self.args), resolvent=resolvent)

    def check(self, function: str, x: PyTree) -> None:
        """F_batch and the resolvent must return trees like x; n must be positive."""
        checks.value(function, "n", self.n >= 1, "be at least 1", self.n)
        _check_map(function, "F_batch", self.F_batch, x, jnp.zeros((1,), jnp.int32), *self.args)
        if self.resolvent is not None:
            _check_map(function, "resolvent", self.resolvent, x, jnp.ones((), trees_dtype(x)))


def _natural(problem: Any, x: PyTree) -> PyTree:
    """x - J_G(x - F(x)) with unit step; F(x) itself when G = 0."""
    if problem.resolvent is None:
        return problem.operator(x)
    one = jnp.ones((), trees_dtype(x))
    return trees.sub(x, problem.backward(trees.sub(x, problem.operator(x)), one))


@_problem(data=["A", "b", "preconditioner", "null_space"], meta=("symmetric",))
class Linear(Problem):
    """Solve A x = b.

    Attributes:
      A: array [n, n]; or a linear function v -> A v on trees like b; or an object with a method `mv`, such as a
        lineax operator; or a sparse matrix of scipy or `jax.experimental.sparse`, converted on the host at every call
        (see `jaxnum.sparse_operator`, which does it once).
      b: array [n], or any pytree of floating-point or complex leaves when A is a function.
      preconditioner: approximate inverse of A: array [n, n], linear function r -> M r, or None. It changes the
        path, not the solution, and so carries no derivative.
      null_space: None, or for a singular consistent system an orthonormal basis of the null space: a tree like b with a
        leading axis over its members. The solution orthogonal to it is returned.
      symmetric: True if A is symmetric (Hermitian) positive definite, as `cg` needs; "indefinite" if it is symmetric
        with a positive definite preconditioner, as `minres` needs; else False. From 256 unknowns on, the tangent
        equation is solved by conjugate gradients, MINRES or GMRES accordingly. Nothing wrong comes of a wrong claim: a
        tangent whose residual is not small is returned as NaN.
    """

    A: Any
    b: Any
    preconditioner: Any = None
    null_space: Any = None
    symmetric: bool | str = True

    def __post_init__(self) -> None:
        for name in ("A", "preconditioner"):
            operator = getattr(self, name)
            if operators.is_sparse(operator):
                object.__setattr__(self, name, operators.sparse_operator(operator))
            if hasattr(operator, "mv"):
                object.__setattr__(self, name, Function(operator.mv))
        _wrap(self, "A", "preconditioner")

    def matvec(self, v: PyTree) -> PyTree:
        """A v."""
        return operators.apply(self.A, v)

    def root(self, x: PyTree) -> PyTree:
        """A x - b."""
        return trees.sub(self.matvec(x), self.b)

    def project(self, v: PyTree) -> PyTree:
        """V minus its part in the null space."""
        if self.null_space is None:
            return v
        weights = jax.vmap(lambda member: trees.inner(member, v))(self.null_space)
        return jax.tree.map(
            lambda leaf, basis: leaf - jnp.tensordot(weights.astype(basis.dtype), basis, 1, precision="highest"),
            v,
            self.null_space,
        )

    def canonical(self, x: PyTree) -> PyTree:
        """The solution orthogonal to the null space."""
        return self.project(x)

    def preconditioned(self, v: PyTree) -> PyTree:
        """M v, or v without a preconditioner."""
        return v if self.preconditioner is None else operators.apply(self.preconditioner, v)

    def traced(self, x: PyTree) -> Linear:
        """Trace A and the preconditioner at x when they are functions."""
        A, M = (functions.trace(f, x) if isinstance(f, Function) else f for f in (self.A, self.preconditioner))
        return replace(self, A=A, preconditioner=M)

    def check(self, function: str, x: PyTree) -> None:
        """A must be square, b must fit A, x must look like b."""
        remedy = "Did you pass a batch? Use jax.vmap or jaxnum.solve_batched."
        checks.choice(function, "symmetric", self.symmetric, (True, False, "indefinite"))
        checks.dtype(function, "inexact", **{f"b{jax.tree_util.keystr(p)}": v for p, v in _leaves(self.b)})
        for name in ("A", "preconditioner"):
            operator = getattr(self, name)
            known = isinstance(operator, Function) or hasattr(operator, "dtype") or (name != "A" and operator is None)
            wanted = "be an array [n, n], a sparse matrix, a linear function or an object with a method `mv`"
            checks.value(function, name, known, wanted, type(operator).__name__, error=TypeError)
            if isinstance(operator, Function):
                image = jax.eval_shape(operator, self.b)
                checks.same_tree(function, ("b", self.b), dtypes=True, **{f"{name}(b)": image})
            elif operator is not None:
                single = len(jax.tree.leaves(self.b)) == 1 and not isinstance(self.b, (dict, list, tuple))
                checks.value(
                    function,
                    "b",
                    single,
                    f"be one array when `{name}` is one",
                    type(self.b).__name__,
                    "Give a function v -> A v for tree-valued b.",
                    checks.TreeError,
                )
                like: Any = (
                    jax.ShapeDtypeStruct(operator.shape, operator.dtype) if isinstance(operator, Operator) else operator
                )
                checks.shape(function, remedy=remedy, **{name: (like, "N N"), "b": (self.b, "N")})
                checks.same_dtype(function, b=self.b, **{name: like})
        checks.same_tree(function, ("b", self.b), dtypes=True, remedy=remedy, x0=x)
        if self.null_space is not None:
            member = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)), self.null_space
            )
            checks.same_tree(function, ("b", self.b), dtypes=True, **{"null_space[i]": member})


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def trees_dtype(x: PyTree) -> Any:
    """The widest floating dtype among the leaves of x."""
    return jnp.result_type(*[jnp.finfo(jnp.result_type(leaf)).dtype for leaf in jax.tree.leaves(x)])
