"""The public call: checks, derivative rule, dispatch."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import checks, dispatch
from kernels_pallas._softmin import reference, xla
from kernels_pallas._softmin.config import KINDS, Config, Operands

NAME = "softmin"
_IMPLEMENTATIONS = (None, "reference", "xla", "tpu", "gpu")


def softmin(
    x: jax.Array,
    y: jax.Array,
    v: jax.Array,
    epsilon: float | jax.Array,
    *,
    kind: str = "sqeuclidean",
    implementation: str | None = None,
) -> jax.Array:
    """Row log-sum-exps of the costs between two point clouds, computed on the fly: the matrix is never formed.

    s_i = log sum_j exp(v_j - c(x_i, y_j) / epsilon). The softened minimum of c(x_i, y_j) - epsilon v_j over j, which
    gives the operation its name, is -epsilon s_i: for epsilon -> 0 that is the c-transform of transport. The form with
    the logarithm is what Sinkhorn's sweeps need: f = epsilon (log a - s) with v = g / epsilon.

    Args:
      x: points [n, d]; float32, bfloat16, float16, or float64 (`reference` and `xla`).
      y: points [m, d] of the same dtype.
      v: logarithms of weights [m], floating point: not +inf. -inf is a point without mass, whose y may hold anything,
        NaN included.
      epsilon: positive scalar, in units of the cost.
      kind: of cost, "sqeuclidean" (sum of squares), "euclidean" or "cityblock" (sum of absolute values).
      implementation: None chooses by the platform the program is lowered for, "tpu" (Pallas Mosaic), "xla" (runs
        everywhere) or "reference" (the whole matrix, the specification); "gpu" has no kernel. A named one that cannot
        do a call raises; None does all but explicitly sharded arrays.

    Returns:
      s [n] in float32, or float64 where an input is float64. -inf in all rows where no point has mass.

    Raises:
      ShapeError, DtypeError, TypeError, ValueError: arguments that do not fit, at trace time; epsilon not positive and
        finite where its value is known.
      NotImplementedError: a named implementation cannot do this call, or does not run on the platform.
      TypeError: forward-mode differentiation through anything but "reference".

    Cost: n m (3 d + 4) flops and n m exponentials; the gradient about three times that. Memory O(n + m) beside a block
      of at most 4 MiB or 8 rows.

    Numerics: costs come from differences, not from |x|^2 + |y|^2 - 2 x.y, which loses the small ones. The maximum is
      taken out before exponentials. 16-bit points are subtracted and summed in float32.

    Derivatives: with respect to x, y, v and epsilon, in reverse mode of any order in linear memory, blocks being
      computed again, by XLA on every platform; all modes through "reference". Where points coincide, the euclidean and
      cityblock costs have derivative zero. Rows of -inf have gradient zero, and so have points without mass.

    Source: Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences" (2019);
      the online maximum: Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018).

    Example:
      >>> import jax.numpy as jnp, kernels_pallas
      >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [3.0]])
      >>> s = kernels_pallas.softmin(x, y, jnp.zeros(2), 0.1)
      >>> [round(float(c), 3) + 0.0 for c in -0.1 * s]
      [0.0, 1.0]
    """
    config, operands = prepare(x, y, v, epsilon, kind=kind)
    checks.choice(NAME, "implementation", implementation, _IMPLEMENTATIONS)
    dispatch.check_implementation(NAME, implementation, _UNSUPPORTED, config, operands, "the points x")
    if implementation == "reference" or operands.x.size * operands.v.size == 0:
        return reference.forward(config, operands)[0]
    guarded = dispatch.refuse_forward_mode(NAME, dispatch.align(operands))
    return _differentiable((implementation, config), guarded)[0]  # pyright: ignore[reportIndexIssue]


def prepare(x: Any, y: Any, v: Any, epsilon: Any, *, kind: str = "sqeuclidean") -> tuple[Config, Operands]:
    """Check the arguments; give the static part, and the arrays with a batch of one in front."""
    checks.arrays(NAME, x=x, y=y, v=v)
    checks.dtype(NAME, "floating", x=x, y=y, v=v)
    checks.same_dtype(NAME, remedy="Cast them to one dtype.", x=x, y=y)
    remedy = "A cloud has one point a row; for a batch use jax.vmap."
    checks.shape(NAME, remedy=remedy, x=(x, "n d"), y=(y, "m d"), v=(v, "m"))
    checks.choice(NAME, "kind", kind, KINDS)
    scalar = isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool)
    scalar = scalar or jnp.issubdtype(getattr(epsilon, "dtype", jnp.bool_), jnp.floating)
    checks.value(NAME, "epsilon", scalar, "be a real scalar", epsilon, error=TypeError)
    checks.shape(NAME, remedy="Use vmap for several.", epsilon=(epsilon, ""))
    if not checks.traced(epsilon):
        checks.value(NAME, "epsilon", 0 < float(epsilon) < jnp.inf, "be positive and finite", epsilon)
    dtype = jnp.promote_types(jnp.promote_types(jnp.result_type(x), jnp.result_type(v)), jnp.float32)
    v = jnp.asarray(v, dtype)
    # By selection, so that nothing of a point without mass reaches a sum or a gradient.
    y = jnp.where((v == -jnp.inf)[:, None], 0, jnp.asarray(y))
    operands = Operands(jnp.asarray(x), y, v, jnp.asarray(epsilon, dtype))
    return Config(kind), Operands(*(a[None] for a in operands))


# --- Which implementation can do a call. ------------------------------------------------------------------------------


def _not_on_tpu(config: Config, operands: Operands) -> str | None:
    for a in operands:
        if a.dtype in (jnp.float64, jnp.float16):
            return f"TPUs have no {a.dtype.name}; cast to float32 or bfloat16"
    if not all(isinstance(size, int) for size in (*operands.x.shape, *operands.v.shape)):
        return "its blocks need sizes that are known, not symbolic ones"
    from kernels_pallas._softmin.tpu import MOST_COORDINATES

    if operands.x.shape[2] > MOST_COORDINATES:
        return f"points have more than {MOST_COORDINATES} coordinates"
    return None


def _not_on_gpu(config: Config, operands: Operands) -> str | None:
    return "it has no GPU kernel"


_UNSUPPORTED = {"tpu": _not_on_tpu, "gpu": _not_on_gpu}


# --- Derivatives: one rule above dispatch. Its backward pass is plain JAX, so orders above the first need no rule. ----


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(static: tuple, operands: Operands) -> jax.Array:
    return _forward(*static, operands)[0]


def _differentiable_fwd(static: tuple, operands: Operands) -> tuple:
    lse = _differentiable(static, operands)  # pyright: ignore[reportGeneralTypeIssues]
    return lse, (operands, lse)


def _differentiable_bwd(static: tuple, saved: tuple, cotangent: jax.Array) -> tuple[Operands]:
    return (xla.backward(static[1], *dispatch.align((*saved, cotangent))),)


_differentiable.defvjp(_differentiable_fwd, _differentiable_bwd)


# --- Dispatch. --------------------------------------------------------------------------------------------------------


def _shapes(config: Config, operands: Operands) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct(operands.x.shape[:2], operands.v.dtype),)


def _tpu_forward(config: Config, operands: Operands) -> tuple[jax.Array]:
    # Imported when first lowered for a TPU: Pallas costs a tenth of a second.
    from kernels_pallas._softmin import tpu

    return tpu.forward(config, operands)


_forward = dispatch.primitive(
    NAME,
    shapes=_shapes,
    xla={"default": xla.forward},
    accelerated={"tpu": _tpu_forward},
    unsupported=_UNSUPPORTED,
    shareable=lambda config, operands: Operands(False, False, False, False),
)
