"""SR-SGC: loads of the paper, every pattern of the straggler model, repetitions by hand, refusals."""

from functools import partial

import numpy as np
import pytest

from jaxnum.training import sr_sgc
from tests.training import coded


@pytest.mark.parametrize(
    ("arguments", "load", "delay"),
    [((4, 1, 2, 2), 0.5, 1), ((20, 2, 3, 4), 0.15, 2), ((256, 1, 2, 27), 0.05859375, 1)],
)
def test_loads_and_delays(arguments, load, delay):
    scheme = sr_sgc(*arguments)
    np.testing.assert_allclose((scheme.load, scheme.delay), (load, delay), rtol=1e-14)


@pytest.mark.parametrize("model", [(1, 2, 2), (1, 3, 2), (2, 3, 2), (1, 2, 3)])
@pytest.mark.parametrize("kind", ["cyclic", "fractional"])
def test_every_pattern_of_the_model_is_decoded_in_time(model, kind):
    burst, window, distinct = model
    if kind == "fractional" and distinct == 3:
        kind = "roots"  # s = 2, and groups of 3 do not divide 4
    scheme = sr_sgc(4, *model, kind=kind)
    rule = partial(coded.bursty, burst=burst, window=window, distinct=distinct)
    lost, decoded = coded.every_pattern(scheme, rule, window)
    assert lost == 0
    for delivered in decoded:
        coded.check_decoding(scheme.vector(delivered), scheme.encoding(), delivered)


def test_patterns_outside_can_lose_a_job():
    scheme = sr_sgc(4, 1, 2, 2)
    lost, _ = coded.every_pattern(scheme, partial(coded.bursty, burst=2, window=2, distinct=2), 2, rounds=3)
    assert lost > 0


def test_no_more_is_repeated_than_is_needed():
    scheme = sr_sgc(6, 2, 3, 4)  # s = 2, and what round 0 lacks is repeated in round 2
    state, done = scheme.observe(scheme.init(9), np.array([True, False, False, False, False, True]))
    assert done == ()
    state, done = scheme.observe(state, np.ones(6, bool))
    assert [job for job, _ in done] == [1]
    assert scheme.tasks(state).tolist() == [[1, 0, 1], [2, 0, 2], [0, 2, 0], [3, 2, 3], [4, 2, 4], [5, 2, 5]]
    state, done = scheme.observe(state, np.array([True, True, True, True, True, False]))
    assert [(job, delivered.tolist()) for job, delivered in done] == [(0, [True, True, True, False, False, True])]
    # Three results of job 2 are missing, of which one is worth repeating.
    state, _ = scheme.observe(state, np.ones(6, bool))
    assert scheme.tasks(state)[:2].tolist() == [[1, 2, 1], [0, 4, 0]]


def test_bad_arguments_are_named():
    wrong = {"workers": (1, 1, 2, 2), "burst": (4, 0, 2, 2), "window": (4, 2, 4, 2), "distinct": (4, 1, 2, 5)}
    for name, arguments in wrong.items():
        with pytest.raises(ValueError, match=f"^sr_sgc: `{name}` must be "):
            sr_sgc(*arguments)
    with pytest.raises(ValueError, match="^sr_sgc: `distinct` must lead to groups of workers that divide 5"):
        sr_sgc(5, 1, 2, 2, kind="fractional")
    with pytest.raises(ValueError, match="^sr_sgc: `jobs` must be"):
        sr_sgc(4, 1, 2, 2).init(0)
    with pytest.raises(ValueError, match="^gradient_coding_vector: `alive` must have at least 3 of 4"):
        sr_sgc(4, 1, 2, 2).vector(np.array([True, True, False, False]))
