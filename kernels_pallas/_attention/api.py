"""The public call: checks, canonical form, derivative rules, dispatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import checks, dispatch
from kernels_pallas._attention import reference, xla
from kernels_pallas._attention.arguments import prepare
from kernels_pallas._attention.config import BlockSizes, Config, Operands, accumulator, tpu_blocks

_IMPLEMENTATIONS = (None, "reference", "xla", "tpu", "gpu")
# Entries of the block map that a TPU core can hold in scalar memory.
_TPU_MAP_ENTRIES = 2**16
_SHARED = ("bias", "mask", "q_positions", "kv_positions")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: int | jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Any:
    """Exact softmax attention without the matrix of scores in memory.

    With s_ij = scale q_i . k_j + bias_ij, then s <- soft_cap tanh(s / soft_cap), hidden entries -inf:
    lse_i = log sum_j exp s_ij and o_i = sum_j d_ij exp(s_ij - lse_i) v_j, where dropout makes d_ij 0 or 1 / (1 - rate)
    and d_ij = 1 without it. Key j is visible to query i iff pos_j <= pos_i
    (causal), pos_i - left <= pos_j <= pos_i + right (window), their segments are equal and not negative, and the mask
    is True. A query that sees nothing gets o = 0, lse = -inf and zero gradients (`jax.nn` and others give it the mean
    of v).

    Args:
      q: queries [*B, T, Hq, D]; float32, bfloat16, float16, or float64 (`reference` and `xla`).
      k: keys [*B, S, Hk, D] of the same dtype; Hk divides Hq, and query head h reads key head h // (Hq / Hk).
      v: values [*B, S, Hk, Dv] of the same dtype.
      bias: added to the scaled scores, [*B, Hq, T, S], floating point; each of *B, Hq, T may be 1.
      mask: True where a query may see a key, [*B, Hq, T, S], bool; every axis may be 1.
      segment_ids: int32 [*B, T] for both sides, or a pair ([*B, T], [*B, S]); only equal ids see each other. A negative
        id is padding: it sees nothing, is seen by nothing, and its q, k, v may hold anything, NaN included. What is
        hidden in any other way must be finite.
      q_positions: int [T] or [*B, T], less than 2^30 in absolute value; default 0, 1, ...
      kv_positions: int [S] or [*B, S], likewise; default 0, 1, ...
      q_offset: position of the first query, an int or int [] or [*B], when `q_positions` is not given: where a chunk of
        queries starts in a longer context.
      causal: hide keys behind the query's position.
      window: (left, right), how far a query sees in positions, ints >= 0; None for no limit on that side.
      soft_cap: bound of the scores, > 0, before hiding.
      scale: of q . k; default D ** -0.5. A traced scale is multiplied into q instead.
      dropout_rate: share of the weights that are dropped, in [0, 1), rounded to a multiple of 2^-16. Which ones depends
        on the seed and on the indices of batch, head, query and key alone: not on implementation, blocks or platform.
        Inside `jax.shard_map` these are indices of the shard, so fold the shard's own index into the seed.
      dropout_seed: an int below 2^32, an integer scalar, of which the low 32 bits count, or a typed key of
        `jax.random`.
      return_lse: also return the log-sum-exp; it is differentiable, which merges of partial results need.
      implementation: None chooses by the platform the program is lowered for, "tpu" (Pallas Mosaic), "gpu" (Pallas
        Mosaic GPU; Hopper, float16 and bfloat16, no bias, mask or dropout, heads of at most 256), "xla" (chunked,
        linear memory, fast on CPUs) or "reference" (dense, the specification). A named one that cannot do a call
        raises; None always works. A program exported for CUDA where no GPU is present is for Hopper.
      block_sizes: of the tiles of `xla` and `tpu`; default by implementation, flags and dtype. `gpu` has its own. Only
        speed depends on it.

    Returns:
      o [*B, T, Hq, Dv] in the dtype of q; with `return_lse` the pair (o, lse [*B, Hq, T] in float32, or float64 for
      float64).

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit, at trace time.
      NotImplementedError: a named implementation cannot do this call, or does not run on the platform.
      TypeError: forward-mode differentiation through anything but "reference".

    Cost: 2 T S Hq (D + Dv) flops forward, 2.5 times that backward; blocks that positions or segments
      hide cost nothing. Memory O(T + S), except "reference": O(T S).

    Numerics: scores, statistics and sums in float32 (float64 for float64 inputs); 16-bit weights are rounded to the
      dtype of v before the product with v on accelerators. Hide with `mask` or, without
      `soft_cap`, a bias of -inf, not with a huge finite bias: o is right then too, but the gradient of a row whose
      every score is huge is not, since lse cannot hold log S beside such a score.

    Derivatives: with respect to q, k, v and bias in reverse mode, and reverse over reverse, whose second pass is dense;
      all modes and orders through "reference". A bias that is differentiated costs as much memory again as it has, and
      on accelerators a second pass over the scores. The implicit derivative of a solve whose map holds attention is
      taken in forward mode, and so needs "reference".

    Source: Dao, Fu, Ermon, Rudra & Ré, "FlashAttention" (2022), alg. 1; Dao, "FlashAttention-2" (2023), alg. 1 and 2;
      online softmax: Milakov & Gimelshein (2018). Dropout: Threefry-2x32 (Salmon et
      al., 2011). The cotangent of lse enters delta = rowsum(do o) - dlse.

    Example:
      >>> import jax, jax.numpy as jnp, kernels_pallas
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 32))
      >>> o, lse = kernels_pallas.attention(q, k, v, causal=True, return_lse=True)
      >>> o.shape, lse.shape, bool(jnp.allclose(o[:, 0], v[:, 0], atol=1e-6))
      ((2, 100, 4, 32), (2, 4, 100), True)
    """
    config, operands, batch = prepare(
        q,
        k,
        v,
        bias=bias,
        mask=mask,
        segment_ids=segment_ids,
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_offset=q_offset,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        dropout_rate=dropout_rate,
        dropout_seed=dropout_seed,
        block_sizes=block_sizes,
    )
    checks.choice("attention", "implementation", implementation, _IMPLEMENTATIONS)
    nothing = 0 in (operands.q.size, operands.k.size, operands.v.size)
    _check_implementation(None if nothing else implementation, config, operands)
    if nothing:
        o, lse = _nothing(operands)
    elif implementation == "reference":
        o, lse = reference.forward(config, operands)
    else:
        guarded = dispatch.refuse_forward_mode("attention", dispatch.align(operands))
        o, lse = _compiled((implementation, config), guarded)
    o, lse = (x.reshape(*batch, *x.shape[1:]) for x in (o, lse))
    return (o, lse) if return_lse else o


# --- Which implementation can do a call. ------------------------------------------------------------------------------


def _check_implementation(
    implementation: str | None, config: Config, operands: Operands, name: str = "attention"
) -> None:
    dispatch.check_implementation(name, implementation, _UNSUPPORTED, config, operands, "batch and heads")


def _check_backward(implementation: str | None, config: Config, inputs: tuple, name: str = "attention") -> None:
    dispatch.refuse_unsupported(name, implementation, _UNSUPPORTED_BACKWARD, config, inputs)


def _not_on_tpu(config: Config, operands: Operands, *, backward: bool = False) -> str | None:
    """Why the TPU kernel cannot do a call, or None."""
    q, k = operands.q, operands.k
    if q.dtype in (jnp.float64, jnp.float16):
        return f"TPUs have no {q.dtype.name}; cast to float32 or bfloat16"
    if not all(isinstance(size, int) for size in (*q.shape, *k.shape)):
        return "its blocks need sizes that are known, not symbolic ones"
    blocks = tpu_blocks(config, operands, backward=backward)
    of_batch = [x for x in (operands.q_segments, operands.q_positions, operands.kv_positions) if x is not None]
    maps = max((x.shape[0] for x in of_batch), default=1)
    if maps * -(-q.shape[1] // blocks.q) * -(-k.shape[1] // blocks.kv) > _TPU_MAP_ENTRIES:
        return f"its map of visible blocks would have more than {_TPU_MAP_ENTRIES} entries; use larger blocks"
    return None


def _not_on_gpu(config: Config, operands: Operands) -> str | None:
    """Why the GPU kernel cannot do a call, or None."""
    from kernels_pallas._attention import gpu

    return dispatch.not_hopper() or gpu.unsupported(config, operands)


def _not_backward_on_tpu(config: Config, saved: tuple) -> str | None:
    """Why the TPU's backward kernels cannot do a call, or None."""
    return _not_on_tpu(config, saved[0], backward=True)


