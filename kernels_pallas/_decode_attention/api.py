"""The public call: checks, canonical form, derivative rules, dispatch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import cache as caches
from kernels_pallas import checks, dispatch
from kernels_pallas._attention import check_number
from kernels_pallas._decode_attention import reference, xla
from kernels_pallas._decode_attention.config import Config, Operands, accumulator
from kernels_pallas._decode_attention.tiles import not_on_gpu, not_on_tpu

_NAME = "decode_attention"
_IMPLEMENTATIONS = (None, "reference", "xla", "tpu", "gpu")
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
# A window that reaches further hides nothing: lengths are below 2^30.
_FARTHEST = 2**30
_SHARED = ("k", "v", "k_scale", "v_scale", "sinks")


def decode_attention(
    q: jax.Array,
    cache: caches.KVCache | caches.PagedKVCache,
    *,
    window: tuple[int | None, int | None] | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    num_splits: int | None = None,
) -> Any:
    """Exact softmax attention of the newest tokens to a cache that holds them, at a cost that follows its length.

    Query t of a row lies at position i = length - T + t and sees key j iff 0 <= j <= i and, with a window,
    j >= i - left. With s_tj = scale q_t . k_j, then s <- soft_cap tanh(s / soft_cap), hidden entries -inf:
    lse_t = log(exp sink + sum_j exp s_tj) and o_t = sum_j exp(s_tj - lse_t) v_j. A query that sees nothing gets o = 0
    and, without sinks, lse = -inf. Token by token this equals `attention` with `causal=True`.

    Args:
      q: queries of the newest T tokens [*B, T, Hq, D]; float32, bfloat16, float16, or float64 (`reference` and `xla`).
        T = 1 decodes one token; a few more verify a draft.
      cache: `KVCache` or `PagedKVCache` with Hk key heads; Hk divides Hq, and query head h reads key head
        h // (Hq / Hk). Its dtype is that of q, or int8. Lengths are traced, below 2^30. Keys and values that no query
        of a row sees may hold anything, NaN included.
      window: (left, right) as in `attention`, how far a query sees in positions, ints >= 0; None for no limit on that
        side. Nothing lies to the right of the newest token, so that right hides nothing.
      soft_cap: bound of the scores, > 0, before hiding.
      sinks: a score a head that attends to nothing [Hq], floating point: it takes a share of the weight.
      scale: of q . k; default D ** -0.5. A traced scale is multiplied into q instead.
      return_lse: also return the log-sum-exp; it is differentiable, which merges of partial results need.
      implementation: None chooses by the platform the program is lowered for, "tpu" (Pallas Mosaic), "gpu" (Pallas
        Mosaic GPU, for Hopper: 16-bit caches, widths that are multiples of 64), "xla" (runs everywhere) or "reference"
        (dense, the specification). A named one that cannot do a call raises; None always works.
      num_splits: parts that the cache of a row is cut into, which an accelerator works on side by side; default by
        implementation. Only speed depends on it.

    Returns:
      o [*B, T, Hq, Dv] in the dtype of q; with `return_lse` the pair (o, lse [*B, Hq, T] in float32, or float64 for
      float64).

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit, at trace time.
      NotImplementedError: a named implementation cannot do this call, or does not run on the platform.
      TypeError: forward-mode differentiation through anything but "reference".

    Cost: the keys and values that the queries of a row see, read once, whatever the capacity: on a TPU blocks that no
      query sees are neither fetched nor computed, on a CPU the loop ends with the row. On a TPU the cache is read in
      place where D and Dv are multiples of 128 and Hk is a power of two (int8: but not 2); else every call lays it out
      anew.

    Numerics: scores, statistics and sums in float32 (float64 for float64 queries). An int8 cache is not multiplied out:
      the scales of keys multiply the scores, those of values the weights. 16-bit weights are rounded to the dtype of q
      before the product with v on accelerators.

    Derivatives: with respect to q, the floating-point arrays of the cache and the sinks, in reverse mode and reverse
      over reverse, through a dense backward pass that costs T Hq S memory a row; all modes and orders through
      "reference".

    Source: Dao, Haziza, Massa & Sizov, "Flash-Decoding for long-context inference" (2023); pages: Kwon et al.,
      "Efficient memory management for large language model serving with PagedAttention" (2023); sinks: Xiao et al.,
      "Efficient streaming language models with attention sinks" (2023), in the form of a learned score.

    Example:
      >>> import jax, jax.numpy as jnp, kernels_pallas
      >>> cache = kernels_pallas.init_cache(2, 1024, 2, 32)
      >>> k, v = jax.random.normal(jax.random.key(0), (2, 2, 5, 2, 32))
      >>> cache = kernels_pallas.append_to_cache(cache, k, v)
      >>> q = jax.random.normal(jax.random.key(1), (2, 1, 4, 32))
      >>> o = kernels_pallas.decode_attention(q, cache)
      >>> o.shape, cache.length.tolist()
      ((2, 1, 4, 32), [5, 5])
    """
    config, operands, batch = prepare(
        q, cache, window=window, soft_cap=soft_cap, sinks=sinks, scale=scale, num_splits=num_splits
    )
    checks.choice(_NAME, "implementation", implementation, _IMPLEMENTATIONS)
    _check_implementation(implementation, config, operands)
    if implementation == "reference" or any(x.size == 0 for x in jax.tree.leaves(operands)):
        o, lse = reference.forward(config, operands)
    else:
        guarded = dispatch.refuse_forward_mode(_NAME, dispatch.align(operands))
        o, lse = _differentiable((implementation, config), guarded)  # pyright: ignore[reportGeneralTypeIssues]
    o, lse = (x.reshape(*batch, *x.shape[1:]) for x in (o, lse))
    return (o, lse) if return_lse else o


# --- Canonical form. --------------------------------------------------------------------------------------------------


def prepare(
    q: jax.Array,
    cache: Any,
    *,
    window: Any = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    num_splits: int | None = None,
) -> tuple[Config, Operands, tuple[int, ...]]:
    """Check the arguments; give the static part, the arrays with one batch axis, and the batch shape."""
    caches.check_cache(_NAME, cache)
    checks.dtype(_NAME, _DTYPES, q=q)
    if jnp.result_type(cache.k) != jnp.int8:
        checks.same_dtype(_NAME, remedy="Cast them to one dtype.", **{"q": q, "cache.k": cache.k})
    batch = jnp.shape(cache.length)
    k_heads, D = jnp.shape(cache.k)[-2:]
    remedy = "The layout is [*batch, tokens, heads, head dimension]."
    sizes = checks.shape(_NAME, remedy=remedy, q=(q, " ".join(map(str, (*batch, "T", "Hq", D)))), sinks=(sinks, "Hq"))
    heads = sizes["Hq"]
    checks.value(
        _NAME,
        "cache.k",
        k_heads > 0 and heads % k_heads == 0,
        f"have a number of heads that divides those of `q`, {heads}",
        k_heads,
        "Query heads share key heads in equal groups.",
        checks.ShapeError,
    )
    checks.dtype(_NAME, "floating", sinks=sinks)
    splits_ok = num_splits is None or (_is_int(num_splits) and num_splits >= 1)
    checks.value(_NAME, "num_splits", splits_ok, "be a whole number >= 1", num_splits)
    given = check_number(_NAME, "scale", scale, positive=False)
    config = Config(
        _check_window(window),
        check_number(_NAME, "soft_cap", soft_cap, positive=True),
        max(D, 1) ** -0.5 if given is None else given,
        None if num_splits is None else int(num_splits),
    )
    B = math.prod(batch)

    def flat(x: Any) -> Any:  # of a contiguous cache [*B, ...] -> [B, ...]; pages are shared: [1, ...]
        if x is None:
            return None
        x = jnp.asarray(x)
        return x[None] if isinstance(cache, caches.PagedKVCache) else x.reshape(B, *x.shape[len(batch) :])

    table = None
    if isinstance(cache, caches.PagedKVCache):
        table = jnp.asarray(cache.block_table, jnp.int32).reshape(B, -1)
    operands = Operands(
        jnp.asarray(q).reshape(B, *jnp.shape(q)[-3:]),
        flat(cache.k),
        flat(cache.v),
        jnp.asarray(cache.length, jnp.int32).reshape(B),
        table,
        flat(cache.k_scale),
        flat(cache.v_scale),
        None if sinks is None else jnp.asarray(sinks)[None],
    )
    return config, operands, batch


def _is_int(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _check_window(window: Any) -> int | None:
    """The left side, the only one that can hide anything."""
    if window is None:
        return None
    ok = isinstance(window, (tuple, list)) and len(window) == 2
    ok = ok and all(w is None or (_is_int(w) and w >= 0) for w in window)
    checks.value(_NAME, "window", ok, "be a pair (left, right) of ints >= 0 or None", window)
    left = window[0]
    return None if left is None or left >= _FARTHEST else int(left)


def _check_implementation(implementation: str | None, config: Config, operands: Operands) -> None:
    dispatch.check_implementation(_NAME, implementation, _UNSUPPORTED, config, operands, "batch and heads")


def _not_on_gpu(config: Config, operands: Operands) -> str | None:
    """Why the GPU kernel cannot do a call, or None."""
    return dispatch.not_hopper() or not_on_gpu(config, operands)


_UNSUPPORTED = {"tpu": not_on_tpu, "gpu": _not_on_gpu}


# --- Derivatives: one rule above dispatch. ----------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(static: tuple, operands: Operands) -> tuple[jax.Array, jax.Array]:
    implementation, config = static
    o, lse = _forward(implementation, config, operands)
    return o, lse


def _differentiable_fwd(static: tuple, operands: Operands) -> tuple:
    return _differentiable(static, operands), operands  # pyright: ignore[reportGeneralTypeIssues]


def _differentiable_bwd(static: tuple, operands: Operands, cotangents: tuple) -> tuple[Operands]:
    """Dense: beside a cache, the scores of a few queries are small."""
    operands, cotangents = dispatch.align((operands, cotangents))
    leaves, tree = jax.tree.flatten(operands)
    at = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def of_inexact(*given: jax.Array) -> tuple[jax.Array, jax.Array]:
        changed = list(leaves)
        for i, x in zip(at, given, strict=True):
            changed[i] = x
        return reference.forward(static[1], jax.tree.unflatten(tree, changed))

    found = jax.vjp(of_inexact, *(leaves[i] for i in at))[1](tuple(cotangents))
    # What is whole numbers has cotangents of no size.
    grads = [np.zeros(x.shape, jax.dtypes.float0) for x in leaves]
    for i, g in zip(at, found, strict=True):
        grads[i] = g
    return (jax.tree.unflatten(tree, grads),)


_differentiable.defvjp(_differentiable_fwd, _differentiable_bwd)


# --- Dispatch. --------------------------------------------------------------------------------------------------------


def _shapes(config: Config, operands: Operands) -> tuple[jax.ShapeDtypeStruct, ...]:
    q, v = operands.q, operands.v
    B, T, H = q.shape[:3]
    lse = jax.ShapeDtypeStruct((B, H, T), accumulator(q.dtype))
    return jax.ShapeDtypeStruct((B, T, H, v.shape[-1]), q.dtype), lse


def _shareable(config: Config, operands: Operands) -> Operands:
    named = zip(Operands._fields, operands, strict=True)
    return Operands(*(None if x is None else name in _SHARED for name, x in named))


def _tpu_forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    # Imported when first lowered for a TPU: Pallas costs a tenth of a second.
    from kernels_pallas._decode_attention import tpu

    return tpu.forward(config, operands)


def _gpu_forward(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    from kernels_pallas._decode_attention import gpu

    return gpu.forward(config, operands)


_forward = dispatch.primitive(
    _NAME,
    shapes=_shapes,
    xla={"default": partial(xla.forward, sequential=False), "cpu": partial(xla.forward, sequential=True)},
    accelerated={"tpu": _tpu_forward, "gpu": _gpu_forward},
    unsupported=_UNSUPPORTED,
    shareable=_shareable,
)
