"""Stochastic Lanczos quadrature: the density of the spectrum of an operator, and traces of its functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.functions import Function
from jaxnum.curvature import _lanczos, arguments, operators
from kernels_pallas import checks

PyTree = Any


class SpectralDensity(NamedTuple):
    """What `spectral_density` returns: for each probe a quadrature rule on the spectrum.

    Attributes:
      nodes: [probes, m], Ritz values.
      weights: [probes, m] >= 0, each row sums to 1; 0 where the Krylov space had ended.
      size: [] floating, the number n of unknowns.
    """

    nodes: jax.Array
    weights: jax.Array
    size: jax.Array

    def trace(self, f: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Estimate of tr f(A), f elementwise, and its standard error over the probes; each []."""
        # f may be infinite at the zeros that stand where no node is.
        terms = jnp.where(self.weights > 0, f(jnp.where(self.weights > 0, self.nodes, 1)), 0)
        estimates = self.size * jnp.sum(self.weights * terms, axis=1)
        probes = estimates.shape[0]
        return jnp.mean(estimates), jnp.std(estimates, ddof=1) / probes**0.5

    def density(self, grid: jax.Array, width: float | jax.Array) -> jax.Array:
        """The density of eigenvalues (integral 1) smoothed by a Gaussian of standard deviation `width`; like grid."""
        z = (grid[..., None, None] - self.nodes) / width
        bumps = jnp.exp(-0.5 * z**2) / (width * (2 * jnp.pi) ** 0.5)
        return jnp.mean(jnp.sum(self.weights * bumps, axis=-1), axis=-1)


def spectral_density(
    op: Any, like: PyTree, key: jax.Array, *, num_probes: int = 10, num_steps: int = 60
) -> SpectralDensity:
    """Estimate how the eigenvalues of a symmetric operator are distributed.

    For a random unit vector v, `lanczos` gives nodes theta_i and weights w_i with sum_i w_i f(theta_i) = vᵀ f(A) v,
    exact for polynomials of degree 2 m - 1; over v its mean is tr f(A) / n. Low-rank operators end the Krylov space
    early, which costs no accuracy.

    Args:
      op: linear symmetric function v -> A v on trees like `like`, as of `hessian_product`, or an array [n, n].
      like: pytree of floating-point arrays, of the shapes and dtypes of v.
      key: [] typed random key.
      num_probes: Python int >= 2, random signs, each with its own rule.
      num_steps: Python int >= 1, products for each probe.

    Returns:
      A `SpectralDensity`: `.density(grid, width)` is the smoothed density, `.trace(f)` is (tr f(A), standard error),
      as of jnp.log for the log-determinant.

    Raises:
      ValueError: num_probes or num_steps is out of range.
      TypeError, ShapeError, TreeError, DtypeError: op, like or key do not fit.

    Cost: num_probes times a `lanczos`, one after the other, in the memory of one.

    Numerics: nodes and weights in float32 at least. The extreme nodes approach the extreme eigenvalues fastest; gaps
      narrower than about (largest - smallest) / m are not resolved.

    Source: Golub & Meurant, "Matrices, moments and quadrature" (1994); Ubaru, Chen & Saad, "Fast estimation of tr(f(A))
      via stochastic Lanczos quadrature" (2017), algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> A = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
      >>> mean, error = spectral_density(A, jnp.zeros(3), jax.random.key(0), num_steps=3).trace(jnp.log)
      >>> print(f"{mean:.4f}")
      2.0794
    """
    arguments.typed_key("spectral_density", key)
    for name, given, least in (("num_probes", num_probes, 2), ("num_steps", num_steps, 1)):
        ok = isinstance(given, int) and not isinstance(given, bool) and given >= least
        checks.value("spectral_density", name, ok, f"be a Python int >= {least}", given)
    like = trees.strong(like)
    checks.value("spectral_density", "like", trees.size(like) > 0, "have at least one entry", trees.size(like))
    return _quadrature(operators.operator("spectral_density", op, like), like, key, num_probes, num_steps)


@partial(jax.jit, static_argnames=("num_probes", "num_steps"))
def _quadrature(op: Function, like: PyTree, key: jax.Array, num_probes: int, num_steps: int) -> SpectralDensity:
    tol = jnp.asarray(_lanczos.default_tol(like))

    def one(probe_key: jax.Array) -> tuple[jax.Array, jax.Array]:
        leaves, treedef = jax.tree.flatten(like)
        keys = jax.random.split(probe_key, len(leaves))
        signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        rule = _lanczos.krylov(op, treedef.unflatten(signs), tol, num_steps)
        return rule.values, rule.weights

    nodes, weights = jax.lax.map(one, jax.random.split(key, num_probes))
    return SpectralDensity(nodes, weights, jnp.asarray(trees.size(like), precision.accumulator(nodes.dtype)))
