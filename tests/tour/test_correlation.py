import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum.solvers import halpern
from jaxnum.tour import _correlation as stop


def higham(broken, steps=2000, tolerance=1e-14):
    """Higham (2002), algorithm 3.3: alternating projections with Dykstra's correction, in plain numpy."""
    y, correction = broken.copy(), np.zeros_like(broken)
    for _ in range(steps):
        r = y - correction
        values, vectors = np.linalg.eigh(r)
        x = (vectors * np.maximum(values, 0)) @ vectors.T
        correction = x - r
        last, y = y, x.copy()
        np.fill_diagonal(y, 1)
        if np.linalg.norm(y - last) <= tolerance * np.linalg.norm(y):
            break
    return y


@pytest.fixture(scope="module")
def broken():
    return stop.pairwise_correlation(stop.features_with_holes(0.2, 0))


def test_holes_make_the_matrix_indefinite(broken):
    features = stop.features_with_holes(0.2, 0)
    assert (np.isnan(features).mean(0) == round(0.2 * 569) / 569).all()
    assert (np.diag(broken) == 1).all()
    np.testing.assert_array_equal(broken, broken.T)
    assert np.linalg.eigvalsh(broken)[0] < -0.01


def test_halpern_tends_to_highams_matrix_at_the_rate_of_its_bound(broken, x64):
    nearest = higham(broken)
    assert np.linalg.eigvalsh(nearest)[0] > -1e-12
    distance = np.linalg.norm(nearest - broken)
    for steps in (250, 2000):
        solution = jaxnum.fixed_point(
            stop.two_projections,
            jnp.asarray(broken),
            solver=halpern(),
            rtol=0.0,
            atol=0.0,
            max_steps=steps,
            history=True,
            on_failure="return",
        )
        n = np.arange(steps + 1)
        assert (np.asarray(solution.history) <= 2 * distance / (n + 1)).all()
        # The iterate is off by O(1 / N); its distance to the anchor, minimal at the limit, only to second order.
        assert np.linalg.norm(solution.x - nearest) <= 2 * distance / (steps + 1) * 2
        repaired = np.asarray(stop.rescaled(solution.x))
        excess = np.linalg.norm(repaired - broken) - distance
        assert 0 <= excess <= distance * (10 / steps) ** 2
        assert np.linalg.eigvalsh(repaired)[0] > -1e-12
        np.testing.assert_array_equal(np.diag(repaired), 1)


def test_picard_ends_at_another_correlation_matrix(broken, x64):
    nearest = higham(broken)
    plain = jaxnum.fixed_point(stop.two_projections, jnp.asarray(broken), rtol=1e-12)
    assert np.linalg.norm(plain.x - nearest) > 1e-3


def test_stop_reports_what_it_claims():
    found = stop.correlation(steps=50)
    rows = dict(found.rows)
    assert float(rows["lowest eigenvalue, before"]) < 0
    assert float(rows["residual at the last step"]) <= float(rows["its bound 2 ||x0 - x*|| / (N + 1)"])
    assert rows["steps"] == "50"
    assert len(found.pictures) == 1
