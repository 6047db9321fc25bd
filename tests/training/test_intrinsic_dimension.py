"""The search for the intrinsic dimension: on rules with a known answer, with noise, with dents, and on the toy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import intrinsic_dimension, random_subspace_projection


@pytest.mark.parametrize("search", ["bisect", "all"])
@pytest.mark.parametrize("answer", [1, 2, 17, 40, 41])
def test_finds_every_step(search, answer):
    calls = []

    def evaluate(d):
        calls.append(d)
        return 1.0 if d >= answer else 0.1

    found = intrinsic_dimension(evaluate, range(1, 41), 1.0, search=search)
    assert found.monotone
    if answer == 41:
        assert found.dimension is None
        assert found.interval == (40, None)
    else:
        assert found.dimension == answer
        assert found.interval == (answer - 1, answer)
    assert sorted(calls) == list(found.scores)
    assert len(calls) == len(set(calls)) <= (40 if search == "all" else 8)


def test_runs_dents_and_nan_show():
    runs = {1: [0.1, 0.2], 2: [0.2, 0.95], 4: [0.95, 0.9], 8: [0.97, 0.85], 16: [1.0, 1.0]}
    found = intrinsic_dimension(lambda d: runs[d], list(runs), 1.0, search="all")
    assert found.dimension == 4
    assert found.interval == (1, 16)
    assert found.monotone
    dented = {1: 0.1, 2: 0.95, 4: 0.5, 8: 1.0}
    assert not intrinsic_dimension(dented.get, list(dented), 1.0, search="all").monotone
    # Bisection goes 2, 1 and then looks at the neighbour 4.
    assert not intrinsic_dimension(dented.get, list(dented), 1.0).monotone
    broken = intrinsic_dimension({1: 0.1, 2: np.nan, 4: 1.0}.get, [1, 2, 4], 1.0, search="all")
    assert broken.dimension == 4
    assert broken.interval == (2, 4)
    assert np.isnan(broken.scores[2]).all()


@pytest.mark.parametrize("kind", ["dense", "fastfood"])
def test_ten_constraints_have_ten_dimensions(kind, key, x64):
    # Of 1000 numbers ten sums of 100 shall be 1 to 10: exp(-mean squared error) of the best point.
    P = random_subspace_projection(key, 20, 1000, kind=kind)
    rows = jax.vmap(P.adjoint)(jnp.kron(jnp.eye(10), jnp.ones(100)))
    wanted = np.arange(1.0, 11.0)

    def evaluate(d):
        sums = np.asarray(rows[:, :d])
        best = np.linalg.lstsq(sums, wanted)[0]
        return np.exp(-np.mean((sums @ best - wanted) ** 2))

    found = intrinsic_dimension(evaluate, range(1, 21), 1.0)
    assert found.dimension == 10
    assert found.interval == (9, 10)
    assert found.monotone
    assert found.scores[9][0] < 0.5
    assert abs(found.scores[10][0] - 1) < 1e-6


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="^intrinsic_dimension: `candidates` must ascend from at least 1"):
        intrinsic_dimension(float, [4, 2], 1.0)
    with pytest.raises(ValueError, match="^intrinsic_dimension: `baseline` must be greater than 0; got -3.0. Measure"):
        intrinsic_dimension(float, [1], -3.0)
    with pytest.raises(ValueError, match=r"^intrinsic_dimension: `fraction` must be in \(0, 1\]; got 1.5"):
        intrinsic_dimension(float, [1], 1.0, fraction=1.5)
    with pytest.raises(ValueError, match=r"^intrinsic_dimension: `evaluate\(d\)` must be a number or \[runs\]"):
        intrinsic_dimension(lambda d: np.ones((2, 2)), [1], 1.0)
