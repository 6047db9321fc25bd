"""Selective-repetition gradient coding: what is missing of a job is repeated some rounds later."""

from __future__ import annotations

import jax
import numpy as np

from jaxnum.training import codes
from jaxnum.training._gradient_coding import gradient_coding_vector, lazy_code
from jaxnum.training.coding import CodingScheme, integers
from kernels_pallas import checks


def sr_sgc(
    workers: int,
    burst: int,
    window: int,
    distinct: int,
    *,
    kind: str = "cyclic",
    key: jax.Array | None = None,
) -> CodingScheme:
    """A scheme for bursts of stragglers that repeats what a burst has swallowed.

    The promise is for the (B, W, λ) model: in every W rounds in a row at most λ workers straggle, each within at most B
    rounds in a row. With s = ceil(B λ / (W - 1 + B)), in round t

        worker i computes its result of a gradient code for n, s and job t,

    unless job t - B has n - v results with v > s: then v - s of the workers whose results it lacks compute those
    instead. Load (s + 1) / n, delay B; gradient coding that survives λ stragglers has load (λ + 1) / n.

    Args:
      workers: n >= 2.
      burst: B >= 1.
      window: W = x B + 1 for an integer x >= 1.
      distinct: λ in [0, n].
      kind: of the code, see `gradient_coding`.
      key: of the code, as there.

    Returns:
      A `CodingScheme` with n chunks and n pieces.

    Raises:
      ValueError: a number out of range; `vector` refuses as `gradient_coding_vector` does.

    Cost: a round is planned in O(n B) on the host.

    Source: M. N. Krishnan, M. R. Ebrahimi, A. Khisti, "Sequential Gradient Coding For Straggler Mitigation", 2023,
    arXiv 2211.13802, section 3.2.

    Example:
      >>> scheme = sr_sgc(4, burst=1, window=2, distinct=2)
      >>> state, done = scheme.observe(scheme.init(jobs=3), [False, False, True, True])
      >>> print(scheme.load, done, scheme.tasks(state).tolist())
      0.5 () [[0, 0, 0], [1, 1, 1], [2, 1, 2], [3, 1, 3]]
    """
    n, B, W = integers("sr_sgc", dict(workers=(workers, 2, 2**16), burst=(burst, 1, 2**16), window=(window, 2, 2**16)))
    (most,) = integers("sr_sgc", dict(distinct=(distinct, 0, n)))
    checks.value("sr_sgc", "window", (W - 1) % B == 0, f"be a multiple of burst={B}, plus 1", W)
    s = -(-B * most // (W - 1 + B))
    code = lazy_code("sr_sgc", "distinct", n, s, kind, key)
    own = np.arange(n)

    def assign(delivered: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        oldest = delivered[0]
        lacking = ~oldest & (not codes.decodable(s, kind, oldest))
        repeats = lacking & (np.cumsum(lacking) <= lacking.sum() - s)
        return own, np.where(repeats, 0, B), own

    return CodingScheme(
        name="sr_sgc",
        workers=n,
        load=(s + 1) / n,
        delay=B,
        units=np.ones(n, np.int64),
        encoding=lambda: code().matrix,
        vector=lambda delivered: gradient_coding_vector(code(), delivered),
        assign=assign,
        decodable=lambda delivered: codes.decodable(s, kind, delivered),
    )
