"""The public call: checks, and what is static about a ring."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import checks
from kernels_pallas._attention import IMPLEMENTATIONS, BlockSizes, attention, prepare
from kernels_pallas._ring_attention import layout as layouts
from kernels_pallas._ring_attention import ring

_NAME = "ring_attention"


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: Any,
    causal: bool = False,
    layout: str = "contiguous",
    segment_ids: jax.Array | None = None,
    window: tuple[int | None, int | None] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Any:
    """Exact attention inside `jax.shard_map` when the sequence is cut over a mesh axis: the keys travel, in a ring.

    The result equals that of `attention` on the whole sequence. Each of the W devices of the axis holds n tokens. In
    step s it attends with its queries to the keys of the device s behind it, and merges what it gets by its log-sum-exp
    in float32: with lse' = log(exp lse_1 + exp lse_2), o' = exp(lse_1 - lse') o_1 + exp(lse_2 - lse') o_2, and nothing
    merged with nothing is nothing (o = 0, lse = -inf). Keys and values travel as they are, Hk heads in their own dtype,
    one message each a step, while the device works on those it has; it holds its own, these, and the next.

    Args:
      q: queries of this device [*B, n, Hq, D]; float32, bfloat16, float16, or float64 (`reference` and `xla`).
      k: its keys [*B, n, Hk, D] of the same dtype; Hk divides Hq.
      v: its values [*B, n, Hk, Dv] of the same dtype.
      axis_name: mesh axis that the sequence is cut over, a name or a tuple of names.
      causal: hide keys behind the query's position in the whole sequence.
      layout: which tokens a device holds: "contiguous", "striped" or "zigzag"; see `to_ring_attention_layout`.
      segment_ids: int32 [*B, n] of this device's tokens; only equal ids see each other, across devices too. A negative
        id is padding.
      window: (left, right), how far a query sees in positions of the whole sequence, ints >= 0; None for no limit.
      soft_cap: bound of the scores, > 0, before hiding.
      scale: of q . k; default D ** -0.5.
      return_lse: also return the log-sum-exp; it is differentiable.
      implementation: of the attention of one shard to another; see `attention`. "reference" is dense within two shards,
        and JAX differentiates it by itself.
      block_sizes: of the tiles.

    Returns:
      o [*B, n, Hq, Dv] in the dtype of q; with `return_lse` the pair (o, lse [*B, Hq, n] in float32, or float64 for
      float64).

    Raises:
      ShapeError, DtypeError, ValueError: arguments that do not fit, at trace time; no such axis here.
      NotImplementedError: a named implementation cannot do this call, or does not run on the platform.
      TypeError: forward-mode differentiation through anything but "reference".

    Cost: forward W - 1 steps of sending k and v, W of attention; backward W - 1 and W, and W steps of sending the
      cotangents of k and v, in float32. A causal call spends nothing on what is hidden, but waits for whom has most to
      do: in the contiguous layout that is (2 W - 1) / W times the mean, in the other two 1. A window on contiguous or
      zigzag shards ends the ring as soon as no device can see further: contiguous, causal and left <= (W - 1) n takes
      1 + ceil(left / n) steps. Memory O(n), whatever W is; XLA's CPU compiler alone keeps no order among the
      steps, and may hold more shards than two. The steps are unrolled, so that compile time grows with W.

    Numerics: scores, statistics and merges in float32 (float64 for float64 inputs); each step's share of o and of the
      cotangents is rounded to the dtype of q before it is added. Dropout is not offered: its mask goes by the place of
      a key in the whole sequence, which the blocks of one shard do not know.

    Derivatives: with respect to q, k and v in reverse mode; reverse over reverse, whose second pass keeps all it has
      received; all modes and orders through "reference".

    Source: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023).

    Example:
      >>> import jax, kernels_pallas
      >>> from jax.sharding import AxisType, PartitionSpec
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 64, 4, 32))
      >>> mesh = jax.make_mesh((jax.device_count(),), ("sequence",), (AxisType.Auto,))
      >>> cut = PartitionSpec(None, "sequence")
      >>> ring = lambda q, k, v: kernels_pallas.ring_attention(q, k, v, axis_name="sequence", causal=True)
      >>> o = jax.shard_map(ring, mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut)(q, k, v)
      >>> bool(jax.numpy.allclose(o, kernels_pallas.attention(q, k, v, causal=True), atol=1e-5))
      True
    """
    sizes = _check_shapes(q, k, v, segment_ids)
    checks.choice(_NAME, "layout", layout, layouts.LAYOUTS)
    shards = _axis_size(axis_name)
    layouts.check_length(_NAME, "q", jnp.shape(q), layout, sizes["n"], shards)
    checks.choice(_NAME, "implementation", implementation, IMPLEMENTATIONS)
    config, operands, batch = prepare(
        q,
        k,
        v,
        segment_ids=segment_ids,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        block_sizes=block_sizes,
        name=_NAME,
    )
    if 0 in (operands.q.size, operands.k.size, operands.v.size):
        return attention(q, k, v, return_lse=return_lse)
    offsets = layouts.offsets(layout, shards, sizes["n"], config.causal, config.window)
    static = ring.Ring(axis_name, shards, layout, offsets, implementation, config)
    o, lse = ring.attend(static, operands, jax.lax.axis_index(axis_name))
    o, lse = (x.reshape(*batch, *x.shape[1:]) for x in (o, lse))
    return (o, lse) if return_lse else o


def _check_shapes(q: Any, k: Any, v: Any, segment_ids: Any) -> dict[str, Any]:
    remedy = "Every device holds as many keys as queries; the layout is [*batch, length, heads, head dimension]."
    sizes = checks.shape(_NAME, remedy=remedy, q=(q, "*B n Hq D"), k=(k, "*B n Hk D"), v=(v, "*B n Hk Dv"))
    spec = " ".join(map(str, (*sizes["B"], sizes["n"])))
    checks.shape(_NAME, remedy="One id a token of this device.", segment_ids=(segment_ids, spec))
    checks.dtype(_NAME, "integer", segment_ids=segment_ids)
    return sizes


def _axis_size(axis_name: Any) -> int:
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        remedy = "Call it inside jax.shard_map over that axis."
        checks.value(_NAME, "axis_name", False, "be an axis of the mesh around it", repr(axis_name), remedy)
        raise
