"""Gradient boosting of the units of a network: the last layers of a network are trained a few units at a time."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnum.core.precision import accumulator
from jaxnum.curvature import arguments
from kernels_pallas import checks

_UNITS = {"tanh": jnp.tanh, "logistic": jax.nn.sigmoid}
# The inner fit has settled when no entry of the gradient is larger, for residuals of unit mean square.
_SETTLED = 1e-5


class GbnnLoss(NamedTuple):
    """A loss for `gbnn`, of targets y and scores F, both [n, K]."""

    constant: Callable[[jax.Array], jax.Array]  # y -> [K], the scores to begin with
    residual: Callable[[jax.Array, jax.Array], jax.Array]  # (y, F) -> [n, K], minus the derivative in F
    newton: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (y, F, h) -> [], the step along h
    value: Callable[[jax.Array, jax.Array], jax.Array]  # (y, F) -> [n]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("weights", "biases", "outputs", "constants"),
    meta_fields=("units_per_step", "activation", "vector"),
)
@dataclass(frozen=True)
class Gbnn:
    """A network with one hidden layer, units in the order in which `gbnn` trained them."""

    weights: jax.Array  # [d, units]
    biases: jax.Array  # [units]
    outputs: jax.Array  # [units, K], steps included
    constants: jax.Array  # [blocks + 1, K], the output bias of the first 0, 1, ... blocks
    units_per_step: int
    activation: str
    vector: bool  # whether the targets were [n]


def gbnn(
    X: jax.Array,
    y: jax.Array,
    key: jax.Array,
    units: int,
    *,
    units_per_step: int = 1,
    loss: str | GbnnLoss = "squared",
    fit: Callable[..., tuple[jax.Array, ...]] | None = None,
    eta: float | jax.Array = 1.0,
    subsample: float = 0.5,
    activation: str = "tanh",
) -> Gbnn:
    """A network with one hidden layer, trained by gradient boosting: a block of units at a time.

    F_0 is the best constant. For each block t: residuals r = -dL/dF at F_(t-1); a network h_t of `units_per_step`
    units, fitted to r by least squares on a random part of the data; F_t = F_(t-1) + eta rho_t h_t, where rho_t is a
    Newton step along h_t on all data. The sum of the blocks is one network, whose last units can be left out.

    - "squared": (y - F)^2 / 2, r = y - F, rho = 1.
    - "binary": log(1 + exp(-2 y F)), y = -1 or 1, r = 2 y / (1 + exp(2 y F)), rho = sum r h / sum h^2 r (2 y - r). The
      probability of 1 is sigmoid(2 F).
    - "softmax": cross-entropy, r = y - p, rho = sum r h / sum_i (sum_k p h^2 - (sum_k p h)^2). The paper keeps the
      diagonal of the Hessian alone, sum p (1 - p) h^2: for two classes that steps twice as far as "binary", which is
      the same problem, and with eta = 1 past the minimum.

    Args:
      X: [n, d] floating-point inputs, standardised: frozen features of a deep network, or a table.
      y: [n] or [n, K] floating-point targets: any for "squared"; [n] of -1 and 1 for "binary"; [n, K] of one-hot rows
        or probabilities for "softmax".
      key: typed random key.
      units: hidden units in all, a multiple of `units_per_step`.
      units_per_step: units of a block, >= 1.
      loss: a name, or a `GbnnLoss`.
      fit: `fit(key, X, r, units, activation) -> (W [d, J], b [J], v [J, K], c [K])`, the inner fit; default
        `gbnn_layer`.
      eta: shrinkage of every step, in (0, 1].
      subsample: share of the data that a block is fitted to, drawn without replacement, in (0, 1].
      activation: "tanh" or "logistic".

    Returns:
      A `Gbnn`, a pytree; `gbnn_predict` gives its scores F.

    Raises:
      ShapeError, DtypeError: inputs and targets that do not fit each other or the loss; a `key` that is not typed.
      ValueError: an option out of range; labels other than -1 and 1 for "binary", rows that do not sum to 1 for
      "softmax", where they are not traced.

    Cost: units / units_per_step inner fits one after another, in one compiled scan.

    Numerics: in at least float32. For "squared" with subsample = 1 the training loss never rises. Where the
      denominator of rho is below the smallest normal number, rho is 0. A NaN in X or y makes the model NaN; labels of
      one class alone make the constant of "binary" infinite.

      A network that is trained jointly fits smooth functions better: on the regression Friedman #1 the test error was
      2.1 times its error for blocks of one unit, and 1.2 times for blocks of five.

    Derivatives: none of the fit; `gbnn_predict` has all.

    Source: S. Emami, G. Martínez-Muñoz, "Sequential Training of Neural Networks with Gradient Boosting", IEEE Access
      11, 2023, arXiv 1909.12098; the Newton step of "softmax" is ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> X = jnp.linspace(-2, 2, 64)[:, None]
      >>> y = jnp.sin(2 * X[:, 0])
      >>> model = gbnn(X, y, jax.random.key(0), 6, units_per_step=2, subsample=1.0)
      >>> errors = [float(jnp.mean((gbnn_predict(model, X, k) - y) ** 2)) for k in (0, 2, 6)]
      >>> errors[0] > errors[1] > errors[2], errors[2] < 0.01
      (True, True)
    """
    checks.arrays("gbnn", X=X, y=y)
    X, y = jnp.asarray(X), jnp.asarray(y)
    checks.shape("gbnn", X=(X, "N D"), y=(y, "N" if y.ndim == 1 else "N K"))
    checks.dtype("gbnn", "floating", X=X)
    checks.value("gbnn", "X", X.size > 0, "have a row and a column", X.shape, error=checks.ShapeError)
    arguments.typed_key("gbnn", key)
    _check_labels(loss, y)
    checks.dtype("gbnn", "floating", remedy="Pass y.astype(X.dtype).", y=y)
    rules = LOSSES[loss] if isinstance(loss, str) else loss
    units, units_per_step = operator.index(units), operator.index(units_per_step)
    whole = units_per_step >= 1 and units >= units_per_step and units % units_per_step == 0
    checks.value("gbnn", "units", whole, f"be a multiple of `units_per_step` = {units_per_step}", units)
    if not checks.traced(eta):
        checks.value("gbnn", "eta", 0 < float(eta) <= 1, "be in (0, 1]", eta)
    checks.value("gbnn", "subsample", 0 < subsample <= 1, "be in (0, 1]", subsample)
    checks.choice("gbnn", "activation", activation, tuple(_UNITS))
    wide = accumulator(jnp.result_type(X, y))
    chosen = max(1, round(subsample * X.shape[0]))
    blocks, constants = _boosted(
        X.astype(wide),
        y.astype(wide).reshape(X.shape[0], -1),
        jax.random.split(key, units // units_per_step),
        jnp.asarray(eta, wide),
        units_per_step,
        rules,
        gbnn_layer if fit is None else fit,
        chosen,
        activation,
    )
    W, b, v = blocks
    merged = jnp.moveaxis(W, 0, 1).reshape(X.shape[1], units), b.reshape(units), v.reshape(units, -1)
    return Gbnn(*merged, constants, units_per_step, activation, y.ndim == 1)


def gbnn_predict(model: Gbnn, X: jax.Array, num_units: int | None = None) -> jax.Array:
    """Scores F of the network that `gbnn` trained, or of its first units alone.

    Args:
      model: what `gbnn` returned.
      X: [n, d] inputs.
      num_units: how many units to use, a multiple of `units_per_step` from 0 to all; None uses all.

    Returns:
      [n] or [n, K], as the targets were.

    Raises:
      ShapeError: inputs of another width. ValueError: units that are no whole number of blocks.

    Cost: n (d + K) num_units multiplications.

    Source: as `gbnn`.

    Example:
      >>> import jax.numpy as jnp
      >>> start = jnp.array([[3.0], [3.5]])
      >>> model = Gbnn(jnp.ones((4, 1)), jnp.zeros(1), jnp.ones((1, 1)), start, 1, "tanh", True)
      >>> print(gbnn_predict(model, jnp.zeros((3, 4)), 0), gbnn_predict(model, jnp.zeros((3, 4))))
      [3. 3. 3.] [3.5 3.5 3.5]
    """
    units = model.biases.shape[0]
    checks.shape("gbnn_predict", X=(X, f"N {model.weights.shape[0]}"))
    used = units if num_units is None else operator.index(num_units)
    whole = 0 <= used <= units and used % model.units_per_step == 0
    wanted = f"be a multiple of {model.units_per_step} from 0 to {units}"
    checks.value("gbnn_predict", "num_units", whole, wanted, num_units)
    hidden = _hidden(X, model.weights[:, :used], model.biases[:used], model.activation)
    F = _dot(hidden, model.outputs[:used]) + model.constants[used // model.units_per_step]
    return F[:, 0] if model.vector else F


def gbnn_layer(
    key: jax.Array,
    X: jax.Array,
    r: jax.Array,
    units: int,
    activation: str = "tanh",
    *,
    iterations: int = 200,
    penalty: float = 1e-4,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A network with one hidden layer, fitted to r by least squares: the inner fit of `gbnn`.

    Minimises (|r - h|^2 + penalty (|W|^2 + |v|^2)) / (2 n), h = f(X W + b) v + c, by L-BFGS from uniform weights of
    Glorot's size; last, v and c are solved for exactly. Before, r is divided by its root mean square. The last solve
    makes h no worse than 0, even where L-BFGS has not settled.

    Args:
      key: typed random key of the first weights.
      X: [n, d] inputs.
      r: [n, K] residuals.
      units: J, hidden units.
      activation: f, "tanh" or "logistic".
      iterations: most steps of L-BFGS; for another number give `gbnn` a `functools.partial`.
      penalty: weight of the squares, > 0.

    Returns:
      `(W [d, J], b [J], v [J, K], c [K])`.

    Raises:
      ShapeError, DtypeError: arguments that do not fit each other, or not floating-point; a `key` that is not typed.
      ValueError: no units.

    Cost: a few gradients each step.

    Source: as `gbnn`, which names L-BFGS; the last solve is ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> X = jnp.linspace(-1, 1, 32)[:, None]
      >>> W, b, v, c = gbnn_layer(jax.random.key(0), X, jnp.tanh(3 * X), 1)
      >>> bool(jnp.max(jnp.abs(jnp.tanh(X @ W + b) @ v + c - jnp.tanh(3 * X))) < 0.01)
      True
    """
    arguments.typed_key("gbnn_layer", key)
    checks.arrays("gbnn_layer", X=X, r=r)
    checks.shape("gbnn_layer", X=(X, "N D"), r=(r, "N K"))
    checks.dtype("gbnn_layer", "floating", X=X, r=r)
    checks.value("gbnn_layer", "units", units >= 1, "be at least 1", units)
    wide = accumulator(jnp.result_type(X, r))
    X, r = jnp.asarray(X, wide), jnp.asarray(r, wide)
    scale = jnp.sqrt(jnp.mean(jnp.square(r)))
    scale = jnp.where(scale == 0, 1, scale)
    target, n, d = r / scale, *X.shape
    keys = jax.random.split(key, 3)
    bound = ((6 if activation == "tanh" else 2) / (d + units)) ** 0.5
    draw = partial(jax.random.uniform, dtype=r.dtype, minval=-bound, maxval=bound)
    zeros = jnp.zeros(r.shape[1], r.dtype)
    start = draw(keys[0], (d, units)), draw(keys[1], (units,)), draw(keys[2], (units, r.shape[1])), zeros

    def objective(weights: tuple[jax.Array, ...]) -> jax.Array:
        W, b, v, c = weights
        miss = target - _dot(_hidden(X, W, b, activation), v) - c
        return (jnp.sum(miss**2) + penalty * (jnp.sum(W**2) + jnp.sum(v**2))) / (2 * n)

    W, b, _, _ = _minimised(objective, start, iterations)
    hidden = _hidden(X, W, b, activation)
    centred = hidden - hidden.mean(axis=0)
    gram = _dot(centred.T, centred) + penalty * jnp.eye(units, dtype=r.dtype)
    v = jnp.linalg.solve(gram, _dot(centred.T, target - target.mean(axis=0)))
    c = target.mean(axis=0) - _dot(hidden.mean(axis=0), v)
    return W, b, scale * v, scale * c


