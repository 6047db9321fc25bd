"""Multiplexed gradient coding: most chunks are sent uncoded and tried again, and a code covers the rest."""

from __future__ import annotations

import jax
import numpy as np

from jaxnum.training import codes
from jaxnum.training._gradient_coding import gradient_coding_vector, lazy_code
from jaxnum.training.coding import CodingScheme, boolean, integers
from kernels_pallas import checks


def m_sgc(
    workers: int,
    burst: int,
    window: int,
    distinct: int,
    *,
    kind: str = "cyclic",
    key: jax.Array | None = None,
) -> CodingScheme:
    """A scheme for bursts of stragglers that needs little more than its share of the data from each worker.

    The promise is for the (B, W, λ) model of `sr_sgc`, and as well for at most λ stragglers in every W - 1 + B rounds
    in a row, each in any B of them. The data of a job are n (W - 1) large chunks, W - 1 for each worker, which no other
    worker has, and B n small ones, in B groups with a gradient code for n workers and λ stragglers each; large chunks
    are λ + 1 times as large, so that all pieces cost the same. Job t has slot m in round t + m, m = 0..W - 2 + B:

        slots 0..W - 2        each worker computes its chunk m,
        slots W - 1..W - 2 + B  a worker that owes a chunk computes it; the others send their piece of group m - W + 1.

    Load (λ + 1) (W - 1 + B) / (n (B + (W - 1) (λ + 1))), close to 1 / n for long windows, where uncoded work has 1 / n;
    delay W - 2 + B. With λ = n there are no groups, and the load is (W - 1 + B) / (n (W - 1)).

    Args:
      workers: n >= 1.
      burst: B in [1, W - 1].
      window: W >= 2.
      distinct: λ in [0, n].
      kind: of the code, see `gradient_coding`.
      key: of the code, as there.

    Returns:
      A `CodingScheme`: pieces and chunks are numbered alike, worker i's large ones i (W - 1).., then group by group.

    Raises:
      ValueError: a number out of range; `vector` refuses what is not decodable.

    Cost: a round is planned in O(n (W + B)^2) on the host. The encoding has n (W - 1 + B) rows and columns.

    Source: as `sr_sgc`, section 3.3.

    Example:
      >>> scheme = m_sgc(4, burst=1, window=2, distinct=2)
      >>> state, _ = scheme.observe(scheme.init(jobs=3), [False, True, True, True])
      >>> print(scheme.load, scheme.delay, scheme.units.tolist())
      0.375 1 [3, 3, 3, 3, 1, 1, 1, 1]
      >>> scheme.tasks(state)[:4].tolist()  # worker, job, piece: worker 0 owes its chunk 0
      [[0, 0, 0], [1, 0, 5], [2, 0, 6], [3, 0, 7]]
    """
    n, W = integers("m_sgc", dict(workers=(workers, 1, 2**16), window=(window, 2, 2**16)))
    B, most = integers("m_sgc", dict(burst=(burst, 1, W - 1), distinct=(distinct, 0, n)))
    groups, s = (B, most) if most < n else (0, 0)
    code = lazy_code("m_sgc", "distinct", n, s, kind, key)
    large = n * (W - 1)
    own = np.arange(n)
    size = np.repeat([s + 1, 1], [large, groups * n])

    # The job in its slot m is in row W - 2 + B - m: rows from B on have first attempts, those before second ones.
    first = np.arange(W - 1)[:, None]
    first_pieces = own * (W - 1) + first
    coded_pieces = large + (B - 1 - np.arange(B))[:, None] * n + own
    rows = np.repeat(np.concatenate([np.arange(B), W - 2 + B - first[:, 0]]), n)
    everybody = np.tile(own, B + W - 1)

    def assign(delivered: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        owes = ~delivered[:B, :large].reshape(B, n, W - 1)
        late = owes.any(axis=2)
        second = np.where(late, own * (W - 1) + owes.argmax(axis=2), coded_pieces)
        busy = np.append(late.ravel() | (groups > 0), np.ones(large, bool))
        pieces = np.append(second.ravel(), first_pieces.ravel())
        return everybody[busy], rows[busy], pieces[busy]

    def decodable(delivered: np.ndarray) -> np.ndarray:
        coded = delivered[:, large:].reshape(len(delivered), groups, n)
        return np.logical_and(delivered[:, :large].all(axis=1), codes.decodable(s, kind, coded).all(axis=1))

    def encoding() -> np.ndarray:
        matrix = np.eye(n * (W - 1 + groups))
        for start in range(large, len(matrix), n):
            matrix[start : start + n, start : start + n] = code().matrix
        return matrix

    def vector(delivered: np.ndarray) -> np.ndarray:
        delivered = boolean("m_sgc", "delivered", delivered, len(size))
        missing = int((~delivered[:large]).sum())
        checks.value(
            "m_sgc", "delivered", missing == 0, "have all large chunks", f"{missing} without", "Wait for them."
        )
        parts = [gradient_coding_vector(code(), part) for part in delivered[large:].reshape(groups, n)]
        return np.concatenate([np.ones(large), *parts])

    return CodingScheme(
        name="m_sgc",
        workers=n,
        load=float((W - 1 + B) * size[0] / size.sum()),
        delay=W - 2 + B,
        units=size,
        encoding=encoding,
        vector=vector,
        assign=assign,
        decodable=decodable,
    )
