"""MKOR: gradients of linear layers preconditioned by inverse Kronecker factors that rank-1 updates keep up to date.

For transformers and other networks of large linear layers: K-FAC's directions at O(width²) a layer, with no inversion.
Under `jax.vmap` the factors are updated at every step: vmap runs both branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.core import trees
from jaxnum.core.precision import accumulator
from jaxnum.transforms import _mkor_layers, _strict
from jaxnum.transforms.moments import check_numbers
from kernels_pallas import checks
from kernels_pallas.checks import ShapeError, TreeError

PyTree = Any
Stats = Mapping[str, tuple[jax.Array, jax.Array]]


class MkorState(NamedTuple):
    """State of `scale_by_mkor`."""

    count: jax.Array  # [] int32, steps taken
    left: dict[str, jax.Array]  # by layer, the inverse factor of output gradients, [outputs, outputs] factor_dtype
    right: dict[str, jax.Array]  # by layer, that of inputs and 1, [inputs (+ 1), inputs (+ 1)] factor_dtype
    skipped: dict[str, jax.Array]  # by layer, [] int32: updates left out because statistics were not finite


def mkor(
    learning_rate: optax.ScalarOrSchedule,
    layers: _mkor_layers.Layers,
    *,
    inner: optax.GradientTransformation | None = None,
    momentum: float | jax.Array = 0.9,
    weight_decay: float | jax.Array = 0.0,
    variant: str = "exact",
    stats_every: int | jax.Array = 10,
    warmup_steps: int | jax.Array = 0,
    gamma: float | jax.Array = 0.95,
    zeta: float | jax.Array = 0.9,
    norm_limit: float | jax.Array = 100.0,
    clip_value: float | jax.Array = 100.0,
    factor_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """MKOR with momentum and decoupled weight decay, as an optimiser ready for use.

    For a layer s = W x + b with gradient G of [W, b], and L, R the running second moments of its output gradients and
    inputs, of which only the inverses X are kept, both I at first:

        D = L⁻¹ G R⁻¹,   D <- D ||G|| / ||D|| (Frobenius, layer by layer),

    after which momentum, or `inner`, takes D for the gradient. Every `stats_every` steps, before that, with the mean
    output gradient g (and the mean input a for R), clipped to ±clip_value:

        X <- ζ X + (1 - ζ) I   where max |X| > norm_limit,
        exact:      X <- (X - (1 - γ) v vᵀ / (γ + (1 - γ) gᵀ v)) / γ,   v = X g,   the inverse of γ L + (1 - γ) g gᵀ;
        reference:  X <- Y - v vᵀ / (1 + gᵀ v),   Y = γ X + (1 - γ) I,  v = Y g,   as in the released code.

    The formula that the paper prints has a plus for the minus, and is no inverse: factors exceed 1e50 in 200 updates.
    In the exact variant directions that are never seen grow as γ⁻ᵗ, which the limit is for. In the reference variant
    eigenvalues stay in (0, 1], in float32 at least, and the limit is never reached. Leaves in no layer go to momentum
    as they are.

    Args:
      learning_rate: at least 0, a number or a schedule.
      layers: dict of `MkorLayer`, or a function that makes it from params; see `mkor_layers`. Leave out embeddings and
        output layers of large vocabularies. Name it in `static_args` under `optax.inject_hyperparams`.
      inner: transformation that takes the place of momentum, such as `optax.scale_by_adam()`; None is momentum.
      momentum: in [0, 1), m <- momentum m + D. Not read where `inner` is given.
      weight_decay: at least 0, λ of -learning_rate (step + λ θ).
      variant: "exact" or "reference".
      stats_every: at least 1, steps between updates of the factors.
      warmup_steps: at least 0, steps at the start that all update the factors.
      gamma: γ in (0, 1).
      zeta: ζ in [0, 1].
      norm_limit: greater than 0; `jnp.inf` never resets.
      clip_value: greater than 0.
      factor_dtype: dtype of the factors; None takes the wider of float32 and the weight's own. "bfloat16" halves their
        memory. Give it as a string.

    Returns:
      An `optax.GradientTransformationExtraArgs`. `update` needs
        stats: dict like `layers` of pairs (a: [inputs], with a 1 after them where the layer has a bias; g: [outputs]),
      which `mkor_stats` makes beside the gradient; it is read at the steps that update the factors. In
      `optax.MultiSteps` those of the last part of the batch are used.

    Raises:
      ValueError: an option out of range; at update, `params` or `stats` is missing.
      TypeError: `inner` is not an optax transformation, `layers` not a dict of `MkorLayer`.
      TreeError, ShapeError, DtypeError: layers or statistics that do not fit, and updates that do not match real
        floating-point `params`.

    Cost: for a layer (m, n), 2 m n (m + n) operations a step, as its model does for about (m + n)/3 positions, and
    O(m² + n²) at an update. Memory: m² + n² for the factors, and the momentum. Data parallelism sends m + n numbers.

    Numerics: products and sums in at least float32, whatever `factor_dtype`; factors stay symmetric to the last bit.
    In "bfloat16" rounding takes small eigenvalues of a factor below 0, by up to some 1e-3 of the largest, and a step
    may point uphill. Where gᵀ v is below 0 the factor starts again from I: in "bfloat16" where |g|² is several hundred,
    as in wide layers whose inputs have a large mean. Where a or g of a layer is not finite, the update of both its
    factors is left out and counted in the state's `skipped`. A gradient that is not finite makes the layer's whole step
    NaN, at this step and, by momentum, after; factors never see it. `optax.apply_if_finite` skips such steps.

    Source: M. Mozaffari, S. Li, Z. Zhang, M. M. Dehnavi, "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using
    Rank-1 Updates", 2023, arXiv 2306.01685, Algorithm 1, with the inverse worked out again; "reference" is the update
    of its released code. norm_limit is ours.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxnum.transforms import mkor_layers, mkor_stats
      >>> x = jax.random.normal(jax.random.key(0), (64, 3)) * jnp.array([1.0, 0.3, 0.1])
      >>> y = x @ jnp.array([[1.0], [2.0], [3.0]])
      >>> def loss(p, x, y, tap=lambda name, x, s: s):
      ...     return jnp.mean((tap("", x, x @ p["w"] + p["b"]) - y) ** 2)
      >>> params = {"w": jnp.zeros((3, 1)), "b": jnp.zeros(1)}
      >>> layers = mkor_layers(params, "w", "b")
      >>> optimiser = mkor(0.05, layers, stats_every=1)
      >>> @jax.jit
      ... def step(params, state):
      ...     _, grads, stats = mkor_stats(loss, params, x, y, layers=layers)
      ...     updates, state = optimiser.update(grads, state, params, stats=stats)
      ...     return optax.apply_updates(params, updates), state
      >>> state = optimiser.init(params)
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> bool(loss(params, x, y) < 1e-2)
      True
    """
    check_numbers(
        "mkor", "be at least 0", lambda x: x >= 0, dict(learning_rate=learning_rate, weight_decay=weight_decay)
    )
    check_numbers("mkor", "be in [0, 1)", lambda x: 0 <= x < 1, dict(momentum=momentum))
    if inner is not None:
        _strict.transformation("mkor", "inner", inner)
    numbers = dict(gamma=gamma, zeta=zeta, norm_limit=norm_limit, clip_value=clip_value)
    chain = optax.chain(
        _scale_by_mkor("mkor", layers, variant, stats_every, warmup_steps, numbers, factor_dtype),
        _momentum(momentum) if inner is None else inner,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _strict.in_dtypes_of_params(chain)


def scale_by_mkor(
    layers: _mkor_layers.Layers,
    *,
    variant: str = "exact",
    stats_every: int | jax.Array = 10,
    warmup_steps: int | jax.Array = 0,
    gamma: float | jax.Array = 0.95,
    zeta: float | jax.Array = 0.9,
    norm_limit: float | jax.Array = 100.0,
    clip_value: float | jax.Array = 100.0,
    factor_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient of each layer by D of `mkor`, of the same Frobenius norm.

    Args, errors, cost, numerics (non-finite gradients included) and source: see `mkor`. The state is an `MkorState`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates point uphill, as the gradient does; chain it with
      momentum and `optax.scale_by_learning_rate`.
    """
    numbers = dict(gamma=gamma, zeta=zeta, norm_limit=norm_limit, clip_value=clip_value)
    return _scale_by_mkor("scale_by_mkor", layers, variant, stats_every, warmup_steps, numbers, factor_dtype)


