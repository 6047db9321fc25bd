"""Linear attention backward on Hopper GPUs: Pallas Mosaic GPU kernels.

Two walks over the chunks, the forward pass's own, leave the states before the chunks and the cotangents of those after
them in the GPU's memory. A third kernel then takes all chunks at once: a thread block a chunk, whose three warpgroups
compute dq, dk and dv.

Notation, within a chunk: s_ij = q_i . k_j, D, READ and WRITE as in the forward pass, S the state before the chunk, dS
the cotangent of the one after it, ds_ij = scale D_ij do_i . v_j; a trailing T is a transpose.
dq = ds k + scale READ do S^T, dk = ds^T q + WRITE v dS^T, dv = (scale D s)^T do + WRITE k dS.
The cotangent of G_i is what row i of s ds holds below the diagonal less what column i does, and q_i and -k_i times the
second parts of dq_i and dk_i; the last token's has the sum of the latter too, and READ <S, dS>.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import recurrence_gpu
from kernels_pallas._linear_attention import gpu
from kernels_pallas._linear_attention.config import Config, Operands
from kernels_pallas.recurrence_gpu_backward import PARTS, chunk_gradients, decay_cotangent


def unsupported_backward(config: Config, operands: Operands) -> str | None:
    """Why these kernels cannot do a call, or None."""
    return recurrence_gpu.unsupported(config, operands)


def backward(
    config: Config, operands: Operands, o_cotangent: jax.Array, state_cotangent: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, ...]:
    """Cotangents of q, k, v, state and, if given, log_decay.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      o_cotangent: cotangent of o [B, T, H, V].
      state_cotangent: cotangent of the final state [B, H, K, V].
      interpret: an interpreter's parameters, for machines without a GPU.
    """
    with jax.enable_x64(False):
        q, k, v, state = recurrence_gpu.padded(*operands[:4])
        _, _, do, dstate = recurrence_gpu.padded(q, k, o_cotangent.astype(q.dtype), state_cotangent)
        rows = gpu.rows(operands)
        walk = partial(gpu.walk, scale=config.scale, interpret=interpret)
        (states,) = walk({"k": k, "v": v, "state": state} | rows, ("states",))
        dstate, dstates = walk({"k": q, "v": do, "state": dstate} | rows, ("final", "states"), reverse=True)
        arrays = {"q": q, "k": k, "v": v, "do": do, "states": states, "dstates": dstates} | rows
        dq, dk, dv, dG = chunk_gradients(arrays, PARTS, scale=config.scale, interpret=interpret)
        _, T, _, K = operands.q.shape
        V = operands.v.shape[3]
        found = dq[:, :T, :, :K], dk[:, :T, :, :K], dv[:, :T, :, :V], dstate[:, :, :K, :V]
        if operands.log_decay is None:
            return found
        dg = decay_cotangent(dG, operands.segments)[:, :T]
        return *found, jnp.sum(dg, axis=1) if operands.log_decay.ndim == 2 else dg
