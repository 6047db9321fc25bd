"""The second-moment operator: closed forms, all batches one by one, and chains of SGD."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum.training import mean_square_stability, mean_square_stability_rate
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance

LINE = jnp.array([[0.5], [1.0], [2.0], [0.1]])


def test_in_one_dimension(x64):
    x = LINE.astype("float64")
    h, variance = float(jnp.mean(LINE**2)), float(jnp.var(LINE**2))
    for size, want in ((1, 0.6165532), (2, 0.8774161), (4, 1.1128360), (jnp.inf, 1.5209125)):
        got = mean_square_stability_rate(x, size)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(got, 2 * h / (h**2 + variance / size), rtol=1e-6)
        np.testing.assert_allclose(mean_square_stability(x, got, size), 1, rtol=1e-9)


@pytest.mark.parametrize("replacement", [True, False])
def test_every_batch_one_by_one(replacement, x64):
    """Four examples of three numbers, so that H is regular, and of five, where it is not: batches of two."""
    batches = list(itertools.product(range(4), repeat=2) if replacement else itertools.combinations(range(4), 2))
    for width in (3, 5):
        x = np.random.default_rng(width).normal(size=(4, width))
        seen = np.linalg.svd(x, full_matrices=False)[2]
        rows = [(x @ seen.T)[list(batch)] for batch in batches]
        steps = [np.eye(len(seen)) - 0.3 / 2 * row.T @ row for row in rows]
        values = np.linalg.eigvalsh(np.mean([np.kron(step, step) for step in steps], axis=0))
        got = mean_square_stability({"a": x[:, :2], "b": x[:, 2:, None]}, 0.3, 2, replacement=replacement)
        np.testing.assert_allclose(got, np.abs(values).max(), rtol=1e-8)


def test_random_problems(x64):
    """With one example a step the trace is bounded; in the limit of large batches the eigenvalue."""
    x = jax.random.normal(jax.random.key(0), (200, 6, 4)) * jax.random.uniform(jax.random.key(1), (200, 6, 1))
    rates = jax.jit(jax.vmap(mean_square_stability_rate, (0, None)))
    one, full = rates(x, 1.0), rates(x, jnp.inf)
    H = jnp.einsum("kni,knj->kij", x, x) / 6
    assert float(jnp.max(one * jnp.trace(H, axis1=1, axis2=2))) <= 2
    np.testing.assert_allclose(full * jnp.linalg.eigvalsh(H)[:, -1], 2, rtol=1e-6)


def test_chains_of_sgd_fall_below_the_rate_and_grow_above_it():
    """4,000 chains, drawn again at each step in proportion to their squares.

    Left alone, nearly all chains fall on either side of the rate: few that nobody draws carry the mean square.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 3))
    critical = float(mean_square_stability_rate(jnp.asarray(x, jnp.float32), 2))
    for share in (0.97, 1.03):
        w, growth = rng.normal(size=(4000, 3)), []
        for _ in range(300):
            w /= np.linalg.norm(w, axis=1, keepdims=True)
            batch = x[rng.integers(12, size=(4000, 2))]
            w = w - share * critical / 2 * np.einsum("cbp,cbq,cq->cp", batch, batch, w, optimize=True)
            squares = np.sum(w**2, axis=1)
            growth.append(np.log(squares.mean()))
            places = (np.arange(4000) + rng.uniform()) / 4000 * squares.sum()
            w = w[np.minimum(np.searchsorted(np.cumsum(squares), places), 3999)]
        radius = mean_square_stability(jnp.asarray(x, jnp.float32), share * critical, 2)
        assert (sum(growth) > 0) == (share > 1)
        assert abs(np.mean(growth[20:]) - np.log(float(radius))) < 0.005


def test_single_precision_agrees_for_a_larger_problem():
    x = jax.random.normal(jax.random.key(5), (30, 16))
    got = mean_square_stability_rate(x, 4)
    with jax.enable_x64(True):
        want = mean_square_stability_rate(jnp.asarray(np.asarray(x), "float64"), 4)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(("n", "width"), [(30, 20), (10, 10), (100, 44)])
def test_anisotropic_data_whose_slow_directions_stand_nearly_still(n, width, float_dtype):
    """Many eigenvalues just below 1, of small problems in one matrix and of the largest by Lanczos to its tolerance."""
    x = np.random.default_rng(0).normal(size=(n, width)) * np.logspace(0, -2, width)
    pairs = (x[:, :, None] * x[:, None]).reshape(n, -1)
    H = x.T @ x / n
    step = np.eye(width) - 0.5 * H
    T = np.kron(step, step) + 0.5**2 / 2 * (pairs.T @ pairs / n - np.kron(H, H))
    got = mean_square_stability(jnp.asarray(x, float_dtype), 0.5, 2)
    rtol = tolerance(float_dtype, width) if width < 40 else 1e-5
    np.testing.assert_allclose(got, np.linalg.eigvalsh(T)[-1], rtol=rtol)


def test_what_was_not_found_is_no_number():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(100, 44)) * np.logspace(0, -2, 44), "float32")
    few = partial(mean_square_stability, learning_rate=0.5, batch_size=2, max_steps=60)
    assert np.isnan(jax.jit(few)(x))
    with pytest.raises(jaxnum.SolverError, match="^mean_square_stability: max_steps after 60 steps"):
        few(x)
    radius = partial(mean_square_stability, learning_rate=0.1, batch_size=1)
    for call in (radius, partial(mean_square_stability_rate, batch_size=1)):
        for bad in (LINE * jnp.nan, LINE * 0):
            assert np.isnan(jax.jit(call)(bad))
            with pytest.raises(jaxnum.SolverError):
                call(bad)


def test_bad_input():
    name = "^mean_square_stability: "
    for rate in (0, np.int64(0)):
        with pytest.raises(ValueError, match=name + "`learning_rate` must be positive; got 0"):
            mean_square_stability(LINE, rate, 1)
    with pytest.raises(ValueError, match=name + "`batch_size` must be at least 1; got 0.5"):
        mean_square_stability(LINE, 0.1, 0.5)
    with pytest.raises(ValueError, match=name + "`batch_size` must be at most 4, the examples; got 8"):
        mean_square_stability(LINE, 0.1, 8, replacement=False)
    with pytest.raises(ShapeError, match=name + r"`jacobian\['b'\]` must have a first axis of examples of 4; got sha"):
        mean_square_stability({"a": LINE, "b": jnp.ones(3)}, 0.1, 1)
    with pytest.raises(DtypeError, match=name + "`jacobian` must have a floating-point dtype; got int32"):
        mean_square_stability(jnp.ones((4, 1), int), 0.1, 1)
    for x in (LINE * jnp.nan, LINE * 0):
        with pytest.raises(jaxnum.SolverError):
            mean_square_stability_rate(x, 1)
