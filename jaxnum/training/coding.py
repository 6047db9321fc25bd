"""What coded schemes of a master and its workers share: who runs what in which round, and what is decodable when.

Host code on NumPy: nothing here is traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from kernels_pallas import checks


class CodingState(NamedTuple):
    """Where a `CodingScheme` stands before a round."""

    round: int  # the round to come, from 0
    jobs: int  # jobs of the whole run
    delivered: np.ndarray  # [delay + 1, pieces] bool, jobs round - delay .. round; all True where there is no such job
    finished: np.ndarray  # [delay + 1] bool, jobs that were decodable before
    lost: int  # jobs whose time ran out


@dataclass(frozen=True)
class CodingScheme:
    """A coded way to compute a sequence of gradients, one job a round, in spite of slow workers.

    The data of a job are cut into chunks; the gradient wanted is the sum over the chunks. A piece is a combination of
    the chunks' gradients, a row of the encoding, and is what a worker computes and sends. Job t begins in round t and
    is decodable by the end of round t + delay. A master repeats: `tasks`, wait, `observe`; a result that has not come
    when the round ends never comes.

    Attributes:
      name: what to call it.
      workers: n.
      load: share of a job's data that each worker goes through in a round.
      delay: T, rounds that a job may take beyond its own.
      units: [chunks] int, relative size of each chunk.
      encoding: () -> [pieces, chunks] float64, the weights of chunks in pieces.
      vector: [pieces] bool of what was delivered -> [pieces] float64 of the weights that decode it.
      assign: delivered [T + 1, pieces], as in the state, -> worker, row and piece of every task.
      decodable: delivered -> [T + 1] bool.

    Example:
      >>> from jaxnum.training import gradient_coding_decode, gradient_coding_encode, sr_sgc
      >>> scheme = sr_sgc(4, burst=1, window=2, distinct=2, kind="fractional")
      >>> encoding, state, sent = scheme.encoding(), scheme.init(jobs=2), {}
      >>> for slow in ([0, 1], [], []):
      ...     for worker, job, piece in scheme.tasks(state):
      ...         gradients = (job + 1) * np.array([1.0, 2.0, 3.0, 4.0], np.float32)  # one for each chunk
      ...         if worker not in slow:
      ...             result = gradient_coding_encode(encoding[piece : piece + 1], gradients)
      ...             sent.setdefault(int(job), np.full(4, np.nan, np.float32))[piece] = result[0]
      ...     state, done = scheme.observe(state, ~np.isin(np.arange(4), slow))
      ...     for job, delivered in done:
      ...         print(job, float(gradient_coding_decode(scheme.vector(delivered), sent[job])))
      0 10.0
      1 20.0
    """

    name: str
    workers: int
    load: float
    delay: int
    units: np.ndarray
    encoding: Callable[[], np.ndarray]
    vector: Callable[[np.ndarray], np.ndarray]
    assign: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
    decodable: Callable[[np.ndarray], np.ndarray]

    def init(self, jobs: int) -> CodingState:
        """The state before round 0 of a run of so many jobs."""
        checks.value(self.name, "jobs", whole(jobs) and jobs >= 1, "be an integer of at least 1", jobs)
        delivered = np.ones((self.delay + 1, self.units.size), bool)
        delivered[-1] = False
        finished = np.arange(self.delay + 1) < self.delay
        return CodingState(0, operator.index(jobs), delivered, finished, 0)

    def tasks(self, state: CodingState) -> np.ndarray:
        """What is run in this round: int [tasks, 3] of worker, job and piece, oldest job first."""
        worker, row, piece = self.assign(state.delivered)
        job = state.round - self.delay + row
        order = np.lexsort((worker, job))
        tasks = np.stack([worker, job, piece], axis=1)[order]
        return tasks[(tasks[:, 1] >= 0) & (tasks[:, 1] < state.jobs)]

    def observe(self, state: CodingState, arrived: Any) -> tuple[CodingState, tuple[tuple[int, np.ndarray], ...]]:
        """The state after a round in which the results of some workers came, [n] bool, and the jobs now decodable.

        Each of these is (job, delivered); `vector(delivered)` decodes it.
        """
        return self._following(state, boolean(self.name, "arrived", arrived, self.workers))

    def tolerates(self, state: CodingState, arrived: Any) -> bool:
        """Whether the round may end with these results: every job is in time if nobody straggles hereafter.

        The patterns that a scheme promises pass this test in every round, and more do; a master that waits until it
        passes loses no job.
        """
        ahead, _ = self.observe(state, arrived)
        everybody = np.ones(self.workers, bool)
        for _ in range(self.delay):
            ahead, _ = self._following(ahead, everybody)
        return ahead.lost == state.lost

    def _following(
        self, state: CodingState, arrived: np.ndarray
    ) -> tuple[CodingState, tuple[tuple[int, np.ndarray], ...]]:
        worker, row, piece = self.assign(state.delivered)
        came = arrived[worker]
        delivered = state.delivered.copy()
        delivered[row[came], piece[came]] = True
        decodable = self.decodable(delivered)
        new = np.flatnonzero(decodable & ~state.finished)
        done = tuple((int(state.round - self.delay + r), delivered[r]) for r in new)
        absent = state.round + 1 >= state.jobs
        following = np.concatenate([delivered[1:], np.full((1, self.units.size), absent)])
        finished = np.append(decodable[1:], absent)
        lost = state.lost + int(not decodable[0])
        return CodingState(state.round + 1, state.jobs, following, finished, lost), done


def whole(got: Any) -> bool:
    """Whether a number is a Python integer, or stands for one."""
    return hasattr(got, "__index__") and not isinstance(got, bool) and not checks.traced(got)


def integers(function: str, numbers: Mapping[str, tuple[Any, int, int]]) -> list[int]:
    """Check integers, given as (number, least, most) by name, and return them.

    Raises:
      ValueError: naming the first that is out of its range.
    """
    for name, (got, least, most) in numbers.items():
        wanted = f"be an integer in [{least}, {most}]"
        checks.value(function, name, whole(got) and least <= operator.index(got) <= most, wanted, got)
    return [operator.index(got) for got, _, _ in numbers.values()]


def boolean(function: str, argument: str, got: Any, size: int) -> np.ndarray:
    """Check a vector of bools, concrete, and return it as NumPy's.

    Raises:
      ShapeError, DtypeError: something else.
      ValueError: a traced array.
    """
    remedy = "Decoding is planned on the host: call this outside jit and pass its result in."
    checks.value(function, argument, not checks.traced(got), "be concrete", "a traced array", remedy)
    given = np.asarray(got)
    checks.dtype(function, "bool", remedy="", **{argument: given})
    checks.shape(function, remedy="", **{argument: (given, str(size))})
    return given


def generator(key: jax.Array) -> np.random.Generator:
    """NumPy's generator for a typed key: float64 whatever the precision of jax; a long draw begins as a short one."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
