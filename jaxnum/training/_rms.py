"""Root mean squares of gradients and updates, leaf by leaf, and whether Adam's epsilon is in their way."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import checks

PyTree = Any


class GradRms(NamedTuple):
    """What `grad_rms` returns: three trees like the gradients, of scalars.

    Attributes:
      rms: float32 at least, the root mean square of each leaf.
      over_eps: rms / eps.
      low: bool, whether over_eps is not at least `least`: Adam's steps are about to collapse there.
    """

    rms: PyTree
    over_eps: PyTree
    low: PyTree


def rms(tree: PyTree) -> PyTree:
    """The root mean square of each leaf.

    Args:
      tree: pytree of floating-point or complex arrays.

    Returns:
      A tree of real scalars, float32 at least. NaN for a leaf without entries and where an entry is NaN or inf.

    Raises:
      DtypeError: a leaf of integers or bools; names its path.

    Cost: two passes.

    Numerics: relative to the largest entry, so that squares of small gradients do not underflow.

    Source: M. Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023,
      arXiv 2309.14322, section 3.4.

    Example:
      >>> import jax.numpy as jnp
      >>> float(rms(jnp.array([1.0, 7.0])))
      5.0
    """
    return _rms("rms", "tree", tree)


def grad_rms(gradients: PyTree, *, eps: float | jax.Array = 1e-8, least: float = 10.0) -> GradRms:
    """The root mean square of each leaf's gradient beside the epsilon of Adam, with a flag where it is too near.

    Adam divides by sqrt(v) + eps. Gradients shrink as models grow and as learning rates do; where RMS(g) comes near
    eps, steps collapse, and training stalls without a spike. The remedy is a smaller eps, 1e-15 with float32 moments.

    Args:
      gradients: pytree of floating-point or complex arrays, before clipping: as they enter Adam.
      eps: > 0, Adam's.
      least: rms / eps below which a leaf is flagged.

    Returns:
      A `GradRms`. A leaf whose gradients are not finite is flagged too.

    Raises:
      DtypeError: a leaf of integers or bools; ValueError: eps is not positive.

    Cost: two passes.

    Numerics: as `rms`.

    Source: as `rms`; the threshold of 10 is ours.

    Example:
      >>> import jax.numpy as jnp
      >>> grad_rms({"a": jnp.full(3, 1e-3), "b": jnp.full(3, 2e-8)}).low
      {'a': Array(False, dtype=bool), 'b': Array(True, dtype=bool)}
    """
    checks.number("grad_rms", "eps", lambda eps: eps > 0, "be greater than 0", eps)
    values = _rms("grad_rms", "gradients", gradients)
    over_eps = jax.tree.map(lambda value: value / eps, values)
    return GradRms(values, over_eps, jax.tree.map(lambda ratio: ~(ratio >= least), over_eps))


def update_rms(updates: PyTree, *, learning_rate: float | jax.Array = 1.0) -> PyTree:
    """The root mean square of each leaf's step before the learning rate, which in Adam is near 1 early in training.

    Where it falls with the model's size or with the learning rate, eps is too large: see `grad_rms`.

    Args:
      updates: pytree of floating-point or complex arrays, as an optimiser without weight decay returns them.
      learning_rate: the rate in them, which is divided out, with the schedule's share at this step.

    Returns:
      A tree of real scalars, float32 at least.

    Raises:
      DtypeError: a leaf of integers or bools.

    Cost: two passes.

    Numerics: as `rms`.

    Source: as `rms`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> adam = optax.adam(0.5)
      >>> updates, _ = adam.update(jnp.array([3.0, -0.1]), adam.init(jnp.zeros(2)))
      >>> print(f"{float(update_rms(updates, learning_rate=0.5)):.4f}")
      1.0000
    """
    return jax.tree.map(lambda value: value / learning_rate, _rms("update_rms", "updates", updates))


def _rms(function: str, argument: str, tree: PyTree) -> PyTree:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        checks.dtype(function, "inexact", **{argument + jax.tree_util.keystr(path): leaf})

    def one(leaf: jax.Array) -> jax.Array:
        sizes = jnp.abs(jnp.asarray(leaf))
        sizes = sizes.astype(accumulator(sizes.dtype))
        largest = jnp.max(sizes, initial=0)
        # Above 1 / tiny a divisor's reciprocal, which XLA may multiply by, vanishes.
        unit = jnp.where(jnp.isfinite(largest), jnp.minimum(largest, 1 / jnp.finfo(sizes.dtype).tiny), largest)
        return unit * jnp.sqrt(jnp.mean(jnp.square(sizes / jnp.where(unit == 0, 1, unit))))

    return jax.tree.map(one, tree)
