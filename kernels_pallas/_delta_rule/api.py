"""The public calls: derivative rules and dispatch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import checks, dispatch
from kernels_pallas._delta_rule import reference, xla
from kernels_pallas._delta_rule.arguments import (
    NAME,
    check_decay,
    check_floating,
    check_updates,
    check_updates_of_heads,
    normalized,
    prepare,
)
from kernels_pallas._delta_rule.config import Config, Operands, gate
from kernels_pallas._linear_attention import check_scale, grouped
from kernels_pallas.recurrence import accumulator

_IMPLEMENTATIONS = (None, "reference", "xla", "tpu", "gpu")
_OVER = "batch and heads"


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    l2norm: bool = False,
    updates_per_token: int = 1,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention whose state a token corrects instead of adding to it: linear time and memory.

    With S~_t = diag(exp g_t) S_{t-1}, what key k_t reads moves towards v_t by the share beta_t:
    S_t = S~_t + k_t u_t^T with u_t = beta_t (v_t - S~_t^T k_t), and o_t = scale S_t^T q_t. S_0 is the initial state,
    one S [K, V] a head. This is S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T: for keys of
    length 1, beta in (0, 1) has eigenvalues in [0, 1] (DeltaNet, gated DeltaNet), beta in (0, 2) in [-1, 1], which
    parity and other state tracking need. It is computed chunk by chunk, exactly.

    Args:
      q: queries [*B, T, H, K]; float32, bfloat16, float16, or float64 (`reference` and `xla`).
      k: keys [*B, T n, H, K] of the same dtype, with n = `updates_per_token`. Their length should be 1, as `l2norm`
        makes it: I - beta k k^T multiplies what is along k by 1 - beta |k|^2, and a state that this makes grow
        overflows.
      v: values [*B, T n, HV, V] of the same dtype; HV is a multiple of H, and head h reads head h // (HV / H) of q
        and k.
      beta: how much of the error is corrected [*B, T n, HV], floating point, any value; 0 leaves the state.
      log_decay: g, natural logarithms <= 0: None for no decay; [*B, T, HV], one a token (gated DeltaNet); or
        [*B, T, HV, K], one a token and key channel (Kimi delta attention). -inf is a decay of 0; below -1000 all are,
        with zero derivative.
      initial_state: S_0 [*B, HV, K, V] in float32, or float64 for float64 inputs; default 0.
      segment_ids: int32 [*B, T], documents packed into a row: the state restarts from 0 where the id differs from that
        of the last token that is not padding; the first document continues `initial_state`. A negative id is padding:
        the state passes it unchanged, its output is 0, and it may hold anything, NaN included.
      scale: of S^T q; default K ** -0.5. A traced scale is multiplied into q instead.
      l2norm: divide q and k by sqrt(sum x^2 + 1e-6) first, in float32 (float64 for float64 inputs), rounded to their
        dtype.
      updates_per_token: n, steps of the rule that a token takes one after the other (DeltaProduct): those of token t
        are entries n t to n t + n - 1 of k, v and beta. The decay acts before the first, q reads after the last.
      chunk_size: updates computed at once, a power of two from 16 to 256; default by implementation. Only speed
        depends on it.
      implementation: None chooses by the platform the program is lowered for, "tpu" (Pallas Mosaic), "gpu" (Pallas
        Mosaic GPU; Hopper, 16-bit inputs), "xla" (runs everywhere) or "reference" (token by token, the
        specification). A named one that cannot do a call raises; None does all but explicitly sharded arrays.

    Returns:
      o [*B, T, HV, V] in the dtype of q, and the state after the last token [*B, HV, K, V] in float32, or float64 for
      float64 inputs. Passed on as `initial_state`, it continues the sequence.

    Raises:
      ShapeError, DtypeError, TypeError, ValueError: arguments that do not fit, at trace time; a positive log_decay
        where its value is known (inside compiled code or a derivative it becomes NaN in the outputs).
      NotImplementedError: a named implementation cannot do this call, or does not run on the platform.
      TypeError: forward-mode differentiation through anything but "reference".

    Cost: about n T HV (6 K V + C (4 K + 4 V) + 2 C^2 / 3) flops forward for chunks of C updates; memory O(n T), plus
      one state a chunk in the backward pass. What is saved for it is the inputs.

    Numerics: states, decays and sums in float32 (float64 for float64 inputs). The triangular matrix of a chunk is
      inverted block by block: it has no powers, which would be huge where keys are alike and beta is above 1. Decays
      between tokens are differences of sums inside a chunk that are exact to rounding beside any gate.

    Derivatives: with respect to q, k, v, beta, log_decay and the initial state, through o and the final state, in
      reverse mode and reverse over reverse; all modes and orders through "reference".

    Source: Yang, Wang, Zhang, Shen & Kim, "Parallelizing linear transformers with the delta rule over sequence length"
      (2024), sec. 3; Yang, Kautz & Hatamizadeh, "Gated delta networks" (2024); Kimi team, "Kimi linear" (2025); Siems
      et al., "DeltaProduct" (2025); eigenvalues in [-1, 1]: Grazzi, Siems et al. (2024).

    Example:
      >>> import jax, jax.numpy as jnp, kernels_pallas
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 16))
      >>> beta = jax.nn.sigmoid(jax.random.normal(jax.random.key(1), (2, 100, 4)))
      >>> o, state = kernels_pallas.delta_rule(q, k, v, beta, l2norm=True)
      >>> o.shape, state.shape
      ((2, 100, 4, 16), (2, 4, 16, 16))
    """
    config, operands, finish = prepare(
        q,
        k,
        v,
        beta,
        log_decay=log_decay,
        initial_state=initial_state,
        segment_ids=segment_ids,
        scale=scale,
        l2norm=l2norm,
        updates_per_token=updates_per_token,
        chunk_size=chunk_size,
    )
    checks.choice(NAME, "implementation", implementation, _IMPLEMENTATIONS)
    if operands.q.size == 0 or operands.v.size == 0:
        return finish(jnp.zeros(operands.v.shape, operands.v.dtype), operands.state)
    dispatch.check_implementation(NAME, implementation, _UNSUPPORTED, config, operands, _OVER)
    if implementation == "reference":
        return finish(*reference.forward(config, operands))
    guarded = dispatch.refuse_forward_mode(NAME, dispatch.align(operands))
    return finish(*_differentiable((implementation, config), guarded))  # pyright: ignore[reportGeneralTypeIssues]


