"""Bytes on chip that a choice of blocks occupies, by the kernel that runs on a kind of hardware."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kernels_pallas._attention import BlockSizes, accumulator
from kernels_pallas._attention_io import HwSpec, attention_io, tpu_constants, tpu_generation

_LANES = 128
# Keys a step from which the TPU kernel leaves it to the compiler to overlap products and exponentials.
_LONG_TILE = 1024
# Rows of queries that a thread block of the Hopper kernel owns, and key blocks that are in flight at once.
_GPU_ROWS, _GPU_STAGES = 128, 2


def footprint(hardware: HwSpec, blocks: BlockSizes, D: int, Dv: int, dtype: Any) -> int:
    """Bytes of fast memory; compare with `hardware.fast_bytes`."""
    if hardware.kind == "tpu":
        return _tpu(hardware, blocks, D, Dv, dtype)
    itemsize = jnp.dtype(dtype).itemsize
    if hardware.kind == "gpu":
        # Scores, statistics and the accumulator lie in registers; q and o share their place in shared memory.
        return itemsize * (blocks.q * max(D, Dv) + _GPU_STAGES * blocks.kv * (D + Dv))
    # A CPU widens 16-bit numbers; one tile is at work at a time.
    cost = attention_io(blocks.q, blocks.compute, D, Dv, block_q=blocks.q, block_kv=blocks.compute)
    return cost.fast_words * accumulator(jnp.dtype(dtype)).itemsize


def _tpu(hardware: HwSpec, blocks: BlockSizes, D: int, Dv: int, dtype: Any) -> int:
    """Windows and scratch, what the compiler adds, and the tiles of scores it keeps for want of registers."""
    constants = tpu_constants(tpu_generation(hardware))
    scores = constants["score_tiles"] * score_bytes(blocks)
    return int(tpu_windows(blocks, D, Dv, dtype) + constants["internal_bytes"] + scores)


def score_bytes(blocks: BlockSizes) -> int:
    """Bytes of the float32 scores under way: with short tiles the next product stands before the softmax of this."""
    under_way = 1 if blocks.compute >= _LONG_TILE else min(2, blocks.kv // blocks.compute)
    return 4 * blocks.q * blocks.compute * under_way


def tpu_windows(blocks: BlockSizes, D: int, Dv: int, dtype: Any) -> int:
    """Bytes of the windows of the TPU kernel, two of each, and of its scratch.

    Windows: q, k, v and o in the dtype of the call, head dimensions padded to whole lanes, and 8 rows of the
    log-sum-exp. Scratch, in float32: maximum and normaliser once a lane, and the accumulator.
    """
    D, Dv = (-(-n // _LANES) * _LANES for n in (D, Dv))
    q, kv = blocks.q, blocks.kv
    moved = q * D + kv * (D + Dv) + q * Dv
    return 2 * (moved * jnp.dtype(dtype).itemsize + 8 * q * 4) + 4 * (2 * q * _LANES + q * Dv)


def candidates(hardware: HwSpec) -> list[BlockSizes]:
    """Blocks that are tried: powers of two times 128."""
    sizes = [_LANES << n for n in range(6)]
    if hardware.kind == "gpu":
        return [BlockSizes(_GPU_ROWS, kv, kv) for kv in sizes[:3]]
    if hardware.kind == "cpu":  # fetches what it computes; longer blocks than these were not measured
        return [BlockSizes(q, kv, kv) for q in sizes[:5] for kv in sizes[:5]]
    return [BlockSizes(q, kv, compute) for q in sizes for kv in sizes for compute in sizes[:4] if compute <= kv]


def padded(hardware: HwSpec, blocks: BlockSizes, T: int, S: int, D: int, Dv: int) -> tuple[int, int, int, int]:
    """Sizes as the kernel pads them: lengths to whole blocks, on a TPU head dimensions to whole lanes."""
    up = lambda n, m: -(-n // m) * m  # noqa: E731
    if hardware.kind == "cpu":  # cuts its blocks to lengths that are shorter
        return up(T, min(blocks.q, T)), up(S, min(blocks.compute, S)), D, Dv
    width = _LANES if hardware.kind == "tpu" else 1
    return up(T, blocks.q), up(S, blocks.kv), up(D, width), up(Dv, width)
