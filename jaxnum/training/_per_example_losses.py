"""The loss of every example by itself, a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import checks
from kernels_pallas.checks import ShapeError

PyTree = Any


def per_example_losses(
    loss: Callable[[PyTree, PyTree], jax.Array], params: PyTree, data: PyTree, *, batch_size: int | None = None
) -> jax.Array:
    """The loss of each example at the same parameters, as `opposing_signals` compares them from step to step.

    Args:
      loss: `(params, example) -> []`, of one example, without dropout and augmentation, and with batch normalisation
        in evaluation: its noise would drown what a step changes.
      params: pytree of parameters.
      data: pytree of arrays [n, ...], examples first: a fixed probe set, not the batch of the step.
      batch_size: examples side by side, >= 1; None is all of them.

    Returns:
      [n] losses in the dtype of `loss`.

    Raises:
      ShapeError: leaves of `data` without examples or with different numbers, a loss that is no scalar.
      ValueError: batch_size below 1.

    Cost: one forward pass over the data, holding the activations of `batch_size` examples.

    Numerics: those of `loss`; an example whose loss is not finite leaves the others alone.

    Source: E. Rosenfeld, A. Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network
      Optimization", 2023, arXiv 2311.04163, section 2.

    Example:
      >>> import jax.numpy as jnp
      >>> data = {"x": jnp.arange(3.0), "y": jnp.ones(3)}
      >>> per_example_losses(lambda w, one: (w * one["x"] - one["y"]) ** 2, 2.0, data, batch_size=2).tolist()
      [1.0, 1.0, 9.0]
    """
    name = "per_example_losses"
    leaves = jax.tree_util.tree_leaves_with_path(data)
    checks.value(name, "data", bool(leaves), "have leaves", "an empty tree")
    wanted = "have an axis of examples, as long as in every leaf"
    for path, leaf in leaves:
        shape, first = jnp.shape(leaf), jnp.shape(leaves[0][1])
        at = "data" + jax.tree_util.keystr(path)
        checks.value(name, at, shape[:1] == first[:1] != (), wanted, f"shape {shape}", error=ShapeError)
    if batch_size is not None:
        ok = isinstance(batch_size, int) and batch_size >= 1
        checks.value(name, "batch_size", ok, "be an int of at least 1", batch_size)

    def one(example: PyTree) -> jax.Array:
        value = loss(params, example)
        checks.shape(name, remedy="`loss` takes one example and returns a scalar.", loss=(value, ""))
        return jnp.asarray(value)

    return jax.vmap(one)(data) if batch_size is None else jax.lax.map(one, data, batch_size=batch_size)
