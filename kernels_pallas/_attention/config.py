"""What is static about a call of attention: its flags and its block sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import checks

_LANES = 128


@dataclass(frozen=True)
class BlockSizes:
    """How many queries and keys a kernel holds at once.

    Attributes:
      q: queries a block, positive multiple of 128.
      kv: keys a block fetched from memory, positive multiple of `compute`.
      compute: keys a step of the arithmetic, positive multiple of 128.

    Raises:
      ValueError: a size that is not such a multiple.
    """

    q: int
    kv: int
    compute: int

    def __post_init__(self) -> None:
        for argument, size, multiple in (
            ("q", self.q, _LANES),
            ("compute", self.compute, _LANES),
            ("kv", self.kv, self.compute),
        ):
            ok = isinstance(size, int) and not isinstance(size, bool) and size >= 1 and size % multiple == 0
            checks.value("BlockSizes", argument, ok, f"be a positive multiple of {multiple}", size)


@dataclass(frozen=True)
class Config:
    """The static part of a call; hashable, so that it can be a parameter of a primitive."""

    causal: bool
    window: tuple[int | None, int | None] | None
    soft_cap: float | None
    scale: float
    blocks: BlockSizes | None
    # The rate in steps of 2^-16, and whether the backward pass also gives the cotangent of the bias.
    dropout: int = 0
    bias_gradient: bool = False


class Operands(NamedTuple):
    """The arrays of a call, all with the batch first; None for what was not given.

    Attributes:
      q: [B, T, Hq, D].
      k: [B, S, Hk, D].
      v: [B, S, Hk, Dv].
      bias: [B|1, Hq|1, T|1, S], floating point.
      mask: [B|1, Hq|1, T|1, S|1], bool.
      q_segments: int32 [B, T].
      kv_segments: int32 [B, S].
      q_positions: int32 [B|1, T].
      kv_positions: int32 [B|1, S].
      dropout_keys: int32 [B, Hq, 2], two words a head.
    """

    q: Any
    k: Any
    v: Any
    bias: Any = None
    mask: Any = None
    q_segments: Any = None
    kv_segments: Any = None
    q_positions: Any = None
    kv_positions: Any = None
    dropout_keys: Any = None


# Blocks by direction, case and generation, written by `python -m benchmarks.tpu_blocks`.
_TPU_TABLE = Path(__file__).with_name("tpu_blocks.json")


def tpu_blocks(
    config: Config, operands: Operands, *, backward: bool = False, generation: str | None = None
) -> BlockSizes:
    """Blocks of a TPU kernel, no longer than the lengths padded to whole lanes.

    Those of the generation given, or of the one that the program is compiled for, as far as JAX tells it: the default
    device, or the device of the abstract mesh. Where it tells none, as beside a topology without a chip, those that do
    well on all.
    """
    T, S = operands.q.shape[1], operands.k.shape[1]
    blocks = config.blocks
    if blocks is None:
        row = _tpu_table()["backward" if backward else "forward"][tpu_case(config, operands)]
        sizes = row.get(generation or _tpu_generation() or "default", row["default"])
        # Wider heads than those of the table take blocks of half the length.
        blocks = BlockSizes(*(max(_LANES, size // 2) if _width(operands) > 1024 else size for size in sizes))
    up = lambda n, m: -(-n // m) * m  # noqa: E731
    compute = min(blocks.compute, up(S, _LANES))
    return BlockSizes(min(blocks.q, up(T, _LANES)), min(blocks.kv // compute * compute, up(S, compute)), compute)


def tpu_case(config: Config, operands: Operands) -> str:
    """Which line of the table of blocks serves a call: by what a block needs, and whether blocks are skipped."""
    if _width(operands) > 256:
        return "wide"
    skips = config.causal or config.window is not None or operands.q_segments is not None
    takes = operands.bias is not None or operands.mask is not None or config.dropout
    return "hiding" if skips or takes else "full"


def _width(operands: Operands) -> int:
    """Bytes of a row of q, k or v."""
    return max(operands.q.shape[3], operands.v.shape[3]) * operands.q.dtype.itemsize


@lru_cache(maxsize=1)
def _tpu_table() -> dict[str, dict[str, dict[str, list[int]]]]:
    return json.loads(_TPU_TABLE.read_text())


def _tpu_generation() -> str | None:
    from jax.experimental.pallas import tpu as pltpu

    try:
        return str(pltpu.get_tpu_info().chip_version)
    except ValueError:  # neither the default device nor an abstract mesh names a TPU
        return None


def accumulator(dtype: Any) -> Any:
    """Scores, statistics and sums are kept in float32, or in float64 when the inputs are."""
    return jnp.promote_types(dtype, jnp.float32)


def precision(dtype: Any) -> jax.lax.Precision:
    """Full precision for float32 and float64 products; an accelerator's default would round their operands."""
    wide = jnp.dtype(dtype).itemsize >= 4
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
