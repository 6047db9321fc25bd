"""Target-based surrogates: many cheap steps of the model for one expensive gradient at its outputs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.core.precision import accumulator
from kernels_pallas import checks

PyTree = Any


class SsoState(NamedTuple):
    """State of `sso`."""

    count: jax.Array  # [] int32, outer steps, which is expensive calls
    inner_steps: jax.Array  # [] int32, inner steps of all outer steps together


class SsoInfo(NamedTuple):
    """What one outer step of `sso` saw."""

    loss: jax.Array  # [], of the expensive call, before the step
    inner_steps: jax.Array  # [] int32, steps taken, fewer than num_inner after an early exit
    surrogate: jax.Array  # [], its value after the step; it was 0 before
    decreased: jax.Array  # [] bool, whether that is below 0
    grad_norm: jax.Array  # [], of the surrogate's gradient after the step


def sso(
    inner: optax.GradientTransformation,
    num_inner: int,
    eta: optax.ScalarOrSchedule,
    *,
    tolerance: float | jax.Array = 0.0,
) -> tuple[Callable[[PyTree], SsoState], Callable[..., tuple[PyTree, SsoState, SsoInfo]]]:
    """Amortise a gradient that is expensive with respect to a model's outputs over many steps of the model.

    For a loss l(f(θ)) whose gradient d = dl/dz at z = f(θ_t) takes a simulator, an expert or an adversary, while f and
    its derivatives are cheap. Each outer step asks for d once and takes `num_inner` steps of `inner` from θ_t on

        g_t(θ) = <d, f(θ) - z> + ||f(θ) - z||^2 / (2 η_t).

    With one step of gradient descent this is gradient descent. Where l is L-smooth in z and η <= 1 / L,
    l(f(θ)) <= l(z) + g_t(θ) on the batch that z comes from: what lowers the surrogate lowers the loss. For many steps
    it is projected gradient descent among the outputs, with steps η.

    Args:
      inner: any optax transformation, started afresh in each outer step, since the surrogate is another. `update` gets
        `value`, `grad` and `value_fn` of the surrogate, as line searches and `optax.lbfgs` want them. The paper's is
        `optax.chain(optax.scale(-10.0), optax.scale_by_backtracking_linesearch(60, slope_rtol=0.5,
        decrease_factor=0.9))`.
      num_inner: m >= 1, largest number of inner steps.
      eta: η > 0, a number or a schedule over outer steps: constant for a full batch, where the model can fit all
        targets; `lambda t: eta / jnp.sqrt(t + 1.0)` or `optax.exponential_decay(eta, steps, 1 / steps)` for noisy
        gradients. For the mean of b losses that are L-smooth in their own row it is b / L: to forget the b is the
        commonest mistake.
      tolerance: >= 0; inner steps end where the norm of the surrogate's gradient is no larger.

    Returns:
      `(init, step)`: `init(params)` is an `SsoState`, and `step(params, state, model_fn, target_grad_fn)` returns
      `(params, state, info)`, with an `SsoInfo`. `model_fn(params)` gives the outputs z, a tree of floating-point
      arrays, of the examples at hand; it must be a fixed function: the same dropout key each time, statistics of
      batch normalisation frozen. `target_grad_fn(z)` gives the loss and d, a tree like z, and is called once; it need
      not be differentiable, and may be a `jax.pure_callback`.

    Raises:
      TypeError: `inner` is not an optax transformation; at step, `target_grad_fn` returns no pair.
      ValueError: a number out of range.
      TreeError, ShapeError, DtypeError: at step, parameters or outputs that are not floating-point; a d that does not
        match z.

    Cost: one expensive call, m + 1 gradients through the model, and what a line search evaluates. Under `jax.vmap` all
    lanes take the steps of the slowest.

    Numerics: the surrogate in at least float32. A d that is inf or NaN makes surrogate and parameters NaN, and no early
    exit hides it; a line search of optax may stand still instead, and `loss` and `surrogate` show it.

    Derivatives: forward mode, through `target_grad_fn` too; the inner loop has no reverse mode.

    Source: J. W. Lavington, S. Vaswani, R. Babanezhad, M. Schmidt, N. Le Roux, "Target-based Surrogates for Stochastic
    Optimization", 2023, arXiv 2302.02607, algorithm 1. In its released code η is 1 / (2 η) of ours.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> inputs, labels = jnp.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]]), jnp.array([0.0, 1.0, 2.0])
      >>> init, step = sso(optax.sgd(0.5), 100, eta=1.0)
      >>> params = jnp.zeros(2)
      >>> state = init(params)
      >>> for _ in range(5):
      ...     params, state, info = step(
      ...         params, state, lambda w: inputs @ w, jax.value_and_grad(lambda z: jnp.sum((z - labels) ** 2) / 2)
      ...     )
      >>> print(int(state.count), int(state.inner_steps), bool(info.decreased))
      5 500 True
    """
    is_transformation = isinstance(inner, optax.GradientTransformation)
    remedy = "Call its factory first." if callable(inner) else ""
    shown = type(inner).__name__
    checks.value("sso", "inner", is_transformation, "be an optax gradient transformation", shown, remedy, TypeError)
    whole = hasattr(num_inner, "__index__") and not isinstance(num_inner, bool) and not checks.traced(num_inner)
    ok = whole and operator.index(num_inner) >= 1
    checks.value("sso", "num_inner", ok, "be an integer of at least 1", num_inner)
    if not callable(eta):
        checks.number("sso", "eta", lambda eta: eta > 0, "be greater than 0", eta)
    checks.number("sso", "tolerance", lambda tolerance: tolerance >= 0, "be at least 0", tolerance)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SsoState:
        _floating("params", params)
        return SsoState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def step(
        params: PyTree,
        state: SsoState,
        model_fn: Callable[[PyTree], PyTree],
        target_grad_fn: Callable[[PyTree], tuple[jax.Array, PyTree]],
    ) -> tuple[PyTree, SsoState, SsoInfo]:
        _floating("params", params)
        z, pull = jax.vjp(model_fn, params)
        _floating("model_fn(...)", z)
        returned = target_grad_fn(z)
        remedy = "Return (loss, gradient of the loss with respect to the outputs)."
        pair = isinstance(returned, (tuple, list)) and len(returned) == 2
        checks.value("sso", "target_grad_fn(...)", pair, "be a pair", type(returned).__name__, remedy, TypeError)
        loss, dz = returned
        checks.same_tree("sso", ("model_fn(...)", z), dtypes=True, remedy=remedy, **{"target_grad_fn(...)[1]": dz})
        rate = eta(state.count) if callable(eta) else eta

        def value_fn(params: PyTree) -> jax.Array:
            return _surrogate(model_fn(params), z, dz, rate)

        def unfinished(carry: tuple[Any, ...]) -> jax.Array:
            # A comparison with NaN is false, and its negation goes on.
            return (carry[0] < num_inner) & ~(optax.tree.norm(carry[4]) <= tolerance)

        def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            count, params, inner_state, value, slope = carry
            updates, inner_state = inner.update(slope, inner_state, params, value=value, grad=slope, value_fn=value_fn)
            params = optax.apply_updates(params, updates)
            return count + 1, params, inner_state, *jax.value_and_grad(value_fn)(params)

        # At θ_t the surrogate's gradient is the loss's: with one inner step not a bit is lost to f(θ) - z.
        start = (jnp.int32(0), params, inner.init(params), _surrogate(z, z, dz, rate), pull(dz)[0])
        count, params, _, value, slope = jax.lax.while_loop(unfinished, one, start)
        following = SsoState(jnp.asarray(optax.safe_increment(state.count)), state.inner_steps + count)
        return params, following, SsoInfo(loss, count, value, value < 0, optax.tree.norm(slope))

    return init, step


def sso_surrogate(outputs: PyTree, z: PyTree, dz: PyTree, eta: float | jax.Array) -> jax.Array:
    """The surrogate <d, outputs - z> + ||outputs - z||^2 / (2 η) that `sso` minimises.

    Args:
      outputs: tree of floating-point arrays, f(θ).
      z: tree like outputs, at θ_t; no gradient flows into it.
      dz: tree like outputs, the loss's gradient at z; no gradient flows into it.
      eta: η > 0.

    Returns:
      A scalar, 0 at outputs = z.

    Raises:
      ValueError: `eta` is not greater than 0.
      TreeError, ShapeError, DtypeError: trees that do not match.

    Cost: one pass.

    Numerics: in at least float32.

    Source: as `sso`.

    Example:
      >>> import jax.numpy as jnp
      >>> float(sso_surrogate(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]), jnp.array([5.0, -2.0]), 1.0))
      -2.0
    """
    checks.number("sso_surrogate", "eta", lambda eta: eta > 0, "be greater than 0", eta)
    remedy = "Pass outputs of one model on one batch."
    checks.same_tree("sso_surrogate", ("outputs", outputs), dtypes=True, remedy=remedy, z=z, dz=dz)
    return _surrogate(outputs, *jax.lax.stop_gradient((z, dz)), eta)


def _surrogate(outputs: PyTree, z: PyTree, dz: PyTree, eta: Any) -> jax.Array:
    def leaf(new: jax.Array, old: jax.Array, slope: jax.Array) -> jax.Array:
        wide = accumulator(jnp.result_type(new))
        moved = jnp.asarray(new, wide) - jnp.asarray(old, wide)
        return jnp.sum(jnp.asarray(slope, wide) * moved + jnp.square(moved) / (2 * eta), dtype=wide)

    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(leaf, outputs, z, dz))))


def _floating(argument: str, tree: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        checks.dtype("sso", "floating", remedy="", **{argument + jax.tree_util.keystr(path): leaf})
