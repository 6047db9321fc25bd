"""The public call: checks, canonical form, derivative rules, dispatch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import checks, dispatch
from kernels_pallas._parallel_scan._linear_scan import reference, xla
from kernels_pallas._parallel_scan._linear_scan.config import Config, Operands
from kernels_pallas._parallel_scan.arguments import (
    DTYPES,
    check_implementation,
    not_on_gpu,
    not_on_tpu,
)
from kernels_pallas._parallel_scan.segments import Marks, marks
from kernels_pallas.recurrence import accumulator

_NAME = "linear_scan"
_COMPLEX = (
    "Scan a complex recurrence as two real ones: with a = r exp(i theta) and phi = cumsum(theta), the real and the "
    "imaginary part of exp(-i phi) b decay with r; multiply the result by exp(i phi)."
)


def linear_scan(
    a: jax.Array,
    b: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    reverse: bool = False,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Elementwise linear recurrence over time, with a gradient that keeps nothing but its inputs and outputs.

    h_t = a_t h_{t-1} + b_t for each channel by itself, h_0 the initial state. With `reverse` time runs from the end:
    h_t = a_t h_{t+1} + b_t, and the initial state enters at the last token.

    Args:
      a: decays [*B, T, D], any sign and size, 0 included; float32, bfloat16, float16, or float64 (`reference` and
        `xla`). The dtype of b, or float32 beside 16-bit b: a decay near 1, such as 0.999, is 1 in bfloat16.
      b: inputs [*B, T, D].
      initial_state: [*B, D], float32, or float64 beside float64 b; default zeros.
      reverse: whether time runs from the end.
      segment_ids: integer [*B, T]; the state is zero again before a token whose id differs from that of the last token
        before it that is not padding. The first segment continues the initial state. A negative id is padding: the
        state passes it unchanged, h is 0 there, and a and b may hold anything, NaN included. What lies before a
        boundary does not change one bit behind it.
      implementation: None chooses by the platform the program is lowered for, "tpu" (Pallas Mosaic), "xla" (a loop on
        CPUs, steps that double elsewhere) or "reference" (the specification); "gpu" has no kernel. A named one that
        cannot do a call raises; None does all but explicitly sharded arrays.

    Returns:
      h [*B, T, D] in the dtype of b, and the final state [*B, D] in the dtype of the initial state: that of the last
      token, or with `reverse` of the first.

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit, at trace time.
      NotImplementedError: a named implementation cannot do this call, or does not run on the platform.
      TypeError: forward-mode differentiation through anything but "reference".

    Cost: 2 T D flops, each array moved once; the gradient twice that. Memory: the outputs, and for the gradient a
      and h. Steps that double hold a few times the outputs.

    Numerics: the state is kept in float32 (float64 for float64 inputs). A decay of exactly 0 forgets the state even
      where it is infinite, except in "reference". Implementations add in different orders and agree up to rounding.
      The gradient of 16-bit inputs reads h as it was returned, rounded.

    Derivatives: with respect to a, b and the initial state, in reverse mode of any order, each pass a linear scan; all
      modes through "reference".

    Source: Blelloch, "Prefix sums and their applications" (1990); the gradient: Martin & Cundy, "Parallelizing linear
      recurrent neural nets over sequence length" (2018); the kernel on TPUs as in De et al., "Griffin" (2024).

    Example:
      >>> import jax.numpy as jnp, kernels_pallas
      >>> a, b = jnp.full((1, 4, 1), 0.5), jnp.ones((1, 4, 1))
      >>> h, final = kernels_pallas.linear_scan(a, b, segment_ids=jnp.asarray([[0, 0, 1, -1]]))
      >>> h[0, :, 0].tolist(), final.tolist()
      ([1.0, 1.5, 1.0, 0.0], [[1.0]])
    """
    config, operands, call = prepare(a, b, initial_state, reverse=reverse, segment_ids=segment_ids)
    check_implementation(_NAME, implementation, _UNSUPPORTED, config, operands)
    if implementation == "reference" or operands.b.size == 0:
        h, final = reference.forward(config, operands, None if call.marks is None else call.marks.restart)
    else:
        guarded = dispatch.refuse_forward_mode(_NAME, dispatch.align(operands))
        h, final = _differentiable((implementation, config), guarded)  # pyright: ignore[reportGeneralTypeIssues]
    return call.finish(h, final)


# --- Canonical form. --------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What the canonical form leaves out, and the result takes in again.

    Attributes:
      batch: leading axes.
      marks: where the state restarts, and what is padding; None without segments.
    """

    batch: tuple[int, ...]
    marks: Marks | None

    def finish(self, h: jax.Array, final: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The public outputs: h [*B, T, D], 0 in padding, and the final state [*B, D]."""
        if self.marks is not None:
            h = jnp.where(self.marks.valid[:, :, None], h, 0)
        return h.reshape(*self.batch, *h.shape[1:]), final.reshape(*self.batch, final.shape[1])