def delta_rule_step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    l2norm: bool = False,
    updates_per_token: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """One token of `delta_rule`, for decoding: constant cost, whatever came before.

    S~ = diag(exp g) S_before, S = S~ + k u^T with u = beta (v - S~^T k), o = scale S^T q.

    Args:
      state: S_before [*B, HV, K, V] in float32, or float64 for float64 inputs.
      q: query [*B, H, K].
      k: key [*B, H, K] of the same dtype; with n = `updates_per_token` above 1, [*B, n, H, K].
      v: value [*B, HV, V] of the same dtype, or [*B, n, HV, V].
      beta: share of the error that is corrected [*B, HV], or [*B, n, HV].
      log_decay: g, natural logarithms <= 0: None, [*B, HV] or [*B, HV, K].
      scale: of S^T q; default K ** -0.5.
      l2norm: divide q and k by their length, as in `delta_rule`.
      updates_per_token: steps of the rule in this token.

    Returns:
      o [*B, HV, V] in the dtype of q, and the state after the token.

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit, at trace time.

    Cost: 6 K V flops a head and update; the state is read and written once for each.

    Derivatives: all modes.

    Source: as `delta_rule`.

    Example:
      >>> import jax, jax.numpy as jnp, kernels_pallas
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 16))
      >>> state = jnp.zeros((2, 4, 16, 16))
      >>> o, state = kernels_pallas.delta_rule_step(state, q, k, v, jnp.ones((2, 4)), l2norm=True)
      >>> o.shape, state.shape
      ((2, 4, 16), (2, 4, 16, 16))
    """
    name = "delta_rule_step"
    checks.arrays(name, state=state, q=q, k=k, v=v, beta=beta)
    n = check_updates(name, updates_per_token)
    check_floating(name, q, k, v, beta, log_decay)
    sizes = checks.shape(name, remedy="The layout is [*batch, heads, head dimension]: one token.", q=(q, "*B H K"))
    batch, H, K = sizes["B"], sizes["H"], sizes["K"]
    lead = (*batch, n) if n > 1 else batch
    remedy = "Several updates a token stand before the heads."
    V, HV = check_updates_of_heads(name, remedy, lead, H, K, k, v, beta)
    dtype = accumulator(jnp.result_type(q))
    checks.shape(name, state=(state, " ".join(map(str, (*batch, HV, K, V)))))
    checks.dtype(name, [dtype], remedy="States are kept in the dtype of sums.", state=state)
    l2norm = checks.flag(name, "l2norm", l2norm)
    out = jnp.result_type(q)
    if l2norm:
        q, k = normalized(jnp.asarray(q)), normalized(jnp.asarray(k))
    scale, q = check_scale(name, scale, K, jnp.asarray(q))
    q, k = (grouped(jnp.asarray(x, dtype), HV) for x in (q, k))
    decay = jnp.ones((*batch, HV, 1), dtype)
    if log_decay is not None:
        g = check_decay(name, log_decay, (*batch, HV), K, dtype)
        decay = jnp.exp(g if g.ndim > len(batch) + 1 else g[..., None])
    k, v, beta = (jnp.asarray(x, dtype).reshape(*batch, n, HV, *x.shape[len(lead) + 1 :]) for x in (k, v, beta))
    at = (slice(None),) * len(batch)
    for i in range(n):
        state = reference.step(state, k[*at, i], v[*at, i], beta[*at, i], decay if i == 0 else jnp.ones_like(decay))
    return (scale * reference.read(state, q)).astype(out), state


# --- Which implementation can do a call. ------------------------------------------------------------------------------


def _not_on_gpu(config: Config, operands: Operands) -> str | None:
    from kernels_pallas._delta_rule import gpu

    return dispatch.not_hopper() or gpu.unsupported(config, operands)


