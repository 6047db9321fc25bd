"""The public calls: checks, derivative rules, dispatch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas._parallel_scan._selective_scan import reference, xla
from kernels_pallas._parallel_scan._selective_scan.arguments import prepare
from kernels_pallas._parallel_scan._selective_scan.config import Config, Operands
from kernels_pallas._parallel_scan.arguments import check_implementation, not_on_gpu, not_on_tpu

_NAME = "selective_scan"
# Tokens a chunk times states a channel, of which a TPU core holds all for 1024 channels: 4 MiB.
_TPU_STATES = 1024


def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = True,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    eigenvalues: str = "positive",
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Selective state-space scan (S6, Mamba) that never stores the states of all tokens, forward or backward.

    With dt = softplus(delta + delta_bias), for every channel d and state n: a_tdn = exp(dt_td A_dn), or
    2 exp(dt_td A_dn) - 1 with symmetric eigenvalues; h_tdn = a_tdn h_{t-1,dn} + dt_td u_td B_tn;
    y_td = (sum_n C_tn h_tdn + D_d u_td) silu(z_td).

    Args:
      u: inputs [*B, T, D]; float32, bfloat16, float16, or float64 (`reference` and `xla`).
      delta: step sizes before bias and softplus [*B, T, D]; the dtype of u, or float32 beside 16-bit u.
      A: rates [D, N], <= 0, usually -exp(A_log); the dtype of u or float32, like D and delta_bias. A positive rate
        raises where its value is known, and gives NaN inside a compiled program.
      B: input weights [*B, T, N], or [*B, T, G, N] in groups, of which channel d reads group d // (D / G); dtype of u.
      C: output weights, shaped like B; dtype of u.
      D: skip [D].
      z: gate [*B, T, D]; dtype of u.
      delta_bias: [D].
      delta_softplus: whether dt is softplus(delta + delta_bias); otherwise the sum itself, which must be >= 0.
      initial_state: [*B, D, N], float32, or float64 beside float64 u; default zeros.
      segment_ids: integer [*B, T], as in `linear_scan`: the state is zero again where the id changes, and a negative id
        is padding, which leaves the state unchanged, gives y = 0 and may hold anything, NaN included.
      reverse: whether time runs from the end; the initial state then enters at the last token.
      eigenvalues: "positive", decays in (0, 1], or "symmetric", in (-1, 1]: a state can then change its sign, which
        parity needs.
      chunk_size: tokens between two states that are kept for the gradient, a power of two >= 8; default 64 up
        to N = 16, fewer above. Only speed and memory depend on it.
      implementation: None chooses by the platform the program is lowered for, "tpu" (Pallas Mosaic), "xla" (a loop on
        CPUs, steps that double inside chunks elsewhere) or "reference" (the specification); "gpu" has no kernel. A
        named one that cannot do a call raises; None does all but explicitly sharded arrays.

    Returns:
      y [*B, T, D] in the dtype of u, and the final state [*B, D, N] in the dtype of the initial state.

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit, at trace time.
      NotImplementedError: a named implementation cannot do this call, or does not run on the platform.
      TypeError: forward-mode differentiation through anything but "reference".

    Cost: about 7 T D N flops and T D N exponentials, the gradient three times that. Memory: O(T (D + N)), and for the
      gradient T / chunk_size states and a chunk of them.

    Numerics: decays, states and sums in float32 (float64 for float64 inputs). Nothing is divided by products of decays.

    Derivatives: with respect to all arrays, in reverse mode; reverse over reverse, whose second pass keeps the states
      of all tokens; all modes and orders through "reference".

    Source: Gu & Dao, "Mamba: linear-time sequence modeling with selective state spaces" (2023), alg. 2 and section 3.3;
      symmetric eigenvalues: Grazzi, Siems et al., "Unlocking state-tracking in linear RNNs through negative
      eigenvalues" (2024).

    Example:
      >>> import jax, jax.numpy as jnp, kernels_pallas
      >>> u, delta = jax.random.normal(jax.random.key(0), (2, 1, 50, 8))
      >>> B, C = jax.random.normal(jax.random.key(1), (2, 1, 50, 4))
      >>> A = -jnp.ones((8, 4))
      >>> y, state = kernels_pallas.selective_scan(u, delta, A, B, C)
      >>> first, middle = kernels_pallas.selective_scan(u[:, :20], delta[:, :20], A, B[:, :20], C[:, :20])
      >>> rest, end = kernels_pallas.selective_scan(
      ...     u[:, 20:], delta[:, 20:], A, B[:, 20:], C[:, 20:], initial_state=middle
      ... )
      >>> y.shape, bool(jnp.allclose(state, end, atol=1e-5))
      ((1, 50, 8), True)
    """
    config, operands, call = prepare(
        u,
        delta,
        A,
        B,
        C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=initial_state,
        segment_ids=segment_ids,
        reverse=reverse,
        eigenvalues=eigenvalues,
        chunk_size=chunk_size,
    )
    check_implementation(_NAME, implementation, _UNSUPPORTED, config, operands)
    if implementation == "reference" or operands.u.size == 0 or operands.A.size == 0:
        y, final = reference.forward(config, operands)
    else:
        guarded = dispatch.refuse_forward_mode(_NAME, dispatch.align(operands))
        y, final, _ = _differentiable((implementation, config), guarded)  # pyright: ignore[reportGeneralTypeIssues]
    return call.finish(y, final)


