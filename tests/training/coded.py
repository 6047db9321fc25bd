"""What the tests of coded schemes share: straggler models, every pattern of one, and jobs run with real numbers."""

import itertools

import numpy as np

from jaxnum.training import gradient_coding_decode, gradient_coding_encode
from tests.tolerances import tolerance


def bursty(recent, burst, window, distinct):
    """Whether the last rounds [<= window, n], True for stragglers, obey the (B, W, λ) model."""
    rounds, workers = np.nonzero(recent[-window:])
    spans = [np.ptp(rounds[workers == i]) + 1 for i in set(workers.tolist())]
    return len(spans) <= distinct and max(spans, default=0) <= burst


def scattered(recent, burst, window, distinct):
    """Whether in any window + burst - 1 rounds at most λ workers straggle, each in at most B of them."""
    count = recent[-(window + burst - 1) :].sum(axis=0)
    return (count > 0).sum() <= distinct and count.max(initial=0) <= burst


def every_pattern(scheme, allowed, memory, rounds=6):
    """Jobs lost over all patterns of some rounds that a model allows, and every delivered set that came to be decoded.

    Patterns that lead to the same state and the same recent past are followed as one.
    """
    subsets = [np.array(s) for s in itertools.product([False, True], repeat=scheme.workers)]
    level = {b"": (scheme.init(rounds), np.zeros((0, scheme.workers), bool))}
    lost, decoded = 0, {}
    for t in range(rounds + scheme.delay):
        following = {}
        for state, past in level.values():
            for stragglers in subsets if t < rounds else subsets[:1]:
                recent = np.concatenate([past, stragglers[None]])[-memory:]
                if allowed(recent):
                    after, done = scheme.observe(state, ~stragglers)
                    lost = max(lost, after.lost)
                    decoded |= {delivered.tobytes(): delivered for _, delivered in done}
                    past_after = recent[1 - memory :] if memory > 1 else recent[:0]
                    following[after.delivered.tobytes() + past_after.tobytes()] = (after, past_after)
        level = following
    return lost, list(decoded.values())


def check_decoding(vector, encoding, delivered):
    """Weights that add up to 1 for every chunk, to the backward error of a least-squares solve, with 0 off the set."""
    assert not vector[~delivered].any()
    condition = np.linalg.norm(vector) * np.linalg.norm(encoding[delivered], 2)
    bound = tolerance("float64", len(encoding), condition=condition)
    np.testing.assert_allclose(vector @ encoding, 1, rtol=0, atol=bound)


def gradients_of_jobs(scheme, jobs, straggling, chunk_gradients):
    """Run the master: yields (job, sum of its chunks' gradients) as they are decoded.

    `straggling[t]` [n] bool; `chunk_gradients(job)` a tree of [chunks, ...]; what stragglers send is lost.
    """
    encoding = scheme.encoding()
    sent = {}
    state = scheme.init(jobs)
    for t in range(jobs + scheme.delay):
        arrived = ~straggling[t]
        for worker, job, piece in scheme.tasks(state):
            if job not in sent:
                gradients = chunk_gradients(job)
                empty = {k: np.full((len(encoding), *g.shape[1:]), np.nan) for k, g in gradients.items()}
                sent[job] = (gradients, empty)
            if arrived[worker]:
                gradients, received = sent[job]
                own = np.flatnonzero(encoding[piece])
                few = {k: g[own] for k, g in gradients.items()}
                result = gradient_coding_encode(encoding[piece][None, own], few)
                for name, row in result.items():
                    received[name][piece] = row[0]
        state, done = scheme.observe(state, arrived)
        for job, delivered in done:
            yield job, gradient_coding_decode(scheme.vector(delivered), sent.pop(job)[1])
    assert state.lost == 0
