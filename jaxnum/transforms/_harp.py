"""Hessian-aided momentum: the old momentum is carried to the new point by a product with the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.core.precision import accumulator
from jaxnum.curvature import arguments
from jaxnum.curvature.products import hessian_vector
from jaxnum.transforms import _strict
from jaxnum.transforms.moments import check_numbers, norm_or_one
from kernels_pallas import checks

PyTree = Any


class HarpState(NamedTuple):
    """State of `scale_by_harp`."""

    count: jax.Array  # [] int32, steps taken; the next one draws from fold_in(key, count)
    previous: PyTree  # parameters of the step before, like params
    d: PyTree  # the momentum, like params, at least float32


def harp(
    learning_rate: optax.ScalarOrSchedule,
    key: jax.Array,
    *,
    eta_power: float | jax.Array = 1.0,
    normalize: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Steps along a momentum that Hessian products keep up to date.

    With η_t = (2 / (t + 2))^eta_power, t = 0, 1, ..., and q drawn from [0, 1] uniformly:

        v_t = H(q θ_t + (1 - q) θ_{t-1}) (θ_t - θ_{t-1})
        d_t = (1 - η_t) (d_{t-1} + v_t) + η_t g_t
        θ_{t+1} = θ_t - γ_t d_t / ||d_t||,   or θ_t - γ_t d_t where normalize is False.

    Over q the product is in mean the change of the gradient, so that d_t follows it without bias, for any function.

    Args:
      learning_rate: γ >= 0, a number or a schedule; γ_0 / (t + 2) in the paper.
      key: typed random key for q; step t draws from `fold_in(key, t)`, so that a resumed run repeats itself.
      eta_power: in (0, 1].
      normalize: steps of length γ, or of γ ||d||.

    Returns:
      An `optax.GradientTransformationExtraArgs`. `update` needs one of two extra arguments: `obj_fn(params) -> scalar`,
      the loss of the step's examples, whose Hessian is used; or `hvp_fn(params, vector) -> tree`, an unbiased product,
      for policy gradients, whose examples must be drawn at the point that it is given.

    Raises:
      ValueError: an option out of range; at update, `params`, or both of `obj_fn` and `hvp_fn`, are missing.
      TreeError, ShapeError, DtypeError: updates or products that do not match real floating-point `params`; a `key`
        that is not typed.

    Cost: a Hessian product, about two gradients (in reverse mode where `obj_fn` has no forward mode), and two passes.
    Memory: previous parameters and the momentum.

    Numerics: d in at least float32. The norm is that of the whole tree; where it is 0 the step is 0. A non-finite
    gradient or product (but for that of the first step, which is with 0 and not used) makes everything NaN at this step
    and after, or its coordinate where normalize is False; `optax.apply_if_finite` skips steps by the gradient alone.
    Inside `optax.masked` `obj_fn` is given `optax.MaskedNode` for the parameters left out.

    Source: I. Fatkhullin, A. Barakat, A. Kireeva, N. He, "Stochastic Policy Gradient Methods: Improved Sample
    Complexity for Fisher-non-degenerate Policies", 2023, arXiv 2302.01734, algorithm (N)-HARPG.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda x: jnp.sum((x - 1) ** 4)
      >>> optimiser = harp(lambda t: 2.0 / (t + 2), jax.random.key(0))
      >>> x = jnp.array([3.0, -2.0])
      >>> state = optimiser.init(x)
      >>> for _ in range(100):
      ...     updates, state = optimiser.update(jax.grad(loss)(x), state, x, obj_fn=loss)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True
    """
    check_numbers("harp", "be at least 0", lambda x: x >= 0, dict(learning_rate=learning_rate))
    momentum = _scale_by_harp("harp", key, eta_power, normalize)
    return _strict.in_dtypes_of_params(optax.chain(momentum, optax.scale_by_learning_rate(learning_rate)))


def scale_by_harp(
    key: jax.Array, *, eta_power: float | jax.Array = 1.0, normalize: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient by d_t / ||d_t||, or d_t, of `harp`.

    Args, errors, cost, numerics and source: see `harp`. The state is a `HarpState`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates point uphill, as the gradient does; chain it with
      `optax.scale_by_learning_rate`.
    """
    return _scale_by_harp("scale_by_harp", key, eta_power, normalize)


def _scale_by_harp(
    function: str, key: jax.Array, eta_power: Any, normalize: bool
) -> optax.GradientTransformationExtraArgs:
    arguments.typed_key(function, key)
    check_numbers(function, "be in (0, 1]", lambda x: 0 < x <= 1, dict(eta_power=eta_power))

    def init(params: PyTree) -> HarpState:
        _strict.parameters(function, params, "floating")
        d = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=accumulator(jnp.result_type(p))), params)
        return HarpState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.array, params), d)

    def update(
        updates: PyTree,
        state: HarpState,
        params: PyTree = None,
        *,
        obj_fn: Callable[[PyTree], jax.Array] | None = None,
        hvp_fn: Callable[[PyTree, PyTree], PyTree] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, HarpState]:
        del extra_args
        _strict.matching(function, updates, params, "floating")
        given = obj_fn is not None or hvp_fn is not None
        remedy = "Call update(updates, state, params, obj_fn=loss)."
        checks.value(function, "obj_fn", given, "be given, or hvp_fn", None, remedy)
        if hvp_fn is None:
            assert obj_fn is not None
            hvp_fn = partial(hessian_vector, function, "obj_fn", obj_fn, mode="auto")
        q = jax.random.uniform(jax.random.fold_in(key, state.count))
        between = jax.tree.map(lambda p, old: (q * p + (1 - q) * old).astype(p.dtype), params, state.previous)
        change = jax.tree.map(jnp.subtract, params, state.previous)
        product = hvp_fn(between, change)
        checks.same_tree(function, ("params", params), dtypes=False, remedy="", **{"hvp_fn(...)": product})
        eta = (2 / (jnp.asarray(state.count, float) + 2)) ** eta_power

        def leaf(d: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
            # Nothing has moved before the first step, whatever a product with 0 may be.
            old = jnp.where(state.count == 0, 0, d + v.astype(d.dtype))
            return ((1 - eta) * old + eta * g.astype(d.dtype)).astype(d.dtype)

        d = jax.tree.map(leaf, state.d, product, updates)
        norm = norm_or_one(d) if normalize else 1.0
        moved = jax.tree.map(lambda d, g: (d / norm).astype(g.dtype), d, updates)
        return moved, HarpState(jnp.asarray(optax.safe_increment(state.count)), params, d)

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
