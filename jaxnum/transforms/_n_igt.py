"""Normalised momentum with implicit gradient transport: gradients are taken where the momentum's bias cancels."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.core.precision import accumulator
from jaxnum.transforms import _strict
from jaxnum.transforms.moments import check_numbers, norm_or_one, states
from kernels_pallas import checks

PyTree = Any


class NIgtState(NamedTuple):
    """State of `n_igt`."""

    count: jax.Array  # [] int32, steps taken
    x: PyTree  # the iterate, like params, at least float32
    d: PyTree  # moving average of transported gradients, like params, at least float32


def n_igt(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eta_power: float | jax.Array = 0.8,
    weight_decay: float | jax.Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Normalised steps along a momentum whose gradients are taken ahead of the iterate.

    With η_t = (2 / (t + 2))^eta_power, t = 0, 1, ..., and gradient g_t at the transported point y_t, y_0 = x_0:

        d_t = (1 - η_t) d_{t-1} + η_t g_t
        x_{t+1} = (1 - γ_t λ) x_t - γ_t d_t / ||d_t||
        y_{t+1} = x_{t+1} + ((1 - η_{t+1}) / η_{t+1}) (x_{t+1} - x_t)

    On a quadratic d_t is the gradient at x_t plus an average of the noise alone: ordinary momentum lags behind. The
    parameters that the training loop holds are y_t; `n_igt_params` gives x_t, to be evaluated and kept.

    Args:
      learning_rate: γ >= 0, the length of a step, a number or a schedule; γ_0 / (t + 2) in the paper.
      eta_power: in (0, 1]; the paper's 4/5.
      weight_decay: λ >= 0, on x. Decay, clipping or averaging chained behind would act on y.

    Returns:
      An `optax.GradientTransformationExtraArgs`; clip gradients before it.

    Raises:
      ValueError: an option out of range; at update, `params` is missing.
      TreeError, ShapeError, DtypeError: updates that do not match real floating-point `params`.

    Cost: two passes over parameters and gradient. Memory: the iterate and the momentum.

    Numerics: x and d in at least float32; the transport is tens of steps long, and bfloat16 parameters lose some of it.
    The norm is that of the whole tree; where it is 0 the step is 0. A non-finite gradient makes everything NaN at this
    step and after; `optax.apply_if_finite` skips such steps.

    Source: I. Fatkhullin, A. Barakat, A. Kireeva, N. He, "Stochastic Policy Gradient Methods: Improved Sample
    Complexity for Fisher-non-degenerate Policies", 2023, arXiv 2302.01734, algorithm N-PG-IGT; A. Cutkosky, H. Mehta,
    "Momentum Improves Normalized SGD", 2020, arXiv 2002.03305.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda x: jnp.sum((x - 1) ** 2)
      >>> optimiser = n_igt(lambda t: 2.0 / (t + 2))
      >>> y = jnp.array([3.0, -2.0])
      >>> state = optimiser.init(y)
      >>> for _ in range(100):
      ...     updates, state = optimiser.update(jax.grad(loss)(y), state, y)
      ...     y = optax.apply_updates(y, updates)
      >>> bool(loss(n_igt_params(state, y)) < 1e-2)
      True
    """
    check_numbers(
        "n_igt", "be at least 0", lambda x: x >= 0, dict(learning_rate=learning_rate, weight_decay=weight_decay)
    )
    check_numbers("n_igt", "be in (0, 1]", lambda x: 0 < x <= 1, dict(eta_power=eta_power))

    def init(params: PyTree) -> NIgtState:
        _strict.parameters("n_igt", params, "floating")
        x = jax.tree.map(lambda p: jnp.array(p, accumulator(jnp.result_type(p))), params)
        return NIgtState(jnp.zeros([], jnp.int32), x, jax.tree.map(jnp.zeros_like, x))

    def update(updates: PyTree, state: NIgtState, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, NIgtState]:
        del extra_args
        _strict.matching("n_igt", updates, params, "floating")
        rate = jnp.asarray(learning_rate(state.count) if callable(learning_rate) else learning_rate)
        eta, following = ((2 / (jnp.asarray(t, float) + 2)) ** eta_power for t in (state.count, state.count + 1))
        ahead = (1 - following) / following
        d = jax.tree.map(lambda d, g: ((1 - eta) * d + eta * g.astype(d.dtype)).astype(d.dtype), state.d, updates)
        inverse = 1 / norm_or_one(d)  # XLA repeats a product in two passes and stores a quotient between them
        shrunk = 0.0 if isinstance(weight_decay, int | float) and weight_decay == 0 else rate * weight_decay
        x = jax.tree.map(lambda x, d: (x - shrunk * x - rate * (inverse * d)).astype(x.dtype), state.x, d)

        def transported(new: jax.Array, old: jax.Array, d: jax.Array, p: jax.Array) -> jax.Array:
            # Not new - old, which has lost digits. Without decay the old iterate is not read: XLA would copy its
            # donated buffer before the new one is put there.
            change = -rate * (inverse * d)
            change = change if isinstance(shrunk, float) else change - shrunk * old
            return (new + ahead * change - p).astype(p.dtype)

        moved = jax.tree.map(transported, x, state.x, d, params)
        return moved, NIgtState(jnp.asarray(optax.safe_increment(state.count)), x, d)

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def n_igt_params(state: PyTree, params: PyTree) -> PyTree:
    """The iterate x of `n_igt`, where a model is evaluated and what a checkpoint should keep.

    Args:
      state: an `NIgtState`, or the state of an optimiser that holds one, chained or injected, and steps all of
        `params`: not masked, nor one of several groups.
      params: the parameters of the training loop, for their dtypes.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: there is no `NIgtState` in `state`, or more than one.

    Cost: none but a change of dtype.

    Source: as `n_igt`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones(2)
      >>> print(n_igt_params(n_igt(0.1).init(x), x).tolist())
      [1.0, 1.0]
    """
    found = states(state, NIgtState)
    checks.value("n_igt_params", "state", len(found) == 1, "hold one NIgtState", len(found), "Pass n_igt's state.")
    return jax.tree.map(lambda x, p: x.astype(jnp.result_type(p)), found[0].x, params)
