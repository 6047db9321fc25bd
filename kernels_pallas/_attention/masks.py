"""Who may attend to whom, entry by entry and block by block: one definition for all implementations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas._attention.config import Config, Operands

SKIP, PARTIAL, FULL = 0, 1, 2


def positional(config: Config) -> bool:
    """Whether positions decide anything."""
    return config.causal or config.window is not None


def masked(config: Config, operands: Operands) -> bool:
    """Whether any entry can be hidden."""
    return positional(config) or operands.mask is not None or operands.q_segments is not None


def visible(
    config: Config,
    q_positions: Any = None,
    kv_positions: Any = None,
    q_segments: Any = None,
    kv_segments: Any = None,
    mask: Any = None,
) -> Any:
    """Which keys each query sees; arguments broadcast against each other, None for what does not restrict.

    Key j is visible to query i iff pos_j <= pos_i (causal), pos_i - left <= pos_j <= pos_i + right (window), both
    segments are equal and not negative, and the mask is True.

    Returns:
      Bool, or None when everything is visible.
    """
    parts = []
    if config.causal:
        parts.append(kv_positions <= q_positions)
    left, right = config.window or (None, None)
    if left is not None:
        parts.append(kv_positions >= q_positions - left)
    if right is not None:
        parts.append(kv_positions <= q_positions + right)
    if q_segments is not None:
        parts.append((q_segments == kv_segments) & (kv_segments >= 0))
    if mask is not None:
        parts.append(mask)
    seen = None
    for part in parts:
        seen = part if seen is None else seen & part
    return seen


def positions(operands: Operands) -> tuple[Any, Any]:
    """Positions of the queries [B|1, T] and of the keys [B|1, S]; what is not given counts from 0."""
    q, kv = operands.q_positions, operands.kv_positions
    if q is None:
        q = np.arange(operands.q.shape[1], dtype=np.int32)[None]
    if kv is None:
        kv = np.arange(operands.k.shape[1], dtype=np.int32)[None]
    return q, kv


def block_kinds(config: Config, operands: Operands, q_block: int, kv_block: int) -> Any:
    """What each block of scores holds: SKIP nothing visible, FULL everything, PARTIAL anything in between.

    Decided from the least and greatest position and segment of each block, so SKIP and FULL are certain and PARTIAL is
    not. NumPy where nothing is traced, so that the map is a constant of the program.

    Returns:
      int32 [B|1, ceil(T / q_block), ceil(S / kv_block)].
    """
    q, kv = positions(operands)
    q_low, q_high = _bounds(q, q_block)
    kv_low, kv_high = _bounds(kv, kv_block)
    q_low, q_high, kv_low, kv_high = q_low[:, :, None], q_high[:, :, None], kv_low[:, None], kv_high[:, None]
    xp = _library(q, kv, operands.q_segments)
    live = xp.ones(np.broadcast_shapes(q_low.shape, kv_low.shape), bool)
    full = live & (operands.mask is None)
    if config.causal:
        live, full = live & (kv_low <= q_high), full & (kv_high <= q_low)
    left, right = config.window or (None, None)
    if left is not None:
        live, full = live & (kv_high >= q_low - left), full & (kv_low >= q_high - left)
    if right is not None:
        live, full = live & (kv_low <= q_high + right), full & (kv_high <= q_low + right)
    if operands.q_segments is not None:
        q_first, q_last = (x[:, :, None] for x in _bounds(operands.q_segments, q_block))
        kv_first, kv_last = (x[:, None] for x in _bounds(operands.kv_segments, kv_block))
        live = live & (q_first <= kv_last) & (kv_first <= q_last) & (q_last >= 0) & (kv_last >= 0)
        full = full & (q_first == q_last) & (kv_first == kv_last) & (q_first == kv_first)
    padding = -operands.k.shape[1] % kv_block
    if padding:
        last = np.arange(live.shape[2]) == live.shape[2] - 1
        full = full & ~last
    return xp.where(live, xp.where(full, FULL, PARTIAL), SKIP).astype(np.int32)


def _bounds(x: Any, block: int) -> tuple[Any, Any]:
    """Least and greatest entry of each block of the last axis of [B, N]; the last block may be short."""
    xp = _library(x)
    padded = xp.pad(x, ((0, 0), (0, -x.shape[1] % block)), mode="edge")
    blocks = padded.reshape(x.shape[0], -1, block)
    return blocks.min(axis=2), blocks.max(axis=2)


def _library(*arrays: Any) -> Any:
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def pad_axis(x: Any, axis: int, block: int, *, value: Any = 0) -> Any:
    """Lengthen an axis to a multiple of `block`; an axis of 1 that is shared, and None, stay as they are."""
    if x is None or x.shape[axis] % block == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return _library(x).pad(x, widths, constant_values=value)
