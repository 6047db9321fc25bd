"""Products with Hessians and Jacobians in whichever mode of differentiation the function allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core import trees
from kernels_pallas import checks

PyTree = Any

MODES = ("auto", "forward", "reverse")
_REFUSALS = (TypeError, NotImplementedError, ValueError)


def hessian_vector(
    function: str, argument: str, fn: Callable, params: PyTree, vector: PyTree, mode: str, remedy: str = ""
) -> PyTree:
    """The Hessian of a scalar function times a vector.

    Args:
      function: name of the public function, first word of errors.
      argument: its argument that holds `fn`.
      fn: params -> [] floating.
      params: where the Hessian is taken.
      vector: tree like params.
      mode: one of `MODES`.
      remedy: what helps when no mode works.

    Returns:
      A tree like params.

    Raises:
      ShapeError: fn does not return one real scalar.
      NotImplementedError: in mode "auto", no mode can differentiate fn twice.
    """

    def scalar(p: PyTree) -> jax.Array:
        out = fn(p)
        one = isinstance(out, jax.Array) and jnp.issubdtype(out.dtype, jnp.floating) and out.shape == ()
        got = tuple(out.shape) if hasattr(out, "shape") else type(out).__name__
        value = f"{argument}(params)"
        scalar_remedy = "Return the loss alone, without auxiliary values."
        checks.value(function, value, one, "be one real scalar", got, scalar_remedy, checks.ShapeError)
        return out

    gradient = jax.grad(scalar)

    def forward() -> PyTree:
        return jax.jvp(gradient, (params,), (vector,))[1]

    def reverse() -> PyTree:
        return jax.grad(lambda p: trees.vdot(gradient(p), vector))(params)

    def plain() -> PyTree:
        return gradient(params)

    return _in_mode(function, argument, mode, forward, reverse, plain, remedy)


def jacobian_vector(function: str, argument: str, fn: Callable, params: PyTree, vector: PyTree, mode: str) -> PyTree:
    """The Jacobian of a function times a vector; see `hessian_vector`.

    In mode "reverse" it is the pull-back of the pull-back, which is linear: two passes of reverse mode.
    """

    def forward() -> PyTree:
        return jax.jvp(fn, (params,), (vector,))[1]

    def reverse() -> PyTree:
        outputs, pull_back = jax.vjp(fn, params)
        return jax.vjp(lambda u: pull_back(u)[0], jax.tree.map(jnp.zeros_like, outputs))[1](vector)[0]

    def plain() -> PyTree:
        return fn(params)

    return _in_mode(function, argument, mode, forward, reverse, plain, "")


def _in_mode(
    function: str,
    argument: str,
    mode: str,
    forward: Callable[[], PyTree],
    reverse: Callable[[], PyTree],
    plain: Callable[[], PyTree],
    remedy: str,
) -> PyTree:
    """A product in the asked mode, or in the first mode that is not refused; `plain` is what both differentiate."""
    if mode != "auto":
        return {"forward": forward, "reverse": reverse}[mode]()
    try:
        refused = _holds(jax.make_jaxpr(forward)().jaxpr)
        refusal = "a custom_vjp function has no forward-mode derivative"
    except _REFUSALS as error:
        refused, refusal = True, str(error)
    if not refused:
        return forward()
    # An error of the function itself comes out here, in its own words; what is left is a refusal of forward mode.
    jax.eval_shape(plain)
    try:
        return reverse()
    except _REFUSALS as error:
        got = f"in forward mode: {refusal}; in reverse mode: {error}"
    remedy = " ".join(filter(None, ("Use an implementation that can be differentiated twice", remedy))) + "."
    wanted = "be differentiable twice"
    return checks.value(function, argument, False, wanted, got, remedy, NotImplementedError)


def _holds(jaxpr: Any) -> bool:
    """Whether a jaxpr, or one nested in it, holds a forward derivative that its lowering refuses.

    Inside jit, cond and scan, JAX notes the forward derivative of a custom_vjp function as the primitive `custom_lin`
    and refuses it only when the program is lowered, too late to choose another mode; so does `refuse_forward_mode` of
    the kernels, with its own primitive.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("custom_lin", "forward_mode"):
            return True
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            nested = getattr(parameter, "jaxpr", parameter)
            if hasattr(nested, "eqns") and _holds(nested):
                return True
    return False
