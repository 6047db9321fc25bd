"""Softmax attention; the public names are in `kernels_pallas`, the rest is what other operations are built of."""

from kernels_pallas._attention.api import _IMPLEMENTATIONS as IMPLEMENTATIONS
from kernels_pallas._attention.api import _backward_call as backward_call
from kernels_pallas._attention.api import _check_backward as check_backward
from kernels_pallas._attention.api import _check_implementation as check_implementation
from kernels_pallas._attention.api import _forward as forward_call
from kernels_pallas._attention.api import attention, prepare
from kernels_pallas._attention.arguments import _check_number as check_number
from kernels_pallas._attention.config import BlockSizes, Config, Operands, accumulator, precision, tpu_blocks
from kernels_pallas._attention.reference import forward as forward_reference

__all__ = [
    "IMPLEMENTATIONS",
    "BlockSizes",
    "Config",
    "Operands",
    "accumulator",
    "attention",
    "backward_call",
    "check_backward",
    "check_implementation",
    "check_number",
    "forward_call",
    "forward_reference",
    "precision",
    "prepare",
    "tpu_blocks",
]