def _minimised(objective: Callable, start: tuple[jax.Array, ...], iterations: int) -> tuple[jax.Array, ...]:
    """L-BFGS until the gradient has settled."""
    optimiser = optax.lbfgs()
    evaluate = optax.value_and_grad_from_state(objective)

    def going(carry: tuple) -> jax.Array:
        _, _, steps, steepest = carry
        return (steps < iterations) & (steepest > _SETTLED)

    def step(carry: tuple) -> tuple:
        weights, state, steps, _ = carry
        value, gradient = evaluate(weights, state=state)
        updates, state = optimiser.update(gradient, state, weights, value=value, grad=gradient, value_fn=objective)
        steepest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)]))
        return optax.apply_updates(weights, updates), state, steps + 1, steepest

    first = (start, optimiser.init(start), jnp.int32(0), jnp.asarray(jnp.inf, start[0].dtype))
    return jax.lax.while_loop(going, step, first)[0]


@partial(jax.jit, static_argnames=("units", "rules", "fit", "chosen", "activation"))
def _boosted(
    X: jax.Array,
    y: jax.Array,
    keys: jax.Array,
    eta: jax.Array,
    units: int,
    rules: GbnnLoss,
    fit: Callable,
    chosen: int,
    activation: str,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Blocks (W, b, v) stacked in front, and the output biases after each."""
    constant = rules.constant(y)

    def step(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
        F, bias = carry
        drawing, fitting = jax.random.split(key)
        r = rules.residual(y, F)
        rows = jax.random.choice(drawing, X.shape[0], (chosen,), replace=False)
        part = (X, r) if chosen == X.shape[0] else (X[rows], r[rows])
        W, b, v, c = fit(fitting, *part, units, activation)
        h = _dot(_hidden(X, W, b, activation), v) + c
        scale = eta * rules.newton(y, F, h)
        bias = bias + scale * c
        return (F + scale * h, bias), ((W, b, scale * v), bias)

    start = (jnp.broadcast_to(constant, y.shape), constant)
    _, (blocks, biases) = jax.lax.scan(step, start, keys)
    return blocks, jnp.concatenate([constant[None], biases])


def _hidden(X: jax.Array, W: jax.Array, b: jax.Array, activation: str) -> jax.Array:
    return _UNITS[activation](_dot(X, W) + b)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _check_labels(loss: Any, y: jax.Array) -> None:
    if isinstance(loss, GbnnLoss):
        return
    checks.choice("gbnn", "loss", loss, tuple(LOSSES))
    if loss == "softmax":
        checks.shape("gbnn", remedy="Labels become rows by jax.nn.one_hot.", y=(y, "N K"))
        if not checks.traced(y):
            given = np.asarray(y, float)
            # Probabilities of bfloat16 do not sum to 1 better. A NaN is let through, to show in the model.
            wrong = (given < 0).any() or (np.abs(given.sum(axis=1) - 1) > 1e-2).any()
            checks.value("gbnn", "y", not wrong, "have rows of probabilities, which sum to 1", "others")
    if loss == "binary":
        checks.shape("gbnn", y=(y, "N"))
        if not checks.traced(y):
            # A NaN is let through, to show in the model.
            given = np.asarray(y, float)
            fits = bool(((np.abs(given) == 1) | np.isnan(given)).all())
            checks.value("gbnn", "y", fits, "be of -1 and 1", "others", "From 0 and 1: 2 * y - 1.")


def _ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """top / bottom, and 0 where the bottom has vanished; NaN stays."""
    vanished = bottom < jnp.finfo(bottom.dtype).tiny
    return jnp.where(vanished, jnp.where(jnp.isnan(top), top, 0), top / jnp.where(vanished, 1, bottom))


def _binary_residual(y: jax.Array, F: jax.Array) -> jax.Array:
    return 2 * y * jax.nn.sigmoid(-2 * y * F)


def _binary_newton(y: jax.Array, F: jax.Array, h: jax.Array) -> jax.Array:
    r = _binary_residual(y, F)
    return _ratio(jnp.sum(r * h), jnp.sum(h**2 * r * (2 * y - r)))


def _softmax_newton(y: jax.Array, F: jax.Array, h: jax.Array) -> jax.Array:
    p = jax.nn.softmax(F)
    spread = h - jnp.sum(p * h, axis=1, keepdims=True)
    return _ratio(jnp.sum((y - p) * h), jnp.sum(p * spread**2))


LOSSES = {
    "squared": GbnnLoss(
        constant=lambda y: y.mean(axis=0),
        residual=lambda y, F: y - F,
        newton=lambda y, F, h: jnp.ones([], h.dtype),
        value=lambda y, F: jnp.sum((y - F) ** 2, axis=1) / 2,
    ),
    "binary": GbnnLoss(
        constant=lambda y: jnp.arctanh(y.mean(axis=0)),  # log((1 + m) / (1 - m)) / 2
        residual=_binary_residual,
        newton=_binary_newton,
        value=lambda y, F: jax.nn.softplus(-2 * y * F)[:, 0],
    ),
    "softmax": GbnnLoss(
        constant=lambda y: jnp.zeros(y.shape[1], y.dtype),
        residual=lambda y, F: y - jax.nn.softmax(F),
        newton=_softmax_newton,
        value=lambda y, F: optax.softmax_cross_entropy(F, y),
    ),
}
