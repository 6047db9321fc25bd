"""Fast extragradient: the published recursion, its bound with and without constraints, games beside linear programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import jaxnum
from jaxnum import Inclusion, Status
from jaxnum.solvers import feg, resolvents, restarted
from tests.solvers.monotone_problems import COUNTS, bilinear, driven, game, hard_start, residuals, slope
from tests.tolerances import tolerance


def turn(real, length=1.0):
    """(A, rho) of a planar map of Lipschitz constant `length` that is rho-comonotone, rho = real / length^2."""
    imaginary = np.sqrt(length**2 - real**2)
    return np.array([[real, -imaginary], [imaginary, real]]), real / length**2


@pytest.mark.parametrize(("real", "rho"), [(0.0, 0.0), (-0.3, -0.3)])
def test_unconstrained_steps_are_the_published_ones(real, rho, x64):
    A, _ = turn(real)
    x0 = x = np.array([1.0, 2.0])
    for k in range(12):
        beta, F = 1 / (k + 1), A @ x
        half = x + beta * (x0 - x) - (1 - beta) * (1 + 2 * rho) * F
        x = x + beta * (x0 - x) - A @ half - (1 - beta) * 2 * rho * F
    got = driven(feg(1.0, rho=rho), Inclusion(lambda z: A @ z), jnp.asarray(x0), [12])[0][0]
    np.testing.assert_allclose(got, x, atol=tolerance("float64", 12))


def test_bilinear_saddle_falls_as_one_over_k(x64):
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(size=(2, 50)))
    got = residuals(feg(1.0), bilinear(), start, COUNTS)
    share = got * (COUNTS + 1) / np.linalg.norm(start)
    assert np.all(share <= 2 * (COUNTS + 1) / COUNTS)
    np.testing.assert_allclose(share[[0, 2, 4]], 1.0, atol=0.1)
    assert slope(COUNTS, got) <= -0.95
    hard = residuals(feg(1.0), bilinear(), hard_start(), COUNTS)
    assert slope(COUNTS, hard) <= -0.95


def test_search_keeps_the_bound_with_its_last_estimate(x64):
    start = hard_start()
    for (_, state, residual), count in zip(driven(feg(), bilinear(), start, COUNTS), COUNTS, strict=True):
        assert state.lipschitz <= 2.0
        assert residual <= 2 * state.lipschitz * np.linalg.norm(start) / (count - 10)  # ten trials at most failed


def linear_program(A, b, c):
    """min over x in [0,1]^m of max over y in [0,1]^n of x'Ay + b'x - c'y, with the maximiser from the dual."""
    m, n = A.shape
    # max_y = sum of max(A'x - c, 0): t_j >= (A'x - c)_j, t >= 0.
    primal = scipy.optimize.linprog(
        np.r_[b, np.ones(n)], A_ub=np.c_[A.T, -np.eye(n)], b_ub=c, bounds=[(0, 1)] * m + [(0, None)] * n
    )
    return primal.x[:m], -primal.ineqlin.marginals, primal.fun


def test_box_constrained_game_is_the_linear_program(x64):
    A, b, c = game()
    x, y, value = linear_program(A, b, c)
    F = lambda z: {"x": A @ z["y"] + b, "y": c - A.T @ z["x"]}  # noqa: E731
    z0 = {"x": jnp.full(5, 0.5), "y": jnp.full(4, 0.5)}
    solution = jaxnum.inclusion(F, z0, resolvent=resolvents.box(0.0, 1.0))
    got = solution.x["x"] @ A @ solution.x["y"] + b @ solution.x["x"] - c @ solution.x["y"]
    np.testing.assert_allclose(got, value, atol=1e-6)
    # The bound of the composite method, along the way, from the distance to the program's solution.
    L = np.linalg.norm(A, 2)
    distance = np.sqrt(np.sum((x - 0.5) ** 2) + np.sum((y - 0.5) ** 2))
    problem = Inclusion(F, resolvents.box(0.0, 1.0))
    counts = np.array([1, 2, 5, 20, 100, 500])
    assert np.all(residuals(feg(L), problem, z0, counts) <= 2 * L * distance / counts * (1 + 1e-9) + 1e-12)


