"""Steps that shrink so that the last iterate is as good as the weighted average of all."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnum.transforms import _strict
from kernels_pallas import checks

PyTree = Any


class LastIterateState(NamedTuple):
    """State of `scale_by_last_iterate`."""

    count: jax.Array  # [] int32, steps taken


def scale_by_last_iterate(weights: jax.typing.ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Scale a learner's steps by the share of the weights that is still to come.

    With Δ_t the step of any online learner that sees w_t g_t, put before this in the chain,

        x_{t+1} = x_t + (w_{t+1} + ... + w_T) / (w_1 + ... + w_T) Δ_t,   t = 1, ..., T.

    If the learner has regret R_T on a convex loss, the last iterate is within R_T / (w_1 + ... + w_T) of the optimum in
    mean: what else holds for the weighted average alone. Equal weights give the linear decay, and w_t = G_t^-p that of
    `jaxnum.schedules.refine_schedule`, once the learner's own w_t is counted in.

    Args:
      weights: [T] positive, concrete: one a step of the run. A learner that does not weigh its gradients has w_t times
        its rate, say `optax.scale_by_schedule`, before this.

    Returns:
      An `optax.GradientTransformationExtraArgs`; steps beyond T are 0, as step T is.

    Raises:
      ValueError: weights that are traced, not a vector, empty, or not positive and finite; at update, no `params`.
      TreeError, ShapeError, DtypeError: at update, updates that do not match floating-point `params`.

    Cost: one pass over the updates. Memory: a number a step of the run, a constant of the program.

    Numerics: shares are summed in float64 from the end, and stay so where x64 is on. Non-finite updates stay
    non-finite, at step T and beyond too.

    Source: A. Defazio, A. Cutkosky, H. Mehta, K. Mishchenko, "Optimal Linear Decay Learning Rate Schedules and Further
    Refinements", 2023, arXiv 2310.07831, theorem 1.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> learner = optax.chain(optax.sgd(1.0), scale_by_last_iterate([1.0, 1.0, 1.0, 1.0]))
      >>> x = jnp.zeros(())
      >>> state, steps = learner.init(x), []
      >>> for _ in range(5):
      ...     update, state = learner.update(jnp.ones(()), state, x)
      ...     steps.append(float(update))
      >>> print(steps)
      [-0.75, -0.5, -0.25, -0.0, -0.0]
    """
    function, wanted = "scale_by_last_iterate", "be a vector [T] of positive numbers"
    remedy = "Call it outside jax.jit."
    traced = any(map(checks.traced, jax.tree.leaves(weights)))
    checks.value(function, "weights", not traced, "be concrete", "a tracer", remedy)
    given = np.asarray(weights, np.float64)
    checks.value(function, "weights", given.ndim == 1 and given.size >= 1, wanted, f"shape {given.shape}")
    inside = np.isfinite(given) & (given > 0)
    checks.value(function, "weights", bool(inside.all()), wanted, given[~inside][:1])
    tails = np.append(np.cumsum(given[::-1])[::-1], 0.0)
    shares = tails[1:] / tails[0]

    def init(params: PyTree) -> LastIterateState:
        _strict.parameters(function, params)
        return LastIterateState(jnp.zeros([], jnp.int32))

    def update(
        updates: PyTree, state: LastIterateState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, LastIterateState]:
        del extra_args
        _strict.matching(function, updates, params)
        share = jnp.asarray(shares)[jnp.minimum(state.count, shares.size - 1)]
        moved = jax.tree.map(lambda u: (share * u).astype(u.dtype), updates)
        return moved, LastIterateState(jnp.asarray(optax.safe_increment(state.count)))

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
