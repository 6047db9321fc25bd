"""How long a coded scheme takes with slow workers: a simulation of its master."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnum.curvature import arguments
from jaxnum.training.coding import CodingScheme, generator, integers
from kernels_pallas import checks


class StragglerRun(NamedTuple):
    """What `straggler_simulation` saw."""

    durations: np.ndarray  # [rounds] float64, in the unit of the times
    arrived: np.ndarray  # [rounds, n] bool, whose results came before the round ended
    waited: np.ndarray  # [rounds] bool, rounds in which the master had to wait for stragglers
    decoded: np.ndarray  # [jobs] int, round in which each job became decodable


def straggler_simulation(scheme: CodingScheme, times: Any, jobs: int, *, patience: float = 1.0) -> StragglerRun:
    """Run a scheme's master on given finishing times.

    A straggler of a round is a worker that takes longer than (1 + patience) times the fastest; the master knows at that
    moment, and ends the round there, or at once when everybody has answered. Where a job would then be lost, it waits
    on, worker by worker, until none is: a pattern that the scheme promises never makes it wait. The run ends with the
    round in which the last job is decodable.

    Args:
      scheme: of `gradient_coding_scheme`, `sr_sgc` or `m_sgc`.
      times: [rounds, n] > 0, when each worker has finished its tasks of a round, counted from the round's start; inf
        for one that never does. At least `jobs + scheme.delay` rounds. They depend on `scheme.load`.
      jobs: >= 1.
      patience: > 0, the paper's μ.

    Returns:
      A `StragglerRun`; total time is the sum of its durations. A round that waits for a worker that never answers takes
      inf.

    Raises:
      ValueError: too few rounds, times that are not positive, NaN included, or a number out of range.
      ShapeError: times of another number of workers.

    Cost: on the host, about rounds times delay plans of a round.

    Source: as `sr_sgc`, section 4. The paper's master waits where the (B, W, λ) model would be left, ours where a job
    would be lost, which no pattern of the model leads to.

    Example:
      >>> import numpy as np
      >>> from jaxnum.training import gradient_coding_scheme
      >>> times = np.ones((2, 4))
      >>> times[0, 0] = times[1, 1:3] = 9.0
      >>> run = straggler_simulation(gradient_coding_scheme(4, 1), times, jobs=2)
      >>> print(run.durations.tolist(), run.waited.tolist())
      [2.0, 9.0] [False, True]
    """
    name = "straggler_simulation"
    times = np.asarray(times, np.float64)
    (jobs,) = integers(name, dict(jobs=(jobs, 1, 2**31)))
    checks.shape(name, times=(times, f"_ {scheme.workers}"))
    rounds = jobs + scheme.delay
    wanted = f"have {rounds} rounds for {jobs} jobs and a delay of {scheme.delay}"
    checks.value(name, "times", len(times) >= rounds, wanted, len(times))
    checks.value(name, "times", bool((times > 0).all()), "be greater than 0", times.min())
    checks.value(name, "patience", patience > 0, "be greater than 0", patience)
    state = scheme.init(jobs)
    decoded = np.full(jobs, -1)
    durations, arrivals, waits = [], [], []
    while (decoded < 0).any():
        row = times[state.round]
        ends = min((1 + patience) * row.min(), row.max())
        needed = next(end for end in (ends, *np.unique(row[row > ends])) if scheme.tolerates(state, row <= end))
        durations.append(needed)
        arrivals.append(row <= needed)
        waits.append(needed > ends)
        at = state.round
        state, done = scheme.observe(state, row <= needed)
        decoded[[job for job, _ in done]] = at
    return StragglerRun(np.asarray(durations), np.stack(arrivals), np.asarray(waits), decoded)


def straggler_simulation_times(
    key: jax.Array,
    rounds: int,
    workers: int,
    load: float,
    *,
    enter: float = 0.02,
    leave: float = 0.5,
    base: float = 1.0,
    slope: float = 20.0,
    slowdown: float = 5.0,
) -> np.ndarray:
    """Finishing times of workers that are slow in bursts, a Gilbert-Elliott chain each.

    A worker takes base + slope * load, times `slowdown` where it straggles. It begins to straggle with probability
    `enter` and recovers with probability `leave` before each round, and starts from the chain's equilibrium. One key
    gives one pattern, whatever the load, and more rounds go on where fewer end.

    Args:
      key: typed random key.
      rounds: >= 1.
      workers: n >= 1.
      load: `scheme.load`, >= 0.
      enter: in [0, 1].
      leave: in [0, 1], not 0 together with `enter`.
      base: >= 0, time of a worker without data.
      slope: >= 0, time for the whole data.
      slowdown: >= 1.

    Returns:
      float64 [rounds, n], for `straggler_simulation`.

    Raises:
      ValueError: a number out of range.
      DtypeError: a `key` that is not typed.

    Cost: one draw for each round and worker.

    Source: as `sr_sgc`, section 2; E. N. Gilbert, "Capacity of a burst-noise channel", 1960.

    Example:
      >>> import jax
      >>> times = straggler_simulation_times(jax.random.key(0), 1000, 64, 1 / 64)
      >>> print(times.min(), times.max(), bool(abs((times > 2).mean() - 0.02 / 0.52) < 0.005))
      1.3125 6.5625 True
    """
    name = "straggler_simulation_times"
    arguments.typed_key(name, key)
    checks.value(name, "key", not checks.traced(key), "be concrete", "a traced key", "Simulate outside jit.")
    rounds, n = integers(name, dict(rounds=(rounds, 1, 2**31), workers=(workers, 1, 2**16)))
    for argument, got in dict(enter=enter, leave=leave).items():
        checks.value(name, argument, 0 <= got <= 1, "be in [0, 1]", got)
    checks.value(name, "leave", enter + leave > 0, "be greater than 0 where enter is 0", leave)
    for argument, got, least in (("load", load, 0), ("base", base, 0), ("slope", slope, 0), ("slowdown", slowdown, 1)):
        checks.value(name, argument, got >= least, f"be at least {least}", got)
    draws = generator(key).random((rounds, n))
    slow = np.empty((rounds, n), bool)
    slow[0] = draws[0] < enter / (enter + leave)
    for t in range(1, rounds):
        slow[t] = np.where(slow[t - 1], draws[t] >= leave, draws[t] < enter)
    return (base + slope * load) * np.where(slow, slowdown, 1.0)
