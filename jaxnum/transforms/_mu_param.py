"""Learning rates of the muParam parametrisation: each weight's divided by its fan-in, as Adam's steps ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxnum.transforms import _strict
from kernels_pallas import checks

PyTree = Any


def mu_param(
    fan_in: Callable[[str, Any], float | None], *, base_fan_in: float = 256
) -> optax.GradientTransformationExtraArgs:
    """Multiply the updates of each weight by base_fan_in / fan_in, so that one learning rate suits every width.

    Adam's steps have entries of about the learning rate, whatever the gradient's size. In a weight matrix of fan-in n
    they line up with its input and change its output by n times that, while the output itself keeps its size: the best
    rate falls as 1 / n. Vectors, embeddings and the first layer, whose fan-in is fixed, keep theirs.

    Put it after the optimiser's scaling, and before a weight decay that should not know of it:

        optax.chain(optax.scale_by_adam(), mu_param(fan_in), optax.scale_by_learning_rate(rate))
        optax.chain(adamw_independent(rate, weight_decay=0.0), mu_param(fan_in), optax.add_decayed_weights(-1e-4))

    A model of base_fan_in is trained as without it: tune there, and use the rate at every width. That is the simple
    form of the paper. The full one has attention logits over D in place of sqrt(D), and initial output weights of
    variance ~ 1 / fan_in^2: the model's side, which is left to it. Gradient descent without Adam's normalisation asks
    for other multipliers.

    Args:
      fan_in: `(path, leaf) -> number or None`, for a path such as "layer/kernel" and a parameter: the fan-in of
        a weight matrix that grows with the model, hidden layers and output layer alike, and None for all others.
      base_fan_in: > 0, of the model whose learning rates are meant: 256 in the paper.

    Returns:
      An `optax.GradientTransformationExtraArgs` without state.

    Raises:
      ValueError: base_fan_in or a fan-in is not positive; at update, `params` is missing.
      TreeError, ShapeError, DtypeError: updates that do not match floating-point or complex `params`.

    Cost: a multiplication, which XLA fuses.

    Numerics: updates keep their dtype; non-finite ones stay so.

    Source: G. Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
      2022, arXiv 2203.03466, table 3, Adam; M. Wortsman et al., 2023, arXiv 2309.14322, section 3.2.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"embedding": jnp.ones((10, 512)), "hidden": jnp.ones((512, 512))}
      >>> transform = mu_param(lambda path, leaf: leaf.shape[0] if path == "hidden" else None)
      >>> updates, _ = transform.update(params, transform.init(params), params)
      >>> {name: float(update[0, 0]) for name, update in updates.items()}
      {'embedding': 1.0, 'hidden': 0.5}
    """
    _check_base("mu_param", base_fan_in)

    def scale(updates: PyTree, params: PyTree) -> PyTree:
        multipliers = _multipliers("mu_param", params, fan_in, base_fan_in)
        return jax.tree.map(lambda u, factor: u * factor, updates, multipliers)

    return _strict.strict(optax.stateless(scale), name="mu_param")


def mu_param_multipliers(
    params: PyTree, fan_in: Callable[[str, Any], float | None], *, base_fan_in: float = 256
) -> PyTree:
    """The factors of `mu_param` as a tree: to look at, or as labels of the groups of `optax.partition`.

    Args:
      params: pytree of parameters, or of their shapes.
      fan_in: as there.
      base_fan_in: as there.

    Returns:
      A tree like params of Python floats, base_fan_in / fan_in, and 1 where the fan-in is None.

    Raises:
      ValueError: as there.

    Cost: none: shapes only.

    Source: as there.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"embedding": jnp.ones((10, 512)), "hidden": jnp.ones((512, 512))}
      >>> groups = mu_param_multipliers(params, lambda path, leaf: leaf.shape[0] if path == "hidden" else None)
      >>> optimiser = optax.partition({factor: optax.adam(0.1 * factor) for factor in (0.5, 1.0)}, groups)
      >>> groups
      {'embedding': 1.0, 'hidden': 0.5}
    """
    _check_base("mu_param_multipliers", base_fan_in)
    return _multipliers("mu_param_multipliers", params, fan_in, base_fan_in)


def _check_base(function: str, base: Any) -> None:
    checks.value(function, "base_fan_in", base > 0, "be greater than 0", base)


def _multipliers(function: str, params: PyTree, fan_in: Callable[[str, Any], float | None], base: float) -> PyTree:
    def factor(path: Any, leaf: Any) -> float:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = fan_in(name, leaf)
        if size is None:
            return 1.0
        checks.value(function, "fan_in", size > 0 and math.isfinite(size), f"be greater than 0 for {name!r}", size)
        return float(base / size)

    return jax.tree_util.tree_map_with_path(factor, params)
