"""What is static about a call of softmin, and the arrays that every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

KINDS = ("sqeuclidean", "euclidean", "cityblock")


@dataclass(frozen=True)
class Config:
    """The static part of a call; hashable, so that it can be a parameter of a primitive."""

    kind: str


class Operands(NamedTuple):
    """The arrays of a call, all with the batch first. Points y without mass hold zeros.

    Attributes:
      x: [B, n, d].
      y: [B, m, d] of the same dtype.
      v: [B, m], in the dtype of sums; -inf for a point without mass.
      epsilon: [B], in the dtype of sums.
    """

    x: Any
    y: Any
    v: Any
    epsilon: Any
