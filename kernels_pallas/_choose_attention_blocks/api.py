"""The public call: which blocks, by the tuned table or by the I/O model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import checks
from kernels_pallas._attention import BlockSizes, Config, Operands, accumulator, tpu_blocks
from kernels_pallas._attention_io import HwSpec, IOCost, attention_io, check_window, hardware_of, tpu_generation
from kernels_pallas._choose_attention_blocks.config import BlockChoice
from kernels_pallas._choose_attention_blocks.footprint import candidates, footprint, padded

_NAME = "choose_attention_blocks"
_METHODS = (None, "table", "model")


def choose_attention_blocks(
    T: int,
    S: int,
    D: int,
    Dv: int | None = None,
    *,
    hardware: str | HwSpec,
    dtype: Any = jnp.float32,
    heads: int = 1,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int = 0,
    backward: bool = False,
    fast_bytes: int | None = None,
    method: str | None = None,
) -> BlockChoice:
    """Block sizes for `attention`, and why.

    A choice for a TPU comes from the table that was tuned with its compiler where that has a row for the call. Else the
    model decides: among blocks of powers of two times 128 whose footprint fits the fast memory, those of the least
    predicted seconds, max(flops / rate, bytes / bandwidth) + steps x price of a step, where flops, bytes and steps are
    counted by `attention_io` over the live tiles of the padded lengths; among those within 1 % of it, those that move
    fewest words, then those that hold least.

    Args:
      T: queries, >= 1.
      S: keys, >= 1.
      D: head dimension of queries and keys, >= 1.
      Dv: of values; default D.
      hardware: "tpu_v4", "tpu_v5e", "tpu_v5p", "tpu_v6e", "h100", "cpu", or a `HwSpec`.
      dtype: of q, k and v; default float32.
      heads: query heads times batch, >= 1.
      causal: as in `attention`.
      window: as in `attention`.
      q_offset: position of the first query.
      backward: choose for the backward pass.
      fast_bytes: bytes a block may fill, instead of those of the hardware; the model then decides.
      method: None (the table where it has a row, else the model), "table" or "model".

    Returns:
      `BlockChoice`: `block_sizes` for `attention(..., block_sizes=)`, the predicted cost, and `explain()`. The kernel
      for a GPU has tiles of its own, which `block_sizes` of a call do not change; for it the choice is a prediction.

    Raises:
      ValueError: an argument that does not fit; a fast memory without room for blocks of 128; "table" without a row.
      NotImplementedError: the model for a backward pass on a TPU, whose kernel is not the schedule that is counted.

    Cost: a few hundred counts in NumPy, milliseconds; nothing is traced and no backend is started.

    Numerics: a model of seconds, not a measurement: exponentials count as nothing, and all of a core's cache as one.

    Source: Saha & Ye, "The I/O Complexity of Attention, or How Optimal is FlashAttention?" (2024); the footprint on a
      TPU is fitted to what its compiler allocates (`benchmarks/attention_footprint.py`).

    Example:
      >>> from kernels_pallas import choose_attention_blocks
      >>> choice = choose_attention_blocks(4096, 4096, 64, hardware="cpu", causal=True)
      >>> choice.block_sizes
      BlockSizes(q=512, kv=512, compute=512)
    """
    Dv = D if Dv is None else Dv
    spec = _check(T, S, D, Dv, hardware, dtype, heads, window, fast_bytes, method)
    dtype = jnp.dtype(dtype)
    room = spec.fast_bytes if fast_bytes is None else fast_bytes
    generation = tpu_generation(spec)
    tuned = None
    if generation is not None and fast_bytes is None and method != "model":
        tuned = _tuned(generation, (T, S, D, Dv), dtype, causal, window, backward)
    wanted = f"be None or 'model' for {spec.name}, which has no tuned row, and for `fast_bytes` of your own"
    checks.value(_NAME, "method", tuned is not None or method != "table", wanted, repr(method))
    if tuned is None and spec.kind == "tpu" and backward:
        raise NotImplementedError(
            f"{_NAME}: `method` 'model' cannot choose for the backward pass on a TPU, whose kernel keeps dq on chip; "
            "the table can."
        )

    def cost(blocks: BlockSizes) -> IOCost:
        return _cost(spec, blocks, (T, S, D, Dv), heads, causal, window, q_offset, backward)

    words = dtype if spec.kind != "cpu" else accumulator(dtype)
    if tuned is not None:
        blocks = tuned
    else:
        blocks = _modelled(spec, room, (T, S, D, Dv), dtype, words, cost)
    return BlockChoice(
        block_sizes=blocks,
        method="model" if tuned is None else "table",
        hardware=spec,
        cost=cost(blocks),
        footprint_bytes=None if backward and spec.kind == "tpu" else footprint(spec, blocks, D, Dv, dtype),
        room_bytes=room,
        dtype=jnp.dtype(words).name,
        heads=heads,
        padding=padded(spec, blocks, T, S, D, Dv),
        lengths=(T, S, D, Dv),
        backward=backward,
    )


def _check(
    T: Any, S: Any, D: Any, Dv: Any, given: Any, dtype: Any, heads: Any, window: Any, fast_bytes: Any, method: Any
) -> HwSpec:
    sizes = {"T": T, "S": S, "D": D, "Dv": Dv, "heads": heads}
    if fast_bytes is not None:
        sizes["fast_bytes"] = fast_bytes
    for argument, size in sizes.items():
        ok = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        checks.value(_NAME, argument, ok, "be an int of at least 1", size)
    check_window(_NAME, window)
    checks.choice(_NAME, "method", method, _METHODS)
    checks.value(_NAME, "dtype", jnp.issubdtype(dtype, jnp.floating), "be a floating-point dtype", dtype)
    return hardware_of(_NAME, "hardware", given)


def _tuned(
    generation: str, sizes: tuple[int, int, int, int], dtype: Any, causal: bool, window: Any, backward: bool
) -> BlockSizes:
    """Blocks of the table that the TPU kernels use, for a call without bias, mask or segments."""
    T, S, D, Dv = sizes
    q, k, v = (jax.ShapeDtypeStruct((1, n, 1, width), dtype) for n, width in ((T, D), (S, D), (S, Dv)))
    config = Config(causal, window, None, 1.0, None)
    return tpu_blocks(config, Operands(q, k, v), backward=backward, generation=generation)


def _clipped(blocks: BlockSizes, T: int, S: int) -> BlockSizes:
    """No longer than the lengths padded to whole lanes, as the kernels cut them."""
    up = lambda n, m: -(-n // m) * m  # noqa: E731
    compute = min(blocks.compute, up(S, 128))
    return BlockSizes(min(blocks.q, up(T, 128)), min(blocks.kv // compute * compute, up(S, compute)), compute)


def _cost(
    spec: HwSpec,
    blocks: BlockSizes,
    sizes: tuple[int, int, int, int],
    heads: int,
    causal: bool,
    window: Any,
    q_offset: int,
    backward: bool,
) -> IOCost:
    """What all heads move with these blocks, lengths padded as the kernel pads them."""
    T, S, D, Dv = padded(spec, blocks, *sizes)
    cost = attention_io(
        T,
        S,
        D,
        Dv,
        block_q=blocks.q,
        block_kv=blocks.kv,
        causal=causal,
        window=window,
        q_offset=q_offset,
        backward=backward,
    )
    return cost.times(heads)


def _modelled(spec: HwSpec, room: int, sizes: tuple, dtype: Any, words: Any, cost: Any) -> BlockSizes:
    T, S, D, Dv = sizes
    tried = dict.fromkeys(_clipped(blocks, T, S) for blocks in candidates(spec))
    held = {blocks: footprint(spec, blocks, D, Dv, dtype) for blocks in tried}
    fitting = {blocks: cost(blocks) for blocks in tried if held[blocks] <= room}
    least = min(held.values())
    checks.value(_NAME, "fast_bytes", bool(fitting), f"be at least {least}, what the smallest blocks hold", room)
    steps = {blocks: cost.steps * (blocks.kv // blocks.compute) for blocks, cost in fitting.items()}
    seconds = {b: c.roofline(spec, words) + steps[b] * spec.step_seconds for b, c in fitting.items()}
    quick = [blocks for blocks in fitting if seconds[blocks] <= 1.01 * min(seconds.values())]
    return min(quick, key=lambda blocks: (fitting[blocks].words, held[blocks]))
