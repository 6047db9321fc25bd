"""Sophia: momentum divided by an estimate of the diagonal curvature, clipped coordinate by coordinate.

For pre-training language models. The curvature is refreshed every `update_interval` steps only, so a step
costs hardly more than one of momentum. Under `jax.vmap` the refresh is paid at every step: vmap runs both
branches.
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


class SophiaState(NamedTuple):
    """State of `scale_by_sophia`."""

    count: jax.Array  # [] int32, steps taken
    mu: PyTree  # momentum, like params, moment_dtype
    nu: PyTree  # moving average of the curvature estimates, like params, moment_dtype
    win_rate: jax.Array  # [] float32, share of coordinates that the last refresh step did not clip
    hessian_state: PyTree  # state of hessian_fn


def sophia(
    learning_rate: optax.ScalarOrSchedule,
    hessian_fn: optax.GradientTransformation,
    *,
    b1: float | jax.Array = 0.965,
    b2: float | jax.Array = 0.99,
    gamma: float | jax.Array = 0.01,
    eps: float | jax.Array = 1e-12,
    clip: float | jax.Array = 1.0,
    weight_decay: float | jax.Array = 0.2,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    update_interval: int | jax.Array = 10,
    order: str = "before",
    bias_correct_mu: bool = False,
    moment_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Sophia with decoupled weight decay, as an optimiser ready for use.

    At step t with gradient g, learning rate η and weight decay λ:

        m_t = b1 m_{t-1} + (1 - b1) g
        h_t = b2 h_{t-k} + (1 - b2) estimate(θ_t)   every k = update_interval steps, else h_{t-1}
        θ_{t+1} = (1 - η λ) θ_t - η clip(m_t / max(gamma h_t, eps), ±clip)

    Where the curvature is negative or tiny, max(.) is eps and the step is that of signed momentum.

    Args:
      learning_rate: η >= 0, a number or a schedule.
      hessian_fn: estimator of the diagonal curvature, `jaxnum.curvature.hutchinson(key)` (Sophia-H, pass
        `obj_fn=` to `update`) or `jaxnum.curvature.gauss_newton_bartlett(key)` (Sophia-G, pass `logits_fn=`).
        Any transformation that returns a tree like `params` serves.
      b1: decay of the momentum, in [0, 1). The paper has 0.96, its released code 0.965.
      b2: decay of the curvature average, in [0, 1).
      gamma: > 0, scales the curvature; 0.01 for Sophia-H, 0.05 for Sophia-G. Tune it so that the state's
        `win_rate` stays in 0.1 to 0.5.
      eps: > 0, least denominator.
      clip: > 0, largest magnitude of a coordinate's step before the learning rate.
      weight_decay: λ >= 0.
      weight_decay_mask: tree of bools, prefix of `params`, or a function that makes it from `params`; decay
        only where True.
      update_interval: k >= 1, steps between refreshes of the curvature.
      order: "before" refreshes the curvature and then steps (the paper); "after" steps with the old curvature
        and then refreshes, so that the first step is a sign step (`optax.contrib.sophia`).
      bias_correct_mu: divide the momentum by 1 - b1^t. The paper does not; `optax.contrib.sophia` does.
      moment_dtype: dtype of both moments; None takes the wider of float32 and the parameter's own dtype. Give
        it as a string ("float32") under `optax.inject_hyperparams`, which takes any callable for a schedule.

    Returns:
      An `optax.GradientTransformationExtraArgs`; extra arguments of `update` go to `hessian_fn`.

    Raises:
      ValueError: an option out of range; at update, `params` or an argument that `hessian_fn` needs is
        missing.
      TypeError: `hessian_fn` is not an optax transformation.
      TreeError, ShapeError, DtypeError: updates or estimates that do not match real floating-point `params`.

    Cost: one fused pass over parameters, gradient and two moments; at a refresh the estimator (one to three
    gradients) and one more pass. Memory: two moments.

    Numerics: moments, quotient and clip are in `moment_dtype` and at least float32; the update has the
    parameters' dtype. Nothing non-finite is clipped into a plausible step: where the momentum or the
    curvature of a coordinate is inf or NaN its update is NaN, at that step and after. `optax.apply_if_finite`
    skips bad gradients. With float16 parameters give `optax.inject_hyperparams` a float32 `hyperparam_dtype`,
    or eps becomes 0, and name a mask that is a function in its `static_args`.

    Source: H. Liu, Z. Li, D. Hall, P. Liang, T. Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for
    Language Model Pre-training", 2023, arXiv 2305.14342, Algorithm 3. `order="after", bias_correct_mu=True,
    eps=1e-8` equals `optax.contrib.sophia`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxnum.curvature import hutchinson
      >>> loss = lambda x: jnp.sum(x**4)
      >>> estimator = hutchinson(jax.random.key(0))
      >>> optimiser = sophia(0.1, estimator, b1=0.5, gamma=1.0, weight_decay=0.0)
      >>> @jax.jit
      ... def step(x, state):
      ...     updates, state = optimiser.update(jax.grad(loss)(x), state, x, obj_fn=loss)
      ...     return optax.apply_updates(x, updates), state
      >>> x = jnp.array([1.0, -2.0])
      >>> state = optimiser.init(x)
      >>> for _ in range(100):
      ...     x, state = step(x, state)
      >>> bool(loss(x) < 1e-2)
      True
    """
    check_numbers(
        "sophia", "be at least 0", lambda x: x >= 0, dict(learning_rate=learning_rate, weight_decay=weight_decay)
    )
    scaled = _scale_by_sophia(
        "sophia", hessian_fn, b1, b2, gamma, eps, clip, update_interval, order, bias_correct_mu, moment_dtype
    )
    chain = optax.chain(
        scaled,
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _strict.in_dtypes_of_params(chain)


def scale_by_sophia(
    hessian_fn: optax.GradientTransformation,
    *,
    b1: float | jax.Array = 0.965,
    b2: float | jax.Array = 0.99,
    gamma: float | jax.Array = 0.01,
    eps: float | jax.Array = 1e-12,
    clip: float | jax.Array = 1.0,
    update_interval: int | jax.Array = 10,
    order: str = "before",
    bias_correct_mu: bool = False,
    moment_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient by clip(m / max(gamma h, eps), ±clip), Sophia's step without rate and decay.

    Args, errors, cost, numerics (non-finite gradients included) and source: see `sophia`. The state is a
    `SophiaState`; its `win_rate` is measured at refresh steps only, since counting at each step would cost
    more than the step.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates point uphill, as the gradient does; chain it
      with `optax.scale_by_learning_rate`.
    """
    return _scale_by_sophia(
        "scale_by_sophia",
        hessian_fn,
        b1,
        b2,
        gamma,
        eps,
        clip,
        update_interval,
        order,
        bias_correct_mu,
        moment_dtype,
    )


def _scale_by_sophia(
    function: str,
    hessian_fn: optax.GradientTransformation,
    b1: Any,
    b2: Any,
    gamma: Any,
    eps: Any,
    clip: Any,
    update_interval: Any,
    order: str,
    bias_correct_mu: bool,
    moment_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    _strict.transformation(function, "hessian_fn", hessian_fn)
    check_numbers(function, "be in [0, 1)", lambda x: 0 <= x < 1, dict(b1=b1, b2=b2))
    check_numbers(function, "be greater than 0", lambda x: x > 0, dict(gamma=gamma, eps=eps, clip=clip))
    check_numbers(function, "be at least 1", lambda x: x >= 1, dict(update_interval=update_interval))
    checks.choice(function, "order", order, ("before", "after"))
    hessian_fn = optax.with_extra_args_support(hessian_fn)
    direction = partial(_direction, gamma, eps, clip)

    def init(params: PyTree) -> SophiaState:
        _strict.parameters(function, params, "floating")

        def zeros(p: Any) -> jax.Array:
            return jnp.zeros_like(p, dtype=moment_dtype or accumulator(jnp.result_type(p)))

        return SophiaState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(zeros, params),
            nu=jax.tree.map(zeros, params),
            win_rate=jnp.zeros([], jnp.float32),
            hessian_state=hessian_fn.init(params),
        )

    def update(
        updates: PyTree, state: SophiaState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, SophiaState]:
        _strict.matching(function, updates, params, "floating")
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = jax.tree.map(partial(moments.average, b1), state.mu, updates)
        unbiased = jax.tree.map(lambda m: (m / (1 - b1**count)).astype(m.dtype), mu) if bias_correct_mu else mu

        def refresh(nu: PyTree, win_rate: jax.Array, hessian_state: PyTree) -> tuple[PyTree, jax.Array, PyTree]:
            del win_rate
            estimate, hessian_state = hessian_fn.update(updates, hessian_state, params, **extra_args)
            remedy = "hessian_fn must estimate every parameter."
            checks.same_tree(
                function, ("params", params), dtypes=False, remedy=remedy, **{"hessian_fn.update(...)": estimate}
            )
            fresh = jax.tree.map(lambda n, h: moments.average(b2, n, h).astype(n.dtype), nu, estimate)
            used = fresh if order == "before" else nu
            return fresh, _win_rate(gamma, eps, clip, unbiased, used), hessian_state

        nu, win_rate, hessian_state = jax.lax.cond(
            state.count % update_interval == 0,
            refresh,
            lambda *kept: kept,
            state.nu,
            state.win_rate,
            state.hessian_state,
        )
        used = nu if order == "before" else state.nu
        steps = jax.tree.map(lambda g, m, h: direction(m, h).astype(g.dtype), updates, unbiased, used)
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
        return steps, SophiaState(count, mu, nu, win_rate, hessian_state)

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _direction(gamma: Any, eps: Any, clip: Any, m: jax.Array, h: jax.Array) -> jax.Array:
    """One leaf's step, NaN where m or h is not finite: the clip would turn inf into a plain step."""
    step = jnp.clip(m / jnp.maximum(gamma * h.astype(m.dtype), eps), -clip, clip)
    return jnp.where(jnp.isfinite(m) & jnp.isfinite(h), step, jnp.nan)


def _win_rate(gamma: Any, eps: Any, clip: Any, mu: PyTree, nu: PyTree) -> jax.Array:
    """Share of coordinates whose quotient is inside the clip, [] float32."""

    def inside(m: jax.Array, h: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(m) < clip * jnp.maximum(gamma * h.astype(m.dtype), eps), dtype=jnp.float32)

    counts = jax.tree.leaves(jax.tree.map(inside, mu, nu))
    size = sum(m.size for m in jax.tree.leaves(mu))
    return jnp.asarray(sum(counts) / max(size, 1), jnp.float32)
