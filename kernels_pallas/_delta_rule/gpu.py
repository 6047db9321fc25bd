"""The delta rule forward on Hopper GPUs: linear attention's walk over chunks, with values that the state corrects.

Notation, within a chunk: D_ij = exp(G_i - G_j) for j <= i of one segment, else 0; M_ij = D_ij k_i . k_j for j < i; S
the state before the chunk, b the betas. What is new in token i, r_i = v_i - S~_i^T k_i, solves (I + M diag(b)) r = e
with e_i = v_i - read_i S^T k_i; the inverse is made outside, of all chunks at once. u_i = b_i r_i is then written:
o_i = scale (read_i S^T q_i + sum_j D_ij (q_i . k_j) u_j), and S' = read_C S + sum_j write_j k_j u_j^T.

Errors of S, e and u come back through later chunks, so products take these, and the inverse, as two numbers of 16 bits
each; the keys have 16 bits anyway.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import recurrence_gpu
from kernels_pallas._delta_rule.config import Config, Operands
from kernels_pallas.recurrence_gpu import (
    BETA,
    CHUNK,
    COLUMNS,
    READ,
    WRITE,
    Chunk,
    entries,
    line,
    product,
    store_split,
    turned,
)


def unsupported(config: Config, operands: Operands) -> str | None:
    """Why the kernel cannot do a call, or None."""
    return recurrence_gpu.unsupported(config, operands)


def forward(config: Config, operands: Operands, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, V] and final state [B, H, K, V].

    Args:
      config: static part of the call.
      operands: arrays of the call.
      interpret: an interpreter's parameters, for machines without a GPU.
    """
    with jax.enable_x64(False):
        inputs = prepared(operands)
        inputs["inverse"] = split(inverted(inputs.pop("pairs") * inputs["rows"][..., BETA, None, :]), operands.q.dtype)
        o, final = walk(step, inputs, ("o", "final"), scale=config.scale, interpret=interpret)
    _, T, _, V = operands.v.shape
    return o[:, :T, :, :V], final[:, :, : operands.q.shape[3], :V]


# --- Outside of the kernel. -------------------------------------------------------------------------------------------


def prepared(operands: Operands) -> dict[str, jax.Array]:
    """The inputs of the walk but for the inverse, and what that is made of, M."""
    q, k, v, state = recurrence_gpu.padded(operands.q, operands.k, operands.v, operands.state)
    rows = recurrence_gpu.decay_rows(operands.log_decay, operands.segments, operands.q.shape[:3])
    beta = recurrence_gpu.in_chunks(operands.beta)[..., None, :]
    rows = jnp.concatenate([jnp.broadcast_to(rows, (*beta.shape[:3], *rows.shape[3:])), beta], axis=3)
    return {"q": q, "k": k, "v": v, "state": state, "rows": rows, "pairs": _pairs(k, rows)}


def _pairs(k: jax.Array, rows: jax.Array) -> jax.Array:
    """M [B, H, N, CHUNK, CHUNK], in float32."""
    B, T, H, K = k.shape
    k = jnp.pad(k, ((0, 0), (0, -T % CHUNK), (0, 0), (0, 0))).reshape(B, -1, CHUNK, H, K)
    # Products of 16 bits are exact in float32.
    scores = jnp.einsum("bnihk,bnjhk->bhnij", k, k, preferred_element_type=jnp.float32)
    coarse, rest = (
        rows[..., part, :, None] - rows[..., part, None, :] for part in (recurrence_gpu.COARSE, recurrence_gpu.REST)
    )
    place = jnp.arange(CHUNK)
    return scores * jnp.exp(jnp.where(place[:, None] > place, coarse + rest, -jnp.inf))


def inverted(L: jax.Array) -> jax.Array:
    """(I + L)^{-1} of strictly lower triangular L [..., CHUNK, CHUNK], by block doubling.

    The inverses of two neighbouring diagonal blocks give that of both: its lower left part is -X2 L21 X1. No power of L
    appears, which would be huge where keys are alike.
    """
    dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    lead = L.shape[:-2]
    inverse = jnp.ones((*lead, CHUNK, 1, 1), L.dtype)
    size = 1
    while size < CHUNK:
        count = CHUNK // (2 * size)
        blocks = L.reshape(*lead, count, 2, size, count, 2, size)
        # The lower left quarter of each diagonal block.
        lower = jnp.stack([blocks[..., i, 1, :, i, 0, :] for i in range(count)], axis=-3)
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        corner = -dot(dot(second, lower), first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]


