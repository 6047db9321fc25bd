"""The form of every layer, and what their files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxnum.core.precision import accumulator
from kernels_pallas import checks, recurrence

PyTree = Any
_Cache = TypeVar("_Cache")


class Layer(NamedTuple):
    """A recurrent layer as four pure functions on pytrees, made by a factory as optax makes its transformations.

    Attributes:
      init: `init(key) -> params`, a dict of arrays in JAX's default floating-point dtype.
      apply: `apply(params, x, *, segment_ids=None, cache=None) -> (y, cache)` on a whole sequence x [*B, T, width]. It
        continues `cache`, or starts from nothing, and returns what the next call continues. `segment_ids` int32
        [*B, T]: a token meets those of its own segment only. A segment starts where the id differs from that of the
        last token that is not padding; the first one continues the cache. Negative ids are padding: inputs there may
        hold anything, NaN included, outputs are 0, and the cache passes unchanged.
      step: `step(params, x, cache) -> (y, cache)` on one token x [*B, width], at a cost that does not grow with what
        came before. Token by token it equals `apply`.
      init_cache: `init_cache(batch=(), dtype=float) -> cache` before the first token, for batch axes `batch` (an int or
        a tuple of ints) and inputs of `dtype`. Recurrent states are float32, or float64 for float64.

    Layers compute in the dtype of x, whatever the dtype of the parameters; gates and states in float32 at least.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[..., tuple[jax.Array, PyTree]]
    step: Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, PyTree]]
    init_cache: Callable[..., PyTree]


class BidirectionalLayer(NamedTuple):
    """A layer whose outputs depend on the tokens on both sides, as two pure functions on pytrees.

    Attributes:
      init: `init(key) -> params`.
      apply: `apply(params, x, *, segment_ids=None) -> y` on a whole sequence x [*B, T, width], with `segment_ids` as
        for a `Layer`.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[..., jax.Array]


def check_sizes(name: str, sizes: dict[str, int]) -> None:
    """Check that sizes are Python ints, at least 1."""
    for argument, size in sizes.items():
        checks.value(name, argument, isinstance(size, int) and size >= 1, "be an int of at least 1", size)


def enter(name: str, width: int, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The inputs [*B, T, width] of a layer, checked, with zeros in the padding."""
    checks.shape(name, remedy="The layout is [*batch, tokens, width].", x=(x, f"*B T {width}"))
    checks.dtype(name, "floating", x=x)
    if segment_ids is None:
        return x
    checks.shape(name, segment_ids=(segment_ids, " ".join(map(str, x.shape[:-1]))))
    checks.dtype(name, "integer", segment_ids=segment_ids)
    return jnp.where(segment_ids[..., None] >= 0, x, 0)


def enter_step(name: str, width: int, x: jax.Array) -> None:
    """Check the input [*B, width] of one step."""
    checks.shape(name, remedy="A step takes one token: [*batch, width].", x=(x, f"*B {width}"))
    checks.dtype(name, "floating", x=x)


def enter_cache(name: str, cache: _Cache | None, empty: _Cache) -> _Cache:
    """The cache given, checked against an empty one, or the empty one."""
    if cache is None:
        return empty
    remedy = "Make it with init_cache, for the same batch and dtype as x."
    checks.same_tree(name, ("init_cache(...)", empty), dtypes=True, remedy=remedy, cache=cache)
    return cache


def check_eps(name: str, eps: float) -> None:
    """Check the eps of a norm."""
    checks.value(name, "eps", eps >= 0, "be >= 0", eps)


def check_implementation(name: str, implementation: str | None) -> None:
    """Check the name of an implementation where a layer is made; whether it can do a call, the kernel tells."""
    checks.choice(name, "implementation", implementation, (None, "reference", "xla", "tpu", "gpu"))


def unbounded(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays of float16 as float32, for sums that a norm follows: there they may be too much for float16."""
    return tuple(x.astype(jnp.float32) if x.dtype == jnp.float16 else x for x in arrays)


def sums(dtype: Any) -> Any:
    """The dtype of states for inputs of a dtype, Python's float included."""
    return accumulator(jnp.zeros((), dtype).dtype)


def batch_axes(batch: int | tuple[int, ...]) -> tuple[int, ...]:
    """Batch axes as a tuple."""
    return (batch,) if isinstance(batch, int) else tuple(batch)


def matrix(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """Random weights [rows, columns] that keep the size of what they multiply."""
    return jax.random.normal(key, (rows, columns)) * rows**-0.5


def times(x: jax.Array, weights: jax.Array) -> jax.Array:
    """X @ weights in the dtype of x."""
    return x @ weights.astype(x.dtype)


def precisely(x: jax.Array, weights: jax.Array) -> jax.Array:
    """X @ weights in the dtype of sums, for gates: what they say is raised to powers."""
    dtype = accumulator(x.dtype)
    return jnp.matmul(x.astype(dtype), weights.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[..., heads * D] as [..., heads, D]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def join_heads(x: jax.Array) -> jax.Array:
    """[..., heads, D] as [..., heads * D]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def rms_norm(x: jax.Array, weight: jax.Array | None = None, eps: float = 1e-6) -> jax.Array:
    """X over its root mean square along the last axis, times a weight; in float32 at least, given back as x is."""
    wide = x.astype(accumulator(x.dtype))
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    return (wide if weight is None else wide * weight.astype(wide.dtype)).astype(x.dtype)


def segments_of(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Segments counted from 0 and which tokens are not padding, both [*B, T]; see `recurrence.canonical_segments`."""
    flat = segment_ids.reshape(-1, segment_ids.shape[-1])
    segments, valid = recurrence.canonical_segments(flat)
    return segments.reshape(segment_ids.shape), valid.reshape(segment_ids.shape)