def prepare(
    a: jax.Array, b: jax.Array, initial_state: Any = None, *, reverse: bool = False, segment_ids: Any = None
) -> tuple[Config, Operands, Call]:
    """Check the arguments; give the static part, the arrays in canonical form, and what finishes the result."""
    checks.arrays(_NAME, a=a, b=b)
    checks.dtype(_NAME, DTYPES, a=a, b=b, remedy=_COMPLEX if _is_complex(a) or _is_complex(b) else "")
    if jnp.result_type(a) != jnp.float32 or jnp.result_type(b) == jnp.float64:
        checks.same_dtype(_NAME, remedy="Beside 16-bit `b` it may be float32 too.", b=b, a=a)
    sizes = checks.shape(
        _NAME,
        remedy="The layout is [*batch, time, channels]; nothing is broadcast.",
        a=(a, "*B T D"),
        b=(b, "*B T D"),
        initial_state=(initial_state, "*B D"),
        segment_ids=(segment_ids, "*B T"),
    )
    checks.dtype(_NAME, "integer", segment_ids=segment_ids)
    batch = sizes["B"]
    wide = accumulator(jnp.result_type(b))
    if initial_state is not None:
        checks.dtype(_NAME, (wide,), initial_state=initial_state, remedy="States are kept wide, as they are returned.")
    config = Config(checks.flag(_NAME, "reverse", reverse))

    def flat(x: Any) -> jax.Array:
        return jnp.asarray(x).reshape(math.prod(batch), *jnp.shape(x)[len(batch) :])

    a, b = flat(a), flat(b)
    initial = jnp.zeros((b.shape[0], b.shape[2]), wide) if initial_state is None else flat(initial_state)
    if segment_ids is None:
        return config, Operands(a, b, initial), Call(batch, None)
    found = marks(flat(segment_ids), reverse=config.reverse)
    valid, restart = (x[:, :, None] for x in found)
    # By selection, so that neither what lies before a boundary nor its cotangent crosses it.
    a = jnp.where(restart, 0, jnp.where(valid, a, 1))
    return config, Operands(a, jnp.where(valid, b, 0), initial), Call(batch, found)


def _is_complex(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)


# --- Derivatives: one rule above dispatch; that of its backward pass is made of linear scans. -------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(static: tuple, operands: Operands) -> tuple[jax.Array, jax.Array]:
    h, final = forward_call(*static, operands)
    return h, final


def _differentiable_fwd(static: tuple, operands: Operands) -> tuple:
    h, final = _differentiable(static, operands)  # pyright: ignore[reportGeneralTypeIssues]
    return (h, final), (operands.a, h, operands.initial)


def _differentiable_bwd(static: tuple, saved: tuple, cotangents: tuple) -> tuple[Operands]:
    grads = _backward(static, *dispatch.align((*saved, *cotangents)))  # pyright: ignore[reportGeneralTypeIssues]
    return (Operands(*grads),)  # pyright: ignore[reportGeneralTypeIssues]


_differentiable.defvjp(_differentiable_fwd, _differentiable_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward(static: tuple, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(backward_call(*static, inputs))


def _backward_fwd(static: tuple, *inputs: jax.Array) -> tuple:
    return _backward(static, *inputs), inputs


def _backward_bwd(static: tuple, inputs: tuple, cotangents: tuple) -> tuple:
    return jax.vjp(partial(_composed, static), *inputs)[1](cotangents)


_backward.defvjp(_backward_fwd, _backward_bwd)


def _composed(
    static: tuple, a: jax.Array, h: jax.Array, initial: jax.Array, h_cotangent: jax.Array, final_cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The backward pass, of parts that have derivatives."""
    implementation, config = static
    dh = h_cotangent.astype(initial.dtype)
    against = Config(not config.reverse)
    wide = a.astype(dh.dtype)
    scanned = Operands(wide, wide * dh, final_cotangent)
    p, last = _differentiable((implementation, against), scanned)  # pyright: ignore[reportGeneralTypeIssues]
    g = dh + xla.before(against, p, final_cotangent)
    da = g * xla.before(config, h.astype(g.dtype), initial)
    return da.astype(a.dtype), g.astype(h.dtype), last


# --- Dispatch. --------------------------------------------------------------------------------------------------------

_UNSUPPORTED = {"tpu": not_on_tpu, "gpu": not_on_gpu}


def _forward_shapes(config: Config, operands: Operands) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (operands.b, operands.initial))


def _backward_shapes(config: Config, inputs: tuple) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[:3])


def _tpu_forward(config: Config, operands: Operands) -> tuple[jax.Array, ...]:
    # Imported when first lowered for a TPU: Pallas costs a tenth of a second.
    from kernels_pallas._parallel_scan._linear_scan import tpu

    return tpu.forward(config, operands)


def _tpu_backward(config: Config, inputs: tuple) -> tuple[jax.Array, ...]:
    from kernels_pallas._parallel_scan._linear_scan import tpu

    return tpu.backward(config, *inputs)


def _xla_backward(config: Config, inputs: tuple, *, sequential: bool) -> tuple[jax.Array, ...]:
    return xla.backward(config, *inputs, sequential=sequential)


forward_call = dispatch.primitive(
    _NAME,
    shapes=_forward_shapes,
    xla={"default": partial(xla.forward, sequential=False), "cpu": partial(xla.forward, sequential=True)},
    accelerated={"tpu": _tpu_forward},
    unsupported=_UNSUPPORTED,
    shareable=lambda config, operands: Operands(False, False, False),
)
backward_call = dispatch.primitive(
    "linear_scan_backward",
    shapes=_backward_shapes,
    xla={"default": partial(_xla_backward, sequential=False), "cpu": partial(_xla_backward, sequential=True)},
    accelerated={"tpu": _tpu_backward},
    unsupported=_UNSUPPORTED,
    shareable=lambda config, inputs: (False,) * 5,
)
