"""Softmax attention; the public names are in `kernels_pallas`."""

from kernels_pallas._attention.api import attention as attention
from kernels_pallas._attention.config import BlockSizes as BlockSizes
