"""Resolvents (I + step G)^{-1}, ready for `jaxnum.inclusion` and `jaxnum.Inclusion`: proximal maps and projections.

Every function here returns a plain `resolvent(x, step)` on pytrees. A projection is the resolvent of the normal cone of
its set, whatever the step. Bounds, radii and weights may be arrays that are differentiated: what a resolvent captures
becomes a leaf of the problem. Norms and sums run over all leaves; `product` puts one set on each leaf.

    inclusion(F, x0, resolvent=resolvents.box(0.0, 1.0))
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from kernels_pallas import checks

__all__ = ["ball", "box", "halfspace", "l1", "l1_ball", "nonnegative", "product", "psd", "simplex"]

PyTree = Any
Resolvent = Callable[[PyTree, Any], PyTree]


def box(lower: Any, upper: Any) -> Resolvent:
    """Projection onto lower <= x <= upper.

    Args:
      lower: real scalar, or a tree like x; -inf for none.
      upper: the same, at least lower; inf for none.

    Returns:
      resolvent(x, step).

    Raises:
      ValueError: scalar bounds in the wrong order.

    Example:
      >>> import jax.numpy as jnp
      >>> box(0.0, 1.0)(jnp.array([-1.0, 0.5, 2.0]), 1.0).tolist()
      [0.0, 0.5, 1.0]
    """
    if all(jnp.ndim(bound) == 0 and not checks.traced(bound) for bound in (lower, upper) if _is_leaf(bound)):
        ordered = not (_is_leaf(lower) and _is_leaf(upper)) or float(lower) <= float(upper)
        checks.value("box", "lower", ordered, "be at most `upper`", lower)

    def resolvent(x: PyTree, step: Any) -> PyTree:
        return jax.tree.map(lambda leaf, a, b: jnp.clip(leaf, _as(a, leaf), _as(b, leaf)), x, *_spread(x, lower, upper))

    return resolvent


def nonnegative() -> Resolvent:
    """Projection onto x >= 0.

    Returns:
      resolvent(x, step).

    Example:
      >>> import jax.numpy as jnp
      >>> nonnegative()(jnp.array([-1.0, 2.0]), 1.0).tolist()
      [0.0, 2.0]
    """
    return lambda x, step: _optax().projection_non_negative(x)


def simplex(total: Any = 1.0) -> Resolvent:
    """Projection onto x >= 0, sum x = total, the sum over all leaves.

    Args:
      total: real scalar > 0.

    Returns:
      resolvent(x, step).

    Raises:
      ValueError: total not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> simplex()(jnp.array([0.5, 1.5, -1.0]), 1.0).tolist()
      [0.0, 1.0, 0.0]
    """
    _check_positive("simplex", total=total)
    return lambda x, step: _on_simplex(x, total)


def ball(radius: Any = 1.0, centre: PyTree | None = None) -> Resolvent:
    """Projection onto ||x - centre|| <= radius, the Euclidean norm over all leaves.

    Args:
      radius: real scalar > 0.
      centre: a tree like x; default 0.

    Returns:
      resolvent(x, step).

    Raises:
      ValueError: radius not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> ball(2.5)(jnp.array([3.0, 4.0]), 1.0).tolist()
      [1.5, 2.0]
    """
    _check_positive("ball", radius=radius)

    def resolvent(x: PyTree, step: Any) -> PyTree:
        if centre is None:
            return _optax().projection_l2_ball(x, _scalar(radius, x))
        middle = jax.tree.map(_as, centre, x)
        inside = _optax().projection_l2_ball(trees.sub(x, middle), _scalar(radius, x))
        return trees.add(middle, inside)

    return resolvent


def l1_ball(radius: Any = 1.0) -> Resolvent:
    """Projection onto sum |x| <= radius, the sum over all leaves.

    Args:
      radius: real scalar > 0.

    Returns:
      resolvent(x, step).

    Raises:
      ValueError: radius not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> l1_ball()(jnp.array([2.0, -1.5, 0.2]), 1.0).tolist()
      [0.75, -0.25, 0.0]
    """
    _check_positive("l1_ball", radius=radius)

    def resolvent(x: PyTree, step: Any) -> PyTree:
        # A choice, where optax has a `cond`: under vmap both are computed anyway, and x may be shorter than float64.
        sizes = jax.tree.map(jnp.abs, x)
        inside = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sizes)) <= _scalar(radius, x)
        outside = jax.tree.map(lambda leaf, size: jnp.sign(leaf) * size, x, _on_simplex(sizes, radius))
        return trees.where(inside, x, outside)

    return resolvent


def halfspace(normal: PyTree, offset: Any) -> Resolvent:
    """Projection onto <normal, x> <= offset, the inner product over all leaves.

    Args:
      normal: a tree like x, not 0.
      offset: real scalar.

    Returns:
      resolvent(x, step).

    Example:
      >>> import jax.numpy as jnp
      >>> halfspace(jnp.array([1.0, 1.0]), 1.0)(jnp.array([2.0, 1.0]), 1.0).tolist()
      [1.0, 0.0]
    """

    def resolvent(x: PyTree, step: Any) -> PyTree:
        return _optax().projection_halfspace(x, jax.tree.map(_as, normal, x), _scalar(offset, x))

    return resolvent


def psd() -> Resolvent:
    """Projection of each leaf, a matrix [n, n] or a batch [..., n, n], onto the symmetric positive semidefinite cone.

    X -> V max(Lambda, 0) V' of the symmetric part V Lambda V' of X. The derivative is by divided differences of the
    eigenvalues, finite where they meet (where that of `eigh` is not), once.

    Returns:
      resolvent(x, step).

    Example:
      >>> import jax.numpy as jnp
      >>> psd()(jnp.diag(jnp.array([2.0, -1.0])), 1.0).tolist()
      [[2.0, 0.0], [0.0, 0.0]]
    """

    def resolvent(x: PyTree, step: Any) -> PyTree:
        for path, leaf in jax.tree_util.tree_leaves_with_path(x):
            got = jnp.shape(leaf)
            square, name = len(got) >= 2 and got[-1] == got[-2], f"x{jax.tree_util.keystr(path)}"
            checks.value("psd", name, square, "have shape [..., n, n]", got, error=checks.ShapeError)
        return jax.tree.map(_psd, x)

    return resolvent


def l1(weight: Any = 1.0) -> Resolvent:
    """Soft thresholding, the resolvent of the subdifferential of weight ||x||_1: sign(x) max(|x| - step weight, 0).

    Args:
      weight: real scalar >= 0, or a tree like x.

    Returns:
      resolvent(x, step); a step that is a tree like x has one for each entry.

    Example:
      >>> import jax.numpy as jnp
      >>> l1()(jnp.array([3.0, -0.2, -2.0]), 0.5).tolist()
      [2.5, 0.0, -1.5]
    """

    def resolvent(x: PyTree, step: Any) -> PyTree:
        def shrink(leaf: jax.Array, w: Any, t: Any) -> jax.Array:
            return leaf - jnp.clip(leaf, -_as(t, leaf) * _as(w, leaf), _as(t, leaf) * _as(w, leaf))

        return jax.tree.map(shrink, x, *_spread(x, weight, step))

    return resolvent


def product(resolvents: PyTree) -> Resolvent:
    """One resolvent on each part of x: the strategies of the players of a game, the blocks of a problem.

    Args:
      resolvents: a tree of resolvents that x continues, such as (simplex(), simplex()) for x = (p, q).

    Returns:
      resolvent(x, step); a step that is a tree like x goes to the parts that it belongs to.

    Example:
      >>> import jax.numpy as jnp
      >>> p, q = product((nonnegative(), box(-1.0, 1.0)))((jnp.array([-2.0]), jnp.array([-2.0])), 1.0)
      >>> p.tolist(), q.tolist()
      ([0.0], [-1.0])
    """

    def resolvent(x: PyTree, step: Any) -> PyTree:
        if _is_leaf(step):
            return jax.tree.map(lambda of_part, part: of_part(part, step), resolvents, x)
        return jax.tree.map(lambda of_part, part, t: of_part(part, t), resolvents, x, step)

    return resolvent


def _optax() -> Any:
    # Imported when first used: optax would double what `import jaxnum` costs.
    return importlib.import_module("optax.projections")


def _check_positive(function: str, *, radius: Any = 1.0, total: Any = 1.0) -> None:
    for name, value in (("radius", radius), ("total", total)):
        if not checks.traced(value):
            checks.value(function, name, 0 < float(value) < jnp.inf, "be a finite real number > 0", value)


def _on_simplex(x: PyTree, total: Any) -> PyTree:
    # optax's sums come out in float64 when x64 is on.
    projected = _optax().projection_simplex(x, _scalar(total, x))
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), projected, x)


def _is_leaf(bound: Any) -> bool:
    return jax.tree_util.all_leaves([bound]) and jnp.ndim(bound) == 0


def _spread(x: PyTree, *bounds: Any) -> list[PyTree]:
    """Each bound as a tree like x."""
    return [jax.tree.map(lambda _, b=bound: b, x) if _is_leaf(bound) else bound for bound in bounds]


def _as(value: Any, leaf: jax.Array) -> jax.Array:
    # A float64 bound must not promote a float32 x.
    return jnp.asarray(value, jnp.result_type(leaf))


def _scalar(value: Any, x: PyTree) -> jax.Array:
    return jnp.asarray(value, precision.coarsest(x))


@jax.custom_jvp
def _psd(x: jax.Array) -> jax.Array:
    return _psd_parts(x)[0]


def _psd_parts(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(_symmetric(x), symmetrize_input=False)
    kept = vectors * jnp.maximum(values, 0)[..., None, :]
    return _symmetric(_matmul(kept, _adjoint(vectors))), values, vectors


@_psd.defjvp
def _psd_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    out, values, vectors = _psd_parts(primals[0])
    row, column = values[..., :, None], values[..., None, :]
    gap, rise = row - column, jnp.maximum(row, 0) - jnp.maximum(column, 0)
    slope = jnp.where(gap == 0, jnp.where(row > 0, 1, 0), rise / jnp.where(gap == 0, 1, gap))
    inside = _matmul(_adjoint(vectors), _matmul(_symmetric(tangents[0]), vectors))
    return out, _matmul(vectors, _matmul(slope * inside, _adjoint(vectors)))


_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def _symmetric(x: jax.Array) -> jax.Array:
    return (x + _adjoint(x)) / 2
