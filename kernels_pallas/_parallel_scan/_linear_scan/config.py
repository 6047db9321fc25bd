"""What is static about a call of the linear scan, and the arrays that every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Config:
    """The static part of a call; hashable, so that it can be a parameter of a primitive."""

    reverse: bool


class Operands(NamedTuple):
    """The arrays of a call, all with the batch first. Padding has a = 1 and b = 0; a = 0 restarts the state.

    Attributes:
      a: [B, T, D].
      b: [B, T, D].
      initial: [B, D], in the accumulator's dtype.
    """

    a: Any
    b: Any
    initial: Any
