"""AdamW whose weight decay does not change with the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jaxnum.transforms import _strict, moments
from jaxnum.transforms.moments import check_numbers

PyTree = Any


def adamw_independent(
    peak: float | Any,
    schedule: optax.Schedule | None = None,
    *,
    b1: float | Any = 0.9,
    b2: float | Any = 0.95,
    eps: float | Any = 1e-8,
    weight_decay: float | Any = 1e-4,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    max_grad_norm: float | None = 1.0,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with independent weight decay: θ <- θ - s_t (α u_t + λ θ), u_t Adam's step.

    In `optax.adamw` the decay is α s_t λ: tuning α tunes it too. With the independent form the best learning rate
    varies less with the model's size, and larger ones are borne.

    Args:
      peak: α >= 0, learning rate where the schedule is 1.
      schedule: s_t in [0, 1], step -> share, a schedule with peak 1 such as `jaxnum.schedules.wsd(1.0, ...)`; None is 1
        throughout.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the squares, in [0, 1).
      eps: >= 0, added to the root. Where gradients are near it steps collapse: 1e-15 for large models, with moments in
        float32.
      weight_decay: λ in [0, 1).
      weight_decay_mask: tree of bools, prefix of `params`, or a function that makes it from `params`; decay only
        where True.
      max_grad_norm: > 0, gradients of larger global norm are scaled down to it; None scales none.
      mu_dtype: dtype of the momentum; None takes the parameters'.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an option out of range; at update, `params` is missing.
      TreeError, ShapeError, DtypeError: updates that do not match real floating-point `params`.

    Cost: as `optax.adamw`.

    Numerics: as `optax.adamw`, whose squares take the parameters' dtype: keep parameters in float32. A non-finite
    gradient makes every coordinate NaN with `max_grad_norm`, its own without, at this step and after;
    `optax.apply_if_finite` skips such steps.

    Source: M. Wortsman, P. J. Liu, L. Xiao et al., "Small-scale proxies for large-scale Transformer training
    instabilities", 2023, arXiv 2309.14322, section 3.2; I. Loshchilov, F. Hutter, "Decoupled Weight Decay
    Regularization", 2019, where the decay is independent too.

    Example:
      >>> import jax.numpy as jnp
      >>> optimiser = adamw_independent(1e-3, weight_decay=0.1)
      >>> x = jnp.array([2.0])
      >>> updates, _ = optimiser.update(jnp.zeros(1), optimiser.init(x), x)
      >>> print(f"{float(updates[0]):.2f}")
      -0.20
    """
    name = "adamw_independent"
    check_numbers(name, "be in [0, 1)", lambda x: 0 <= x < 1, {"b1": b1, "b2": b2, "weight_decay": weight_decay})
    check_numbers(name, "be at least 0", lambda x: x >= 0, {"peak": peak, "eps": eps})
    if max_grad_norm is not None:
        check_numbers(name, "be greater than 0", lambda x: x > 0, {"max_grad_norm": max_grad_norm})
    share = schedule or (lambda count: jnp.ones([]))
    chain = optax.chain(
        optax.identity() if max_grad_norm is None else moments.clip_by_norm(max_grad_norm),
        optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype),
        optax.scale_by_learning_rate(lambda count: peak * share(count)),
        # After the rate, where updates point downhill already.
        optax.add_decayed_weights(lambda count: -weight_decay * share(count), weight_decay_mask),
    )
    return _strict.strict(_strict.in_dtypes_of_params(chain), name=name)
