"""Extragradient: its rate on the bilinear saddle point, a constrained problem, wrong constants."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import Status
from jaxnum.solvers import extragradient, resolvents
from tests.solvers.monotone_problems import COUNTS, SINGULAR, bilinear, driven, hard_start, residuals, slope
from tests.tolerances import tolerance


def test_steps_are_the_textbook_ones(x64):
    a, (p, q) = 0.5, np.asarray(hard_start())
    for _ in range(20):
        half_p, half_q = p - a * SINGULAR * q, q + a * SINGULAR * p
        p, q = p - a * SINGULAR * half_q, q + a * SINGULAR * half_p
    got = driven(extragradient(2**0.5), bilinear(), hard_start(), [20])[0][0]
    np.testing.assert_allclose(got, np.stack([p, q]), rtol=tolerance("float64", 20, condition=10))


def test_bilinear_saddle_falls_as_one_over_the_root(x64):
    assert -0.75 <= slope(COUNTS, residuals(extragradient(1.0), bilinear(), hard_start(), COUNTS)) <= -0.45


def test_projected_saddle_has_its_known_solution(x64):
    # min over x <= 1 of max over y of (x - 2) y: y would push x to 2, the set holds it at 1; y in [0, 3] ends at 0.
    F = lambda z: jnp.stack([z[1] + z[0] - 3, 2 - z[0]])  # noqa: E731
    solution = jaxnum.inclusion(F, jnp.zeros(2), resolvent=resolvents.box(0.0, 1.0), solver=extragradient(2.0))
    np.testing.assert_allclose(solution.x, [1.0, 0.0], atol=1e-7)


def test_a_wrong_constant_ends_with_a_status_and_the_last_finite_x(x64):
    solution = jaxnum.solve(extragradient(0.3), hard_start(), bilinear(), on_failure="return")
    assert int(solution.status) == Status.nonfinite
    assert np.all(np.isfinite(solution.x))


@pytest.mark.parametrize("lipschitz", [0.0, -1.0, np.inf])
def test_constant_outside_its_range(lipschitz):
    with pytest.raises(ValueError, match="extragradient: `lipschitz` must be a finite real number > 0; got"):
        extragradient(lipschitz)
