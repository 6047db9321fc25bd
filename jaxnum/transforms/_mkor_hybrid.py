"""MKOR-H: a second-order method until the loss falls no faster, and a first-order one from then on."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.transforms import _strict
from jaxnum.transforms.moments import check_numbers
from kernels_pallas import checks
from kernels_pallas.checks import DtypeError, ShapeError

PyTree = Any


class MkorHybridState(NamedTuple):
    """State of `mkor_hybrid`."""

    count: jax.Array  # [] int32, losses seen in this window
    total: jax.Array  # [] float32, their sum
    previous: jax.Array  # [] float32, mean loss of the window before; NaN before there is one
    slow: jax.Array  # [] int32, windows in a row whose loss fell too little
    switched: jax.Array  # [] bool, whether the first-order method has taken over
    second: PyTree  # state of second_order, which rests after the switch
    first: PyTree  # state of first_order, which rests before it


def mkor_hybrid(
    second_order: optax.GradientTransformation,
    first_order: optax.GradientTransformation,
    *,
    threshold: float | jax.Array = 0.01,
    patience: int | jax.Array = 2,
    window: int | jax.Array = 50,
) -> optax.GradientTransformationExtraArgs:
    """Step by one method while the loss falls fast, and by another for good once it does not.

    With ℓ_w the mean of the losses of window w and r_w = (ℓ_{w-1} - ℓ_w) / |ℓ_{w-1}|, the switch is thrown by the step
    that ends the `patience`-th window in a row with r_w < threshold; the step itself is still `second_order`'s.

    The paper bypasses the factors and keeps the momentum:

        optax.chain(mkor_hybrid(scale_by_mkor(layers), optax.identity()), optax.trace(0.9),
                    optax.scale_by_learning_rate(rate))

    and `mkor_hybrid(mkor(rate, layers), optax.adamw(...))` changes everything, with moments that begin at the switch.

    Args:
      second_order: transformation to begin with.
      first_order: transformation to end with.
      threshold: relative decrease of the loss from window to window below which the first does not pay.
      patience: at least 1, windows.
      window: at least 1, steps in one.

    Returns:
      An `optax.GradientTransformationExtraArgs`. `update` needs
        value: [] floating, the loss of the step; the global one under data parallelism, as `mkor_stats` returns it,
      and what the two methods need, `stats` of `mkor` also after the switch. The state is an `MkorHybridState`.

    Raises:
      ValueError: an option out of range; at update, `params` or `value` is missing.
      TypeError: an argument is not an optax transformation.
      TreeError, ShapeError, DtypeError: a `value` that is no floating-point scalar; updates that do not match real
        floating-point `params`.

    Cost: one of the two methods a step, chosen at run time (under `jax.vmap` both). Memory: both states.

    Numerics: losses are summed in float32. A window with a loss that is not finite has no verdict and neither has the
    one after it: neither switches, and the count of slow windows starts again. Non-finite gradients go to the method
    in charge.

    Source: M. Mozaffari, S. Li, Z. Zhang, M. M. Dehnavi, "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using
    Rank-1 Updates", 2023, arXiv 2306.01685, section 3, MKOR-H. It names no threshold: the defaults are ours.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimiser = mkor_hybrid(optax.scale(-1.0), optax.scale(-0.1), window=1, patience=1)
      >>> x = jnp.ones(1)
      >>> state = optimiser.init(x)
      >>> for value in (4.0, 2.0, 2.0, 1.0):
      ...     step, state = optimiser.update(x, state, x, value=value)
      ...     print(round(float(step[0]), 1), bool(state.switched))
      -1.0 False
      -1.0 False
      -1.0 True
      -0.1 True
    """
    _strict.transformation("mkor_hybrid", "second_order", second_order)
    _strict.transformation("mkor_hybrid", "first_order", first_order)
    check_numbers("mkor_hybrid", "be at least 1", lambda x: x >= 1, dict(patience=patience, window=window))
    second_order = optax.with_extra_args_support(second_order)
    first_order = optax.with_extra_args_support(first_order)

    def init(params: PyTree) -> MkorHybridState:
        _strict.parameters("mkor_hybrid", params, "floating")
        return MkorHybridState(
            count=jnp.zeros([], jnp.int32),
            total=jnp.zeros([], jnp.float32),
            previous=jnp.full([], jnp.nan, jnp.float32),
            slow=jnp.zeros([], jnp.int32),
            switched=jnp.zeros([], bool),
            second=second_order.init(params),
            first=first_order.init(params),
        )

    def update(
        updates: PyTree, state: MkorHybridState, params: PyTree = None, *, value: Any = None, **extra_args: Any
    ) -> tuple[PyTree, MkorHybridState]:
        _strict.matching("mkor_hybrid", updates, params, "floating")
        _check_value(value)

        def alike(moved: PyTree) -> PyTree:
            # One method may widen the gradient's dtype where the other does not.
            return jax.tree.map(lambda m, u: m.astype(u.dtype), moved, updates)

        def by_first(first: PyTree, second: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            moved, first = first_order.update(updates, first, params, value=value, **extra_args)
            return alike(moved), first, second

        def by_second(first: PyTree, second: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            moved, second = second_order.update(updates, second, params, value=value, **extra_args)
            return alike(moved), first, second

        moved, first, second = jax.lax.cond(state.switched, by_first, by_second, state.first, state.second)
        watched = _watched(state, value, threshold, patience, window)
        return moved, watched._replace(first=first, second=second)

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _check_value(value: Any) -> None:
    remedy = "Pass update(updates, state, params, value=loss)."
    checks.value("mkor_hybrid", "value", value is not None, "be given, the loss of the step", None, remedy)
    shape, dtype = tuple(jnp.shape(value)), jnp.result_type(value)
    checks.value("mkor_hybrid", "value", shape == (), "have shape ()", shape, remedy, ShapeError)
    real = jnp.issubdtype(dtype, jnp.floating)
    checks.value("mkor_hybrid", "value", real, "have a floating-point dtype", dtype, remedy, DtypeError)


def _watched(state: MkorHybridState, value: Any, threshold: Any, patience: Any, window: Any) -> MkorHybridState:
    """The state after one more loss."""
    count, total = state.count + 1, state.total + jnp.asarray(value, jnp.float32)
    ends = count >= window
    mean = total / count
    decrease = (state.previous - mean) / jnp.abs(state.previous)
    too_little = jnp.isfinite(decrease) & (decrease < threshold)
    slow = jnp.where(ends, jnp.where(too_little, state.slow + 1, 0), state.slow)
    return state._replace(
        count=jnp.where(ends, 0, count),
        total=jnp.where(ends, 0.0, total),
        previous=jnp.where(ends, mean, state.previous),
        slow=slow,
        switched=state.switched | (slow >= patience),
    )
