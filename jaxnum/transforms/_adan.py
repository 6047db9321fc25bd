"""Adan: moments of the gradient and of its change from step to step, with the paper's coefficient.

`optax.adan` multiplies that change by 1 - b2 = 0.08 where the method has 0.92: the paper writes its decays the other
way round, and no choice of b2 repairs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.core.precision import accumulator
from jaxnum.transforms import _strict, moments
from jaxnum.transforms.moments import check_numbers
from kernels_pallas import checks

PyTree = Any


class AdanState(NamedTuple):
    """State of `scale_by_adan`."""

    count: jax.Array  # [] int32, steps taken
    m: PyTree  # moving average of gradients, like params, moment_dtype
    v: PyTree  # moving average of the gradients' changes, like params, moment_dtype
    n: PyTree  # moving average of squared extrapolated gradients, like params, moment_dtype
    previous: PyTree  # gradient of the step before, like params


def adan(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.98,
    b2: float | jax.Array = 0.92,
    b3: float | jax.Array = 0.99,
    eps: float | jax.Array = 1e-8,
    eps_root: float | jax.Array = 0.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    decay: str = "proximal",
    max_grad_norm: float | None = None,
    moment_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adan with weight decay, as an optimiser ready for use.

    At step k with gradient g_k, learning rate η and weight decay λ, from m = v = n = 0:

        d_k = g_k - g_{k-1}, d_1 = 0
        m_k = b1 m_{k-1} + (1 - b1) g_k
        v_k = b2 v_{k-1} + (1 - b2) d_k
        n_k = b3 n_{k-1} + (1 - b3) (g_k + b2 d_k)²
        u_k = (m_k / (1 - b1^k) + b2 v_k / (1 - b2^k)) / (sqrt(n_k / (1 - b3^k) + eps_root) + eps)
        θ <- (θ - η u_k) / (1 + η λ)   with decay="proximal",
        θ <- (1 - η λ) θ - η u_k       with decay="decoupled".

    The paper's β is 1 - b throughout.

    Args:
      learning_rate: η >= 0, a number or a schedule. Adan bears larger ones than AdamW.
      b1: decay of the gradients' average, in [0, 1).
      b2: decay of the average of changes and weight of the change, in [0, 1).
      b3: decay of the average of squares, in [0, 1).
      eps: >= 0, added to the root.
      eps_root: >= 0, added under the root. `optax.adan` has 1e-8 here.
      weight_decay: λ >= 0.
      weight_decay_mask: tree of bools, prefix of `params`, or a function that makes it from `params`; decay only
        where True.
      decay: "proximal", of the paper and the released code's default, or "decoupled", as in AdamW.
      max_grad_norm: > 0, gradients of larger global norm are scaled down to it first, and the gradient remembered is
        the scaled one; None scales none.
      moment_dtype: dtype of m, v, n; None takes the wider of float32 and the parameter's own dtype. Give it as a string
        ("float32") under `optax.inject_hyperparams`, which takes any callable for a schedule.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an option out of range; at update, `params` is missing.
      TreeError, ShapeError, DtypeError: updates that do not match real floating-point `params`.

    Cost: one fused pass over parameters, gradient and four buffers. Memory: three moments and the previous gradient,
    twice what Adam keeps.

    Numerics: the change d_k is a difference of nearly equal numbers: it and the moments are formed in `moment_dtype`
    and at least float32, whatever the gradient's dtype; the update has the parameters' dtype. 1 - b^k is computed
    without cancellation. A gradient that is inf or NaN, or too large for its square (1e19 in float32), makes that
    coordinate NaN at this step and after, and with `max_grad_norm` one that is inf or NaN makes all NaN;
    `optax.apply_if_finite` skips such steps. With eps = eps_root = 0 a coordinate whose gradients are all 0 is NaN.
    Under `optax.inject_hyperparams` name a mask that is a function in `static_args`, and with float16 parameters give
    a float32 `hyperparam_dtype`, or eps becomes 0.

    Source: X. Xie, P. Zhou, H. Li, Z. Lin, S. Yan, "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing
    Deep Models", 2022, arXiv 2208.06677, Algorithm 1; bias corrections, and eps outside the root, of its released code.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda x: jnp.sum((x - 1) ** 2)
      >>> optimiser = adan(0.1)
      >>> x = jnp.array([3.0, -2.0])
      >>> state = optimiser.init(x)
      >>> for _ in range(300):
      ...     updates, state = optimiser.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 0.1)
      True
    """
    checks.choice("adan", "decay", decay, ("proximal", "decoupled"))
    check_numbers(
        "adan", "be at least 0", lambda x: x >= 0, dict(learning_rate=learning_rate, weight_decay=weight_decay)
    )
    if max_grad_norm is not None:
        check_numbers("adan", "be greater than 0", lambda x: x > 0, dict(max_grad_norm=max_grad_norm))
    clip = optax.identity() if max_grad_norm is None else moments.clip_by_norm(max_grad_norm)
    scaled = _scale_by_adan("adan", b1, b2, b3, eps, eps_root, moment_dtype)
    if decay == "proximal":
        last = _proximal_decay(learning_rate, weight_decay, weight_decay_mask)
    else:
        decayed = optax.add_decayed_weights(weight_decay, weight_decay_mask)
        last = optax.chain(decayed, optax.scale_by_learning_rate(learning_rate))
    return _strict.in_dtypes_of_params(optax.chain(clip, scaled, last))


