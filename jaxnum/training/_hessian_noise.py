"""How much the Hessian changes from batch to batch, as one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core import trees
from jaxnum.curvature import arguments, hessian_product, operators
from jaxnum.training import _batch_eigenvalue
from kernels_pallas import checks
from kernels_pallas.checks import ShapeError

PyTree = Any


def hessian_noise(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: PyTree,
    key: jax.Array,
    *,
    num_examples: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Estimate P σ², the noise of the Hessian that `batch_eigenvalue` and `batch_learning_rate` take.

    With X the difference between the Hessian of a batch and the full one, E |X|_F² = P² σ² / b. From pairs of batches,
    independent of each other, and one vector u of random signs for each,

        P σ² = b / (2 P) E |(H_1 - H_2) u|²,

    which neither needs the full Hessian nor is biased by an estimate of it.

    Args:
      loss: (params, batch) -> [] floating, the mean over the batch. Keys of dropout and statistics of normalisation
        must be frozen, or H changes between its products.
      params: pytree of floating-point arrays.
      batches: tree of [2 k, B, ...], k >= 2 pairs of batches of B examples, the first with the second and so on.
      key: [] typed random key.
      num_examples: N of which each batch was drawn without replacement; None for replacement, or endless data.

    Returns:
      (mean, standard error), [] each, over the k pairs.

    Raises:
      ValueError: an odd number of batches, or fewer than four; num_examples not above B.
      ShapeError: leaves of batches that differ in their first two axes; a loss that is not one scalar.
      DtypeError: params not of floating-point arrays, key not typed.

    Cost: 2 k Hessian products, one after the other.

    Numerics: norms in float32 at least. NaN stays NaN.

    Source: D. Granziol, S. Zohren, S. Roberts, 2022, arXiv 2006.09092, section 4; pairs instead of the full Hessian
      are ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loss = lambda w, x: 0.5 * jnp.mean((x * w) ** 2)
      >>> x = jax.random.normal(jax.random.key(0), (800, 4))
      >>> noise, error = hessian_noise(loss, jnp.array(1.0), x, jax.random.key(1))
      >>> abs(float(noise) - 2) < 3 * float(error)  # the variance of x²
      True
    """
    arguments.parameters("hessian_noise", params)
    arguments.typed_key("hessian_noise", key)
    count, size = _counts(batches)
    if num_examples is not None:
        checks.value("hessian_noise", "num_examples", num_examples > size, f"be above {size}", num_examples)
    pairs = jax.tree.map(lambda x: jnp.reshape(x, (count // 2, 2, *jnp.shape(x)[1:])), batches)

    def one(inputs: tuple[jax.Array, PyTree]) -> jax.Array:
        key, pair = inputs
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(k, jnp.shape(x), jnp.result_type(x)) for k, x in zip(keys, leaves, strict=True)]
        u = treedef.unflatten(signs)
        first, second = (
            hessian_product(lambda p, i=i: loss(p, jax.tree.map(lambda x: x[i], pair)), params)(u) for i in (0, 1)
        )
        change = trees.sub(operators.wide(first), operators.wide(second))
        return trees.vdot(change, change)

    squares = jax.lax.map(one, (jax.random.split(key, count // 2), pairs))
    estimates = squares / (2 * trees.size(params) * _batch_eigenvalue.sampled("hessian_noise", 1.0, size, num_examples))
    return jnp.mean(estimates), jnp.std(estimates, ddof=1) / (count // 2) ** 0.5


def _counts(batches: PyTree) -> tuple[int, int]:
    """The number of batches and of examples in each."""
    leaves = jax.tree_util.tree_leaves_with_path(batches)
    checks.value("hessian_noise", "batches", bool(leaves), "have leaves", "an empty tree")
    wanted = jnp.shape(leaves[0][1])[:2]
    remedy = "Stack the batches along a new first axis."
    for path, leaf in leaves:
        got, name = jnp.shape(leaf), "batches" + jax.tree_util.keystr(path)
        words = "start with the axes (batches, examples)" + (f" of {wanted}" if len(wanted) == 2 else "")
        checks.value(
            "hessian_noise", name, len(got) >= 2 and got[:2] == wanted, words, f"shape {got}", remedy, ShapeError
        )
    even = wanted[0] >= 4 and wanted[0] % 2 == 0
    checks.value("hessian_noise", "batches", even, "be an even number, at least 4", wanted[0])
    return wanted[0], wanted[1]