def test_matrix_game_on_simplices_has_the_value_of_the_linear_program(x64):
    A, *_ = game(1)
    m, n = A.shape
    program = scipy.optimize.linprog(
        np.r_[np.zeros(m), 1.0],
        A_ub=np.c_[A.T, -np.ones(n)],
        b_ub=np.zeros(n),
        A_eq=np.r_[np.ones(m), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * m + [(None, None)],
    )
    both = resolvents.product((resolvents.simplex(), resolvents.simplex()))
    x, y = jaxnum.inclusion(
        lambda z: (A @ z[1], -A.T @ z[0]), (jnp.full(m, 1 / m), jnp.full(n, 1 / n)), resolvent=both
    ).x
    np.testing.assert_allclose(np.max(A.T @ x), program.fun, atol=1e-6)
    np.testing.assert_allclose(np.min(A @ y), program.fun, atol=1e-6)


def test_negative_comonotone_map_needs_its_rho(x64):
    A, rho = turn(-0.3)
    problem, x0 = Inclusion(lambda z: A @ z), jnp.array([1.0, 2.0])
    counts = np.array([10, 100, 1000])
    bound = 2 * np.sqrt(5.0) / ((1 + 2 * rho) * counts)
    assert np.all(residuals(feg(1.0, rho=rho), problem, x0, counts) <= bound)
    assert residuals(feg(1.0), problem, x0, counts)[-1] > 1


def test_gradients_through_bounds_and_payoffs_equal_finite_differences(x64):
    A, b, _ = game(3)
    x0 = jnp.full(5, 0.5)

    def value(b, upper):
        F = lambda x: x + 0.3 * jnp.sin(x) + A @ (A.T @ x) - 4 * b  # noqa: E731
        x = jaxnum.inclusion(F, x0, resolvent=resolvents.box(0.0, upper), rtol=1e-12).x
        return jnp.sum(jnp.cos(x) * jnp.arange(1.0, 6))

    point, upper = jnp.asarray(b), jnp.full(5, 0.4)
    value = jax.jit(value)
    gradients = jax.jit(jax.grad(value, (0, 1)))(point, upper)
    for argument, got in enumerate(gradients):
        for i in range(5):
            step = 1e-5 * np.eye(5)[i]
            moved = [(point + s * step, upper) if argument == 0 else (point, upper + s * step) for s in (1, -1)]
            np.testing.assert_allclose(got[i], (value(*moved[0]) - value(*moved[1])) / 2e-5, atol=1e-5)
    assert np.any(np.asarray(gradients[1]) != 0)  # a bound is active


def test_restarts_turn_one_over_k_into_linear(x64):
    S = jnp.array([0.05, 1.0])
    problem, x0 = Inclusion(lambda z: jnp.stack([S * z[1], -S * z[0]])), jnp.ones((2, 2))
    options = {"atol": 1e-9, "rtol": 0.0}
    quick = jaxnum.solve(restarted(feg(1.0)), x0, problem, **options)
    plain = jaxnum.solve(feg(1.0), x0, problem, max_steps=int(quick.steps), on_failure="return", **options)
    assert int(plain.status) == Status.max_steps
    assert float(plain.residual) > 1000 * float(quick.residual)


def test_a_wrong_constant_ends_with_a_status_and_the_last_finite_x(x64):
    A, _ = turn(0.0, length=3.0)
    solution = jaxnum.inclusion(lambda z: A @ z, jnp.ones(2), solver=feg(1.0), on_failure="return")
    assert int(solution.status) == Status.nonfinite
    assert np.all(np.isfinite(solution.x))


def test_an_estimate_beyond_what_rho_allows_is_a_breakdown(x64):
    A, _ = turn(-0.3, length=4.0)
    solution = jaxnum.inclusion(lambda z: A @ z, jnp.ones(2), solver=feg(rho=-0.3), on_failure="return")
    assert int(solution.status) == Status.breakdown


def test_arguments_outside_their_range():
    with pytest.raises(ValueError, match="feg: `lipschitz` must be a finite real number > 0, or None; got"):
        feg(0.0)
    with pytest.raises(ValueError, match=r"feg: `rho` must be above -1 / \(2 lipschitz\); got"):
        feg(1.0, rho=-0.5)
