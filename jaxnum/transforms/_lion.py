"""Lion, of optax's own steps: the modes that `optax.lion` does not reach, checks, and settings from AdamW's.

Its step is a third of `optax.lion`'s on a CPU, where XLA copies a momentum that is read after its donated buffer was
written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnum.transforms import _strict
from jaxnum.transforms.moments import check_numbers
from kernels_pallas import checks

PyTree = Any


def lion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1e-3,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    mode: str = "hard",
    smooth_beta: float = 1.0,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion: the sign of an average of gradients, with decoupled weight decay and one buffer.

        c_t = b1 m_{t-1} + (1 - b1) g_t
        θ <- θ - η (sign(c_t) + λ θ)
        m_t = b2 m_{t-1} + (1 - b2) g_t

    Args:
      learning_rate: η >= 0, a number or a schedule; a third to a tenth of AdamW's, see `lion_from_adamw`.
      b1: weight of the momentum in the direction, in [0, 1); 0.95 for language models.
      b2: decay of the momentum, in [0, 1); 0.98 for language models.
      weight_decay: λ >= 0; three to ten times AdamW's.
      weight_decay_mask: tree of bools, prefix of `params`, or a function that makes it from `params`; decay only
        where True. Name it in `static_args` under `optax.inject_hyperparams`, which takes a function for a schedule.
      mode: "hard" is the method. "smooth" takes tanh(smooth_beta c) instead of the sign, and can be differentiated
        through; "refined" takes c itself where |c| < 1. Both are optax's.
      smooth_beta: > 0, see there.
      mu_dtype: dtype of the momentum; None takes the parameters'. In bfloat16 a change of less than a few tenths of the
        momentum is rounded away.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state of `optax.lion`.

    Raises:
      ValueError: an option out of range; at update, `params` is missing.
      TreeError, ShapeError, DtypeError: updates that do not match real floating-point `params`.

    Cost: one pass over parameters, gradient and momentum. Memory: half of Adam's moments.

    Numerics: a coordinate without gradient and momentum stays where it is. Steps have the size η whatever the gradient:
    clip gradients before, not steps after. Where b1 <= b2 and the momentum is float32 at least, c_t is formed as
    (b1 / b2) m_t + (1 - b1 / b2) g_t, the same number from what the step leaves behind: only where it is 0 but for
    rounding can its sign differ from `optax.lion`'s. A NaN gradient makes its coordinate NaN at this step and after; an
    infinite one gives a plain step and an infinite momentum. Average gradients over devices before this.

    Source: X. Chen, C. Liang, D. Huang, E. Real et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv
    2302.06675, Algorithm 2.

    Example:
      >>> import jax.numpy as jnp
      >>> optimiser = lion(0.1, weight_decay=0.0)
      >>> x = jnp.array([1.0, -2.0, 0.0])
      >>> updates, _ = optimiser.update(x, optimiser.init(x), x)
      >>> print([f"{float(u):.1f}" for u in updates])
      ['-0.1', '0.1', '-0.0']
    """
    checks.choice("lion", "mode", mode, ("hard", "smooth", "refined"))
    check_numbers("lion", "be in [0, 1)", lambda x: 0 <= x < 1, {"b1": b1, "b2": b2})
    check_numbers("lion", "be greater than 0", lambda x: x > 0, {"smooth_beta": smooth_beta})
    least = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    check_numbers("lion", "be at least 0", lambda x: x >= 0, least)
    chain = optax.chain(
        _scale_by_lion(b1, b2, mu_dtype, mode, smooth_beta),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _strict.strict(_strict.in_dtypes_of_params(chain), name="lion")


def _scale_by_lion(b1: Any, b2: Any, mu_dtype: Any, mode: Any, smooth_beta: float) -> optax.GradientTransformation:
    """`optax.scale_by_lion`, the direction from the new momentum where that loses no digits."""
    plain = optax.scale_by_lion(b1, b2, mu_dtype, mode=mode, smooth_beta=smooth_beta)
    if not (isinstance(b1, int | float) and isinstance(b2, int | float) and b1 <= b2 > 0):
        return plain
    after = optax.scale_by_lion(b1 / b2, mode=mode, smooth_beta=smooth_beta)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        moved, following = plain.update(updates, state, params)
        if all(jnp.finfo(mu.dtype).bits >= 32 for mu in jax.tree.leaves(state.mu)):
            moved, _ = after.update(updates, following, params)
        return moved, following

    return optax.GradientTransformation(plain.init, update)


def lion_from_adamw(learning_rate: float, weight_decay: float, *, ratio: float = 10.0) -> dict[str, float]:
    """Lion's learning rate and weight decay where AdamW's are known.

    The rate is divided by `ratio` and the decay multiplied by it, so that their product, the share of the weights that
    a step takes away, stays as it was.

    Args:
      learning_rate: AdamW's, > 0.
      weight_decay: AdamW's, >= 0.
      ratio: in [3, 10], the authors' range.

    Returns:
      `{"learning_rate": ..., "weight_decay": ...}`, to be passed to `lion`.

    Raises:
      ValueError: an argument out of range.

    Cost: none.

    Source: as `lion`, section 5.

    Example:
      >>> settings = lion_from_adamw(1e-3, 0.1)
      >>> print({name: f"{value:g}" for name, value in settings.items()})
      {'learning_rate': '0.0001', 'weight_decay': '1'}
    """
    check_numbers("lion_from_adamw", "be greater than 0", lambda x: x > 0, {"learning_rate": learning_rate})
    check_numbers("lion_from_adamw", "be at least 0", lambda x: x >= 0, {"weight_decay": weight_decay})
    check_numbers("lion_from_adamw", "be in [3, 10]", lambda x: 3 <= x <= 10, {"ratio": ratio})
    return {"learning_rate": learning_rate / ratio, "weight_decay": weight_decay * ratio}
