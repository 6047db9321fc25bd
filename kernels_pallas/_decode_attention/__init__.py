"""Attention of a few queries to a cache; the public name is in `kernels_pallas`."""

from kernels_pallas._decode_attention.api import decode_attention as decode_attention
