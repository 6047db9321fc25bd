"""The I/O model of attention: words moved between a slow and a fast memory; public names are in `kernels_pallas`."""

from kernels_pallas._attention_io.api import attention_io, check_window
from kernels_pallas._attention_io.config import IOCost
from kernels_pallas._attention_io.hardware import HwSpec, hardware_of, tpu_constants, tpu_generation

__all__ = [
    "HwSpec",
    "IOCost",
    "attention_io",
    "check_window",
    "hardware_of",
    "tpu_constants",
    "tpu_generation",
]
