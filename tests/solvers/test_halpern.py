"""Halpern iteration: exact worst cases, the contractive rate, and the separation from Krasnosel'skii-Mann."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import FixedPoint
from jaxnum.solvers import halpern, picard


def driven(solver, T, x0, steps):
    """The iterate and residual after exactly so many steps, without the driver's stopping rule."""
    problem = FixedPoint(T)
    state = solver.init(solver.hyper, x0, problem)

    def body(pair, _):
        return solver.step(solver.hyper, *pair, problem), None

    (x, state), _ = jax.lax.scan(body, (x0, state), None, length=steps)
    return x, solver.measure(solver.hyper, x, state, problem).residual


@pytest.mark.parametrize("steps", [10, 50, 200])
def test_reflection_is_the_worst_case_exactly(steps, x64):
    _, residual = driven(halpern(), lambda x: -x, jnp.ones(1), steps)
    assert abs(residual * (steps + 1) / 2 - 1) <= 1e-12


@pytest.mark.parametrize("steps", [3, 10, 51])
def test_huber_map_meets_the_bound_with_equality(steps, x64):
    c = 1 / (steps + 1)
    T = lambda x: jnp.where(jnp.abs(x) >= c, x - 2 * c * jnp.sign(x), -x)  # noqa: E731
    _, residual = driven(halpern(), T, jnp.ones(1), steps)
    assert abs(residual * (steps + 1) / 2 - 1) <= 1e-12


def test_first_iterate_of_the_reflection_is_the_fixed_point(x64):
    solution = jaxnum.fixed_point(lambda x: -x, jnp.ones(3), solver=halpern())
    assert int(solution.steps) == 1
    np.testing.assert_array_equal(solution.x, np.zeros(3))


def rotation(angle):
    R = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return lambda x: jnp.asarray(R) @ x


def test_rotation_separates_halpern_from_averaging(x64):
    x0 = jnp.array([1.0, 0.0])
    _, averaged = driven(picard(damping=0.5), rotation(0.1), x0, 1000)
    _, anchored = driven(halpern(), rotation(0.1), x0, 1000)
    assert anchored <= 2.0 / 1001
    np.testing.assert_allclose([averaged, anchored], [0.0286, 4.27e-4], rtol=5e-3)  # the figures to three digits


def test_slopes_of_the_residuals(x64):
    """O(1/k) against O(1/sqrt k): an average over rotations of all angles has no favourable one."""
    angles = np.geomspace(1e-3, np.pi, 200)
    c, s = jnp.cos(angles), jnp.sin(angles)
    T = lambda z: jnp.stack([c * z[0] - s * z[1], s * z[0] + c * z[1]])  # noqa: E731
    x0 = jnp.stack([jnp.ones(200), jnp.zeros(200)])
    counts = np.array([100, 300, 1000, 3000, 5000])

    def slope(solver):
        residuals = [float(driven(solver, T, x0, int(k))[1]) for k in counts]
        return np.polyfit(np.log(counts), np.log(residuals), 1)[0]

    assert slope(halpern()) <= -0.95
    assert -0.75 <= slope(picard(damping=0.5)) <= -0.2


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("steps", [5, 20])
def test_contractive_weights_meet_their_bound_with_equality(gamma, steps, x64):
    """Worst case over scaled rotations: equal to (1 + gamma) / sum gamma^-i, and never above."""
    angles = jnp.linspace(0, jnp.pi, 4001)
    x0 = jnp.array([1.0, 0.0])

    def residual(angle):
        R = gamma * jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        return driven(halpern(contraction=gamma), lambda x: R @ x, x0, steps)[1]

    worst = float(jnp.max(jax.vmap(residual)(angles)))
    bound = (1 + gamma) / np.sum(gamma ** -np.arange(steps + 1.0))
    assert worst <= bound * (1 + 1e-12)
    assert worst >= bound * (1 - 1e-5)


def test_contractive_beats_picard_in_the_worst_case_and_tends_to_it(x64):
    T = lambda x: -0.9 * x  # noqa: E731
    _, plain = driven(picard(), T, jnp.ones(1), 20)
    _, anchored = driven(halpern(contraction=0.9), T, jnp.ones(1), 20)
    assert anchored < plain
    weights = halpern(contraction=0.1)
    _, late = driven(weights, lambda x: 0.1 * x + 1, jnp.zeros(2), 400)  # phi overflows: weight 0, Picard
    assert late < 1e-15


def test_restarts_give_linear_convergence_on_a_sharp_problem(x64):
    """A rotation is sharp (||x - T x|| grows like the distance), and Halpern alone still O(1/k) on it."""
    x0 = jnp.array([1.0, 2.0])
    options = {"atol": 1e-8, "rtol": 0.0}
    restarted = jaxnum.fixed_point(rotation(0.1), x0, solver=jaxnum.solvers.restarted(halpern()), **options)
    steps = int(restarted.steps)
    plain = jaxnum.fixed_point(rotation(0.1), x0, solver=halpern(), max_steps=steps, on_failure="return", **options)
    assert int(plain.status) == jaxnum.Status.max_steps
    assert float(plain.residual) > 1000 * float(restarted.residual)
    every = jaxnum.fixed_point(rotation(0.1), x0, solver=jaxnum.solvers.restarted(halpern(), every=40), **options)
    assert int(every.status) == jaxnum.Status.converged


def test_projection_onto_the_intersection_of_two_balls(x64):
    """The limit is a fixed point of the composition, in both sets."""

    def ball(x, centre):
        d = x - centre
        return centre + d / jnp.maximum(1.0, jnp.linalg.norm(d))

    T = lambda x: ball(ball(x, jnp.array([0.0, 0.0])), jnp.array([1.0, 0.0]))  # noqa: E731
    solution = jaxnum.fixed_point(T, jnp.array([3.0, 4.0]), solver=halpern(), rtol=1e-3)
    assert np.linalg.norm(solution.x) <= 1 + 2e-3
    assert np.linalg.norm(solution.x - np.array([1.0, 0.0])) <= 1 + 2e-3


@pytest.mark.parametrize("contraction", [0.0, 1.1])
def test_contraction_outside_its_range(contraction):
    with pytest.raises(ValueError, match=r"halpern: `contraction` must be in \(0, 1\]; got"):
        halpern(contraction=contraction)
