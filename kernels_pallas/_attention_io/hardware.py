"""Memories and rates of the hardware that blocks are chosen for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kernels_pallas import checks

_TPUS = {"tpu_v4": "TPU_V4", "tpu_v5e": "TPU_V5E", "tpu_v5p": "TPU_V5P", "tpu_v6e": "TPU_V6E"}
NAMES = (*_TPUS, "h100", "cpu")
_KINDS = ("tpu", "gpu", "cpu")
_TPU_TABLE = Path(__file__).with_name("tpu.json")


@dataclass(frozen=True)
class HwSpec:
    """A machine as the I/O model sees it: a fast memory, a slow one, and a rate of arithmetic.

    Attributes:
      name: what to call it.
      kind: "tpu", "gpu" or "cpu": which kernel runs there.
      fast_bytes: bytes of fast memory a kernel may fill, > 0.
      bandwidth: bytes a second between slow and fast memory, > 0.
      flops_16: flops a second of matrix products of 16-bit numbers, > 0.
      flops_32: likewise of 32-bit numbers in full precision, > 0.
      step_seconds: what a tile costs beside its arithmetic and its traffic, >= 0.

    Raises:
      ValueError: a number or the kind does not fit.
    """

    name: str
    kind: str
    fast_bytes: int
    bandwidth: float
    flops_16: float
    flops_32: float
    step_seconds: float

    def __post_init__(self) -> None:
        checks.choice("HwSpec", "kind", self.kind, _KINDS)
        for argument in ("fast_bytes", "bandwidth", "flops_16", "flops_32", "step_seconds"):
            got, lowest = getattr(self, argument), 0 if argument == "step_seconds" else None
            number = isinstance(got, int | float) and not isinstance(got, bool)
            ok = number and (got >= 0 if lowest == 0 else got > 0)
            checks.value("HwSpec", argument, ok, "be a number >= 0" if lowest == 0 else "be a number > 0", got)


def hardware_of(function: str, argument: str, given: Any) -> HwSpec:
    """The spec of a name of `NAMES`, or the given spec itself.

    Args:
      function: name of the public function, for the error.
      argument: name of its argument.
      given: a name or a HwSpec.
    """
    if isinstance(given, HwSpec):
        return given
    checks.choice(function, argument, given, NAMES)
    if given in _TPUS:
        return _tpu(given)
    return _H100 if given == "h100" else _CPU


def _tpu(name: str) -> HwSpec:
    """Rates of one core from JAX's own table, room and price of a step from the compiler's."""
    from jax.experimental.pallas import tpu as pltpu

    info = pltpu.get_tpu_info_for_chip(getattr(pltpu.ChipVersion, _TPUS[name]), 1)
    constants = tpu_constants(name.removeprefix("tpu_"))
    clock = info.bf16_ops_per_second / (2 * info.num_mxus * info.mxu_column_size**2)
    return HwSpec(
        name,
        "tpu",
        fast_bytes=constants["limit_bytes"],
        bandwidth=float(info.mem_bw_bytes_per_second),
        flops_16=float(info.bf16_ops_per_second),
        # A float32 product in full precision is six of bfloat16 (jax.lax.Precision.HIGHEST).
        flops_32=info.bf16_ops_per_second / 6,
        step_seconds=constants["step_bundles"] / clock,
    )


def tpu_generation(spec: HwSpec) -> str | None:
    """The generation of a TPU of the table, None for any other hardware."""
    return spec.name.removeprefix("tpu_") if spec.name in _TPUS and spec.kind == "tpu" else None


def tpu_constants(generation: str | None) -> dict[str, Any]:
    """What the TPU compiler told `python -m benchmarks.attention_footprint`; the largest of all for an unknown chip."""
    table = _tpu_table()
    if generation in table:
        return table[generation]
    names = ("internal_bytes", "score_tiles", "step_bundles")
    return {name: max(entry[name] for entry in table.values()) for name in names}


@lru_cache(maxsize=1)
def _tpu_table() -> dict[str, dict[str, Any]]:
    return json.loads(_TPU_TABLE.read_text())


# NVIDIA H100 SXM: data sheet (3.35 TB/s, 989 TFLOP/s of bfloat16 without sparsity, 67 TFLOP/s of float32) and CUDA C++
# programming guide, compute capability 9.0 (227 KiB of shared memory a thread block).
_H100 = HwSpec("h100", "gpu", 227 * 1024, 3.35e12, 989e12, 67e12, 0.0)

# Two cores of an AMD EPYC with 32 MiB of last-level cache, float32, measured with jax 0.10.2: 160 GFLOP/s in a matrix
# product of 2048^3 and about 50 us a tile, from the time of attention at 4096 tokens over tiles of 128 x 128 to
# 2048 x 2048; 16-bit operands are widened there. A quarter of the cache is left to a tile and what XLA makes of it,
# beyond which the same measurement slows down. 20 GB/s is what one channel of such a machine's memory gives.
_CPU = HwSpec("cpu", "cpu", 8 * 2**20, 20e9, 160e9, 160e9, 5e-5)
