"""M-FAC: the gradient times the inverse of the empirical Fisher matrix of the last m gradients.

The matrix is never formed: through an m x m system a step costs two passes over the m gradients kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.core import trees
from jaxnum.core.precision import accumulator
from jaxnum.curvature import woodbury
from jaxnum.transforms import _strict, moments
from jaxnum.transforms.moments import check_numbers
from kernels_pallas import checks

PyTree = Any


class MfacState(NamedTuple):
    """State of `scale_by_mfac`."""

    count: jax.Array  # [] int32, gradients put into the window
    slot: jax.Array  # [] int32, the row that the next gradient replaces
    window: PyTree  # the last m gradients, like params with an axis of m before, window_dtype
    gram: jax.Array  # [m, m], inner products of the gradients in the window, float32 at least
    momentum: PyTree  # moving average of steps, like params, float32 at least; () without momentum


def mfac(
    learning_rate: optax.ScalarOrSchedule,
    *,
    window: int = 1024,
    damping: float | jax.Array = 1e-5,
    momentum: float | jax.Array | None = None,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    warm_window: bool = False,
    window_dtype: Any = None,
    max_bytes: int = 2**34,
) -> optax.GradientTransformationExtraArgs:
    """M-FAC with coupled weight decay, as an optimiser ready for use.

    With gradient g_t, learning rate η, weight decay w, damping λ and the last m of the vectors h, G [m, d]:

        h_t = g_t + w θ_t, replaces the oldest row of G
        F = λ I + Gᵀ G / m
        u_t = F^-1 h_t = m Gᵀ (m λ I + G Gᵀ)^-1 e,   e the unit vector of h_t's row
        v_t = β v_{t-1} + (1 - β) u_t, v_0 = 0, with momentum β; else v_t = u_t
        θ_{t+1} = θ_t - η v_t

    G starts as zeros and m is the whole window from the first step on, as in the paper, so that the first steps are
    long: u_1 = m g / (m λ + |g|²), of length m / |g|. `warm_window` puts the number of gradients seen in the place
    of m until the window is full: u_1 = g / (λ + |g|²).

    Args:
      learning_rate: η >= 0, a number or a schedule. The released code has 1e-3.
      window: m >= 1, gradients kept; a Python int. The released code has 1024, and 512 for a small network.
      damping: λ > 0. Where gradients are so alike, or so few numbers, that the m x m system is singular to working
        precision, it is raised to 512 eps of the mean squared norm of the window's gradients (6e-5 in float32); above
        64 eps of the largest it never is.
      momentum: β in [0, 1), or None for none. The paper has none.
      weight_decay: w >= 0, added to the gradient before it is preconditioned, as in the released code.
      weight_decay_mask: tree of bools, prefix of `params`, or a function that makes it from `params`; decay only
        where True.
      warm_window: False (the paper) or True.
      window_dtype: dtype in which gradients are kept; None keeps theirs, which loses nothing. "bfloat16" halves
        float32's memory: F is then that of the rounded gradients, exactly. Give it as a string under
        `optax.inject_hyperparams`, which takes any callable for a schedule.
      max_bytes: largest size of the window and its m x m inner products over all devices together, 16 GiB unless
        given; `init` refuses larger ones from shapes alone.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Under `optax.inject_hyperparams` name `window`, `max_bytes` and a mask
      that is a function in `static_args`.

    Raises:
      ValueError: an option out of range; at init, the window needs more than `max_bytes`; at update, `params` is
        missing.
      TreeError, ShapeError, DtypeError: updates that do not match real floating-point `params`.

    Cost: two passes over the window, 4 m d flops, and a Cholesky factorisation, m³/3: the paper's O(dm + m³).
    Memory: m gradients, sharded as the parameters are: all products are sums over the parameters' axes, then one of
    m numbers over devices.

    Numerics: u is formed as F^-1 Gᵀ e = m Gᵀ K^-1 e, without the difference of nearly equal vectors that Woodbury's
    identity has: in float32 at λ = 1e-5 that difference leaves errors of 5 %, this form 2e-7 on the gradients of the
    benchmark. The error grows as eps times the condition number of m λ I + G Gᵀ: gradients that are alike to 3 % can
    leave 6e-4. Inner products are computed afresh for each gradient in float32 at least and at the highest matmul
    precision, so that nothing drifts.
    A gradient that is inf or NaN, or too large for its square, makes the whole step NaN, since F^-1 mixes all
    coordinates; it is not put into the window, and the steps after it are as if it had not been.
    `optax.apply_if_finite` skips such steps.

    Source: E. Frantar, E. Kurtic, D. Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
    Information", NeurIPS 2021, arXiv 2107.03356, section 3.2; the paper's triangular recursions are the LU
    factorisation of the matrix that is Cholesky-factored here.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1.0, 10.0]))
      >>> optimiser = mfac(5.0, window=4, damping=100.0, warm_window=True)
      >>> @jax.jit
      ... def step(x, state):
      ...     updates, state = optimiser.update(jax.grad(loss)(x), state, x)
      ...     return optax.apply_updates(x, updates), state
      >>> x = jnp.array([3.0, -2.0])
      >>> state = optimiser.init(x)
      >>> for _ in range(100):
      ...     x, state = step(x, state)
      >>> bool(loss(x) < 1e-3)
      True
    """
    check_numbers(
        "mfac", "be at least 0", lambda x: x >= 0, dict(learning_rate=learning_rate, weight_decay=weight_decay)
    )
    chain = optax.chain(
        _coupled_decay("mfac", weight_decay, weight_decay_mask),
        _scale_by_mfac("mfac", window, damping, momentum, warm_window, window_dtype, max_bytes),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _strict.in_dtypes_of_params(chain)


def scale_by_mfac(
    *,
    window: int = 1024,
    damping: float | jax.Array = 1e-5,
    momentum: float | jax.Array | None = None,
    warm_window: bool = False,
    window_dtype: Any = None,
    max_bytes: int = 2**34,
) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient by v_t, M-FAC's step without rate and decay.

    Args, errors, cost, numerics (non-finite gradients included) and source: see `mfac`. The state is an `MfacState`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates point uphill, as the gradient does; chain it with
      `optax.scale_by_learning_rate`.
    """
    return _scale_by_mfac("scale_by_mfac", window, damping, momentum, warm_window, window_dtype, max_bytes)


