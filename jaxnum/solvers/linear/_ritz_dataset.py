"""Right-hand sides for training a solver's network: mixtures of Ritz vectors. Source: Kaneda et al. 2023."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.curvature import lanczos
from kernels_pallas import checks

PyTree = Any

# Eigenvalues this small relative to the largest belong to cells outside the domain.
_NULL = 1e-8


def ritz_dataset(
    A: Callable,
    like: PyTree,
    key: jax.Array,
    *,
    samples: int = 500,
    vectors: int = 200,
    extra: int = 10,
    emphasis: float | jax.Array = 9.0,
) -> PyTree:
    """Unit right-hand sides b = sum_i c_i q_i / ||.||, q_i the Ritz vectors of A in ascending order of Ritz value.

    c_i ~ N(0, 1), times `emphasis` for i < rank / 2 + extra: conjugate gradients are slow along the low half, so the
    low half is what a network must learn, while noise, which is mostly high, teaches little.

    Args:
      A: linear function v -> A v, symmetric positive semidefinite; Ritz values that are zero are left out.
      like: tree of floating-point arrays shaped like a right-hand side.
      key: typed PRNG key.
      samples: number of right-hand sides >= 1.
      vectors: m, number of Lanczos steps >= 1, started from A times a normal vector.
      extra: how many vectors of the upper half are emphasised too, >= 0.
      emphasis: real scalar > 0.

    Returns:
      A tree like `like` with a leading axis of `samples`, in its dtypes.

    Raises:
      ValueError: an argument out of its range. What `jaxnum.curvature.lanczos` raises.

    Cost: m products with A, 4 m^2 n operations, memory (m + samples) n.

    Source: Kaneda, Akar, Chen, Kala, Hyde & Teran, "A deep conjugate direction method for iteratively solving linear
      systems" (ICML 2023), section 4.2: there m = 10,000 for 128^3 cells and 500 extra.

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> data = jaxnum.solvers.ritz_dataset(lambda v: 2 * v, jnp.zeros(4), jax.random.key(0), samples=3)
      >>> data.shape
      (3, 4)
    """
    for name, given, least in (("samples", samples, 1), ("extra", extra, 0)):
        checks.value("ritz_dataset", name, isinstance(given, int) and given >= least, f"be an int >= {least}", given)
    if not checks.traced(emphasis):
        checks.value("ritz_dataset", "emphasis", 0 < float(emphasis) < jnp.inf, "be positive and finite", emphasis)
    start, mixing = jax.random.split(key)
    leaves, treedef = jax.tree.flatten(trees.strong(like))
    keys = jax.random.split(start, len(leaves))
    noise = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    found = lanczos(A, A(jax.tree.unflatten(treedef, noise)), vectors)
    meant = found.active & (found.values > _NULL * jnp.max(found.values))
    # Ascending among those that are meant: the null ones come before them.
    place = jnp.cumsum(meant) - 1
    low = place < jnp.sum(meant) // 2 + extra
    c = jax.random.normal(mixing, (samples, vectors), precision.accumulator(precision.coarsest(like)))
    c = c * jnp.where(meant, jnp.where(low, emphasis, 1), 0)
    c = jnp.matmul(c, found.coefficients.T.astype(c.dtype), precision="highest")
    mixed = jax.tree.map(lambda basis: jnp.tensordot(c.astype(basis.dtype), basis, 1, precision="highest"), found.basis)
    norms = jax.vmap(trees.norm)(mixed)
    norms = jnp.where(norms > 0, norms, 1)
    return jax.tree.map(
        lambda leaf, to: (leaf / norms.reshape(-1, *[1] * (leaf.ndim - 1))).astype(jnp.result_type(to)), mixed, like
    )