def _not_backward_on_gpu(config: Config, inputs: tuple) -> str | None:
    from kernels_pallas._delta_rule import gpu_backward

    return dispatch.not_hopper() or gpu_backward.unsupported_backward(config, inputs[0])


def _not_on_tpu(config: Config, operands: Operands) -> str | None:
    from kernels_pallas._delta_rule.limits import not_on_tpu

    return not_on_tpu(config, operands)


_UNSUPPORTED: dict[str, Callable] = {"tpu": _not_on_tpu, "gpu": _not_on_gpu}
_UNSUPPORTED_BACKWARD: dict[str, Callable] = {
    "tpu": lambda config, inputs: _not_on_tpu(config, inputs[0]),
    "gpu": _not_backward_on_gpu,
}


# --- Derivatives: one rule above dispatch, whose backward pass has a rule of its own. ---------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(static: tuple, operands: Operands) -> tuple[jax.Array, jax.Array]:
    o, state = _forward(*static, operands)
    return o, state


def _differentiable_fwd(static: tuple, operands: Operands) -> tuple:
    return _differentiable(static, operands), operands  # pyright: ignore[reportGeneralTypeIssues]


def _differentiable_bwd(static: tuple, operands: Operands, cotangents: tuple) -> tuple[Operands]:
    inputs = dispatch.align((operands, *cotangents))
    dispatch.check_implementation(NAME, static[0], _UNSUPPORTED_BACKWARD, static[1], inputs, _OVER)
    return (_grads(_backward(static, *inputs)),)  # pyright: ignore[reportGeneralTypeIssues]


_differentiable.defvjp(_differentiable_fwd, _differentiable_bwd)


def _grads(found: tuple) -> Operands:
    return Operands(*found[:5], log_decay=found[5] if len(found) == 6 else None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward(static: tuple, operands: Operands, o_cotangent: Any, state_cotangent: Any) -> tuple:
    return tuple(_backward_call(*static, (operands, o_cotangent, state_cotangent)))


def _backward_fwd(static: tuple, *inputs: Any) -> tuple:
    return _backward(static, *inputs), inputs


def _backward_bwd(static: tuple, inputs: tuple, cotangents: tuple) -> tuple:
    """The derivative of the backward pass: that of the chunked form, which JAX differentiates twice."""
    operands, *given = inputs
    floating = operands._replace(segments=None)

    def pulled(floating: Operands, *given: jax.Array) -> tuple:
        def run(floating: Operands) -> tuple[jax.Array, jax.Array]:
            whole = floating._replace(segments=operands.segments)
            return xla.forward(static[1], whole, sequential=True)

        found = jax.vjp(run, floating)[1](given)[0]
        return tuple(x for x in (*found[:5], found.log_decay) if x is not None)

    return jax.vjp(pulled, floating, *given)[1](tuple(cotangents))


_backward.defvjp(_backward_fwd, _backward_bwd)


# --- Dispatch. --------------------------------------------------------------------------------------------------------


def _forward_shapes(config: Config, operands: Operands) -> tuple[jax.ShapeDtypeStruct, ...]:
    v, state = operands.v, operands.state
    return jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, state.dtype)


def _backward_shapes(config: Config, inputs: tuple) -> tuple[jax.ShapeDtypeStruct, ...]:
    operands = inputs[0]
    of = (*operands[:5], *(() if gate(operands) == "none" else (operands.log_decay,)))
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in of)


def _nothing_shared(config: Config, operands: Any) -> Any:
    return jax.tree.map(lambda _: False, operands)


def _xla_backward(sequential: bool) -> Callable:
    return lambda config, inputs: xla.backward(config, *inputs, sequential=sequential)


# Kernels are imported when first lowered for their platform: Pallas costs a tenth of a second.


def _tpu_forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    from kernels_pallas._delta_rule import tpu

    return tpu.forward(config, operands)


def _tpu_backward(config: Config, inputs: tuple) -> tuple[jax.Array, ...]:
    from kernels_pallas._delta_rule import tpu_backward

    return tpu_backward.backward(config, *inputs)


def _gpu_forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    from kernels_pallas._delta_rule import gpu

    return gpu.forward(config, operands)


def _gpu_backward(config: Config, inputs: tuple) -> tuple[jax.Array, ...]:
    from kernels_pallas._delta_rule import gpu_backward

    return gpu_backward.backward(config, *inputs)


_forward = dispatch.primitive(
    NAME,
    shapes=_forward_shapes,
    xla={"default": partial(xla.forward, sequential=False), "cpu": partial(xla.forward, sequential=True)},
    accelerated={"tpu": _tpu_forward, "gpu": _gpu_forward},
    unsupported=_UNSUPPORTED,
    shareable=_nothing_shared,
)
_backward_call = dispatch.primitive(
    f"{NAME}_backward",
    shapes=_backward_shapes,
    xla={"default": _xla_backward(False), "cpu": _xla_backward(True)},
    accelerated={"tpu": _tpu_backward, "gpu": _gpu_backward},
    unsupported=_UNSUPPORTED_BACKWARD,
    shareable=_nothing_shared,
)