def split(x: jax.Array, dtype: Any) -> jax.Array:
    """x [..., C, C] in float32 as a sum of two in dtype, [..., 2, C, C]."""
    digits = jnp.finfo(dtype)
    # Not by casts there and back, which XLA may leave out.
    high = lax.reduce_precision(x, exponent_bits=digits.nexp, mantissa_bits=digits.nmant)
    return jnp.stack([high, x - high], axis=-3).astype(dtype)


# --- The kernel. ------------------------------------------------------------------------------------------------------


def walk(
    step: Any,
    inputs: dict[str, jax.Array],
    outputs: tuple[str, ...],
    *,
    scale: float,
    reverse: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Walk over the chunks with a state of twice the digits; see `recurrence_gpu.walk`.

    Args:
      step: of the walk.
      inputs: of the step, all but "state" moving.
      outputs: names of the outputs.
      scale: of the read S^T q.
      reverse: from the last chunk to the first.
      interpret: an interpreter's parameters.
    """
    dtype, (T, _, K) = inputs["k"].dtype, inputs["k"].shape[1:]
    plan = recurrence_gpu.Walk(
        step,
        f"delta_rule_{outputs[0]}",
        pl.cdiv(T, CHUNK),
        tuple(name for name in inputs if name != "state"),
        outputs,
        reverse,
        scale,
    )
    square = partial(recurrence_gpu.tile, 1, CHUNK, CHUNK, dtype=dtype)
    own = {
        "state_low": recurrence_gpu.tile(1, K, COLUMNS, dtype=dtype),
        "high": square(),
        "low": square(),
        "p": square(),
    }
    return recurrence_gpu.walk(plan, inputs, own, interpret)


def step(chunk: Chunk, state: jax.Array) -> jax.Array:
    """One chunk; without queries, u and r are the outputs."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, own, tiles = chunk.rows, chunk.own, chunk.tiles
    v, high, low, p = tiles["v"], own["high"], own["low"], own["p"]
    _errors(chunk)
    r, o = _corrected(chunk)
    u = r * line(rows, BETA, 0)
    v[...] = u.astype(v.dtype)
    if "r" in chunk.walk.outputs:
        p[...] = r.astype(p.dtype)
    store_split(u * line(rows, WRITE, 0), high, low)
    plgpu.commit_smem()
    if o is not None:
        o = o * (chunk.walk.scale * line(rows, READ, 0)) + product((p, v))
        p[...] = o.astype(p.dtype)
        plgpu.commit_smem()
        chunk.send("o", p)
    else:
        chunk.send("u", v)
        chunk.send("r", p)
    k = turned(tiles["k"])
    return state * rows[READ, CHUNK - 1] + product((k, high), (k, low))


def _errors(chunk: Chunk) -> None:
    """Leave e, and scale D times q . k if o is wanted, in shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, own, tiles = chunk.rows, chunk.own, chunk.tiles

    def run(e: Any, s: Any = None) -> None:
        plgpu.wgmma(e, tiles["k"], own["state"])
        plgpu.wgmma(e, tiles["k"], own["state_low"])
        if s is not None:
            plgpu.wgmma(s, tiles["q"], turned(tiles["k"]))
        e = plgpu.wgmma_accumulator_load(e, wait_n=0 if s is None else 1)
        store_split(entries(tiles["v"]) - e * line(rows, READ, 0), own["high"], own["low"])
        if s is not None:
            own["p"][...] = (s[...] * (recurrence_gpu.decays(rows, 0) * chunk.walk.scale)).astype(own["p"].dtype)

    pl.run_scoped(run, *(plgpu.ACC((CHUNK, CHUNK), jnp.float32),) * (2 if "q" in tiles else 1))
    plgpu.commit_smem()


def _corrected(chunk: Chunk) -> tuple[jax.Array, Any]:
    """r, and S^T q if o is wanted."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    own, inverse = chunk.own, chunk.tiles["inverse"]

    def run(r: Any, o: Any = None) -> tuple[jax.Array, Any]:
        if o is not None:
            plgpu.wgmma(o, chunk.tiles["q"], own["state"])
        for at, error in ((0, "high"), (0, "low"), (1, "high")):
            plgpu.wgmma(r, inverse.at[at], own[error])
        return r[...], None if o is None else o[...]

    return pl.run_scoped(run, *(plgpu.ACC((CHUNK, COLUMNS), jnp.float32),) * (2 if "q" in chunk.tiles else 1))