def _coupled_decay(
    function: str, weight_decay: Any, mask: PyTree | Callable[[PyTree], PyTree] | None
) -> optax.GradientTransformationExtraArgs:
    """Decay ahead of everything else, which must not broadcast a wrong gradient before it is refused."""
    decayed = optax.with_extra_args_support(optax.add_decayed_weights(weight_decay, mask))

    def init(params: PyTree) -> PyTree:
        _strict.parameters(function, params, "floating")
        return decayed.init(params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, PyTree]:
        _strict.matching(function, updates, params, "floating")
        added, state = decayed.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda a, g: a.astype(g.dtype), added, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_by_mfac(
    function: str, window: Any, damping: Any, momentum: Any, warm_window: bool, window_dtype: Any, max_bytes: Any
) -> optax.GradientTransformationExtraArgs:
    for name, got in dict(window=window, max_bytes=max_bytes).items():
        whole = isinstance(got, int) and not isinstance(got, bool) and got >= 1
        remedy = f"Under optax.inject_hyperparams name `{name}` in static_args."
        checks.value(function, name, whole, "be a Python int of at least 1", got, remedy)
    check_numbers(function, "be greater than 0", lambda x: x > 0, dict(damping=damping))
    check_numbers(function, "be in [0, 1)", lambda x: 0 <= x < 1, dict(momentum=momentum))
    warm_window = checks.flag(function, "warm_window", warm_window)

    def init(params: PyTree) -> MfacState:
        _strict.parameters(function, params, "floating")
        _check_bytes(function, params, window, window_dtype, max_bytes)

        def rows(p: Any) -> jax.Array:
            # From the parameter, so that its sharding spreads.
            return jnp.broadcast_to(jnp.zeros_like(p, dtype=window_dtype), (window, *jnp.shape(p)))

        def zeros(p: Any) -> jax.Array:
            return jnp.zeros_like(p, dtype=accumulator(jnp.result_type(p)))

        return MfacState(
            count=jnp.zeros([], jnp.int32),
            slot=jnp.zeros([], jnp.int32),
            window=jax.tree.map(rows, params),
            gram=jnp.zeros((window, window), _wide(params, window_dtype)),
            momentum=() if momentum is None else jax.tree.map(zeros, params),
        )

    def update(updates: PyTree, state: MfacState, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, MfacState]:
        del extra_args
        _strict.matching(function, updates, params, "floating")
        count = jnp.asarray(optax.safe_increment(state.count))
        row = jax.tree.map(lambda g, kept: g.astype(kept.dtype), updates, state.window)
        products = _products(state.window, row, state.gram.dtype).at[state.slot].set(_square(row, state.gram.dtype))
        gram = state.gram.at[state.slot, :].set(products).at[:, state.slot].set(products)
        seen = jnp.minimum(count, window) if warm_window else window
        lower, _ = woodbury.factor(gram, damping, seen)
        weights = woodbury.solve(lower, jax.nn.one_hot(state.slot, window, dtype=gram.dtype))
        good = jnp.isfinite(products).all() & jnp.isfinite(weights).all()

        # The new row apart, and the window written after all reads of it, or XLA copies the window before it writes.
        others, last = seen * weights.at[state.slot].set(0), seen * weights[state.slot]
        step = jax.tree.map(lambda kept, g: _combined(others, kept, last, g), state.window, row)
        row = jax.tree.map(partial(moments.after, state.count), row, step)

        def put(kept: jax.Array, new: jax.Array) -> jax.Array:
            old = jax.lax.dynamic_index_in_dim(kept, state.slot, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(kept, jnp.where(good, new, old), state.slot, 0)

        kept = jax.tree.map(put, state.window, row)
        average = state.momentum
        if momentum is not None:
            step = jax.tree.map(lambda v, u: moments.average(momentum, v, u).astype(v.dtype), average, step)
            # From here on the new average, so that the donated old one is read once.
            step = average = trees.where(good, step, average)
        shown = jax.tree.map(lambda u, g: jnp.where(good, u, jnp.nan).astype(g.dtype), step, updates)
        slot = jnp.where(good, (state.slot + 1) % window, state.slot)
        count = jnp.where(good, count, state.count)
        return shown, MfacState(count, slot, kept, jnp.where(good, gram, state.gram), average)

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _check_bytes(function: str, params: PyTree, window: int, window_dtype: Any, max_bytes: int) -> None:
    """Refuse a window that is too large, before any of it is allocated."""
    sizes = [math.prod(jnp.shape(p)) for p in jax.tree.leaves(params)]
    dtypes = [jnp.dtype(window_dtype or jnp.result_type(p)) for p in jax.tree.leaves(params)]
    needed = window * sum(size * dtype.itemsize for size, dtype in zip(sizes, dtypes, strict=True))
    needed += window**2 * jnp.dtype(_wide(params, window_dtype)).itemsize
    got = f"{window}, whose gradients of {sum(sizes):,} numbers and their inner products need {needed:,} bytes"
    remedy = 'Keep fewer gradients, keep them with window_dtype="bfloat16", or raise max_bytes.'
    wanted = f"need at most max_bytes = {max_bytes:,} bytes"
    checks.value(function, "window", needed <= max_bytes, wanted, got, remedy)


def _wide(params: PyTree, window_dtype: Any) -> Any:
    """The dtype of inner products: the widest accumulator among the leaves."""
    dtypes = [accumulator(window_dtype or jnp.result_type(p)) for p in jax.tree.leaves(params)]
    return jnp.result_type(jnp.float32, *dtypes)


def _products(window: PyTree, row: PyTree, dtype: Any) -> jax.Array:
    """Inner products of every gradient in the window with one, [m]."""

    def leaf(rows: jax.Array, g: jax.Array) -> jax.Array:
        axes = tuple(range(g.ndim))
        contracted = (tuple(axis + 1 for axis in axes), axes)
        if trees.explicitly_sharded(rows):
            # dot_general raises ShardingTypeError on contracted axes that are sharded.
            return jnp.sum(rows.astype(dtype) * g.astype(dtype), axis=contracted[0])
        return jax.lax.dot_general(
            rows, g, (contracted, ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype
        )

    return sum(jax.tree.leaves(jax.tree.map(leaf, window, row)), jnp.zeros([], dtype))


def _square(row: PyTree, dtype: Any) -> jax.Array:
    return sum((jnp.sum(jnp.square(g.astype(dtype))) for g in jax.tree.leaves(row)), jnp.zeros([], dtype))


def _combined(weights: jax.Array, rows: jax.Array, last: jax.Array, g: jax.Array) -> jax.Array:
    """The gradients of one leaf's window, weighted and summed, and one more, in float32 at least."""
    wide = accumulator(rows.dtype)
    sums = jax.lax.dot_general(
        weights.astype(wide), rows.astype(wide), (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    return sums + last.astype(wide) * g.astype(wide)
