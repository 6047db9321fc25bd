"""What is static about a call of decode attention, and how the cache of a row is cut into blocks and parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas._attention import accumulator as accumulator
from kernels_pallas._attention import precision as precision


@dataclass(frozen=True)
class Config:
    """The static part of a call; hashable, so that it can be a parameter of a primitive."""

    left: int | None
    soft_cap: float | None
    scale: float
    splits: int | None


class Operands(NamedTuple):
    """The arrays of a call, all with the batch first; G is B, or 1 where the batch shares; None for what is not there.

    Attributes:
      q: [B, T, Hq, D].
      k: [G, S, Hk, D], or in pages [G, P, page, Hk, D].
      v: likewise, Dv wide.
      length: int32 [B].
      table: int32 [B, N], in pages only.
      k_scale: like k without its last axis.
      v_scale: likewise.
      sinks: [G, Hq].
    """

    q: Any
    k: Any
    v: Any
    length: Any
    table: Any = None
    k_scale: Any = None
    v_scale: Any = None
    sinks: Any = None


def capacity(operands: Operands) -> int:
    """Tokens a row has room for."""
    if operands.table is None:
        return operands.k.shape[1]
    return operands.table.shape[1] * operands.k.shape[2]


def reach(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """What the queries of a row see between them: keys low <= j < stop, int32 [B] each; stop = 0 for none."""
    stop = jnp.clip(operands.length, 0, capacity(operands))
    if config.left is None:
        return jnp.zeros_like(stop), stop
    low = jnp.maximum(operands.length - operands.q.shape[1] - config.left, 0)
    # A row whose window lies past the capacity sees nothing.
    return jnp.where(low < stop, low, 0), jnp.where(low < stop, stop, 0)


def live(config: Config, operands: Operands, block: int) -> tuple[jax.Array, jax.Array]:
    """First block of keys that a row needs, and how many from there; int32 [B] each."""
    low, stop = reach(config, operands)
    first = low // block
    return first, -(-stop // block) - first


def visible(config: Config, k_positions: Any, q_positions: Any) -> Any:
    """Whether a query sees a key, by their positions, which broadcast; the end of the cache is not looked at."""
    seen = k_positions <= q_positions
    return seen if config.left is None else seen & (k_positions >= q_positions - config.left)


def merge(o: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """One result from those of the parts of a cache.

    With w_i = exp(lse_i - m), m the greatest lse or sink: o = sum w_i o_i / l, lse = m + log l, where
    l = sum w_i + exp(sink - m). A part that sees nothing has lse -inf and weighs nothing.

    Args:
      o: float [B, parts, H, T, Dv].
      lse: [B, parts, H, T].
      sinks: [B|1, H].
    """
    m = jnp.max(lse, axis=1)
    if sinks is not None:
        sinks = sinks.astype(lse.dtype)[:, :, None]
        m = jnp.maximum(m, sinks)
    safe = jnp.where(m == -jnp.inf, 0, m)
    w = jnp.exp(lse - safe[:, None])
    l = jnp.sum(w, axis=1)
    if sinks is not None:
        l = l + jnp.exp(sinks - safe)
    sees = l != 0
    l = jnp.where(sees, l, 1)
    o = jnp.sum(w[..., None] * o, axis=1) / l[..., None]
    return o, jnp.where(sees, safe + jnp.log(l), -jnp.inf)
