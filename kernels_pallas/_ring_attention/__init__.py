"""Attention over a sequence that is cut over a mesh axis; the public names are in `kernels_pallas`."""

from kernels_pallas._ring_attention.api import ring_attention as ring_attention
from kernels_pallas._ring_attention.layout import from_ring_attention_layout as from_ring_attention_layout
from kernels_pallas._ring_attention.layout import ring_attention_positions as ring_attention_positions
from kernels_pallas._ring_attention.layout import to_ring_attention_layout as to_ring_attention_layout
