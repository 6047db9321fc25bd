"""The arguments of `attention`: their checks, and the canonical form that every implementation takes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kernels_pallas import checks
from kernels_pallas._attention import dropout
from kernels_pallas._attention.config import BlockSizes, Config, Operands

# Positions beyond this could leave int32 when a window is added to them.
_FARTHEST = 2**30
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


def prepare(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    segment_ids: Any = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    q_offset: Any = 0,
    causal: bool = False,
    window: Any = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: Any = None,
    block_sizes: BlockSizes | None = None,
    name: str = "attention",
) -> tuple[Config, Operands, tuple[int, ...]]:
    """Check the arguments of `attention`; give the static part, the arrays with one batch axis, and the batch shape.

    `name` is the public function that the errors speak of.
    """
    segments = _segment_pair(name, segment_ids, q, k)
    checks.dtype(name, _DTYPES, q=q)
    checks.same_dtype(name, remedy="Cast them to one dtype.", q=q, k=k, v=v)
    remedy = "The layout is [*batch, length, heads, head dimension]."
    sizes = checks.shape(name, remedy=remedy, q=(q, "*B T Hq D"), k=(k, "*B S Hk D"), v=(v, "*B S Hk Dv"))
    batch, T, S, heads, k_heads = (sizes[n] for n in ("B", "T", "S", "Hq", "Hk"))
    checks.value(
        name,
        "k",
        k_heads > 0 and heads % k_heads == 0,
        f"have a number of heads that divides those of `q`, {heads}",
        k_heads,
        "Query heads share key heads in equal groups.",
        checks.ShapeError,
    )
    full = (*batch, heads, T, S)
    for argument, x, free in (("bias", bias, len(full) - 1), ("mask", mask, len(full))):
        _check_sharing(name, argument, x, full, free)
    checks.dtype(name, "floating", bias=bias, remedy="Use `mask` for booleans.")
    checks.dtype(name, "bool", mask=mask, remedy="Use `bias` for numbers.")
    for argument, x, n in (("segment_ids[0]", segments[0], T), ("segment_ids[1]", segments[1], S)):
        checks.shape(name, remedy="One id a token.", **{argument: (x, " ".join(map(str, (*batch, n))))})
        checks.dtype(name, "integer", **{argument: x})
        _check_range(name, argument, x)
    for argument, x, n in (("q_positions", q_positions, T), ("kv_positions", kv_positions, S)):
        wide = x is not None and jnp.ndim(x) > 1
        spec = " ".join(map(str, (*batch, n) if wide else (n,)))
        checks.shape(name, remedy="One position a token.", **{argument: (x, spec)})
        checks.dtype(name, "integer", remedy="Positions are whole numbers.", **{argument: x})
        _check_range(name, argument, x)
    q_positions = _check_offset(name, q_offset, q_positions, batch, T)
    steps = _check_rate(name, dropout_rate)
    seed = _check_seed(name, dropout_seed, steps)
    checks.value(name, "causal", isinstance(causal, (bool, np.bool_)), "be a Python bool", causal, "Use `mask`.")
    config = Config(
        bool(causal),
        _check_window(name, window),
        _check_number(name, "soft_cap", soft_cap, positive=True),
        _check_number(name, "scale", scale, positive=False) or _default_scale(scale, sizes["D"]),
        block_sizes,
        dropout=steps,
    )
    checks.value(
        name,
        "block_sizes",
        block_sizes is None or isinstance(block_sizes, BlockSizes),
        "be a BlockSizes",
        type(block_sizes).__name__,
        error=TypeError,
    )
    operands = _canonical(q, k, v, bias, mask, segments, q_positions, kv_positions, len(batch))
    if seed is not None:
        operands = operands._replace(dropout_keys=dropout.keys_of(seed, operands.q.shape[0], heads))
    return config, operands, batch


def _canonical(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: Any,
    mask: Any,
    segments: tuple,
    q_positions: Any,
    kv_positions: Any,
    batch_axes: int,
) -> Operands:
    batch = q.shape[:batch_axes]

    def flat(x: Any) -> Any:
        return x.reshape(math.prod(batch), *x.shape[batch_axes:])

    def shared(x: Any) -> Any:  # [*B or 1s, ...] -> [B or 1, ...]
        if x is None:
            return None
        x = jnp.asarray(x)
        if all(size == 1 for size in x.shape[:batch_axes]):
            return x.reshape(1, *x.shape[batch_axes:])
        return flat(jnp.broadcast_to(x, (*batch, *x.shape[batch_axes:])))

    def places(x: Any) -> Any:
        if x is None:
            return None
        x = jnp.asarray(x, jnp.int32)
        return x[None] if x.ndim == 1 else flat(x)

    q, k, v = (flat(jnp.asarray(x)) for x in (q, k, v))
    q_segments, kv_segments = (None if x is None else flat(jnp.asarray(x, jnp.int32)) for x in segments)
    if q_segments is not None and kv_segments is not None:
        # Padding may hold NaN, and 0 NaN is NaN: what is never seen is made finite.
        q = jnp.where((q_segments >= 0)[:, :, None, None], q, 0)
        k, v = (jnp.where((kv_segments >= 0)[:, :, None, None], x, 0) for x in (k, v))
    return Operands(
        q, k, v, shared(bias), shared(mask), q_segments, kv_segments, places(q_positions), places(kv_positions)
    )


def _segment_pair(name: str, segment_ids: Any, q: Any, k: Any) -> tuple[Any, Any]:
    if segment_ids is None:
        return None, None
    if isinstance(segment_ids, (tuple, list)):
        ok = len(segment_ids) == 2 and all(x is not None for x in segment_ids)
        checks.value(name, "segment_ids", ok, "be an array or a pair of arrays", f"{len(segment_ids)} items")
        return tuple(segment_ids)
    lengths = jnp.shape(q)[-3:-2], jnp.shape(k)[-3:-2]
    checks.value(
        name,
        "segment_ids",
        lengths[0] == lengths[1],
        "be a pair (ids of q, ids of k) when their lengths differ",
        "one array",
    )
    return segment_ids, segment_ids


def _check_sharing(name: str, argument: str, x: Any, full: tuple[int, ...], free: int) -> None:
    """Check that x has the shape `full`, up to ones in the first `free` axes."""
    if x is None:
        return
    got = tuple(jnp.shape(x))
    ok = len(got) == len(full) and all(
        g == want or (g == 1 and axis < free) for axis, (g, want) in enumerate(zip(got, full, strict=True))
    )
    checks.value(
        name,
        argument,
        ok,
        f"have shape {full}, with 1 where an axis is shared",
        got,
        "The layout is [*batch, query heads, query length, key length].",
        checks.ShapeError,
    )


def _check_window(name: str, window: Any) -> tuple[int | None, int | None] | None:
    if window is None:
        return None
    ok = (
        isinstance(window, (tuple, list))
        and len(window) == 2
        and all(w is None or (isinstance(w, (int, np.integer)) and not isinstance(w, bool) and w >= 0) for w in window)
    )
    checks.value(name, "window", ok, "be a pair (left, right) of ints >= 0 or None", window)
    # Positions are below 2^30, so that neither their sum with a side nor their difference leaves int32.
    left, right = (None if w is None or w >= 2**31 - 1 - _FARTHEST else int(w) for w in window)
    return None if left is None and right is None else (left, right)


def _check_range(name: str, argument: str, x: Any) -> None:
    """Concrete integers that int32 might cut must lie well inside it; traced ones are taken at their word."""
    if x is None or isinstance(x, Tracer) or np.size(x) == 0:
        return
    x = np.asarray(x)
    low, high = int(x.min()), int(x.max())
    ok = low > -_FARTHEST and high < _FARTHEST
    checks.value(name, argument, ok, f"lie strictly between -2^30 and 2^30, {-_FARTHEST} and {_FARTHEST}", (low, high))


def _check_number(name: str, argument: str, given: Any, *, positive: bool) -> float | None:
    if given is None:
        return None
    wanted = "be a positive Python number" if positive else "be a finite Python number"
    remedy = "" if positive else "Multiply a traced scale into q."
    ok = (
        isinstance(given, (int, float, np.integer, np.floating))
        and not isinstance(given, bool)
        and math.isfinite(given)
    )
    checks.value(name, argument, bool(ok and (given > 0 or not positive)), wanted, given, remedy)
    return float(given)


def _check_offset(name: str, offset: Any, q_positions: Any, batch: tuple[int, ...], length: int) -> Any:
    """The queries' positions, with `q_offset` taken in; NumPy when nothing is traced."""
    if isinstance(offset, (int, np.integer)) and not isinstance(offset, bool) and offset == 0:
        return q_positions
    checks.value(name, "q_offset", q_positions is None, "be 0 beside `q_positions`", offset, "Add it to these.")
    checks.dtype(name, "integer", q_offset=offset, remedy="Positions are whole numbers.")
    spec = " ".join(map(str, batch)) if jnp.ndim(offset) else ""
    checks.shape(name, remedy="One offset a sequence.", q_offset=(offset, spec))
    _check_range(name, "q_offset", offset)
    xp = jnp if isinstance(offset, jax.Array) else np
    return xp.asarray(offset, np.int32)[..., None] + np.arange(length, dtype=np.int32)


