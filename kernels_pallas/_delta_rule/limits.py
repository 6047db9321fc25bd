"""What the TPU kernels of the delta rule hold at a time, and what they cannot do."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas import recurrence_tpu
from kernels_pallas._delta_rule.config import Config, Operands, gate
from kernels_pallas.recurrence_tpu import CHUNK, VMEM_BYTES, Plan, up

# Heads a step at most: one head's products wait for each other, another's fill the time.
_HEADS = 4


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


def forward_plan(config: Config, operands: Operands) -> tuple[Plan, int] | None:
    """Chunks and steps of the forward kernel, and heads a step; None where not even one head's chunk fits."""
    return _plan(config, operands, *_forward_bytes(operands), 4)


def backward_plan(config: Config, operands: Operands) -> tuple[Plan, int] | None:
    """Chunks and steps of the kernel that goes back, and heads a step; None where not even one head's chunk fits."""
    K, V, size = _sizes(operands)
    each = 2 * size * (4 * K + 3 * V) + 2 * 4 * CHUNK + 2 * 4 * K * V // CHUNK + 4 * 4 * 8
    fixed = 5 * 4 * K * V + 4 * CHUNK * (12 * CHUNK + 10 * K + 10 * V)
    return _plan(config, operands, *_with_decays(operands, each, fixed), 2)


def states_heads(operands: Operands, plan: Plan, heads: int) -> int:
    """Heads a step of the kernel that makes the states for the one that goes back, at least as many as that one has."""
    each, fixed = _forward_bytes(operands)
    H = operands.q.shape[2]
    fit = (n for n in range(heads, _most_heads(operands) + 1) if n * (fixed + each * plan.tokens) <= VMEM_BYTES)
    return max((n for n in fit if H % n == 0), default=heads)


def _forward_bytes(operands: Operands) -> tuple[int, int]:
    """VMEM of the forward kernel by head: a token's, and what a step needs beside."""
    K, V, size = _sizes(operands)
    # Blocks come twice, one being fetched while the other is used. A chunk keeps its scores and its UT transform, or
    # gives the latter, and the state before it, to the backward pass.
    each = 2 * size * (2 * K + 2 * V) + (size + 2 * 4) * CHUNK + 2 * 4 * K * V // CHUNK + 2 * 4 * 8
    fixed = 5 * 4 * K * V + 4 * CHUNK * (8 * CHUNK + 4 * K + 4 * V)
    return _with_decays(operands, each, fixed)


def _with_decays(operands: Operands, each: int, fixed: int) -> tuple[int, int]:
    if gate(operands) != "channel":
        return each, fixed
    # Log decays and their cotangents, and the decays of every level.
    K, _, _ = _sizes(operands)
    return each + 6 * 4 * K, fixed + 4 * CHUNK * 28 * K


def _most_heads(operands: Operands) -> int:
    # A product of float32 is six of bfloat16.
    return 1 if gate(operands) == "channel" or operands.q.dtype.itemsize == 4 else _HEADS


def _sizes(operands: Operands) -> tuple[int, int, int]:
    return up(operands.q.shape[3]), up(operands.v.shape[3]), operands.q.dtype.itemsize


def _plan(config: Config, operands: Operands, each: int, fixed: int, most: int) -> tuple[Plan, int] | None:
    T, H = operands.q.shape[1:3]
    if gate(operands) == "channel":
        most = 2
    if operands.q.dtype.itemsize == 4:
        most = 1
    for n in range(_most_heads(operands), 0, -1):
        plan = recurrence_tpu.plan(T, config.chunk, most, n * fixed, n * each) if H % n == 0 else None
        if plan is not None:
            return plan, n
    return None