def selective_scan_step(
    state: jax.Array,
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = True,
    eigenvalues: str = "positive",
) -> tuple[jax.Array, jax.Array]:
    """One token of `selective_scan`, for decoding.

    h = a h' + dt u B and y = (sum_n C_n h_n + D u) silu(z), with dt and a as there and h' the state before.

    Args:
      state: [*B, D, N], float32, or float64 beside float64 u, as `selective_scan` returns it.
      u: [*B, D].
      delta: [*B, D].
      A: [D, N].
      B: [*B, N], or [*B, G, N] in groups.
      C: shaped like B.
      D: [D].
      z: [*B, D].
      delta_bias: [D].
      delta_softplus: as in `selective_scan`.
      eigenvalues: as in `selective_scan`.

    Returns:
      y [*B, D] in the dtype of u, and the state after the token.

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit, at trace time.

    Source: see `selective_scan`.

    Example:
      >>> import jax.numpy as jnp, kernels_pallas
      >>> u, A, B = jnp.ones((1, 2)), -jnp.ones((2, 3)), jnp.ones((1, 3))
      >>> y, state = kernels_pallas.selective_scan_step(jnp.zeros((1, 2, 3)), u, u, A, B, B, delta_softplus=False)
      >>> y.tolist(), state.shape
      ([[3.0, 3.0]], (1, 2, 3))
    """
    config, operands, call = prepare(
        u,
        delta,
        A,
        B,
        C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=state,
        eigenvalues=eigenvalues,
        step=True,
    )
    y, state = call.finish(*reference.forward(config, operands))
    return jnp.squeeze(y, -2), state


# --- Derivatives: one rule above dispatch, whose backward pass has a rule of its own. ---------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(static: tuple, operands: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Readings, final state, and the states that are kept: none, unless a backward pass will ask for them."""
    implementation, config = static
    y, final, *kept = forward_call(implementation, config, operands)
    return y, final, kept[0] if kept else jnp.zeros((final.shape[0], 0, *final.shape[1:]), final.dtype)


def _differentiable_fwd(static: tuple, operands: Operands) -> tuple:
    implementation, config = static
    keeping = (implementation, replace(config, keeps=True))
    y, final, states = _differentiable(keeping, operands)  # pyright: ignore[reportGeneralTypeIssues]
    return (y, final, states if config.keeps else states[:, :0]), (operands, states)


def _differentiable_bwd(static: tuple, saved: tuple, cotangents: tuple) -> tuple[Operands]:
    # Nobody sees the states, so that nothing comes back through them.
    inputs = dispatch.align((*saved, *cotangents[:2]))
    grads = _backward(static, *inputs)  # pyright: ignore[reportGeneralTypeIssues]
    return (Operands(*grads),)  # pyright: ignore[reportGeneralTypeIssues]


