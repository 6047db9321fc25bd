"""One extreme eigenvalue of a symmetric operator by restarted Lanczos, with a status."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core import precision, trees
from jaxnum.core.functions import Function
from jaxnum.core.solver import raise_unless_converged
from jaxnum.core.status import RUNNING, Status
from jaxnum.curvature import _lanczos, operators
from kernels_pallas import checks

PyTree = Any

_WHICH = ("largest", "smallest", "magnitude")


class Eigenpair(NamedTuple):
    """What `top_eigenvalue` returns.

    Attributes:
      value: [] the eigenvalue.
      vector: its eigenvector, a tree like v0 of unit norm, in float32 at least.
      steps: [] int32, products made.
      residual: [], |A vector - value vector| up to rounding.
      status: [] int32, a `jaxnum.Status`.
    """

    value: jax.Array
    vector: PyTree
    steps: jax.Array
    residual: jax.Array
    status: jax.Array


def top_eigenvalue(
    op: Any,
    v0: PyTree,
    *,
    which: str = "largest",
    rtol: float | jax.Array | None = None,
    max_steps: int = 1000,
    subspace: int = 20,
    on_failure: str = "raise",
) -> Eigenpair:
    """The largest eigenvalue of a symmetric operator and its eigenvector: the sharpness, for a Hessian.

    Runs of `lanczos` of `subspace` products, each from the best Ritz vector of the last, until its residual is small.
    It finds the algebraically largest eigenvalue, where power iteration finds the largest in magnitude, and in far
    fewer products; the last eigenvector of a slowly changing operator is the v0 to start from.

    Args:
      op: linear symmetric function v -> A v on trees like v0, as of `hessian_product`, or an array [n, n].
      v0: pytree of floating-point arrays, the starting vector. Eigenvectors orthogonal to it are not found: take a
        random one.
      which: "largest", "smallest" or "magnitude" (largest absolute value).
      rtol: real scalar >= 0: it ends when |A u - value u| <= rtol max |Ritz value|. Default 1e-8 in float64, 1e-5 in
        float32. The eigenvalue's own error is of the order of the residual squared.
      max_steps: Python int >= 1, about how many products to make at most: the run under way is finished.
      subspace: Python int >= 2, products from restart to restart, and trees like v0 in memory.
      on_failure: "raise" makes an eager call that did not converge raise SolverError; "return" returns the status.

    Returns:
      An `Eigenpair`. `breakdown`: v0 is zero. `nonfinite`: the operator gave NaN or infinity.

    Raises:
      SolverError: an eager call that did not converge.
      ValueError: an option is out of range.
      TypeError, ShapeError, TreeError, DtypeError: v0 is not of floating-point arrays, or op(v0) is not a tree like it.

    Cost: `steps` products; the orthogonalisation of `lanczos`.

    Numerics: as `lanczos`. A residual below about 8 eps sqrt(n) of the largest Ritz value is rounding.

    Derivatives: none in reverse mode, which refuses the loop; that of a simple eigenvalue is u . (dA u).

    Source: Saad, "Numerical methods for large eigenvalue problems" (2011), section 6.4; explicit restarts.

    Example:
      >>> import jax.numpy as jnp
      >>> top = top_eigenvalue(jnp.diag(jnp.array([-9.0, 1.0, 3.0])), jnp.ones(3))
      >>> print(f"{top.value:.4f}")
      3.0000
    """
    checks.choice("top_eigenvalue", "which", which, _WHICH)
    checks.choice("top_eigenvalue", "on_failure", on_failure, ("raise", "return"))
    for name, given, least in (("max_steps", max_steps, 1), ("subspace", subspace, 2)):
        ok = isinstance(given, int) and not isinstance(given, bool) and given >= least
        checks.value("top_eigenvalue", name, ok, f"be a Python int >= {least}", given)
    v0 = trees.strong(jax.tree.map(jnp.asarray, v0))
    checks.value("top_eigenvalue", "v0", trees.size(v0) > 0, "have at least one entry", trees.size(v0))
    if rtol is None:
        rtol = precision.default_rtol(v0)
    elif not checks.traced(rtol):
        checks.value("top_eigenvalue", "rtol", 0 <= float(rtol) < 1, "be in [0, 1)", rtol)
    operator = operators.operator("top_eigenvalue", op, v0, "v0")
    found = _restarted(operator, v0, jnp.asarray(rtol), which, max_steps, min(subspace, max(2, trees.size(v0))))
    if on_failure == "raise":
        raise_unless_converged("top_eigenvalue", found)  # pyright: ignore[reportArgumentType]  # it has what is read
    return found


@partial(jax.jit, static_argnums=(3, 4, 5))
def _restarted(op: Function, v0: PyTree, rtol: jax.Array, which: str, max_steps: int, subspace: int) -> Eigenpair:
    tol = jnp.asarray(_lanczos.default_tol(v0))

    def run(best: Eigenpair) -> Eigenpair:
        start = jax.tree.map(lambda x, to: x.astype(to.dtype), best.vector, v0)
        found = _lanczos.krylov(op, start, tol, subspace)
        last = jnp.maximum(found.rank - 1, 0)
        size = jnp.max(jnp.abs(found.values))
        chosen = {"largest": last, "smallest": jnp.zeros_like(last)}.get(which)
        if chosen is None:
            chosen = jnp.where(jnp.abs(found.values[last]) >= jnp.abs(found.values[0]), last, 0)
        value, residual = found.values[chosen], found.residuals[chosen]
        status = jnp.where(residual <= rtol.astype(size.dtype) * size, Status.converged, RUNNING)
        status = jnp.where(found.rank == 0, Status.breakdown, status)
        good = jnp.isfinite(value) & jnp.isfinite(residual)
        status = jnp.where(good, status, Status.nonfinite).astype(jnp.int32)
        steps = best.steps + found.rank
        status = jnp.where((status == RUNNING) & (steps >= max_steps), jnp.int32(Status.max_steps), status)
        return Eigenpair(value, found.vector(chosen), steps, residual, status)

    wide = operators.wide(v0)
    zero = jnp.zeros((), trees.norm(wide).dtype)
    first = Eigenpair(zero, wide, jnp.int32(0), zero, jnp.int32(RUNNING))
    return jax.lax.while_loop(lambda pair: pair.status == RUNNING, run, first)
