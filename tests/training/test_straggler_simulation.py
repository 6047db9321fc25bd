"""The simulated master by hand and on random times; real gradients under stragglers train as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import (
    gradient_coding_scheme,
    m_sgc,
    sr_sgc,
    straggler_simulation,
    straggler_simulation_times,
)
from kernels_pallas.checks import DtypeError, ShapeError
from tests.training import coded

SCHEMES = {
    "uncoded": lambda: gradient_coding_scheme(6, 0),
    "gradient_coding": lambda: gradient_coding_scheme(6, 2),
    "sr_sgc": lambda: sr_sgc(6, 2, 3, 4, kind="fractional"),
    "m_sgc": lambda: m_sgc(6, 2, 3, 2, kind="roots"),
}


def test_a_run_by_hand():
    times = np.ones((5, 4))
    times[0, :2] = 3.0, 4.0  # one straggler too many: the master waits for the quicker
    times[1, 3] = 9.0
    times[2] = 1.0, 1.2, 1.4, 1.5
    run = straggler_simulation(gradient_coding_scheme(4, 1), times, jobs=3, patience=0.5)
    assert run.durations.tolist() == [3.0, 1.5, 1.5]
    assert run.waited.tolist() == [True, False, False]
    assert run.arrived.sum(axis=1).tolist() == [3, 3, 4]
    assert run.decoded.tolist() == [0, 1, 2]
    # What round 0 lacks comes back in round 1, and a round without work left is not run.
    run = straggler_simulation(sr_sgc(4, 1, 2, 2), times, jobs=3, patience=0.5)
    assert run.durations.tolist() == [1.5, 1.5, 1.5]
    assert (run.waited.any(), run.decoded.tolist()) == (False, [1, 2, 2])


@pytest.mark.parametrize("name", SCHEMES)
def test_no_job_is_lost_whatever_happens(name):
    scheme, jobs = SCHEMES[name](), 40
    times = straggler_simulation_times(jax.random.key(1), jobs + scheme.delay, 6, scheme.load, enter=0.3)
    run = straggler_simulation(scheme, times, jobs)
    late = run.decoded - np.arange(jobs)
    assert late.min() >= 0
    assert late.max() <= scheme.delay
    assert run.waited.any()
    limit = np.minimum(2 * times.min(axis=1), times.max(axis=1))[: len(run.waited)]
    assert ((run.durations > limit) == run.waited).all()


def test_a_scheme_waits_for_no_pattern_of_its_model():
    # One pair of workers is slow for two rounds out of every three.
    times = np.ones((40, 6))
    times[1::4, :2] = times[2::4, :2] = np.inf
    for name in ("sr_sgc", "m_sgc"):
        assert not straggler_simulation(SCHEMES[name](), times, jobs=30).waited.any()
    assert np.isinf(straggler_simulation(SCHEMES["uncoded"](), times, jobs=30).durations.sum())


def test_times_follow_a_chain_that_does_not_know_the_load():
    slow = straggler_simulation_times(jax.random.key(2), 4000, 50, 0.0, base=1.0, slowdown=5.0) == 5.0
    share, count = 0.02 / 0.52, slow.size
    # Neighbouring rounds are alike: a burst of two rounds in the mean counts for about three independent draws.
    assert abs(slow.mean() - share) < 5 * np.sqrt(3 * share / count)
    left = slow[:-1] & ~slow[1:]
    assert abs(left.sum() / slow[:-1].sum() - 0.5) < 5 * 0.5 / np.sqrt(slow.sum())
    loaded = straggler_simulation_times(jax.random.key(2), 100, 50, 0.5, slope=4.0)
    np.testing.assert_array_equal(loaded, np.where(slow[:100], 15.0, 3.0))


@pytest.mark.parametrize("name", SCHEMES)
def test_training_under_stragglers_is_training_without(name, x64):
    """Each job is a step of one of delay + 1 models in turn, since its gradient may take that long."""
    scheme, steps, rate = SCHEMES[name](), 4, 0.3
    models = scheme.delay + 1
    jobs = steps * models
    rng = np.random.default_rng(0)
    units = int(scheme.units.sum())
    inputs, labels = rng.normal(size=(units, 3)), rng.normal(size=units)
    owner = np.repeat(np.arange(scheme.units.size), scheme.units)

    def loss(params, weights):
        hidden = jnp.tanh(inputs @ params["w"]) @ params["v"]
        return weights @ (hidden - labels) ** 2 / units

    gradient = jax.jit(jax.grad(loss))
    by_chunk = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
    chunks = (owner == np.arange(scheme.units.size)[:, None]).astype(float)
    start = [{"w": rng.normal(size=(3, 4)), "v": rng.normal(size=4)} for _ in range(models)]

    def descend(params, slope):
        return jax.tree.map(lambda p, g: p - rate * np.asarray(g), params, slope)

    straggling = np.zeros((jobs + scheme.delay, 6), bool)
    if name != "uncoded":
        straggling[0::4, :2] = True
        straggling[1::4, 1] = name != "gradient_coding"
    trained = list(start)
    decoded = []
    run = coded.gradients_of_jobs(
        scheme, jobs, straggling, lambda job: jax.tree.map(np.asarray, by_chunk(trained[job % models], chunks))
    )
    for job, slope in run:
        trained[job % models] = descend(trained[job % models], slope)
        decoded.append(job)
    assert sorted(decoded) == list(range(jobs))
    for model, wanted in zip(trained, start, strict=True):
        for _ in range(steps):
            wanted = descend(wanted, gradient(wanted, np.ones(units)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), model, wanted)


def test_bad_arguments_are_named():
    scheme = gradient_coding_scheme(4, 1)
    good = np.ones((3, 4))
    for times, sentence in (
        (good[:1], "have 2 rounds"),
        (0 * good, "be greater than 0"),
        (np.nan * good, "be greater"),
    ):
        with pytest.raises(ValueError, match=f"^straggler_simulation: `times` must {sentence}"):
            straggler_simulation(scheme, times, 2)
    with pytest.raises(ShapeError, match="^straggler_simulation: `times` must have shape"):
        straggler_simulation(scheme, good[:, :3], 2)
    with pytest.raises(ValueError, match="^straggler_simulation: `jobs` must be"):
        straggler_simulation(scheme, good, 0)
    with pytest.raises(ValueError, match="^straggler_simulation: `patience` must be"):
        straggler_simulation(scheme, good, 2, patience=0)
    key = jax.random.key(0)
    for wrong in ({"enter": 1.5}, {"leave": -0.1}, {"leave": 0, "enter": 0}, {"slowdown": 0.5}, {"base": -1.0}):
        with pytest.raises(ValueError, match=f"^straggler_simulation_times: `{next(iter(wrong))}` must be"):
            straggler_simulation_times(key, 2, 3, 0.1, **wrong)
    with pytest.raises(DtypeError, match="^straggler_simulation_times: `key`"):
        straggler_simulation_times(jnp.zeros(2, jnp.uint32), 2, 3, 0.1)


def test_a_traced_key_is_named(key):
    with pytest.raises(ValueError, match="straggler_simulation_times: `key` must be concrete"):
        jax.jit(lambda key: straggler_simulation_times(key, 3, 2, 0.1))(key)
