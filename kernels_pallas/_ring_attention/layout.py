"""Which device holds which token, and what follows from it: positions, and the devices that a query can need."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import checks

LAYOUTS = ("contiguous", "striped", "zigzag")
# Positions beyond this could leave int32 when a window is added to them.
_FARTHEST = 2**30


def to_ring_attention_layout(x: jax.Array, *, layout: str, shards: int, axis: int = 1) -> jax.Array:
    """Reorder a whole sequence so that cutting it into equal shards gives each device the tokens of its layout.

    With W shards of n tokens, shard r gets the tokens, in this order:

    - contiguous: r n, ..., (r + 1) n - 1: the order stays as it is;
    - striped: r, r + W, r + 2 W, ...;
    - zigzag: piece r and then piece 2 W - 1 - r of the 2 W pieces of n / 2 tokens.

    Causal attention keeps every device equally busy in the last two, for the first the last device has almost twice
    the mean. Reorder token ids and targets before they are put on the devices; embeddings and all that follows are then
    in order, and a loss that is a mean over tokens does not notice.

    Args:
      x: array whose `axis` is the whole sequence, [..., W n, ...].
      layout: "contiguous", "striped" or "zigzag".
      shards: W, the size of the mesh axis, >= 1.
      axis: of the sequence.

    Returns:
      The array, reordered.

    Raises:
      ValueError: an unknown layout, or not a positive number of shards.
      ShapeError: a length that does not divide into shards (zigzag: into pairs of pieces).

    Source: Brandon et al., "Striped Attention" (2023); zigzag: Llama 3 (Grattafiori et al., 2024), section 3.3.2.

    Example:
      >>> import jax.numpy as jnp, kernels_pallas
      >>> kernels_pallas.to_ring_attention_layout(jnp.arange(8), layout="zigzag", shards=2, axis=0).tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]
    """
    return jnp.take(x, _order("to_ring_attention_layout", x, layout, shards, axis), axis=axis)


def from_ring_attention_layout(x: jax.Array, *, layout: str, shards: int, axis: int = 1) -> jax.Array:
    """Put a whole sequence back into its order: the inverse of `to_ring_attention_layout`.

    Args and errors: see `to_ring_attention_layout`.

    Returns:
      The array, in the order of positions.

    Example:
      >>> import jax.numpy as jnp, kernels_pallas
      >>> x = kernels_pallas.to_ring_attention_layout(jnp.arange(8), layout="striped", shards=2, axis=0)
      >>> kernels_pallas.from_ring_attention_layout(x, layout="striped", shards=2, axis=0).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    order = _order("from_ring_attention_layout", x, layout, shards, axis)
    return jnp.take(x, np.argsort(order), axis=axis)


def ring_attention_positions(length: int, *, layout: str, shard: int | jax.Array, shards: int) -> jax.Array:
    """Positions in the whole sequence of the tokens that one shard holds, as rotary embeddings need them.

    Args:
      length: n, tokens of a shard, >= 0; even for "zigzag".
      layout: "contiguous", "striped" or "zigzag".
      shard: index of the shard, an int or int []; inside `jax.shard_map`, `jax.lax.axis_index(axis_name)`.
      shards: W, the size of the mesh axis, >= 1.

    Returns:
      int32 [n].

    Raises:
      ValueError: an unknown layout, or not a positive number of shards.
      ShapeError: an odd length of a zigzag shard.

    Source: see `to_ring_attention_layout`.

    Example:
      >>> import kernels_pallas
      >>> kernels_pallas.ring_attention_positions(4, layout="zigzag", shard=0, shards=2).tolist()
      [0, 1, 6, 7]
    """
    name = "ring_attention_positions"
    _check_shards(name, layout, shards)
    whole = isinstance(length, (int, np.integer)) and not isinstance(length, bool) and length >= 0
    checks.value(name, "length", bool(whole), "be an int >= 0", length)
    checks.dtype(name, "integer", shard=shard)
    checks.shape(name, shard=(shard, ""))
    check_length(name, "length", length, layout, length, shards)
    return positions(layout, shards, length, jnp.asarray(shard, jnp.int32))


def positions(layout: str, shards: int, length: int, shard: Any) -> Any:
    """Positions [..., n] of the tokens of shards [...]: NumPy for NumPy."""
    xp = jnp if isinstance(shard, jax.Array) else np
    shard = xp.asarray(shard, np.int32)[..., None]
    at = np.arange(length, dtype=np.int32)
    if layout == "contiguous":
        return shard * np.int32(length) + at
    if layout == "striped":
        return shard + np.int32(shards) * at
    half = length // 2
    start = xp.where(at < half, shard, np.int32(2 * shards - 1) - shard) * np.int32(half)
    return start + at % max(half, 1)


def offsets(layout: str, shards: int, length: int, causal: bool, window: Any) -> tuple[int, ...]:
    """How far behind a shard, around the ring, the shards lie whose keys some shard can see; ascending, from 0."""
    spans = _spans(layout, shards, length)
    q_low, q_high = (x[:, None, :, None] for x in spans)  # [W, 1, runs, 1]
    kv_low, kv_high = (x[None, :, None, :] for x in spans)
    live = np.ones((shards, shards, *(spans[0].shape[1],) * 2), bool)
    left, right = window or (None, None)
    if causal:
        live &= kv_low <= q_high
    if left is not None:
        live &= kv_high >= q_low - left
    if right is not None:
        live &= kv_low <= q_high + right
    reader, owner = np.nonzero(live.any(axis=(2, 3)))
    return tuple(np.unique((reader - owner) % shards).tolist())


def _spans(layout: str, shards: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last position of every run of neighbours that a shard holds (striped: of all it holds); [W, runs]."""
    runs = 2 if layout == "zigzag" else 1
    at = positions(layout, shards, length, np.arange(shards)).astype(np.int64).reshape(shards, runs, length // runs)
    return at[..., 0], at[..., -1]


def check_length(function: str, argument: str, got: Any, layout: str, length: int, shards: int) -> None:
    """A shard must divide into the pieces of its layout, and positions must stay well inside int32."""
    ok = layout != "zigzag" or length % 2 == 0
    wanted = "have an even number of tokens a shard, for two pieces each in the zigzag layout"
    checks.value(function, argument, ok, wanted, got, "Pad the sequence.", checks.ShapeError)
    ok = length * shards <= _FARTHEST
    checks.value(function, argument, ok, "have at most 2^30 tokens in all shards", got, "", checks.ShapeError)


def _order(name: str, x: Any, layout: str, shards: int, axis: int) -> np.ndarray:
    """The token that comes to each place of the reordered sequence."""
    _check_shards(name, layout, shards)
    shape = jnp.shape(x)
    ok = isinstance(axis, (int, np.integer)) and not isinstance(axis, bool) and -len(shape) <= axis < len(shape)
    checks.value(name, "axis", bool(ok), f"be an axis of `x` {shape}", axis)
    size = shape[axis]
    multiple = shards * (2 if layout == "zigzag" else 1)
    wanted = f"have a length that {multiple} divides along axis {axis}"
    checks.value(name, "x", size % multiple == 0, wanted, shape, "Pad the sequence.", checks.ShapeError)
    return positions(layout, shards, size // shards, np.arange(shards)).reshape(-1)


def _check_shards(name: str, layout: Any, shards: Any) -> None:
    checks.choice(name, "layout", layout, LAYOUTS)
    ok = isinstance(shards, (int, np.integer)) and not isinstance(shards, bool) and shards >= 1
    checks.value(name, "shards", bool(ok), "be an int >= 1", shards)
