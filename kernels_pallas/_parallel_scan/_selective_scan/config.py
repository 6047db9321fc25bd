"""What is static about a call of the selective scan, and the arrays that every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Tokens between two states that the gradient keeps: it keeps T / chunk of them and recomputes a chunk at a time. Fewer
# where a state is large, so that its chunk stays in fast memory.
_CHUNK, LEAST_CHUNK = 64, 8
_CHUNK_STATES = 1024


def default_chunk(states: int) -> int:
    """Tokens a chunk for states of N entries a channel."""
    chunk = _CHUNK
    while chunk > LEAST_CHUNK and chunk * states > _CHUNK_STATES:
        chunk //= 2
    return chunk


@dataclass(frozen=True)
class Config:
    """The static part of a call; hashable, so that it can be a parameter of a primitive.

    Attributes:
      reverse: whether time runs from the end.
      symmetric: whether a decay is 2 exp(dt A) - 1.
      chunk: tokens between two states that are kept.
      keeps: whether the forward pass gives these states too.
    """

    reverse: bool
    symmetric: bool
    chunk: int
    keeps: bool = False


class Operands(NamedTuple):
    """The arrays of a call, all with the batch first; channels last. Padding has dt = u = B = C = 0, and so a = 1.

    Attributes:
      u: [B, T, D].
      dt: [B, T, D], like all that follows but B and C in the accumulator's dtype.
      A: [B|1, N, D].
      B: [B, T, N].
      C: [B, T, N].
      initial: [B, N, D].
      restart: bool [B, T], where the state is zero before a token; None for nowhere.
    """

    u: Any
    dt: Any
    A: Any
    B: Any
    C: Any
    initial: Any
    restart: Any = None


def decay(config: Config, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The decay a of exponent dt A, and its derivative."""
    e = jnp.exp(exponent)
    return (2 * e - 1, 2 * e) if config.symmetric else (e, e)
