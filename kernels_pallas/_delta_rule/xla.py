"""The delta rule in plain XLA, chunk by chunk.

One chunk of one head is two-dimensional arithmetic (`chunk.py`). A CPU walks the heads one after the other, for batched
products are slow there; an accelerator takes all heads of a chunk at once, by vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import recurrence
from kernels_pallas._delta_rule import chunk as chunks
from kernels_pallas._delta_rule.chunk import Chunk, Prepared
from kernels_pallas._delta_rule.config import Config, Operands

# Tokens a chunk. A CPU is fastest so: the backward pass keeps a state a chunk, the forward pass does not.
_FORWARD, _BACKWARD = 32, 64


def forward(config: Config, operands: Operands, *, sequential: bool) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, V] in the dtype of q, and the state [B, H, K, V] after the last token.

    Args:
      config: the static part of the call.
      operands: the arrays of the call.
      sequential: walk batch and heads one by one, as a CPU likes. JAX can differentiate both in reverse mode.
    """
    T = operands.q.shape[1]
    given = _prepared(_cut(config, operands, _FORWARD if sequential else _BACKWARD), sequential)

    def head(given: tuple, S: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(S: jax.Array, at: tuple) -> tuple[jax.Array, jax.Array]:
            chunk, prepared, small = at
            solved = chunks.solve(*at, S)
            return chunks.update(chunk, prepared, solved, S), chunks.read(chunk, prepared, solved, S)

        S, o = jax.lax.scan(step, S, given)
        return o, S

    o, state = _over_heads(head, sequential, given, operands.state)
    return _joined(o, T).astype(operands.q.dtype), state


def backward(
    config: Config, operands: Operands, o_cotangent: jax.Array, state_cotangent: jax.Array, *, sequential: bool
) -> tuple[jax.Array, ...]:
    """Cotangents of q, k, v, beta, state and, where there is one, log_decay, in their dtypes.

    A sweep over the chunks keeps the state before each, and what each corrects; a second one, from the last chunk to
    the first, takes the cotangent of the state along.
    """
    T, dtypes = operands.q.shape[1], [None if x is None else x.dtype for x in operands]
    cut = _cut(config, operands, _BACKWARD)
    given = _prepared(cut, sequential)
    do = _chunked(o_cotangent.astype(operands.state.dtype), cut.q.shape[3])

    def head(given: tuple, do: jax.Array, S: jax.Array, dS: jax.Array) -> tuple:
        def forth(S: jax.Array, at: tuple) -> tuple[jax.Array, tuple]:
            solved = chunks.solve(*at, S)
            return chunks.update(*at[:2], solved, S), (solved, S)

        def back(dS: jax.Array, at: tuple) -> tuple[jax.Array, chunks.Cotangents]:
            grads, dS = chunks.backward(*at, dS)
            return dS, grads

        _, (solved, before) = jax.lax.scan(forth, S, given)
        dS, grads = jax.lax.scan(back, dS, (*given[:2], solved, before, do), reverse=True)
        return grads, dS

    grads, dS = _over_heads(head, sequential, given, do, operands.state, state_cotangent)
    dq, dk, dv, dbeta, dg = (None if x is None else _joined(x, T) for x in grads)
    found = (config.scale * dq, dk, dv, dbeta, dS, *(() if dg is None else (dg,)))
    return tuple(x.astype(dtype) for x, dtype in zip(found, dtypes, strict=False))


# --- Chunks of all heads. ---------------------------------------------------------------------------------------------


def _cut(config: Config, operands: Operands, default: int) -> Chunk:
    """All chunks, with axes [B, H, N] in front, in the dtype of the state; the scale is in q."""
    q, k, v, beta, state, log_decay, segments = operands
    acc = state.dtype
    H = q.shape[2]
    C = config.chunk or default
    while C > 1 and q.shape[1] <= C // 2:
        C //= 2
    q, k, v = (x.astype(acc) for x in (q, k, v))
    arrays = [None if x is None else _chunked(x, C) for x in (config.scale * q, k, v, beta, log_decay)]
    of_segments: list = [None, None]
    if segments is not None:
        own = recurrence.pad_tokens(segments, C, last=True)
        own = jnp.broadcast_to(own.reshape(own.shape[0], 1, -1, C), (own.shape[0], H, own.shape[1] // C, C))
        of_segments = [own, jnp.pad(own[:, :, :-1, -1], ((0, 0), (0, 0), (1, 0)))]
    return Chunk(*arrays, *of_segments)


def _prepared(cut: Chunk, sequential: bool) -> tuple[Chunk, Prepared, jax.Array]:
    """All chunks, what is known of each before its state is, and inverses of the diagonal blocks of I + beta M."""
    lead = cut.q.shape[:3]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), cut)
    prepared = jax.lax.map(chunks.prepare, flat) if sequential else jax.vmap(chunks.prepare)(flat)
    small = chunks.invert_small(jax.lax.stop_gradient(flat.beta[..., None] * prepared.M))
    prepared, small = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), (prepared, small))
    return cut, prepared, small


def _chunked(x: jax.Array, C: int) -> jax.Array:
    """[B, T, H, ...] to [B, H, N, C, ...]."""
    x = recurrence.pad_tokens(x, C)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, C, *x.shape[2:]), 3, 1)


def _joined(x: jax.Array, T: int) -> jax.Array:
    """[B, H, N, C, ...] to [B, T, H, ...]."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def _over_heads(head: Callable, sequential: bool, *arrays: Any) -> Any:
    """`head(*arrays)` for all batch entries and heads."""
    if not sequential:
        return jax.vmap(jax.vmap(head))(*arrays)
    B, H = arrays[-1].shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(B * H, *x.shape[2:]), arrays)
    out = jax.lax.map(lambda at: head(*at), flat)
    return jax.tree.map(lambda x: x.reshape(B, H, *x.shape[1:]), out)
