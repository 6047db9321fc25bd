"""Linear attention: a matrix state per head, updated by every token, with decay."""

from kernels_pallas._linear_attention.api import linear_attention as linear_attention
from kernels_pallas._linear_attention.api import linear_attention_step as linear_attention_step
from kernels_pallas._linear_attention.arguments import check_chunk_size as check_chunk_size
from kernels_pallas._linear_attention.arguments import check_scale as check_scale
from kernels_pallas._linear_attention.arguments import check_state as check_state
from kernels_pallas._linear_attention.arguments import grouped as grouped
