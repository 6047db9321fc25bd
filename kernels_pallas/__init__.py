"""Accelerator kernels for JAX, each one call with an implementation per platform."""

from typing import TYPE_CHECKING

from kernels_pallas import lazy

if TYPE_CHECKING:
    from kernels_pallas._attention import BlockSizes as BlockSizes
    from kernels_pallas._attention import attention as attention
    from kernels_pallas._attention_io import HwSpec as HwSpec
    from kernels_pallas._attention_io import IOCost as IOCost
    from kernels_pallas._attention_io import attention_io as attention_io
    from kernels_pallas._choose_attention_blocks import BlockChoice as BlockChoice
    from kernels_pallas._choose_attention_blocks import choose_attention_blocks as choose_attention_blocks
    from kernels_pallas._decode_attention import decode_attention as decode_attention
    from kernels_pallas._delta_rule import delta_rule as delta_rule
    from kernels_pallas._delta_rule import delta_rule_step as delta_rule_step
    from kernels_pallas._linear_attention import linear_attention as linear_attention
    from kernels_pallas._linear_attention import linear_attention_step as linear_attention_step
    from kernels_pallas._parallel_scan import linear_scan as linear_scan
    from kernels_pallas._parallel_scan import selective_scan as selective_scan
    from kernels_pallas._parallel_scan import selective_scan_step as selective_scan_step
    from kernels_pallas._ring_attention import from_ring_attention_layout as from_ring_attention_layout
    from kernels_pallas._ring_attention import ring_attention as ring_attention
    from kernels_pallas._ring_attention import ring_attention_positions as ring_attention_positions
    from kernels_pallas._ring_attention import to_ring_attention_layout as to_ring_attention_layout
    from kernels_pallas._softmin import softmin as softmin
    from kernels_pallas.cache import KVCache as KVCache
    from kernels_pallas.cache import PagedKVCache as PagedKVCache
    from kernels_pallas.cache import append_to_cache as append_to_cache
    from kernels_pallas.cache import init_cache as init_cache
    from kernels_pallas.cache import init_paged_cache as init_paged_cache

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "._attention": ("BlockSizes", "attention"),
        "._attention_io": ("HwSpec", "IOCost", "attention_io"),
        "._choose_attention_blocks": ("BlockChoice", "choose_attention_blocks"),
        "._decode_attention": ("decode_attention",),
        "._delta_rule": ("delta_rule", "delta_rule_step"),
        "._linear_attention": ("linear_attention", "linear_attention_step"),
        "._parallel_scan": ("linear_scan", "selective_scan", "selective_scan_step"),
        "._ring_attention": (
            "from_ring_attention_layout",
            "ring_attention",
            "ring_attention_positions",
            "to_ring_attention_layout",
        ),
        "._softmin": ("softmin",),
        ".cache": ("KVCache", "PagedKVCache", "append_to_cache", "init_cache", "init_paged_cache"),
    },
)
