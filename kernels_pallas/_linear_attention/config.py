"""What is static about a call of linear attention, and the arrays of a call in one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Config:
    """The static part of a call; hashable, so that it can be a parameter of a primitive.

    Attributes:
      scale: of q . k; implementations apply it in the dtype of sums.
      chunk: tokens a chunk, a power of two; None for the implementation's own.
    """

    scale: float
    chunk: int | None = None


class Operands(NamedTuple):
    """The arrays of a call, all with the batch first; None for what was not given.

    Padding tokens already hold zeros in q, k, v and log_decay.

    Attributes:
      q: [B, T, H, K].
      k: [B, T, H, K].
      v: [B, T, H, V].
      state: [B, H, K, V] in float32, or float64 for float64 inputs: the state before the first token.
      log_decay: None; [B, H], constant over the tokens; [B, T, H], a token's; or [B, T, H, K], of a token's key
        channels. In the dtype of the state, between -1000 and 0.
      segments: int32 [B, T], not decreasing, starting at 0, whose segment continues `state`; others start from 0.
    """

    q: Any
    k: Any
    v: Any
    state: Any
    log_decay: Any = None
    segments: Any = None


def gate(operands: Operands) -> str:
    """What a log decay is given for: "none", "head", "token" or "channel"."""
    if operands.log_decay is None:
        return "none"
    return {2: "head", 3: "token", 4: "channel"}[operands.log_decay.ndim]