def scale_by_adan(
    *,
    b1: float | jax.Array = 0.98,
    b2: float | jax.Array = 0.92,
    b3: float | jax.Array = 0.99,
    eps: float | jax.Array = 1e-8,
    eps_root: float | jax.Array = 0.0,
    moment_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient by u_k, Adan's step without rate and decay.

    Args, errors, cost, numerics (non-finite gradients included) and source: see `adan`. The state is an `AdanState`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates point uphill, as the gradient does; chain it with
      `optax.scale_by_learning_rate`.
    """
    return _scale_by_adan("scale_by_adan", b1, b2, b3, eps, eps_root, moment_dtype)


def adan_restart(state: PyTree) -> PyTree:
    """Forget the moments and the previous gradient, as the paper's restart condition asks now and then.

    Args:
      state: an `AdanState`, or the state of any optimiser that holds some, chained, masked or injected.

    Returns:
      The same tree, each `AdanState` as `init` made it and everything else, the schedule's count among it, as it was.

    Raises:
      ValueError: there is no `AdanState` in it.

    Cost: new zeros for five buffers.

    Source: as `adan`, Algorithm 1, line 9.

    Example:
      >>> import jax.numpy as jnp
      >>> optimiser = adan(0.1)
      >>> x = jnp.ones(2)
      >>> _, state = optimiser.update(x, optimiser.init(x), x)
      >>> int(adan_restart(state)[1].count)
      0
    """

    def is_adan(node: Any) -> bool:
        return isinstance(node, AdanState)

    found = bool(moments.states(state, AdanState))
    checks.value("adan_restart", "state", found, "hold an AdanState", type(state).__name__, "Pass adan's state.")
    return jax.tree.map(
        lambda node: jax.tree.map(jnp.zeros_like, node) if is_adan(node) else node, state, is_leaf=is_adan
    )


def _scale_by_adan(
    function: str, b1: Any, b2: Any, b3: Any, eps: Any, eps_root: Any, moment_dtype: Any
) -> optax.GradientTransformationExtraArgs:
    check_numbers(function, "be in [0, 1)", lambda x: 0 <= x < 1, dict(b1=b1, b2=b2, b3=b3))
    check_numbers(function, "be at least 0", lambda x: x >= 0, dict(eps=eps, eps_root=eps_root))

    def init(params: PyTree) -> AdanState:
        _strict.parameters(function, params, "floating")

        def zeros(p: Any) -> jax.Array:
            return jnp.zeros_like(p, dtype=moment_dtype or accumulator(jnp.result_type(p)))

        m, v, n = (jax.tree.map(zeros, params) for _ in range(3))
        return AdanState(jnp.zeros([], jnp.int32), m, v, n, jax.tree.map(jnp.zeros_like, params))

    def update(updates: PyTree, state: AdanState, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, AdanState]:
        del extra_args
        _strict.matching(function, updates, params, "floating")
        count = jnp.asarray(optax.safe_increment(state.count))
        corrections = tuple(moments.one_minus_power(b, count) for b in (b1, b2, b3))

        def leaf(g: jax.Array, m: jax.Array, v: jax.Array, n: jax.Array, before: jax.Array) -> tuple[jax.Array, ...]:
            wide = accumulator(m.dtype)
            c1, c2, c3 = (c.astype(wide) for c in corrections)
            gradient = g.astype(wide)
            change = jnp.where(state.count == 0, 0, gradient - before.astype(wide))
            m_, v_ = moments.average(b1, m, gradient), moments.average(b2, v, change)
            n_ = moments.average(b3, n, jnp.square(gradient + b2 * change))
            step = (m_ / c1 + b2 * (v_ / c2)) / (jnp.sqrt(n_ / c3 + eps_root) + eps)
            step = jnp.where(jnp.isinf(n_), jnp.nan, step)
            return step.astype(g.dtype), m_.astype(m.dtype), v_.astype(v.dtype), n_.astype(n.dtype)

        leaves, tree = jax.tree.flatten(updates)
        columns = (jax.tree.leaves(t) for t in (state.m, state.v, state.n, state.previous))
        moved = [leaf(*row) for row in zip(leaves, *columns, strict=True)]
        steps, m, v, n = (jax.tree.unflatten(tree, [row[i] for row in moved]) for i in range(4))
        previous = jax.tree.map(lambda g, v, n: moments.after(count, g, v + n), updates, v, n)
        return steps, AdanState(count, m, v, n, previous)

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _proximal_decay(
    learning_rate: optax.ScalarOrSchedule, weight_decay: Any, mask: PyTree | Callable[[PyTree], PyTree] | None
) -> optax.GradientTransformationExtraArgs:
    """From u to (θ - η u) / (1 + η λ) - θ: the rate must be known where the decay is applied."""

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(
        updates: PyTree, state: optax.ScaleByScheduleState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, optax.ScaleByScheduleState]:
        del extra_args
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        marked = mask(params) if callable(mask) else mask

        def leaf(decays: bool, u: jax.Array, p: jax.Array) -> jax.Array:
            step = rate * (u + weight_decay * p) / (1 + rate * weight_decay) if decays else rate * u
            return -jnp.asarray(step).astype(u.dtype)

        if marked is None:
            moved = jax.tree.map(partial(leaf, True), updates, params)
        else:
            moved = jax.tree.map(lambda d, u, p: jax.tree.map(partial(leaf, d), u, p), marked, updates, params)
        return moved, optax.ScaleByScheduleState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
