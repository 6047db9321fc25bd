"""M-SGC: loads of the paper, every pattern of two straggler models, the diagonals by hand, refusals."""

from functools import partial

import numpy as np
import pytest

from jaxnum.training import m_sgc
from tests.training import coded


@pytest.mark.parametrize(
    ("arguments", "load", "delay"),
    [
        ((4, 1, 2, 2), 0.375, 1),
        ((20, 2, 3, 4), 1 / 12, 3),
        ((256, 1, 2, 27), 0.00754310344827586, 1),
        ((5, 1, 3, 5), 0.3, 2),
    ],
)
def test_loads_and_delays(arguments, load, delay):
    scheme = m_sgc(*arguments)
    np.testing.assert_allclose((scheme.load, scheme.delay), (load, delay), rtol=1e-14)


@pytest.mark.parametrize("model", [(1, 2, 2), (1, 3, 2), (2, 3, 2), (1, 2, 4)])
@pytest.mark.parametrize("allowed", [coded.bursty, coded.scattered])
def test_every_pattern_of_the_models_is_decoded_in_time(allowed, model):
    scheme = m_sgc(4, *model, kind="roots")
    burst, window, distinct = model
    memory = window if allowed is coded.bursty else window + burst - 1
    rule = partial(allowed, burst=burst, window=window, distinct=distinct)
    lost, decoded = coded.every_pattern(scheme, rule, memory)
    assert lost == 0
    for delivered in decoded:
        coded.check_decoding(scheme.vector(delivered), scheme.encoding(), delivered)


def test_patterns_outside_can_lose_a_job():
    scheme = m_sgc(4, 1, 2, 2)
    for burst, distinct in ((2, 2), (1, 3)):
        rule = partial(coded.bursty, burst=burst, window=2, distinct=distinct)
        assert coded.every_pattern(scheme, rule, 2, rounds=3)[0] > 0


def test_the_load_is_what_tasks_go_through():
    scheme = m_sgc(4, 2, 4, 1)
    state = scheme.init(20)
    for _ in range(scheme.delay):
        state, _ = scheme.observe(state, np.ones(4, bool))
    tasks, encoding = scheme.tasks(state), scheme.encoding()
    for worker in range(4):
        own = tasks[tasks[:, 0] == worker]
        assert own[:, 1].tolist() == list(range(scheme.delay + 1))
        work = sum(scheme.units[encoding[piece] != 0].sum() for _, _, piece in own)
        np.testing.assert_allclose(work / scheme.units.sum(), scheme.load, rtol=1e-14)


def test_a_diagonal_by_hand():
    scheme = m_sgc(2, 2, 3, 1)  # worker i owns chunks 2i and 2i + 1; groups are pieces 4, 5 and 6, 7
    state = scheme.init(1)
    seen = []
    for arrived in ([True, False], [True, True], [True, True], [True, True]):
        seen.append(scheme.tasks(state)[:, [0, 2]].tolist())
        state, done = scheme.observe(state, arrived)
    # Worker 1 owes its first chunk, and makes up for it in slot 2.
    assert seen == [[[0, 0], [1, 2]], [[0, 1], [1, 3]], [[0, 4], [1, 2]], [[0, 6], [1, 7]]]
    ((job, delivered),) = done
    assert (job, np.flatnonzero(~delivered).tolist()) == (0, [5])
    np.testing.assert_allclose(scheme.vector(delivered) @ scheme.encoding(), 1, rtol=1e-14)


@pytest.mark.parametrize("kind", ["cyclic", "fractional"])
def test_without_groups_workers_rest(kind):
    scheme = m_sgc(3, 1, 3, 3, kind=kind)
    assert scheme.units.tolist() == [1] * 6
    state, _ = scheme.observe(scheme.init(1), np.array([True, True, False]))
    state, _ = scheme.observe(state, np.ones(3, bool))
    assert scheme.tasks(state).tolist() == [[2, 0, 4]]
    _, ((_, delivered),) = scheme.observe(state, np.ones(3, bool))
    np.testing.assert_array_equal(scheme.vector(delivered), np.ones(6))


def test_bad_arguments_are_named():
    wrong = {"workers": (0, 1, 2, 0), "burst": (4, 2, 2, 2), "window": (4, 1, 1, 2), "distinct": (4, 1, 2, 5)}
    for name, arguments in wrong.items():
        with pytest.raises(ValueError, match=f"^m_sgc: `{name}` must be "):
            m_sgc(*arguments)
    with pytest.raises(ValueError, match="^m_sgc: `distinct` must lead to groups of workers that divide 4"):
        m_sgc(4, 1, 2, 2, kind="fractional")
    scheme = m_sgc(4, 1, 2, 2)
    with pytest.raises(ValueError, match="^gradient_coding_vector: `alive` must have at least 2 of 4"):
        scheme.vector(np.arange(8) < 5)
    with pytest.raises(ValueError, match="^m_sgc: `delivered` must have all large chunks; got 1 without"):
        scheme.vector(np.arange(8) > 0)
    with pytest.raises(ValueError, match="^m_sgc: `arrived` must have shape"):
        scheme.observe(scheme.init(1), np.ones(3, bool))
