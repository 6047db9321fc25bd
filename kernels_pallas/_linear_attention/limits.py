"""What the TPU kernels of linear attention hold at a time, and what they cannot do."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas import recurrence_tpu
from kernels_pallas._linear_attention.config import Config, Operands, gate
from kernels_pallas.recurrence_tpu import CHUNK, Plan, up

# Chunks that the compiler sees at a time in each loop of the forward kernel: as many as the registers hold.
_UNROLLED = {"score": 8, "add": 8, "carry": 4}


def not_on_tpu(config: Config, operands: Operands) -> str | None:
    """Why the TPU kernels cannot do a call, forward or backward, or None."""
    q, v = operands.q, operands.v
    if q.dtype in (jnp.float64, jnp.float16):
        return f"TPUs have no {q.dtype.name}; cast to float32 or bfloat16"
    if not all(isinstance(size, int) for size in (*q.shape, *v.shape)):
        return "its blocks need sizes that are known, not symbolic ones"
    if forward_plan(config, operands) is None or backward_plan(config, operands) is None:
        return f"a state of {q.shape[3]} x {v.shape[3]} and a chunk of its tokens do not fit into a TPU's VMEM"
    return None


def forward_plan(config: Config, operands: Operands) -> Plan | None:
    """Chunks and steps of the forward kernel, None where they do not fit."""
    K, V, size = _sizes(operands)
    # Blocks come twice, one being fetched while the other is used. A chunk keeps its scores and what it adds to S.
    each = 2 * size * (2 * K + 2 * V) + size * 2 * CHUNK + 4 * K * V // CHUNK + 2 * 4 * 8
    fixed = 5 * 4 * K * V + 4 * CHUNK * (6 * CHUNK + 4 * K + 4 * V)
    return _plan(config, operands, each, fixed, 16)


def unrolled(part: str, kind: str, itemsize: int) -> int:
    """Chunks that the forward kernel takes at a time in one of its loops.

    Args:
      part: "score", "add" or "carry".
      kind: what has a decay, `config.gate`.
      itemsize: of the inputs' dtype.
    """
    if kind == "channel":
        return 1
    return _UNROLLED[part] // (4 if itemsize == 4 else 1)


def backward_plan(config: Config, operands: Operands) -> Plan | None:
    """Chunks and steps of the backward kernels, None where they do not fit."""
    K, V, size = _sizes(operands)
    each = 2 * size * (4 * K + 3 * V) + 2 * 4 * K * V // CHUNK + 4 * 4 * 8
    fixed = 5 * 4 * K * V + 4 * CHUNK * (8 * CHUNK + 8 * K + 8 * V)
    return _plan(config, operands, each, fixed, 4)


def _sizes(operands: Operands) -> tuple[int, int, int]:
    return up(operands.q.shape[3]), up(operands.v.shape[3]), operands.q.dtype.itemsize


def _plan(config: Config, operands: Operands, each: int, fixed: int, most: int) -> Plan | None:
    K, _, size = _sizes(operands)
    if gate(operands) == "channel":
        # Log decays and their cotangents, and the decays of every level.
        each, fixed, most = each + 5 * 4 * K, fixed + 4 * CHUNK * 24 * K, most // 4
    if size == 4:
        most = max(1, most // 4)  # a product of float32 is six of bfloat16
    return recurrence_tpu.plan(operands.q.shape[1], config.chunk, most, fixed, each)
