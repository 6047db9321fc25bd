"""The I/O model of attention: words moved between a slow and a fast memory; the public names are in `kernels_pallas`."""

from kernels_pallas._attention_io.api import attention_io
from kernels_pallas._attention_io.config import IOCost
from kernels_pallas._attention_io.hardware import NAMES as HARDWARE_NAMES
from kernels_pallas._attention_io.hardware import HwSpec, hardware

__all__ = ["HARDWARE_NAMES", "HwSpec", "IOCost", "attention_io", "hardware"]
