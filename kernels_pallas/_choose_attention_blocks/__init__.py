"""Block sizes of attention from the I/O model; the public names are in `kernels_pallas`."""

from kernels_pallas._choose_attention_blocks.api import choose_attention_blocks
from kernels_pallas._choose_attention_blocks.config import BlockChoice
from kernels_pallas._choose_attention_blocks.footprint import footprint, score_bytes, tpu_windows

__all__ = ["BlockChoice", "choose_attention_blocks", "footprint", "score_bytes", "tpu_windows"]
