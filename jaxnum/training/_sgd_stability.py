"""How near a run is to the limits of its stability: sharpness, trace and Frobenius norm beside the learning rate."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.core import precision, trees
from jaxnum.core.solver import raise_unless_converged
from jaxnum.core.status import Status
from jaxnum.curvature import arguments, hessian_product, operators, top_eigenvalue
from jaxnum.training import _mean_square_stability
from kernels_pallas import checks

PyTree = Any


class SgdStability(NamedTuple):
    """What `sgd_stability` returns, [] each."""

    largest: jax.Array  # eigenvalue, the sharpness
    trace: jax.Array
    trace_error: jax.Array  # standard error of the estimate
    frobenius: jax.Array  # norm
    frobenius_error: jax.Array
    rate_largest: jax.Array  # η λ: gradient descent needs at most 2, with momentum β 2 (1 + β)
    rate_trace: jax.Array  # η tr: SGD with one example a step needs at most 2
    rate_frobenius: jax.Array  # η F / sqrt(B)
    status: jax.Array  # int32, a `jaxnum.Status`, of the search for the eigenvalue


class SgdStabilityState(NamedTuple):
    """State of `sgd_stability_monitor`."""

    count: jax.Array  # [] int32, steps taken
    measured: jax.Array  # [] int32, the step of the last report, -1 before any
    report: SgdStability  # NaN before any


def sgd_stability(
    op: Any,
    like: PyTree,
    key: jax.Array,
    *,
    learning_rate: float | jax.Array,
    batch_size: float | jax.Array,
    num_probes: int = 8,
    rtol: float | jax.Array = 1e-3,
    max_steps: int = 200,
    on_failure: str = "raise",
) -> SgdStability:
    """Largest eigenvalue, trace and Frobenius norm of a Hessian, and what they say of the learning rate.

    At a minimum of 1/(2 n) sum_i r_i² that fits every example, gradient descent stays only where η λ_max <= 2, and SGD
    with one example a step only where η tr H <= 2, which is the narrower: SGD ends at flatter minima. With larger
    batches η tr H may go beyond 2, up to 2 tr H / λ_max in the end: read it beside B. `mean_square_stability_rate` is
    exact for small problems. The norm enters as η |H|_F <= sqrt(B / μ), with μ how well the noise is aligned with H.

    λ_max is found by `jaxnum.curvature.top_eigenvalue`; with random signs u, tr H = E uᵀ H u and |H|_F² = E |H u|²,
    both from the same products.

    Args:
      op: linear symmetric function v -> H v on trees like `like`. Away from a minimum `hessian_product` and
        `gauss_newton_product` differ by the residuals: report both apart. For Adam take D^(-1/2) H D^(-1/2) with its
        divisor D, without bias; add what weight decay adds.
      like: pytree of floating-point arrays, as the parameters.
      key: [] typed random key.
      learning_rate: η, [] real. The loss whose mean has no 1/2 has twice the Hessian: nothing else changes.
      batch_size: B >= 1.
      num_probes: Python int >= 2.
      rtol: as of `top_eigenvalue`; the eigenvalue's own error is of the order of its square.
      max_steps: as of `top_eigenvalue`.
      on_failure: "raise" makes an eager call raise SolverError where λ_max was not found; "return" says so in status.

    Returns:
      A `SgdStability` in float32 at least. Compare traces of the same data only.

    Raises:
      SolverError: an eager call that did not converge, as for a non-finite H.
      ValueError: an option is out of range.
      TypeError, ShapeError, TreeError, DtypeError: op, like or key do not fit.

    Cost: num_probes products and those of `top_eigenvalue`, some tens; memory 20 trees like `like`.

    Numerics: the relative standard error of the trace is about sqrt(2 / num_probes) |H|_F / tr H; that of the norm is
      by the delta method.

    Derivatives: none in reverse mode.

    Source: L. Wu, W. J. Su, "The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent", 2023,
      arXiv 2305.17490; for the norm L. Wu, M. Wang, W. Su, "The alignment property of SGD noise and how it helps select
      flat minima", 2022.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> H = jnp.diag(jnp.array([1.0, 2.0, 5.0]))
      >>> report = sgd_stability(H, jnp.zeros(3), jax.random.key(0), learning_rate=0.3, batch_size=1)
      >>> print(f"{report.rate_largest:.3f} {report.rate_trace:.3f}")
      1.500 2.400
    """
    arguments.typed_key("sgd_stability", key)
    checks.choice("sgd_stability", "on_failure", on_failure, ("raise", "return"))
    ok = isinstance(num_probes, int) and not isinstance(num_probes, bool) and num_probes >= 2
    checks.value("sgd_stability", "num_probes", ok, "be a Python int >= 2", num_probes)
    like = trees.strong(jax.tree.map(jnp.asarray, like))
    checks.value("sgd_stability", "like", trees.size(like) > 0, "have at least one entry", trees.size(like))
    function = operators.operator("sgd_stability", op, like)
    start_key, probe_key = jax.random.split(key)
    start = _drawn(jax.random.normal, start_key, like)
    top = top_eigenvalue(function, start, rtol=rtol, max_steps=max_steps, on_failure="return")
    if on_failure == "raise":
        raise_unless_converged("sgd_stability", top)  # pyright: ignore[reportArgumentType]  # it has what is read

    def probe(one: jax.Array) -> jax.Array:
        signs = _drawn(jax.random.rademacher, one, like)
        image = operators.apply(function, signs, like)
        return jnp.stack([trees.vdot(operators.wide(signs), image), trees.vdot(image, image)])

    samples = jax.lax.map(probe, jax.random.split(probe_key, num_probes))
    trace, square = jnp.mean(samples, axis=0)
    trace_error, square_error = jnp.std(samples, axis=0, ddof=1) / num_probes**0.5
    norm = jnp.sqrt(square)
    norm_error = square_error / (2 * jnp.where(norm == 0, 1, norm))
    return _report(
        learning_rate, batch_size, (top.value, trace, trace_error, norm, norm_error), top.status, _dtype(like)
    )


def sgd_stability_exact(
    jacobian: PyTree, *, learning_rate: float | jax.Array, batch_size: float | jax.Array
) -> SgdStability:
    """`sgd_stability` of the Gauss-Newton matrix 1/n sum_i x_i x_iᵀ, without estimates.

    Its trace is the mean of |x_i|², its other figures those of the matrix of products x_i . x_j / n.

    Args:
      jacobian: tree of [n, ...], the gradients x_i of a scalar output; for several outputs the gradients of each, times
        the square root of their number.
      learning_rate: as there.
      batch_size: as there.

    Returns:
      A `SgdStability` with errors 0, in float32 at least; its status is `nonfinite` for x_i that are not finite.

    Raises:
      ShapeError, DtypeError: leaves without the axis of examples, or not real floating-point.

    Cost: a Gram matrix and the eigenvalues of min(n, parameters) unknowns.

    Numerics: in the dtype of the jacobian, float32 at least.

    Source: as there.

    Example:
      >>> import jax.numpy as jnp
      >>> report = sgd_stability_exact(jnp.array([[3.0, 0.0], [0.0, 1.0]]), learning_rate=0.4, batch_size=1)
      >>> print(f"{report.rate_largest:.3f} {report.rate_trace:.3f}")
      1.800 2.000
    """
    x = _mean_square_stability.rows("sgd_stability_exact", jacobian)
    n = len(x)
    small = x if n <= x.shape[1] else x.T
    gram = jnp.matmul(small, small.T, precision="highest") / n
    trace, zero = jnp.trace(gram), jnp.zeros([], x.dtype)
    figures = (jnp.linalg.eigvalsh(gram)[-1], trace, zero, jnp.linalg.norm(gram), zero)
    status = jnp.where(jnp.isfinite(trace), Status.converged, Status.nonfinite)
    return _report(learning_rate, batch_size, figures, status, x.dtype)


def sgd_stability_monitor(
    every: int,
    key: jax.Array,
    learning_rate: optax.ScalarOrSchedule,
    batch_size: float | jax.Array,
    *,
    num_probes: int = 8,
    rtol: float = 1e-3,
    max_steps: int = 200,
) -> optax.GradientTransformationExtraArgs:
    """Keep a report of `sgd_stability` in the optimiser's state, made anew every few steps; updates pass unchanged.

    Put it first in a chain. Its `update` needs the extra argument `obj_fn(params) -> scalar`, whose Hessian is
    reported: the loss of the same data each time, or traces cannot be compared.

    Args:
      every: Python int >= 1; it reports at steps 0, every, 2 every, ...
      key: [] typed random key; step t draws from `fold_in(key, t)`.
      learning_rate: a number, an array (as inside `optax.inject_hyperparams`), or a schedule.
      batch_size: as of `sgd_stability`.
      num_probes: likewise.
      rtol: likewise.
      max_steps: likewise; a search that ends there leaves its status in the report.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `SgdStabilityState`.

    Raises:
      ValueError: an option out of range; at init, no parameters; at update, `params` or `obj_fn` is missing.
      DtypeError: parameters not real floating-point, a key that is not typed.
      TreeError, ShapeError: updates that do not match params.

    Cost: that of `sgd_stability` each `every` steps, and nothing between; under `vmap`, at every step.

    Numerics: as `sgd_stability`. A non-finite Hessian shows in the report, not in the updates.

    Source: as of `sgd_stability`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda x: 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * x**2)
      >>> optimiser = optax.chain(sgd_stability_monitor(10, jax.random.key(0), 0.25, 1), optax.sgd(0.25))
      >>> x = jnp.ones(2)
      >>> _, (state, _) = jax.jit(lambda x, state: optimiser.update(jax.grad(loss)(x), state, x, obj_fn=loss))(
      ...     x, optimiser.init(x)
      ... )
      >>> print(f"{state.report.rate_largest:.3f} {state.report.rate_trace:.3f}")
      1.000 1.250
    """
    name = "sgd_stability_monitor"
    every = operator.index(every)
    checks.value(name, "every", every >= 1, "be at least 1", every)
    arguments.typed_key(name, key)
    options = {"num_probes": num_probes, "rtol": rtol, "max_steps": max_steps, "on_failure": "return"}

    def init(params: PyTree) -> SgdStabilityState:
        arguments.parameters(name, params)
        checks.value(name, "params", trees.size(params) > 0, "have at least one entry", trees.size(params))
        # One array each: a donated state must not hold the same one twice.
        nans = [jnp.full([], jnp.nan, _dtype(params)) for _ in range(8)]
        report = SgdStability(*nans, status=jnp.int32(Status.max_steps))
        return SgdStabilityState(jnp.int32(0), jnp.int32(-1), report)

    def update(
        updates: PyTree,
        state: SgdStabilityState,
        params: PyTree = None,
        *,
        obj_fn: Callable[[PyTree], jax.Array] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SgdStabilityState]:
        del extra_args
        arguments.parameters(name, params)
        checks.same_tree(name, ("params", params), updates=updates)
        loss = arguments.required(name, "obj_fn", obj_fn, "lambda params: loss(params, batch)")
        rate = jnp.asarray(learning_rate(state.count) if callable(learning_rate) else learning_rate)

        def measure() -> tuple[jax.Array, SgdStability]:
            report = sgd_stability(
                hessian_product(loss, params),
                params,
                jax.random.fold_in(key, state.count),
                learning_rate=rate,
                batch_size=batch_size,
                **options,
            )
            return state.count, report

        due = state.count % every == 0
        measured, report = jax.lax.cond(due, measure, lambda: (state.measured, state.report))
        return updates, SgdStabilityState(jnp.asarray(optax.safe_increment(state.count)), measured, report)

    # optax types every state as any tree.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _drawn(draw: Callable[..., jax.Array], key: jax.Array, like: PyTree) -> PyTree:
    """Random numbers like a tree."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([draw(k, jnp.shape(x), jnp.result_type(x)) for k, x in zip(keys, leaves, strict=True)])


def _dtype(like: PyTree) -> Any:
    return jnp.result_type(*[precision.accumulator(jnp.result_type(x)) for x in jax.tree.leaves(like)])


def _report(rate: Any, batch_size: Any, figures: tuple, status: jax.Array, dtype: Any) -> SgdStability:
    checks.number("sgd_stability", "batch_size", lambda size: size >= 1, "be at least 1", batch_size)
    largest, trace, trace_error, norm, norm_error = figures
    rates = (rate * largest, rate * trace, rate * norm / jnp.sqrt(batch_size))
    values = [jnp.asarray(x, dtype) for x in (largest, trace, trace_error, norm, norm_error, *rates)]
    return SgdStability(*values, status=jnp.asarray(status, jnp.int32))
