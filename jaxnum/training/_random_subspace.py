"""Training in a random subspace: parameters are a frozen start plus a random projection of a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core import trees
from jaxnum.core.precision import accumulator
from jaxnum.curvature import arguments
from jaxnum.training._fwht import fwht
from kernels_pallas import checks

PyTree = Any
KINDS = ("dense", "sparse", "fastfood")
MEMORY = ("arrays", "key")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("held",),
    meta_fields=("kind", "memory", "dimension", "size", "dtype"),
)
@dataclass(frozen=True)
class Projection:
    """The map P of `random_subspace_projection`: a pytree, so that compiled functions take it as an argument."""

    held: Any  # the arrays of P, or the key that they are drawn from
    kind: str
    memory: str
    dimension: int
    size: int
    dtype: Any

    def apply(self, theta: jax.Array) -> jax.Array:
        """P theta: [d] -> [D]."""
        checks.shape("Projection.apply", theta=(theta, str(self.dimension)))
        return _applied(self, theta)

    def adjoint(self, gradient: jax.Array) -> jax.Array:
        """The transpose of P on a vector: [D] -> [d]."""
        checks.shape("Projection.adjoint", gradient=(gradient, str(self.size)))
        return _transposed(self, gradient)


@partial(jax.tree_util.register_dataclass, data_fields=("start", "projection"), meta_fields=())
@dataclass(frozen=True)
class Subspace:
    """Where `random_subspace` trains: a pytree, so that compiled functions take it as an argument."""

    start: PyTree  # parameters at theta = 0
    projection: Projection

    def params(self, theta: jax.Array) -> PyTree:
        """The parameters at theta [d]: a tree like `start`."""
        moved = self._split(self.projection.apply(theta))
        return jax.tree.map(lambda p, m: (p.astype(m.dtype) + m).astype(p.dtype), self.start, moved)

    def adjoint(self, gradient: PyTree) -> jax.Array:
        """What a gradient with respect to the parameters is with respect to theta: [d]."""
        checks.same_tree("Subspace.adjoint", ("start", self.start), dtypes=False, remedy="", gradient=gradient)
        leaves = [jnp.ravel(leaf).astype(self.projection.dtype) for leaf in jax.tree.leaves(gradient)]
        return self.projection.adjoint(jnp.concatenate(leaves))

    def _split(self, flat: jax.Array) -> PyTree:
        leaves, treedef = jax.tree.flatten(self.start)
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = [flat[end - leaf.size : end].reshape(leaf.shape) for end, leaf in zip(ends, leaves, strict=True)]
        return jax.tree.unflatten(treedef, parts)


def random_subspace(
    params: PyTree, key: jax.Array, dimension: int, *, kind: str = "fastfood", memory: str = "arrays"
) -> tuple[jax.Array, Subspace]:
    """What it takes to train d numbers in place of D parameters: params(theta) = params + P theta.

    theta starts at 0 and P, of `random_subspace_projection`, stays as it is; any optimiser trains theta. What is
    trained can be stored as two keys, of the start and of P, and d numbers. How many are needed for a problem is its
    intrinsic dimension: `intrinsic_dimension` looks for it.

    Args:
      params: tree of floating-point arrays, D entries: the usual random start, which is kept. Leave out what is not
        trained, such as statistics of batch normalisation.
      key: typed random key of P.
      dimension: d, Python int, 1 <= d <= D.
      kind: as in `random_subspace_projection`.
      memory: as there.

    Returns:
      `(theta, subspace)`: zeros [d] in at least float32, and a `Subspace`. `subspace.params(theta)` is the tree of
      parameters, differentiable; `subspace.adjoint(gradient)` is Pᵀ times a gradient of the parameters. Give the
      subspace to compiled functions as an argument: closed over, its arrays would be constants of the program.

    Raises:
      DtypeError: a leaf is not of real floating-point numbers; names its path; a `key` that is not typed.
      ValueError: a dimension below 1 or above D, an unknown kind or memory; params without entries.

    Cost: that of `random_subspace_projection`.

    Numerics: sums in at least float32, rounded to the dtype of each leaf; a bfloat16 leaf does not move for a change
      below 1/256 of it. Gradients in theta are smaller than those in params by about sqrt(d / D), so that SGD wants a
      rate of its own and Adam does not. A NaN in theta fills all parameters that
      its column reaches.

    Source: C. Li, H. Farkhoor, R. Liu, J. Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR
      2018, arXiv 1804.08838, section 2.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> target = jnp.ones(1000)
      >>> theta, subspace = random_subspace({"w": jnp.zeros(1000)}, jax.random.key(0), 20)
      >>> loss = lambda theta, subspace: jnp.sum((subspace.params(theta)["w"] - target) ** 2)
      >>> gradient = jax.jit(jax.grad(loss))(theta, subspace)
      >>> gradient.shape, bool(loss(-0.1 * gradient, subspace) < loss(theta, subspace))
      ((20,), True)
    """
    arrays = jax.tree.map(jnp.asarray, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        remedy = "Leave such leaves out."
        checks.dtype("random_subspace", "floating", remedy=remedy, **{"params" + jax.tree_util.keystr(path): leaf})
    checks.value("random_subspace", "params", trees.size(arrays) > 0, "have at least one entry", "none")
    dtype = accumulator(jnp.result_type(*jax.tree.leaves(arrays)))
    _check("random_subspace", key, dimension, trees.size(arrays), kind, memory)
    return jnp.zeros(dimension, dtype), Subspace(
        trees.strong(arrays), _drawn(key, dimension, trees.size(arrays), kind, memory, dtype)
    )


def random_subspace_projection(
    key: jax.Array, dimension: int, size: int, *, kind: str = "fastfood", memory: str = "arrays", dtype: Any = None
) -> Projection:
    """A random linear map P from d numbers to D, with columns of about unit norm and nearly orthogonal.

    - "dense": P_ij normal, each column divided by its norm: exact unit norms, D d numbers.
    - "sparse": s = round(sqrt(D)) entries +-1/sqrt(s) a column, one in each of s equal runs of rows, so that none
      coincide: exact unit norms, s d places. (The paper draws every entry with probability 1/sqrt(D).)
    - "fastfood": with L the power of two from D up, H of `fwht`, random signs B, a permutation Π and G normal:
      P theta = (H G Π H B theta)[:D] / sqrt(D sum G^2), theta padded with zeros to L. Norms are 1 in mean; 2 L + d
      numbers.

    The columns are normalised over all D rows, not within each array of the parameters, whose steps would change
    relative to each other.

    Args:
      key: typed random key.
      dimension: d, Python int, 1 <= d <= D.
      size: D, Python int.
      kind: "dense", "sparse" or "fastfood".
      memory: "arrays" keeps what was drawn; "key" keeps the key and draws again in each product, the same numbers. For
        "dense" that is one column at a time: memory of D numbers, and time for D d random ones.
      dtype: real floating-point dtype of P; default float32, or float64 where x64 is on.

    Returns:
      A `Projection` with `apply`: [d] -> [D], and `adjoint`: [D] -> [d]; both differentiable in every mode.

    Raises:
      ValueError: a dimension below 1 or above `size`, an unknown kind or memory. DtypeError: a wrong dtype, or a `key`
        that is not typed.

    Cost: a product takes D d operations for "dense", d sqrt(D) for "sparse", 4 L log2(L) for "fastfood".

    Numerics: sums in dtype. The singular values of "dense" and "sparse" lie within about 1 +- sqrt(d / D), those of
      "fastfood" in a wider range, 0.66 to 1.32 at d = D / 20 and 0.27 to 1.92 at 0.3 D: for d near D take another kind.

    Source: as `random_subspace`; Fastfood: Q. Le, T. Sarlos, A. Smola, "Fastfood: Approximating Kernel Expansions in
      Loglinear Time", ICML 2013; sparse: P. Li, T. Hastie, K. Church, "Very Sparse Random Projections", KDD 2006.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> P = random_subspace_projection(jax.random.key(0), 3, 1000, kind="sparse")
      >>> print(f"{jnp.linalg.norm(P.apply(jnp.array([0.0, 2.0, 0.0]))):.3f}")
      2.000
    """
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    checks.dtype("random_subspace_projection", "floating", dtype=jax.ShapeDtypeStruct((), dtype))
    _check("random_subspace_projection", key, dimension, size, kind, memory)
    return _drawn(key, dimension, size, kind, memory, dtype)


def _check(function: str, key: jax.Array, dimension: int, size: int, kind: str, memory: str) -> None:
    arguments.typed_key(function, key)
    checks.choice(function, "kind", kind, KINDS)
    checks.choice(function, "memory", memory, MEMORY)
    ok = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    checks.value(function, "size", ok, "be a Python int of at least 1", size)
    whole = isinstance(dimension, int) and not isinstance(dimension, bool)
    wanted = f"be a Python int from 1 to {size}, the number of parameters"
    checks.value(function, "dimension", whole and 1 <= dimension <= size, wanted, dimension)


def _drawn(key: jax.Array, dimension: int, size: int, kind: str, memory: str, dtype: Any) -> Projection:
    P = Projection(key, kind, "key", dimension, size, dtype)
    return P if memory == "key" else Projection(_draw(P), kind, memory, dimension, size, dtype)


@jax.jit
def _draw(P: Projection) -> Any:
    """The arrays of a projection that holds its key."""
    # Without the barrier the compiler may work out constants of the size of P from a key that it knows.
    key = jax.lax.optimization_barrier(P.held)
    if P.kind == "dense":
        return jax.lax.map(partial(_column, P, key), jnp.arange(P.dimension))
    if P.kind == "sparse":
        places, signs = jax.random.split(key)
        edges = np.arange(_entries(P) + 1) * P.size // _entries(P)
        shape = (P.dimension, _entries(P))
        low, high = jnp.asarray(edges[:-1], jnp.int32), jnp.asarray(edges[1:], jnp.int32)
        return jax.random.randint(places, shape, low, high), jax.random.rademacher(signs, shape, jnp.int8)
    signs, order, normal = jax.random.split(key, 3)
    length = _padded(P)
    return (
        jax.random.rademacher(signs, (P.dimension,), jnp.int8),
        jax.random.permutation(order, length),
        jax.random.normal(normal, (length,), P.dtype),
    )


def _column(P: Projection, key: jax.Array, index: jax.Array) -> jax.Array:
    column = jax.random.normal(jax.random.fold_in(key, index), (P.size,), P.dtype)
    return column / jnp.linalg.norm(column.astype(accumulator(P.dtype))).astype(P.dtype)


def _entries(P: Projection) -> int:
    return round(P.size**0.5)


def _padded(P: Projection) -> int:
    return 1 << (P.size - 1).bit_length()


@jax.jit
def _applied(P: Projection, theta: jax.Array) -> jax.Array:
    theta = theta.astype(P.dtype)
    if P.kind == "dense" and P.memory == "key":
        return _by_columns(P, theta)
    held = _draw(P) if P.memory == "key" else P.held
    if P.kind == "dense":
        return jnp.matmul(theta, held, precision="highest")
    if P.kind == "sparse":
        places, signs = held
        entries = theta[:, None] * signs / _entries(P) ** 0.5
        return jax.ops.segment_sum(entries.ravel(), places.ravel(), P.size)
    signs, order, normal = held
    length = _padded(P)
    mixed = fwht(jnp.pad(theta * signs, (0, length - P.dimension)), normalize=True)
    moved = mixed.at[order].get(unique_indices=True, mode="promise_in_bounds")
    # Sums of squares leave the range of float16.
    scale = length / jnp.sqrt(P.size * jnp.sum(jnp.square(normal.astype(accumulator(P.dtype)))))
    return scale.astype(P.dtype) * fwht(normal * moved, normalize=True)[: P.size]


def _by_columns(P: Projection, theta: jax.Array) -> jax.Array:
    key = jax.lax.optimization_barrier(P.held)

    # Without the checkpoint a gradient would keep every column.
    @jax.checkpoint
    def add(total: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, weight = column
        return total + weight * _column(P, key, index), None

    zero = jnp.zeros(P.size, P.dtype)
    return jax.lax.scan(add, zero, (jnp.arange(P.dimension), theta))[0]


@jax.jit
def _transposed(P: Projection, gradient: jax.Array) -> jax.Array:
    theta = jax.ShapeDtypeStruct((P.dimension,), P.dtype)
    return jax.linear_transpose(partial(_applied, P), theta)(gradient.astype(P.dtype))[0]
