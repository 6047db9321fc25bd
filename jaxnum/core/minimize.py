"""Minimisation of a smooth function, of one with a separable part that is not, and of a function of A x."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core import functions, trees
from jaxnum.core.functions import Function
from jaxnum.core.problem import Problem
from kernels_pallas import checks

__all__ = ["Minimize"]

PyTree = Any


@partial(jax.tree_util.register_dataclass, data_fields=["f", "args", "resolvent", "penalty", "A"], meta_fields=[])
@dataclass(frozen=True)
class Minimize(Problem):
    """Minimise f(x, *args) + h(x) over x, f smooth and h(x) = sum_i h_i(x_i) convex; h = 0 unless a resolvent is given.

    The lasso: `Minimize(loss, resolvent=resolvents.l1(weight), penalty=lambda x: weight * jnp.abs(x))`; least squares
    within bounds: `Minimize(loss, resolvent=resolvents.box(lower, upper))`.

    Attributes:
      f: smooth scalar-valued function of a pytree x of floating-point leaves.
      args: further arguments of f, differentiable.
      resolvent: None, or `resolvent(x, steps)` = argmin_p sum_i (p_i - x_i)² / 2 steps_i + h_i(p_i), entry by entry,
        steps >= 0 a tree like x; steps of 0 lead to the nearest point where h is finite. Of `jaxnum.solvers.resolvents`
        the `box`, `nonnegative`, `l1` and products of these.
      penalty: None, or `penalty(x)`, a tree like x of the values h_i(x_i) where they are finite. Some solvers want it.
      A: None, or [n, d]: the function is f(A x, *args), x one array [d], and solvers may keep A x as they go.
        Differentiable.
    """

    f: Any
    args: tuple = ()
    resolvent: Any = None
    penalty: Any = None
    A: Any = None

    def __post_init__(self) -> None:
        for name in ("f", "resolvent", "penalty"):
            object.__setattr__(self, name, functions.as_function(getattr(self, name)))

    @property
    def symmetric(self) -> bool:
        """Whether the Jacobian of `root` is a Hessian."""
        return self.resolvent is None

    def image(self, x: PyTree) -> PyTree:
        """What f is applied to: A x, or x."""
        return x if self.A is None else jnp.matmul(self.A, x, precision="highest")

    def value(self, x: PyTree) -> jax.Array:
        """The smooth part f(x, *args), or f(A x, *args)."""
        return self.outer(self.image(x))

    def outer(self, image: PyTree) -> jax.Array:
        """f(image, *args)."""
        return self.f(image, *self.args)

    def gradient(self, x: PyTree) -> PyTree:
        """That of the smooth part."""
        return jax.grad(self.value)(x)

    def backward(self, x: PyTree, steps: PyTree) -> PyTree:
        """The resolvent at x, or x itself when h = 0."""
        return x if self.resolvent is None else self.resolvent(x, steps)

    def root(self, x: PyTree) -> PyTree:
        """The gradient of f at x; with a resolvent the natural residual x - resolvent(x - gradient, 1)."""
        g = self.gradient(x)
        if self.resolvent is None:
            return g
        return trees.sub(x, self.backward(trees.sub(x, g), jax.tree.map(jnp.ones_like, x)))

    def traced(self, x: PyTree) -> Minimize:
        """Trace f, the resolvent and the penalty at x."""
        return replace(
            self,
            f=functions.trace(self.f, self.image(x), *self.args),
            resolvent=functions.trace(self.resolvent, x, jax.tree.map(jnp.ones_like, x)),
            penalty=functions.trace(self.penalty, x),
        )

    def check(self, function: str, x: PyTree) -> None:
        """f must return a real scalar, the resolvent and the penalty trees like x; A must fit x."""
        if self.A is not None:
            single = jax.tree_util.all_leaves([x])
            checks.value(function, "x0", single, "be one array when `A` is given", type(x), error=checks.TreeError)
            checks.shape(function, A=(self.A, "N D"), x0=(x, "D"))
            checks.same_dtype(function, x0=x, A=self.A)
        out = jax.eval_shape(lambda x: self.f(self.image(x), *self.args), x)
        checks.shape(function, remedy="Sum or average the loss.", **{"f(x0)": (out, "")})
        checks.dtype(function, "floating", **{"f(x0)": out})
        missing = self.penalty is not None and self.resolvent is None
        checks.value(function, "penalty", not missing, "come with its `resolvent`", "no resolvent")
        for name, inputs in (("resolvent", (x, jax.tree.map(jnp.ones_like, x))), ("penalty", (x,))):
            fn = getattr(self, name)
            if fn is None:
                continue
            checks.value(function, name, isinstance(fn, Function), "be a function", type(fn).__name__, error=TypeError)
            remedy = f"`{name}` must return a tree like x, one number an entry."
            image = {f"{name}(x0)": jax.eval_shape(fn, *inputs)}
            checks.same_tree(function, ("x0", x), dtypes=True, remedy=remedy, **image)
