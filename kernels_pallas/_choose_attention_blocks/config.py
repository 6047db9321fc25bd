"""What a choice of blocks returns."""

from __future__ import annotations

from dataclasses import dataclass

from kernels_pallas._attention import BlockSizes
from kernels_pallas._attention_io import HwSpec, IOCost


@dataclass(frozen=True)
class BlockChoice:
    """Blocks for `attention(..., block_sizes=)`, and what was assumed of them.

    Attributes:
      block_sizes: the blocks.
      method: "table" (tuned with the compiler) or "model".
      hardware: what they are for.
      cost: words, flops and steps of all heads, counted over the padded sizes.
      footprint_bytes: bytes on chip that the blocks hold; None where no model says.
      room_bytes: bytes on chip that they may hold.
      dtype: of the words moved; a CPU widens 16-bit numbers.
      heads: query heads times batch.
      padding: (T, S, D, Dv) as the kernel pads them.
      lengths: (T, S, D, Dv) as given.
      backward: whether the cost is that of the backward pass.
    """

    block_sizes: BlockSizes
    method: str
    hardware: HwSpec
    cost: IOCost
    footprint_bytes: int | None
    room_bytes: int
    dtype: str
    heads: int
    padding: tuple[int, int, int, int]
    lengths: tuple[int, int, int, int]
    backward: bool

    @property
    def steps(self) -> int:
        """Tiles of scores that are computed, of all heads."""
        return self.cost.steps * (self.block_sizes.kv // self.block_sizes.compute)

    @property
    def seconds(self) -> float:
        """Predicted seconds: the roofline, and the price of every step."""
        return self.cost.roofline(self.hardware, self.dtype) + self.steps * self.hardware.step_seconds

    def explain(self) -> str:
        """The choice, what it moves, holds and takes by the model, and what the model assumed, line by line."""
        cost, hardware, blocks = self.cost, self.hardware, self.block_sizes
        arithmetic, traffic = (f(hardware, self.dtype) for f in (cost.arithmetic_seconds, cost.traffic_seconds))
        bounds = cost.bounds
        origin = {
            "table": "the table that was tuned with the TPU compiler",
            "model": "the I/O model: least predicted seconds, then fewest words",
        }[self.method]
        held = "not modelled" if self.footprint_bytes is None else f"{self.footprint_bytes / 2**20:.2f} MiB"
        lines = [
            f"blocks       q {blocks.q}, kv {blocks.kv}, compute {blocks.compute}, from {origin}",
            f"words moved  {cost.words:,} of {self.dtype} ({cost.words_read:,} read, {cost.words_written:,} written), "
            f"{cost.words / cost.least_words:.2f} x the least possible",
            f"working set  {held} of {self.room_bytes / 2**20:.2f} MiB",
            f"bounds       tight: {cost.tight_bound}, at M = {cost.fast_words:,} words of one tile; in words",
            "             " + ", ".join(f"{name}: {words:.3g}" for name, words in bounds.items()),
            f"roofline     {hardware.name}: {1e3 * max(arithmetic, traffic):.3g} ms "
            f"(arithmetic {1e3 * arithmetic:.3g}, traffic {1e3 * traffic:.3g}), so "
            f"{'arithmetic' if arithmetic >= traffic else 'traffic'} decides",
            f"steps        {self.steps:,} at {1e6 * hardware.step_seconds:.3g} us beside their products: "
            f"{1e3 * self.steps * hardware.step_seconds:.3g} ms; in all {1e3 * self.seconds:.3g} ms",
            "assumed      " + self._assumed(),
        ]
        return "\n".join(lines)

    def _assumed(self) -> str:
        T, S, D, Dv = self.padding
        text = [f"heads one after the other, {self.heads} of them, each with its own keys"]
        if self.padding != self.lengths:
            text.append(f"padded by the kernel to T {T}, S {S}, D {D}, Dv {Dv}")
        if self.backward:
            text.append("the backward pass as two passes, one for dq and one for dk and dv")
        if self.hardware.kind == "gpu":
            text.append("the kernel's own tiles of 128 queries, scores in registers, no cache before device memory")
        text.append("no cost for exponentials")
        return "; ".join(text)

    def __str__(self) -> str:
        return self.explain()