def _scale_by_mkor(
    function: str,
    layers: _mkor_layers.Layers,
    variant: str,
    stats_every: Any,
    warmup_steps: Any,
    numbers: dict[str, Any],
    factor_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    checks.choice(function, "variant", variant, tuple(_UPDATES))
    # What a function finds depends on the parameters, which may have no layers.
    some = callable(layers) or not isinstance(layers, Mapping) or len(layers) > 0
    checks.value(function, "layers", some, "have a layer", "an empty dict", "Make it with mkor_layers.")
    check_numbers(function, "be at least 1", lambda x: x >= 1, dict(stats_every=stats_every))
    check_numbers(function, "be at least 0", lambda x: x >= 0, dict(warmup_steps=warmup_steps))
    check_numbers(function, "be in (0, 1)", lambda x: 0 < x < 1, dict(gamma=numbers["gamma"]))
    check_numbers(function, "be in [0, 1]", lambda x: 0 <= x <= 1, dict(zeta=numbers["zeta"]))
    positive = {name: numbers[name] for name in ("norm_limit", "clip_value")}
    check_numbers(function, "be greater than 0", lambda x: x > 0, positive)
    refreshed = partial(_refreshed, variant, numbers)

    def init(params: PyTree) -> MkorState:
        _strict.parameters(function, params, "floating")
        leaves = jax.tree.leaves(params)
        left, right, skipped = {}, {}, {}
        for name, layer in _mkor_layers.find(function, layers, params).items():
            dtype = factor_dtype or accumulator(jnp.result_type(leaves[layer.weight]))
            left[name] = jnp.eye(layer.outputs, dtype=dtype)
            right[name] = jnp.eye(layer.columns, dtype=dtype)
            skipped[name] = jnp.zeros([], jnp.int32)
        return MkorState(jnp.zeros([], jnp.int32), left, right, skipped)

    def update(
        updates: PyTree,
        state: MkorState,
        params: PyTree = None,
        *,
        stats: Stats | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, MkorState]:
        del extra_args
        _strict.matching(function, updates, params, "floating")
        found = _mkor_layers.find(function, layers, params)
        known = _checked(function, found, stats)
        fresh = (state.count % stats_every == 0) | (state.count < warmup_steps)
        kept = (state.left, state.right, state.skipped)
        left, right, skipped = jax.lax.cond(fresh, refreshed, lambda stats, *kept: kept, known, *kept)
        leaves, tree = jax.tree.flatten(updates)
        for name, layer in found.items():
            gradient = _mkor_layers.matrix(layer, leaves)
            _mkor_layers.put(layer, leaves, _preconditioned(gradient, left[name], right[name]))
        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.unflatten(tree, leaves), MkorState(count, left, right, skipped)

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _checked(function: str, found: dict[str, _mkor_layers.Found], stats: Stats | None) -> dict[str, Any]:
    """The statistics as a dict of pairs, all of the right shape."""
    remedy = "Pass update(updates, state, params, stats=stats) with the stats of mkor_stats."
    given = isinstance(stats, Mapping)
    checks.value(function, "stats", given, "be given, a dict of pairs by layer", type(stats).__name__, remedy)
    assert stats is not None
    wanted = f"have the layers {sorted(found)}"
    checks.value(function, "stats", set(stats) == set(found), wanted, sorted(stats), remedy, TreeError)
    for name, layer in found.items():
        at, pair = f"stats[{name!r}]", stats[name]
        two = isinstance(pair, tuple | list) and len(pair) == 2
        checks.value(function, at, two, "be a pair (a, g)", type(pair).__name__, remedy, TypeError)
        checks.dtype(function, "floating", remedy=remedy, **{at + "[0]": pair[0], at + "[1]": pair[1]})
        for i, (size, what) in enumerate(((layer.columns, "inputs"), (layer.outputs, "outputs"))):
            last = ", the last for the bias" if layer.bias is not None and i == 0 else ""
            wanted = f"have shape ({size},), one entry for each of the layer's {what}{last}"
            got = tuple(jnp.shape(pair[i]))
            checks.value(function, f"{at}[{i}]", got == (size,), wanted, got, remedy, ShapeError)
    return {name: tuple(stats[name]) for name in found}


def _refreshed(
    variant: str, numbers: dict[str, Any], stats: dict[str, Any], left: Any, right: Any, skipped: Any
) -> tuple[Any, Any, Any]:
    """All factors after an update by the statistics, those of a layer as they were where its are not finite."""
    new_left, new_right, new_skipped = {}, {}, {}
    for name, (a, g) in stats.items():
        finite = jnp.isfinite(a).all() & jnp.isfinite(g).all()
        new_left[name] = jnp.where(finite, _factor(variant, left[name], g, **numbers), left[name])
        new_right[name] = jnp.where(finite, _factor(variant, right[name], a, **numbers), right[name])
        new_skipped[name] = skipped[name] + jnp.where(finite, 0, 1).astype(jnp.int32)
    return new_left, new_right, new_skipped


def _factor(
    variant: str, old: jax.Array, vector: jax.Array, gamma: Any, zeta: Any, norm_limit: Any, clip_value: Any
) -> jax.Array:
    """One inverse factor after one update.  [d, d] in the dtype of old"""
    wide = accumulator(old.dtype)
    x, g = old.astype(wide), jnp.clip(vector.astype(wide), -clip_value, clip_value).astype(wide)
    eye = jnp.eye(g.size, dtype=wide)
    x = jnp.where(jnp.abs(x).max() > norm_limit, zeta * x + (1 - zeta) * eye, x)
    return _UPDATES[variant](x, g, eye, gamma).astype(old.dtype)


def _exact(x: jax.Array, g: jax.Array, eye: jax.Array, gamma: Any) -> jax.Array:
    """The inverse of γ X⁻¹ + (1 - γ) g gᵀ, by Sherman and Morrison."""
    x, v, curvature = _along(x, g, eye)
    return (x - (1 - gamma) * (jnp.outer(v, v) / (gamma + (1 - gamma) * curvature))) / gamma


def _reference(x: jax.Array, g: jax.Array, eye: jax.Array, gamma: Any) -> jax.Array:
    """The inverse of Y⁻¹ + g gᵀ with Y = γ X + (1 - γ) I, as the released code has it for γ = 0.95."""
    y, v, curvature = _along(gamma * x + (1 - gamma) * eye, g, eye)
    return y - jnp.outer(v, v) / (1 + curvature)


def _along(x: jax.Array, g: jax.Array, eye: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """X, X g and gᵀ X g, of I where the last is negative: no update makes such a factor positive definite again."""
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    x = jnp.where(product(g, product(x, g)) < 0, eye, x)
    v = product(x, g)
    return x, v, product(g, v)


_UPDATES = {"exact": _exact, "reference": _reference}


def _preconditioned(gradient: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """L⁻¹ G R⁻¹ with the Frobenius norm of G; 0 where G is."""
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    direction = product(product(left.astype(gradient.dtype), gradient), right.astype(gradient.dtype))
    norm, wanted = trees.safe_norm(direction), trees.safe_norm(gradient)
    return direction * (wanted / jnp.where(norm == 0, 1, norm))


def _momentum(decay: Any) -> optax.GradientTransformation:
    """`optax.trace` that adds up in at least float32 and answers in the gradient's dtype."""

    def init(params: PyTree) -> optax.TraceState:
        return optax.TraceState(
            jax.tree.map(lambda p: jnp.zeros_like(p, dtype=accumulator(jnp.result_type(p))), params)
        )

    def update(updates: PyTree, state: optax.TraceState, params: PyTree = None) -> tuple[PyTree, optax.TraceState]:
        del params
        trace = jax.tree.map(lambda g, m: (g.astype(m.dtype) + decay * m).astype(m.dtype), updates, state.trace)
        return jax.tree.map(lambda g, m: m.astype(g.dtype), updates, trace), optax.TraceState(trace)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
