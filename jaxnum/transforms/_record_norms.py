"""Gradient norms of a run, one a step, kept in the optimiser's state: what `jaxnum.schedules.refine_schedule` needs."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.transforms import _strict, moments
from kernels_pallas import checks

PyTree = Any


class NormsState(NamedTuple):
    """State of `record_norms`."""

    count: jax.Array  # [] int32, steps taken
    norms: jax.Array  # [steps] float32, NaN where no step has been


def record_norms(steps: int, *, order: int = 2) -> optax.GradientTransformationExtraArgs:
    """Write the norm of the updates into the state, step by step, and pass them on unchanged.

    Put it first in the chain, before clipping: `optax.chain(record_norms(10_000), optax.sgd(0.1))`. Its state is then
    the first of the chain's.

    Args:
      steps: length of the record, at least 1; steps beyond it are counted and not recorded.
      order: 2 for the Euclidean norm of the whole tree, for SGD; 1 for the sum of absolute values, for Adam.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `NormsState`.

    Raises:
      ValueError: steps below 1, order neither 1 nor 2.
      TreeError, ShapeError, DtypeError: parameters that are not floating-point or complex; updates that do not match
        `params`, where `update` is given them.

    Cost: a pass over the updates. Memory: 4 bytes a step.

    Numerics: sums in float32, of squares that neither overflow nor vanish. A non-finite gradient leaves a non-finite
    norm, for which `refine_schedule` takes its neighbours'.

    Source: A. Defazio, A. Cutkosky, H. Mehta, K. Mishchenko, 2023, arXiv 2310.07831, section 4.

    Example:
      >>> import jax.numpy as jnp
      >>> recorder = record_norms(3)
      >>> state = recorder.init(jnp.zeros(2))
      >>> _, state = recorder.update(jnp.array([3.0, 4.0]), state)
      >>> float(state.norms[0])
      5.0
    """
    steps = operator.index(steps)
    checks.value("record_norms", "steps", steps >= 1, "be at least 1", steps)
    checks.choice("record_norms", "order", order, (1, 2))

    def init(params: PyTree) -> NormsState:
        _strict.parameters("record_norms", params)
        return NormsState(jnp.zeros([], jnp.int32), jnp.full(steps, jnp.nan, jnp.float32))

    def update(
        updates: PyTree, state: NormsState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, NormsState]:
        del extra_args
        if params is not None:
            _strict.matching("record_norms", updates, params)
        sizes = [jnp.abs(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(updates)]
        norm = sum(map(jnp.sum, sizes), jnp.float32(0)) if order == 1 else moments.safe_norm([jnp.float32(0), *sizes])
        norms = state.norms.at[state.count].set(norm, mode="drop")
        return updates, NormsState(jnp.asarray(optax.safe_increment(state.count)), norms)

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
