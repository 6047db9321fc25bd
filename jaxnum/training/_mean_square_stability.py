"""The exact second-moment operator of SGD at a minimum that fits every example, for small problems."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.core.precision import accumulator
from jaxnum.core.solver import raise_unless_converged
from jaxnum.core.status import Status
from jaxnum.curvature import Eigenpair, top_eigenvalue
from kernels_pallas import checks
from kernels_pallas.checks import ShapeError

PyTree = Any

# Largest r for which T is formed, as a matrix of r (r + 1) / 2 rows.
_DENSE = 40
# Products of Lanczos from restart to restart. Just below a radius of 1 many eigenvalues are close to the largest.
_SUBSPACE = 60


def mean_square_stability(
    jacobian: PyTree,
    learning_rate: float | jax.Array,
    batch_size: float | jax.Array,
    *,
    replacement: bool = True,
    rtol: float | jax.Array = 1e-5,
    max_steps: int = 3000,
) -> jax.Array:
    """The factor by which a step of SGD multiplies the mean square of a perturbation, in its worst direction.

    For the loss 1/(2 n) sum_i r_i² at a point where every residual is 0, with x_i the gradient of r_i and
    H = 1/n sum_i x_i x_iᵀ, a step w - η/B sum_(i in batch) x_i x_iᵀ w takes the second moment Σ = E w wᵀ to

        T(Σ) = (I - η H) Σ (I - η H) + η² c (1/n sum_i x_i x_iᵀ Σ x_i x_iᵀ - H Σ H),

    c = 1 / B, or (n - B) / (B (n - 1)) without replacement. T keeps positive semidefinite matrices so, and is
    symmetric: its spectral radius is its largest eigenvalue. For r = min(n, parameters) up to 40, T is formed between
    symmetric matrices; for more, Lanczos finds it from Σ = I. SGD is stable in mean square where it is at most 1.

    Args:
      jacobian: tree of [n, ...], the x_i, as from `jax.vmap(jax.grad(output), (None, 0))(params, inputs)`.
      learning_rate: η > 0, for the loss with its 1/2; for the mean of r_i² pass twice the rate.
      batch_size: 1 <= B, at most n without replacement; `jnp.inf` for gradient descent.
      replacement: whether an example may come twice in a batch.
      rtol: of Lanczos, as of `top_eigenvalue`; the radius is right to about that much of the norm of T - 1.
      max_steps: likewise.

    Returns:
      [] the spectral radius of T among the directions that some x_i sees; the others stand still. NaN, under `jax.jit`,
      for what an eager call raises.

    Raises:
      SolverError: an eager call with non-finite or vanishing x_i, or that did not converge.
      ValueError: a single number out of range, unless traced.
      ShapeError, DtypeError: leaves without the axis of examples, or not real floating-point.

    Cost: an SVD of the jacobian, and all eigenvalues of r (r + 1) / 2 unknowns, or some tens of products of n r²
      operations, thousands where the radius is just below 1 and the data are anisotropic; memory r² times 60. Whether
      SGD is stable `mean_square_stability_rate` tells sooner.

    Numerics: in float32 at least; the radius is 1 + η times an eigenvalue, so that it is sharp near 1.

    Derivatives: none in reverse mode, as of `top_eigenvalue`.

    Source: L. Wu, C. Ma, W. E, "How SGD selects the global minima in over-parameterized learning", 2018; L. Wu, W. J.
      Su, "The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent", 2023, arXiv 2305.17490,
      section 3.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.5], [1.0], [2.0], [0.1]])
      >>> print(*(f"{mean_square_stability(x, 0.6165532, size):.4f}" for size in (1, 2, jnp.inf)))
      1.0000 0.5179 0.0358
    """
    m = _moments("mean_square_stability", jacobian, batch_size, replacement)
    checks.number("mean_square_stability", "learning_rate", lambda rate: rate > 0, "be positive", learning_rate)
    rate = jnp.asarray(learning_rate, m.h.dtype)
    drift = m.h[:, None] + m.h
    if len(m.h) <= _DENSE:
        top = _dense(m, rate)
    else:
        top = top_eigenvalue(
            lambda S: rate * _second(m, S) - drift * S,
            jnp.diag(m.seen),
            rtol=rtol,
            max_steps=max_steps,
            subspace=_SUBSPACE,
            on_failure="return",
        )
    return 1 + rate * _found("mean_square_stability", top)


def mean_square_stability_rate(
    jacobian: PyTree, batch_size: float | jax.Array, *, replacement: bool = True
) -> jax.Array:
    """The learning rate at which `mean_square_stability` is 1: SGD at this minimum is stable up to it.

    T(Σ) = Σ - η A(Σ) + η² C(Σ) with A(Σ) = H Σ + Σ H has the radius 1 at η = 1 / (largest eigenvalue of
    A^(-1/2) C A^(-1/2)); A is diagonal between eigenvectors of H. No search is needed. In one dimension it is
    2 h / (h² + c Var x²); with B = inf, 2 / λ_max(H); with B = 1 at most 2 / tr H, and for larger B it may be above.

    Args:
      jacobian: as there.
      batch_size: as there.
      replacement: as there.

    Returns:
      [] the critical η; NaN, under `jax.jit`, for what an eager call raises.

    Raises:
      As there.

    Cost: an SVD of the jacobian and some tens of products of n r² operations; memory r² times 20.

    Numerics: as there.

    Source: as there; the eigenvalue instead of a bisection is ours.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.5], [1.0], [2.0], [0.1]])
      >>> print(*(f"{mean_square_stability_rate(x, size):.4f}" for size in (1, 2, jnp.inf)))
      0.6166 0.8774 1.5209
    """
    m = _moments("mean_square_stability_rate", jacobian, batch_size, replacement)
    drift = m.h[:, None] + m.h
    root = jnp.where(drift > 0, 1 / jnp.sqrt(jnp.where(drift > 0, drift, 1)), 0 * drift)
    top = top_eigenvalue(lambda S: root * _second(m, root * S), root * jnp.diag(m.seen), on_failure="return")
    return 1 / _found("mean_square_stability_rate", top)


class _Moments(NamedTuple):
    z: jax.Array  # [n, r] examples between the eigenvectors of H
    h: jax.Array  # [r] eigenvalues of H
    seen: jax.Array  # [r] 1 where H acts, 0 in its null space
    c: jax.Array  # [] what a batch leaves of the variance of one example


def _moments(function: str, jacobian: PyTree, batch_size: Any, replacement: bool) -> _Moments:
    x = rows(function, jacobian)
    n = len(x)
    checks.number(function, "batch_size", lambda size: size >= 1, "be at least 1", batch_size)
    if not checks.flag(function, "replacement", replacement):
        checks.number(function, "batch_size", lambda size: size <= n, f"be at most {n}, the examples", batch_size)
    c = 1 / jnp.asarray(batch_size, x.dtype)
    if not replacement:
        c = (c - 1 / n) * n / max(n - 1, 1)
    u, s, _ = jnp.linalg.svd(x, full_matrices=False)
    # Singular values of rounding would stand still and count as a radius of 1.
    floor = 8 * float(jnp.finfo(x.dtype).eps) * max(x.shape) ** 0.5 * jnp.max(s, initial=0)
    seen = jnp.where(s <= floor, 0, jnp.ones_like(s))
    return _Moments(u * (s * seen), s**2 * seen / n, seen, c)


def rows(function: str, jacobian: PyTree) -> jax.Array:
    """A tree of [n, ...] as one matrix [n, p], in float32 at least.

    Raises:
      ShapeError, DtypeError: naming the leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(jacobian)
    checks.value(function, "jacobian", bool(leaves), "have leaves", "an empty tree")
    first = jnp.shape(leaves[0][1])[:1]
    for path, leaf in leaves:
        name, shape = "jacobian" + jax.tree_util.keystr(path), jnp.shape(leaf)
        checks.dtype(function, "floating", **{name: leaf})
        fits = len(shape) >= 1 and shape[:1] == first and shape[0] >= 1
        remedy = "Pass jax.vmap(jax.grad(output), (None, 0))(params, inputs)."
        words = "have a first axis of examples" + (f" of {first[0]}" if first else "")
        checks.value(function, name, fits, words, f"shape {shape}", remedy, ShapeError)
    flat = [jnp.reshape(leaf, (len(leaf), -1)) for _, leaf in leaves]
    matrix = jnp.concatenate([x.astype(accumulator(x.dtype)) for x in flat], axis=1)
    checks.value(function, "jacobian", matrix.shape[1] > 0, "have at least one parameter", "none", error=ShapeError)
    return matrix


