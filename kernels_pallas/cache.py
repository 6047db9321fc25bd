"""Caches of keys and values that grow as a model decodes: contiguous, or in pages that rows share.

A cache is a pytree of arrays, made once and passed through `append_to_cache`; `decode_attention` reads it. Donate it to
the jitted step, so that appending writes in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import checks

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64, jnp.int8)
_GREATEST = 127


class KVCache(NamedTuple):
    """Keys and values of each row, one after the other; what lies past `length` may hold anything.

    Attributes:
      k: keys [*B, S, Hk, D], floating point or int8.
      v: values [*B, S, Hk, Dv] of the same dtype.
      length: tokens of each row, int32 [*B]; more than S means that the last ones found no room.
      k_scale: float32 [*B, S, Hk], what keys are multiplied by; None means 1.
      v_scale: likewise of values.
    """

    k: Any
    v: Any
    length: Any
    k_scale: Any = None
    v_scale: Any = None


class PagedKVCache(NamedTuple):
    """Keys and values in pages: token j of a row lies in page `block_table[row, j // page]`, at place j % page.

    Attributes:
      k: pages of keys [P, page, Hk, D], floating point or int8.
      v: pages of values [P, page, Hk, Dv] of the same dtype.
      block_table: pages of each row in their order, int32 [*B, N]; entries that a row does not reach may be anything.
      length: tokens of each row, int32 [*B]; more than N page means that the last ones found no room.
      k_scale: float32 [P, page, Hk], what keys are multiplied by; None means 1.
      v_scale: likewise of values.
    """

    k: Any
    v: Any
    block_table: Any
    length: Any
    k_scale: Any = None
    v_scale: Any = None


def init_cache(
    batch: int | Sequence[int],
    capacity: int,
    heads: int,
    dim: int,
    *,
    v_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> KVCache:
    """An empty cache with room for `capacity` tokens a row.

    Args:
      batch: number of rows, or the shape *B of several batch axes; () for a single row without one.
      capacity: tokens a row has room for, S >= 1.
      heads: key heads Hk >= 1.
      dim: width D of a key, >= 1.
      v_dim: width Dv of a value; default D.
      dtype: of keys and values; int8 stores each key and value rounded to whole numbers, with a scale of its own.

    Returns:
      `KVCache` of length 0. With int8 it has scales, which `append_to_cache` fills.

    Raises:
      ValueError, TypeError: sizes below 1, or a dtype that is neither floating point nor int8.

    Example:
      >>> import jax.numpy as jnp, kernels_pallas
      >>> cache = kernels_pallas.init_cache(2, 1024, 4, 64, dtype=jnp.int8)
      >>> cache.k.shape, cache.k_scale.shape, cache.length
      ((2, 1024, 4, 64), (2, 1024, 4), Array([0, 0], dtype=int32))
    """
    rows = tuple(batch) if isinstance(batch, Sequence) else (batch,)
    for n in rows:
        _check_size("init_cache", "batch", n)
    _check_size("init_cache", "capacity", capacity)
    arrays = _empty("init_cache", (*rows, capacity), heads, dim, v_dim, dtype)
    return KVCache(length=jnp.zeros(rows, jnp.int32), **arrays)


def init_paged_cache(
    block_table: jax.Array,
    pages: int,
    page_size: int,
    heads: int,
    dim: int,
    *,
    v_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> PagedKVCache:
    """An empty cache in pages; which row owns which page is the caller's, before and between steps.

    A row gets more pages by a new table, `cache._replace(block_table=...)`. Two rows may share the pages of a common
    beginning, as long as neither appends to them.

    Args:
      block_table: page of each row's tokens 0.., page_size.., ...: int [*B, N], each entry in 0..pages-1.
      pages: pages in all, P >= 1.
      page_size: tokens a page, >= 1. Accelerators read a page at a time: larger ones are faster.
      heads: key heads Hk >= 1.
      dim: width D of a key, >= 1.
      v_dim: width Dv of a value; default D.
      dtype: of keys and values; int8 stores each key and value rounded to whole numbers, with a scale of its own.

    Returns:
      `PagedKVCache` of length 0.

    Raises:
      ValueError, TypeError: sizes below 1, a table that is no table of integers or that names a page there is not, or
        a dtype that is neither floating point nor int8.

    Example:
      >>> import jax.numpy as jnp, kernels_pallas
      >>> table = jnp.array([[3, 0], [1, 2]])
      >>> cache = kernels_pallas.init_paged_cache(table, 4, 16, 2, 64)
      >>> cache.k.shape, cache.length
      ((4, 16, 2, 64), Array([0, 0], dtype=int32))
    """
    name = "init_paged_cache"
    _check_size(name, "pages", pages)
    _check_size(name, "page_size", page_size)
    checks.dtype(name, "integer", block_table=block_table)
    checks.shape(name, remedy="One line of pages a row.", block_table=(block_table, "*B N"))
    if not checks.traced(block_table) and np.size(block_table):
        named = np.asarray(block_table)
        low, high = int(named.min()), int(named.max())
        checks.value(name, "block_table", low >= 0 and high < pages, f"name pages in 0..{pages - 1}", (low, high))
    arrays = _empty(name, (pages, page_size), heads, dim, v_dim, dtype)
    table = jnp.asarray(block_table, jnp.int32)
    return PagedKVCache(block_table=table, length=jnp.zeros(table.shape[:-1], jnp.int32), **arrays)


def append_to_cache(
    cache: KVCache | PagedKVCache, k: jax.Array, v: jax.Array, *, count: jax.Array | None = None
) -> Any:
    """The cache with the keys and values of new tokens at the end of each row.

    In an int8 cache the entry x of one token and head is stored as round(x / scale), scale = max |x| / 127, so that
    its error is at most max |x| / 254.

    Args:
      cache: `KVCache` or `PagedKVCache`.
      k: new keys [*B, T, Hk, D] in the dtype of the cache; any floating dtype for an int8 cache.
      v: new values [*B, T, Hk, Dv], likewise.
      count: how many of the T tokens of a row are real, the first ones: int [*B], taken to 0..T; default T. A prompt
        that was padded to a common length is appended by its own.

    Returns:
      A cache of the same kind, shapes and dtypes. Tokens beyond the capacity are dropped, though `length` counts them:
      `cache.length > capacity` tells.

    Raises:
      ShapeError, DtypeError, TypeError: arguments that do not fit the cache, at trace time.

    Cost: the new tokens, if the cache is donated to the jitted function around the call; else a copy of the cache.

    Derivatives: all modes, of a floating-point cache; rounding to int8 has none.

    Example:
      >>> import jax, jax.numpy as jnp, kernels_pallas
      >>> cache = kernels_pallas.init_cache(2, 16, 1, 4)
      >>> append = jax.jit(kernels_pallas.append_to_cache, donate_argnums=0)
      >>> cache = append(cache, jnp.ones((2, 3, 1, 4)), jnp.ones((2, 3, 1, 4)))
      >>> cache.length
      Array([3, 3], dtype=int32)
    """
    name = "append_to_cache"
    check_cache(name, cache)
    batch = jnp.shape(cache.length)
    lead = " ".join(map(str, batch))
    sizes = checks.shape(
        name,
        remedy="The layout is [*batch, tokens, key heads, width].",
        k=(k, f"{lead} T {cache.k.shape[-2]} {cache.k.shape[-1]}"),
        v=(v, f"{lead} T {cache.v.shape[-2]} {cache.v.shape[-1]}"),
        count=(count, lead),
    )
    if cache.k.dtype == jnp.int8:
        checks.dtype(name, "floating", k=k, v=v, remedy="They are rounded here.")
    else:
        checks.same_dtype(name, remedy="Cast them to the dtype of the cache.", **{"cache.k": cache.k, "k": k, "v": v})
    checks.dtype(name, "integer", count=count)
    B, T = math.prod(batch), sizes["T"]
    length = cache.length.reshape(B)
    count = jnp.full(B, T, jnp.int32) if count is None else jnp.clip(jnp.asarray(count, jnp.int32), 0, T).reshape(B)
    at = length[:, None] + jnp.arange(T, dtype=jnp.int32)
    real = jnp.arange(T, dtype=jnp.int32) < count[:, None]
    new = _stored(cache, k, v)
    if isinstance(cache, PagedKVCache):
        written = _write_pages(cache, at, real, new)
    else:
        written = [
            None if x is None else _write(x, batch, at, real, y) for x, y in zip(_arrays(cache), new, strict=True)
        ]
    arrays = dict(zip(("k", "v", "k_scale", "v_scale"), written, strict=True))
    return cache._replace(length=(length + count).reshape(batch), **arrays)


def check_cache(name: str, cache: Any) -> None:
    """Check that a cache fits together, for the public function of that name."""
    kinds = isinstance(cache, (KVCache, PagedKVCache))
    checks.value(name, "cache", kinds, "be a KVCache or a PagedKVCache", type(cache).__name__, error=TypeError)
    checks.dtype(name, _DTYPES, **{"cache.k": cache.k})
    checks.same_dtype(name, **{"cache.k": cache.k, "cache.v": cache.v})
    if isinstance(cache, PagedKVCache):
        lead, table = "P page", {"cache.block_table": (cache.block_table, "*B N")}
        remedy = "The layout is [pages, page, heads, width]."
        checks.dtype(name, "integer", **{"cache.block_table": cache.block_table})
    else:
        lead, table, remedy = "*B S", {}, "The layout is [*batch, capacity, heads, width]."
    arrays = {
        "cache.k": (cache.k, f"{lead} Hk D"),
        "cache.v": (cache.v, f"{lead} Hk Dv"),
        **table,
        "cache.length": (cache.length, "*B"),
        "cache.k_scale": (cache.k_scale, f"{lead} Hk"),
        "cache.v_scale": (cache.v_scale, f"{lead} Hk"),
    }
    checks.shape(name, remedy=remedy, **arrays)
    checks.dtype(name, "integer", **{"cache.length": cache.length})
    scales = {"cache.k_scale": cache.k_scale, "cache.v_scale": cache.v_scale}
    checks.dtype(name, "floating", **scales)
    if jnp.result_type(cache.k) == jnp.int8:
        for argument, x in scales.items():
            checks.value(name, argument, x is not None, "be given beside int8", None, "`init_cache` makes them.")


# --- Inside. ----------------------------------------------------------------------------------------------------------


def _check_size(name: str, argument: str, size: Any) -> None:
    ok = isinstance(size, (int, np.integer)) and not isinstance(size, bool) and size >= 1
    checks.value(name, argument, bool(ok), "be a whole number >= 1", size)


def _empty(name: str, lead: tuple, heads: int, dim: int, v_dim: int | None, dtype: Any) -> dict[str, Any]:
    """Keys, values and, for int8, their scales, by name."""
    _check_size(name, "heads", heads)
    _check_size(name, "dim", dim)
    v_dim = dim if v_dim is None else v_dim
    _check_size(name, "v_dim", v_dim)
    checks.value(
        name,
        "dtype",
        jnp.dtype(dtype) in [jnp.dtype(d) for d in _DTYPES],
        "be a floating-point dtype or int8",
        jnp.dtype(dtype).name,
        error=checks.DtypeError,
    )
    k, v = (jnp.zeros((*lead, heads, width), dtype) for width in (dim, v_dim))
    # A scale of its own for each: what is donated must not be one array twice.
    k_scale, v_scale = (jnp.ones((*lead, heads), jnp.float32) if k.dtype == jnp.int8 else None for _ in "kv")
    return {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}


def _arrays(cache: Any) -> tuple:
    return cache.k, cache.v, cache.k_scale, cache.v_scale


def _stored(cache: Any, k: jax.Array, v: jax.Array) -> tuple:
    """New keys, values and their scales as the cache keeps them."""
    if cache.k.dtype != jnp.int8:
        ones = (None if x is None else jnp.ones(k.shape[:-1], x.dtype) for x in (cache.k_scale, cache.v_scale))
        return k, v, *ones
    (k, k_scale), (v, v_scale) = _rounded(k), _rounded(v)
    return k, v, k_scale.astype(cache.k_scale.dtype), v_scale.astype(cache.v_scale.dtype)


def _rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / _GREATEST
    scale = jnp.where(scale > 0, scale, 1)
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def _write(x: jax.Array, batch: tuple, at: jax.Array, real: jax.Array, new: jax.Array) -> jax.Array:
    """x [*B, S, ...] with the real ones of `new` [*B, T, ...] at the places `at` [B, T]; beyond S they are dropped."""
    S = x.shape[len(batch)]
    flat = x.reshape(at.shape[0], *x.shape[len(batch) :])
    rows = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]
    new = new.reshape(*at.shape, *flat.shape[2:])
    return flat.at[rows, jnp.where(real, at, S)].set(new, mode="drop").reshape(x.shape)


def _write_pages(cache: PagedKVCache, at: jax.Array, real: jax.Array, new: tuple) -> list:
    P, page = cache.k.shape[:2]
    table = cache.block_table.reshape(at.shape[0], -1)
    N = table.shape[1]
    owner = jnp.take_along_axis(table, jnp.minimum(at // page, N - 1), axis=1)
    # A page that is not there takes nothing; JAX would count a negative one from the end.
    owner = jnp.where(real & (at < N * page) & (owner >= 0), owner, P)
    write = lambda x, y: x.at[owner, at % page].set(y.reshape(*at.shape, *x.shape[2:]), mode="drop")  # noqa: E731
    return [None if x is None else write(x, y) for x, y in zip(_arrays(cache), new, strict=True)]
