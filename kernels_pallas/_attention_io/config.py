"""What the I/O model returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kernels_pallas._attention_io.hardware import HwSpec

# Names of the bounds, as in the source of `attention_io`.
ONCE, LARGE_CACHE, SMALL_CACHE = "inputs and outputs once", "N^2 d^2 / M", "N^2 d / sqrt(M)"


@dataclass(frozen=True)
class IOCost:
    """What a schedule of attention moves, holds and computes.

    Attributes:
      schedule: "flash" or "small".
      words_read: words loaded from slow memory.
      words_written: words stored to it.
      fast_words: most words in fast memory at once.
      least_words: what any schedule moves: the inputs that are seen once, and the outputs once.
      flops: of the matrix products, over the whole of every tile that is live.
      steps: tiles of scores that are computed.
      block_q: queries a tile.
      block_kv: keys a tile.
      scores: pairs of a query and a key, T S.
      width: mean head dimension, (D + Dv) / 2.
    """

    schedule: str
    words_read: int
    words_written: int
    fast_words: int
    least_words: int
    flops: int
    steps: int
    block_q: int
    block_kv: int
    scores: int
    width: float

    @property
    def words(self) -> int:
        """Words moved, in both directions."""
        return self.words_read + self.words_written

    @property
    def bounds(self) -> dict[str, float]:
        """Orders of growth at `fast_words` = M, without their constants, and `least_words`, in words."""
        return {
            LARGE_CACHE: self.scores * self.width**2 / self.fast_words,
            SMALL_CACHE: self.scores * self.width / math.sqrt(self.fast_words),
            ONCE: float(self.least_words),
        }

    @property
    def tight_bound(self) -> str:
        """The bound that says most: the smaller of the two that fall with M, unless all is moved once anyway."""
        bounds = self.bounds
        falling = min((LARGE_CACHE, SMALL_CACHE), key=bounds.__getitem__)
        return ONCE if bounds[ONCE] >= bounds[falling] else falling

    def times(self, copies: int) -> IOCost:
        """The cost of so many heads, one after the other in the same fast memory."""
        names = ("words_read", "words_written", "least_words", "flops", "steps", "scores")
        return replace(self, **{name: copies * getattr(self, name) for name in names})

    def roofline(self, hardware: HwSpec, dtype: Any) -> float:
        """Seconds that arithmetic and traffic need at least: the larger of the two.

        Args:
          hardware: what it runs on.
          dtype: of the words; products of 16 bits have a rate of their own.
        """
        return max(self.arithmetic_seconds(hardware, dtype), self.traffic_seconds(hardware, dtype))

    def arithmetic_seconds(self, hardware: HwSpec, dtype: Any) -> float:
        """Seconds of the matrix products at the rate of the hardware."""
        return self.flops / (hardware.flops_16 if _itemsize(dtype) == 2 else hardware.flops_32)

    def traffic_seconds(self, hardware: HwSpec, dtype: Any) -> float:
        """Seconds of the words moved at its bandwidth."""
        return self.words * _itemsize(dtype) / hardware.bandwidth


def _itemsize(dtype: Any) -> int:
    # bfloat16 is no dtype of NumPy by name unless its package has registered it, which jax does.
    import jax.numpy as jnp

    return np.dtype(jnp.dtype(dtype)).itemsize