def _dense(m: _Moments, rate: jax.Array) -> Eigenpair:
    """The largest eigenvalue of (T - 1) / η, from its matrix in the orthonormal basis of symmetric matrices."""
    a, b = np.triu_indices(len(m.h))
    pairs = m.z[:, a] * m.z[:, b] * np.where(a == b, 1, 2**0.5).astype(m.z.dtype)
    mean = jnp.matmul(pairs.T, pairs, precision="highest") / len(pairs)
    plain = rate * (1 - m.c) * m.h[a] * m.h[b] - (m.h[a] + m.h[b])
    # No eigenvalue of T is below -1: what nobody sees cannot be the largest.
    plain = jnp.where(m.seen[a] * m.seen[b] > 0, plain, -2 / rate)
    value = jnp.linalg.eigvalsh(rate * m.c * mean + jnp.diag(plain))[-1]
    good = jnp.isfinite(value) & jnp.any(m.seen > 0)
    status = jnp.where(good, Status.converged, Status.nonfinite).astype(jnp.int32)
    return Eigenpair(value, None, jnp.int32(0), jnp.zeros_like(value), status)


def _found(function: str, top: Eigenpair) -> jax.Array:
    """The eigenvalue; an eager call raises where it was not found, and a traced one, which cannot, has NaN."""
    raise_unless_converged(function, top)  # pyright: ignore[reportArgumentType]  # it has what is read
    return jnp.where(top.status == Status.converged, top.value, jnp.nan)


def _second(m: _Moments, S: jax.Array) -> jax.Array:
    """C(Σ) = H Σ H + c (mean of x xᵀ Σ x xᵀ - H Σ H), [r, r]."""
    both = m.h[:, None] * S * m.h
    quadratic = jnp.sum(jnp.matmul(m.z, S, precision="highest") * m.z, axis=1)
    mean = jnp.matmul(m.z.T, quadratic[:, None] * m.z, precision="highest") / len(m.z)
    return both + m.c * (mean - both)