def _not_backward_on_gpu(config: Config, saved: tuple) -> str | None:
    """Why the GPU's backward kernels cannot do a call, or None."""
    from kernels_pallas._attention import gpu_backward

    return dispatch.not_hopper() or gpu_backward.unsupported_backward(config, saved[0])


_UNSUPPORTED = {"tpu": _not_on_tpu, "gpu": _not_on_gpu}
_UNSUPPORTED_BACKWARD = {"tpu": _not_backward_on_tpu, "gpu": _not_backward_on_gpu}


def _nothing(operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The result when there is nothing to attend to."""
    B, T, H = operands.q.shape[:3]
    if operands.k.shape[1] and operands.q.shape[3] == 0 and operands.v.shape[3]:
        raise checks.ShapeError("attention: `q` must have a head dimension of at least 1; got 0.")
    o = jnp.zeros((B, T, H, operands.v.shape[3]), operands.q.dtype)
    return o, jnp.full((B, H, T), -jnp.inf, accumulator(operands.q.dtype))


# --- Derivatives: one rule above dispatch, whose backward pass has a rule of its own. ---------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(static: tuple, operands: Operands) -> tuple[jax.Array, jax.Array]:
    implementation, config = static
    o, lse = _forward(implementation, config, operands)
    return o, lse


def _differentiable_fwd(static: tuple, operands: Any) -> tuple:
    bias = operands.bias
    # Part of the structure of what is saved, and so known when the backward pass is traced.
    wants_bias = () if bias is not None and bias.perturbed else None
    operands = jax.tree.map(lambda x: x.value, operands, is_leaf=lambda x: hasattr(x, "perturbed"))
    o, lse = _differentiable(static, operands)  # pyright: ignore[reportGeneralTypeIssues]
    o = checkpoint_name(o, "attention_output")
    lse = checkpoint_name(lse, "attention_lse")
    return (o, lse), (operands, o, lse, wants_bias)


def _differentiable_bwd(static: tuple, saved: tuple, cotangents: tuple) -> tuple[Operands]:
    operands, o, lse, wants_bias = saved
    o_cotangent, lse_cotangent = (
        jnp.zeros(like.shape, like.dtype) if isinstance(given, jax.custom_derivatives.SymbolicZero) else given
        for given, like in zip(cotangents, (o, lse), strict=True)
    )
    implementation, config = static
    config = replace(config, bias_gradient=wants_bias is not None)
    inputs = dispatch.align((operands, o, lse, o_cotangent, lse_cotangent))
    _check_backward(implementation, config, inputs)
    grads = _backward((implementation, config), *inputs)
    return (Operands(*grads),)  # pyright: ignore[reportGeneralTypeIssues]


_differentiable.defvjp(_differentiable_fwd, _differentiable_bwd, symbolic_zeros=True)
# A jax.shard_map that is not under jit itself cannot run a rule with symbolic zeros, but can run what is compiled.
_compiled = jax.jit(_differentiable, static_argnums=0, inline=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward(static: tuple, operands: Operands, o: Any, lse: Any, o_cotangent: Any, lse_cotangent: Any) -> tuple:
    return tuple(_backward_call(*static, (operands, o, lse, o_cotangent, lse_cotangent)))


def _backward_fwd(static: tuple, *inputs: Any) -> tuple:
    operands, _, lse, *cotangents = inputs
    return _backward(static, *inputs), (operands, lse, cotangents)


def _backward_bwd(static: tuple, saved: tuple, cotangents: tuple) -> tuple:
    """The derivative of the backward pass, dense: o and lse are seen as functions of the operands here."""
    config = static[1]
    operands, lse, (o_cotangent, lse_cotangent) = saved
    # As in the backward pass itself: what comes back from a row that sees nothing does not count.
    sees = lse != -jnp.inf
    o_cotangent = jnp.where(jnp.swapaxes(sees, 1, 2)[..., None], o_cotangent, 0)
    lse_cotangent = jnp.where(sees, lse_cotangent, 0)
    outputs = ("q", "k", "v", "bias") if config.bias_gradient else ("q", "k", "v")

    def pulled(arrays: dict, *given: Any) -> tuple:
        def run(arrays: dict) -> tuple:
            return reference.forward(config, operands._replace(**arrays))

        return tuple(jax.vjp(run, arrays)[1](given)[0][name] for name in outputs)

    # The bias moves the gradients of the others even where its own was not asked for.
    arrays = {name: getattr(operands, name) for name in ("q", "k", "v", "bias") if getattr(operands, name) is not None}
    grads, *rest = jax.vjp(pulled, arrays, o_cotangent, lse_cotangent)[1](cotangents)
    return (Operands(**grads), None, None, *rest)


_backward.defvjp(_backward_fwd, _backward_bwd)


# --- Dispatch. --------------------------------------------------------------------------------------------------------


def _forward_shapes(config: Config, operands: Operands) -> tuple[jax.ShapeDtypeStruct, ...]:
    q, v = operands.q, operands.v
    B, T, H = q.shape[:3]
    lse = jax.ShapeDtypeStruct((B, H, T), accumulator(q.dtype))
    return jax.ShapeDtypeStruct((B, T, H, v.shape[3]), q.dtype), lse


def _backward_shapes(config: Config, operands: tuple) -> tuple[jax.ShapeDtypeStruct, ...]:
    of = operands[0][: 4 if config.bias_gradient else 3]
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in of)


def _shareable(config: Config, operands: Operands) -> Operands:
    """A bias, a mask and positions may be shared by the whole batch; not a bias whose cotangent is asked for."""
    shared = {name: name in _SHARED and not (name == "bias" and config.bias_gradient) for name in Operands._fields}
    return Operands(**{name: None if getattr(operands, name) is None else shared[name] for name in shared})


def _xla_backward(sequential: bool) -> Callable:
    return lambda config, operands: xla.backward(config, *operands, sequential=sequential)


# Kernels are imported when first lowered for their platform: Pallas costs a tenth of a second.


def _tpu_forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    from kernels_pallas._attention import tpu

    return tpu.forward(config, operands)


def _tpu_backward(config: Config, operands: tuple) -> tuple[jax.Array, ...]:
    from kernels_pallas._attention import tpu_backward

    return _with_bias(config, operands, tpu_backward.backward(config, *operands))


def _gpu_forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    from kernels_pallas._attention import gpu

    return gpu.forward(config, operands)


def _gpu_backward(config: Config, operands: tuple) -> tuple[jax.Array, ...]:
    from kernels_pallas._attention import gpu_backward

    return gpu_backward.backward(config, *operands)


def _with_bias(config: Config, operands: tuple, grads: tuple) -> tuple[jax.Array, ...]:
    """The gradients of a kernel, and that of the bias, where it is asked for, from a pass of its own."""
    return (*grads, xla.bias_gradient(config, *operands)) if config.bias_gradient else grads


_forward = dispatch.primitive(
    "attention",
    shapes=_forward_shapes,
    xla={"default": partial(xla.forward, sequential=False), "cpu": partial(xla.forward, sequential=True)},
    accelerated={"tpu": _tpu_forward, "gpu": _gpu_forward},
    unsupported=_UNSUPPORTED,
    shareable=_shareable,
)
_backward_call = dispatch.primitive(
    "attention_backward",
    shapes=_backward_shapes,
    xla={"default": _xla_backward(False), "cpu": _xla_backward(True)},
    accelerated={"tpu": _tpu_backward, "gpu": _gpu_backward},
    unsupported=_UNSUPPORTED_BACKWARD,
    shareable=lambda config, operands: (_shareable(config, operands[0]), *(False,) * 4),
)
