"""How much of a cache the kernels hold at once, and which calls they cannot do."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from kernels_pallas._decode_attention.config import Config, Operands, capacity

LANES = 128
# Rows of keys (times heads) a step, about: long enough that the transfer hides what a step costs.
_ROWS = 2048
# Scores a step, about, so that they and what is made of them stay in VMEM.
_SCORES = 2**18
# Tiles of pages a step; each is an input of its own.
_MOST_PAGES = 8
# Bytes of the blocks that the pipeline holds, twice each.
_VMEM = 10 * 2**20
# Entries of the block table that a TPU core can hold in scalar memory.
_TABLE_ENTRIES = 2**16

# Rows of queries of a GPU's product, and keys a block.
GPU_ROWS = 64
GPU_KEYS = 64
# Parts in all that keep an H100 busy, and keys below which a part is not worth its merge.
_GPU_PARTS = 132
_GPU_LEAST_KEYS = 256
# Bytes of shared memory that tiles may fill; barriers need the rest of a block's 227 KiB.
_GPU_TILE_BYTES = 224 * 1024


class Tiles(NamedTuple):
    """What a step reads.

    Attributes:
      keys: tokens a tile: a page, or a stretch of a contiguous cache.
      many: tiles a step.
      rows: keys x heads of a step.
    """

    keys: int
    many: int
    rows: int


def tpu_tiles(operands: Operands) -> Tiles:
    """Tiles of the TPU kernel."""
    heads = operands.k.shape[-2]
    queries = operands.q.shape[1] * operands.q.shape[2]
    wanted = max(min(_ROWS, _SCORES // max(queries, 1)), 1)
    if operands.table is not None:
        page, N = operands.k.shape[2], operands.table.shape[1]
        many = max(1, min(wanted // (page * heads), _MOST_PAGES, N))
        return Tiles(page, many, page * many * heads)
    # Tiles of 8-bit numbers have 32 rows; scales lie along lanes.
    step = LANES if operands.k_scale is not None or operands.v_scale is not None else 32
    keys = max(wanted // heads // step, 1) * step
    keys = min(keys, operands.k.shape[1])
    return Tiles(keys, 1, keys * heads)


def not_on_tpu(config: Config, operands: Operands) -> str | None:
    """Why the TPU kernel cannot do a call, or None."""
    q, k, v, table = operands.q, operands.k, operands.v, operands.table
    if q.dtype in (jnp.float64, jnp.float16):
        return f"TPUs have no {q.dtype.name}; cast to float32 or bfloat16"
    if not all(isinstance(size, int) for x in (q, k, v) for size in x.shape):
        return "its blocks need sizes that are known, not symbolic ones"
    tiles, heads = tpu_tiles(operands), k.shape[-2]
    if table is not None:
        sublanes = 32 // k.dtype.itemsize
        if table.size > _TABLE_ENTRIES:
            return f"its block table would have more than {_TABLE_ENTRIES} entries; use larger pages"
        if tiles.many > 1 and tiles.keys * heads % sublanes:
            return f"a page must hold a multiple of {sublanes} keys times heads of {k.dtype.name}"
    if operands.k_scale is not None or operands.v_scale is not None:
        if LANES % heads:
            return f"scales need a number of key heads that divides {LANES}"
        if (k.shape[2] if table is not None else k.shape[1]) % LANES:
            return f"scales need a capacity or pages of a multiple of {LANES} tokens"
    held = 2 * tiles.rows * (k.shape[-1] + v.shape[-1]) * k.dtype.itemsize
    if held > _VMEM:
        return f"a step would hold {held} bytes of keys and values, more than {_VMEM}; use fewer heads or smaller pages"
    return None


def gpu_splits(operands: Operands) -> int:
    """Parts of a row's cache: as many as give every multiprocessor one."""
    B, T, H = operands.q.shape[:3]
    k_heads = operands.k.shape[-2]
    parts = B * k_heads * -(-(H // k_heads) * T // GPU_ROWS)
    return max(1, min(-(-_GPU_PARTS // parts), capacity(operands) // _GPU_LEAST_KEYS))


def gpu_stages(operands: Operands) -> int:
    """Blocks in flight, a power of two; 0 when not even two fit."""
    D, v_dim = operands.k.shape[-1], operands.v.shape[-1]
    own = GPU_ROWS * (2 * D + 2 * GPU_KEYS)
    for stages in (4, 2):
        if own + stages * 2 * GPU_KEYS * (D + v_dim) <= _GPU_TILE_BYTES:
            return stages
    return 0


def not_on_gpu(config: Config, operands: Operands) -> str | None:
    """Why the GPU kernel cannot do a call, or None."""
    q, k, v, table = operands.q, operands.k, operands.v, operands.table
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"its tensor cores take float16 and bfloat16, not {q.dtype.name}"
    if k.dtype != q.dtype or operands.k_scale is not None or operands.v_scale is not None:
        return "it takes no scales, and so no int8"
    if not all(isinstance(size, int) for x in (q, k, v) for size in x.shape):
        return "its blocks need sizes that are known, not symbolic ones"
    if k.shape[-1] % 64 or v.shape[-1] % 64:
        return f"head dimensions must be multiples of 64, not {k.shape[-1]} and {v.shape[-1]}"
    if v.shape[-1] > 256 or not gpu_stages(operands):
        return "its registers and shared memory hold heads of at most 256 entries"
    if table is None and k.shape[1] % 8:
        return f"the capacity must be a multiple of 8, not {k.shape[1]}"
    if table is not None and (k.shape[2] % 8 or (GPU_KEYS % k.shape[2] and k.shape[2] % GPU_KEYS)):
        return f"pages must hold 8, 16, 32 or a multiple of {GPU_KEYS} tokens, not {k.shape[2]}"
    return None