_differentiable.defvjp(_differentiable_fwd, _differentiable_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward(static: tuple, *inputs: Any) -> tuple[jax.Array, ...]:
    implementation, config = static
    return tuple(backward_call(implementation, replace(config, keeps=False), inputs))


def _backward_fwd(static: tuple, *inputs: Any) -> tuple:
    operands, _, *cotangents = inputs
    return _backward(static, *inputs), (operands, cotangents)


def _backward_bwd(static: tuple, saved: tuple, cotangents: tuple) -> tuple:
    """The derivative of the backward pass: the states are seen as functions of the operands here, and all are kept."""
    operands, given = saved

    def pulled(arrays: tuple, *given: jax.Array) -> tuple[jax.Array, ...]:
        def run(arrays: tuple) -> tuple[jax.Array, jax.Array]:
            whole = Operands(*arrays, operands.restart)  # pyright: ignore[reportCallIssue]
            return reference.forward(static[1], whole)

        return jax.vjp(run, arrays)[1](given)[0]

    grads, *rest = jax.vjp(pulled, tuple(operands[:6]), *given)[1](cotangents)
    return (Operands(*grads), None, *rest)


_backward.defvjp(_backward_fwd, _backward_bwd)


# --- Dispatch. --------------------------------------------------------------------------------------------------------


def _not_on_tpu(config: Config, operands: Any) -> str | None:
    """Why the TPU kernels cannot do a call, forward or backward, or None."""
    N = -(-operands.A.shape[1] // 8) * 8
    if N * config.chunk > _TPU_STATES:
        return f"{config.chunk} tokens a chunk with {N} states a channel do not fit its memory; lower chunk_size or N"
    return not_on_tpu(config, operands)


def _not_backward_on_tpu(config: Config, inputs: tuple) -> str | None:
    return not_on_tpu(config, inputs) or _not_on_tpu(config, inputs[0])


_UNSUPPORTED = {"tpu": _not_on_tpu, "gpu": not_on_gpu}
_UNSUPPORTED_BACKWARD = {"tpu": _not_backward_on_tpu, "gpu": not_on_gpu}


def _forward_shapes(config: Config, operands: Operands) -> tuple[jax.ShapeDtypeStruct, ...]:
    acc, state = operands.initial.dtype, operands.initial.shape
    outputs = (jax.ShapeDtypeStruct(operands.u.shape, acc), jax.ShapeDtypeStruct(state, acc))
    if not config.keeps:
        return outputs
    chunks = -(-operands.u.shape[1] // config.chunk)
    return (*outputs, jax.ShapeDtypeStruct((state[0], chunks, *state[1:]), acc))


def _backward_shapes(config: Config, inputs: tuple) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[0][:6])


def _shareable(operands: Operands, *, rates: bool) -> Operands:
    """A batch may share its rates, except where their cotangent is asked for."""
    marked = Operands(False, False, rates, False, False, False, False)
    return marked._replace(restart=None) if operands.restart is None else marked


def _tpu_forward(config: Config, operands: Operands) -> tuple[jax.Array, ...]:
    # Imported when first lowered for a TPU: Pallas costs a tenth of a second.
    from kernels_pallas._parallel_scan._selective_scan import tpu

    return tpu.forward(config, operands)


def _tpu_backward(config: Config, inputs: tuple) -> tuple[jax.Array, ...]:
    from kernels_pallas._parallel_scan._selective_scan import tpu_backward

    return tpu_backward.backward(config, *inputs)


def _xla_backward(config: Config, inputs: tuple, *, sequential: bool) -> tuple[jax.Array, ...]:
    return xla.backward(config, *inputs, sequential=sequential)


forward_call = dispatch.primitive(
    _NAME,
    shapes=_forward_shapes,
    xla={"default": partial(xla.forward, sequential=False), "cpu": partial(xla.forward, sequential=True)},
    accelerated={"tpu": _tpu_forward},
    unsupported=_UNSUPPORTED,
    shareable=lambda config, operands: _shareable(operands, rates=True),
)
backward_call = dispatch.primitive(
    "selective_scan_backward",
    shapes=_backward_shapes,
    xla={"default": partial(_xla_backward, sequential=False), "cpu": partial(_xla_backward, sequential=True)},
    accelerated={"tpu": _tpu_backward},
    unsupported=_UNSUPPORTED_BACKWARD,
    shareable=lambda config, inputs: (_shareable(inputs[0], rates=False), False, False, False),
)
