"""Accelerator kernels for JAX, each one call with an implementation per platform."""

from kernels_pallas._attention import BlockSizes as BlockSizes
from kernels_pallas._attention import attention as attention
