"""The public calls: derivative rules and dispatch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import checks, dispatch
from kernels_pallas._linear_attention import reference, xla
from kernels_pallas._linear_attention.arguments import (
    DTYPES,
    NAME,
    check_scale,
    divide,
    grouped,
    heads_of,
    prepare,
)
from kernels_pallas._linear_attention.config import Config, Operands, gate
from kernels_pallas.recurrence import accumulator, check_log_decay

_IMPLEMENTATIONS = (None, "reference", "xla", "tpu", "gpu")
_OVER = "batch and heads"


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    prefix_length: int | jax.Array | None = None,
    normalize: bool = False,
    reverse: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention without the softmax, as a recurrence over a matrix state with decay: linear time and memory.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T and o_t = scale S_t^T q_t, with S_0 the initial state, g_t the log decay of
    token t and one S [K, V] a head. The decay acts before the token is written, on the initial state too. It is
    computed chunk by chunk, exactly.

    Args:
      q: queries [*B, T, H, K]; float32, bfloat16, float16, or float64 (`reference` and `xla`).
      k: keys [*B, T, H, K] of the same dtype.
      v: values [*B, T, H, V] of the same dtype. q, k and v may have fewer heads, a number that divides the largest, H:
        head h of the state then reads head h // (H / heads).
      log_decay: g, natural logarithms <= 0: None for no decay; [H], a constant a head (RetNet, Lightning attention);
        [*B, T, H], one a token (Mamba-2, simple gated linear attention); or [*B, T, H, K], one a token and key
        channel (gated linear attention). -inf is a decay of 0; below -1000 all are, with zero derivative.
      initial_state: S_0 [*B, H, K, V] in float32, or float64 for float64 inputs; default 0.
      segment_ids: int32 [*B, T], documents packed into a row: the state restarts from 0 where the id differs from that
        of the last token that is not padding; the first document continues `initial_state`. A negative id is padding:
        the state passes it unchanged, its output is 0, and it may hold anything, NaN included.
      scale: of q . k; default K ** -0.5. A traced scale is multiplied into q instead.
      prefix_length: int, or int [] or [*B], from 0 to T: the first tokens, that see each other in both directions: a
        query in the prefix reads the state after the whole prefix, later queries are causal. A traced one beyond T
        counts as T. Not together with `segment_ids` or `reverse`.
      normalize: divide o_t by scale z_t . q_t, with z_t the sum that a column of ones in v would give: the scale
        cancels. A divisor below 1e-6 in absolute value counts as 1e-6. The state is then [*B, H, K, V + 1], its last
        column z. In bfloat16, divisor and dividend are rounded before the division.
      reverse: run from the last token to the first; the initial state enters at the last token.
      chunk_size: tokens computed at once, a power of two from 16 to 256; default by implementation. Only speed depends
        on it.
      implementation: None chooses by the platform the program is lowered for, "tpu" (Pallas Mosaic), "gpu" (Pallas
        Mosaic GPU; Hopper, 16-bit inputs), "xla" (runs everywhere) or "reference" (token by token, the
        specification). A named one that cannot do a call raises; None does all but explicitly sharded arrays.

    Returns:
      o [*B, T, H, V] in the dtype of q, and the state after the last token [*B, H, K, V] in float32, or float64 for
      float64 inputs. Passed on as `initial_state`, it continues the sequence.

    Raises:
      ShapeError, DtypeError, TypeError, ValueError: arguments that do not fit, at trace time; a positive log_decay
        where its value is known (inside compiled code or a derivative it becomes NaN in the outputs).
      NotImplementedError: a named implementation cannot do this call, or does not run on the platform.
      TypeError: forward-mode differentiation through anything but "reference".

    Cost: about 2 T H (2 K V + C (K + V)) flops forward for chunks of C tokens; memory O(T), plus one state a chunk in
      the backward pass. What is saved for it is the inputs.

    Numerics: states, decays and sums in float32 (float64 for float64 inputs). Decays between tokens are differences of
      sums inside a chunk that are exact to rounding beside any gate, and are never divided by.

    Derivatives: with respect to q, k, v, log_decay and the initial state, through o and the final state, in reverse
      mode and reverse over reverse; all modes and orders through "reference".

    Source: Katharopoulos et al., "Transformers are RNNs" (2020); chunks: Sun et al., "Retentive network" (2023), eq. 7;
      Yang et al., "Gated linear attention transformers with hardware-efficient training" (2024), sec. 4; prefix: Arora
      et al., "Just read twice" (2024), in the form in which prefix and rest share their projections.

    Example:
      >>> import jax, jax.numpy as jnp, kernels_pallas
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 16))
      >>> gates = jax.nn.log_sigmoid(jax.random.normal(jax.random.key(1), (2, 100, 4)))
      >>> o, state = kernels_pallas.linear_attention(q, k, v, log_decay=gates)
      >>> o.shape, state.shape
      ((2, 100, 4, 16), (2, 4, 16, 16))
    """
    config, operands, finish = prepare(
        q,
        k,
        v,
        log_decay=log_decay,
        initial_state=initial_state,
        segment_ids=segment_ids,
        scale=scale,
        prefix_length=prefix_length,
        normalize=normalize,
        reverse=reverse,
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


def linear_attention_step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    normalize: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_attention`, for decoding: constant cost, whatever came before.

    S = diag(exp g) S_before + k v^T and o = scale S^T q.

    Args:
      state: S_before [*B, H, K, V], or [*B, H, K, V + 1] with `normalize`; float32, or float64 for float64 inputs.
      q: query [*B, H, K].
      k: key [*B, H, K] of the same dtype.
      v: value [*B, H, V] of the same dtype. q, k and v may have fewer heads, as in `linear_attention`.
      log_decay: g, natural logarithms <= 0: None, [H], [*B, H] or [*B, H, K].
      scale: of q . k; default K ** -0.5.
      normalize: as in `linear_attention`.

    Returns:
      o [*B, H, V] in the dtype of q, and the state after the token.

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit, at trace time.

    Cost: 4 K V flops a head, and the state read and written once.

    Derivatives: all modes.

    Source: as `linear_attention`.

    Example:
      >>> import jax, jax.numpy as jnp, kernels_pallas
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 16))
      >>> o, state = kernels_pallas.linear_attention_step(jnp.zeros((2, 4, 16, 16)), q, k, v)
      >>> o.shape, state.shape
      ((2, 4, 16), (2, 4, 16, 16))
    """
    name = "linear_attention_step"
    checks.arrays(name, state=state, q=q, k=k, v=v)
    checks.dtype(name, DTYPES, q=q)
    checks.same_dtype(name, remedy="Cast them to one dtype.", q=q, k=k, v=v)
    remedy = "The layout is [*batch, heads, head dimension]: one token."
    sizes = checks.shape(name, remedy=remedy, q=(q, "*B Hq K"), k=(k, "*B Hk K"), v=(v, "*B Hv V"))
    H, K, V = heads_of(name, sizes), sizes["K"], sizes["V"]
    normalize = checks.flag(name, "normalize", normalize)
    dtype = accumulator(jnp.result_type(q))
    lead = " ".join(map(str, sizes["B"]))
    checks.shape(name, state=(state, f"{lead} {H} {K} {V + normalize}"))
    checks.dtype(name, [dtype], remedy="States are kept in the dtype of sums.", state=state)
    scale, read = check_scale(name, scale, K, jnp.asarray(q))
    read, key, value = (grouped(jnp.asarray(x, dtype), H) for x in (read, k, v))
    if normalize:
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)
    if log_decay is not None:
        checks.dtype(name, "floating", log_decay=log_decay)
        got, wanted = tuple(jnp.shape(log_decay)), [(H,), (*sizes["B"], H), (*sizes["B"], H, K)]
        what = "have shape " + " or ".join(map(str, dict.fromkeys(wanted)))
        checks.value(name, "log_decay", got in wanted, what, got, error=checks.ShapeError)
        decay = jnp.exp(check_log_decay(name, jnp.asarray(log_decay)).astype(dtype))
        state = state * (decay[..., None] if got == wanted[2] and got != wanted[1] else decay[..., None, None])
    state = state + key[..., :, None] * value[..., None, :]
    o = scale * jnp.einsum("...k,...kv->...v", read, state, precision=jax.lax.Precision.HIGHEST)
    o = divide(o, dtype) if normalize else o
    return o.astype(jnp.result_type(q)), state


# --- Which implementation can do a call. ------------------------------------------------------------------------------


def _not_on_gpu(config: Config, operands: Operands) -> str | None:
    from kernels_pallas._linear_attention import gpu

    return dispatch.not_hopper() or gpu.unsupported(config, operands)


def _not_backward_on_gpu(config: Config, inputs: tuple) -> str | None:
    from kernels_pallas._linear_attention import gpu_backward

    return dispatch.not_hopper() or gpu_backward.unsupported_backward(config, inputs[0])


def _not_on_tpu(config: Config, operands: Operands) -> str | None:
    from kernels_pallas._linear_attention.limits import not_on_tpu

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
    return Operands(*found[:4], log_decay=found[4] if len(found) == 5 else None)


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
        return tuple(x for x in (*found[:4], found.log_decay) if x is not None)

    return jax.vjp(pulled, floating, *given)[1](tuple(cotangents))


_backward.defvjp(_backward_fwd, _backward_bwd)


# --- Dispatch. --------------------------------------------------------------------------------------------------------


def _forward_shapes(config: Config, operands: Operands) -> tuple[jax.ShapeDtypeStruct, ...]:
    v, state = operands.v, operands.state
    return jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, state.dtype)


def _backward_shapes(config: Config, inputs: tuple) -> tuple[jax.ShapeDtypeStruct, ...]:
    operands = inputs[0]
    of = (*operands[:4], *(() if gate(operands) == "none" else (operands.log_decay,)))
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in of)


def _nothing_shared(config: Config, operands: Any) -> Any:
    return jax.tree.map(lambda _: False, operands)


def _xla_backward(sequential: bool) -> Callable:
    return lambda config, inputs: xla.backward(config, *inputs, sequential=sequential)


# Kernels are imported when first lowered for their platform: Pallas costs a tenth of a second.


def _tpu_forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    from kernels_pallas._linear_attention import tpu

    return tpu.forward(config, operands)


def _tpu_backward(config: Config, inputs: tuple) -> tuple[jax.Array, ...]:
    from kernels_pallas._linear_attention import tpu_backward

    return tpu_backward.backward(config, *inputs)


def _gpu_forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    from kernels_pallas._linear_attention import gpu

    return gpu.forward(config, operands)


def _gpu_backward(config: Config, inputs: tuple) -> tuple[jax.Array, ...]:
    from kernels_pallas._linear_attention import gpu_backward

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