def _check_rate(name: str, rate: Any) -> int:
    """The rate of dropout in steps of 2^-16."""
    ok = isinstance(rate, (int, float, np.integer, np.floating)) and not isinstance(rate, bool) and 0 <= rate < 1
    checks.value(name, "dropout_rate", bool(ok), "be a Python number in [0, 1)", rate)
    return dropout.threshold(float(rate))


def _check_seed(name: str, seed: Any, steps: int) -> Any:
    """The seed's two words, uint32 [2]; None when nothing is dropped."""
    wanted, remedy = "be an int, an integer scalar or a typed key", "Pass the step's number, or a key split for it."
    checks.value(
        name, "dropout_seed", seed is not None or not steps, f"{wanted} when `dropout_rate` is not 0", seed, remedy
    )
    if not steps:
        return None
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        checks.shape(name, dropout_seed=(seed, ""), remedy="Split keys are for jax.vmap.")
        return jax.random.bits(seed, (2,), jnp.uint32)
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        checks.value(name, "dropout_seed", bool(-(2**31) <= seed < 2**32), "fit into 32 bits", seed)
        return jnp.array([int(seed) % 2**32, 0], jnp.uint32)
    got = jnp.asarray(seed)
    ok = got.shape == () and jnp.issubdtype(got.dtype, jnp.integer)
    checks.value(name, "dropout_seed", bool(ok), wanted, f"{got.dtype} {got.shape}", remedy)
    return jnp.stack([got.astype(jnp.uint32), jnp.uint32(0)])


def _default_scale(scale: float | None, dim: int) -> float:
    return 0.0 if scale is not None else max(dim, 1) ** -0.5
