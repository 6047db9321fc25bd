"""Sorted recycling: the tour, results in the order they were asked for, and what order and recycling are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg as spla

import jaxnum
from jaxnum import Linear, SolverError
from jaxnum.solvers import gcro_dr, skr, skr_order
from tests.compiles import count_compiles
from tests.solvers.test_gcro_dr import N, convection


def greedy(points):
    """The same tour in plain Python."""
    order, left = [0], set(range(1, len(points)))
    while left:
        here = points[order[-1]]
        order.append(min(left, key=lambda i: np.linalg.norm(points[i] - here)))
        left.remove(order[-1])
    return order


def test_order_is_the_greedy_tour(x64):
    points = np.random.default_rng(0).normal(size=(23, 2, 2))
    np.testing.assert_array_equal(skr_order(jnp.asarray(points)), greedy(points.reshape(23, 4)))
    tree = {"u": jnp.asarray(points[:, 0]), "w": jnp.asarray(points[:, 1, 0] + 1j * points[:, 1, 1])}
    np.testing.assert_array_equal(skr_order(tree), greedy(points.reshape(23, 4)))


def test_chunks_are_toured_one_after_the_other(x64):
    points = np.random.default_rng(1).normal(size=(23, 3))
    order = np.asarray(skr_order(jnp.asarray(points), chunk=10))
    for start, stop in ((0, 10), (10, 20), (20, 23)):
        np.testing.assert_array_equal(np.sort(order[start:stop]), np.arange(start, stop))
    second = points[10:20] - points[order[9]]
    assert order[10] == 10 + np.argmin(np.linalg.norm(second, axis=1))


def test_results_come_back_in_the_order_asked_for(x64):
    rng = np.random.default_rng(2)
    t, b = rng.uniform(0, 0.2, size=6), rng.normal(size=N * N)
    still, turn = (jnp.asarray(A.toarray()) for A in (convection(0.0), convection(1.0) - convection(0.0)))
    make = lambda p: Linear(still + p * turn, jnp.asarray(b), symmetric=False)  # noqa: E731
    given = jnp.arange(6)
    tour, plain = (skr(make, jnp.asarray(t), m=16, k=8, rtol=1e-9, order=order) for order in (None, given))
    for i in range(6):
        want = spla.spsolve(convection(t[i]).tocsc(), b)
        np.testing.assert_allclose(tour.x[i], want, atol=1e-6)
        np.testing.assert_allclose(plain.x[i], want, atol=1e-6)
    alone = jaxnum.solve(gcro_dr(m=16, k=8), jnp.zeros(N * N), make(t[0]), rtol=1e-9)
    # The first in order has nothing to recycle; all others gain.
    assert int(tour.state.matvecs[0]) == int(alone.state.matvecs)
    assert np.max(tour.state.matvecs[1:]) < int(alone.state.matvecs)
    assert tour.steps.shape == tour.status.shape == (6,)


def test_gradient_and_failure(x64):
    A = jnp.array([[4.0, 1.0], [-1.0, 3.0]])
    make = lambda t: Linear(A + t * jnp.eye(2), jnp.ones(2), symmetric=False)  # noqa: E731
    t = jnp.array([0.5, 2.0, 0.1])
    solved = lambda t: jnp.sum(jnp.sin(skr(make, t, m=4, k=2, rtol=1e-12).x))  # noqa: E731
    direct = lambda t: jnp.sum(jnp.sin(jax.vmap(lambda t: jnp.linalg.solve(make(t).A, jnp.ones(2)))(t)))  # noqa: E731
    np.testing.assert_allclose(jax.grad(solved)(t), jax.grad(direct)(t), atol=1e-10)
    with pytest.raises(SolverError, match="skr: 1 of 3 lanes failed: 1"):
        skr(make, t.at[1].set(jnp.nan), m=4, k=2, order=jnp.array([1, 0, 2]))


def test_second_call_with_a_fresh_function_compiles_nothing(x64):
    def run(scale, t):
        A = scale * jnp.array([[4.0, 1.0], [-1.0, 3.0]])
        return skr(lambda t: Linear(lambda v: A @ v + t * v, jnp.ones(2), symmetric=False), t, m=4, k=2)

    inputs = [(jnp.float64(scale), jnp.asarray(np.arange(3.0) + scale)) for scale in (1, 2)]
    run(*inputs[0])
    with count_compiles() as compiled:
        run(*inputs[1])
    assert compiled() == 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="skr_order: `params` must have one leading axis"):
        skr_order({"a": jnp.ones(3), "b": jnp.ones(4)})
    with pytest.raises(ValueError, match="skr_order: `chunk` must be a Python int >= 1; got 0"):
        skr_order(jnp.ones(3), chunk=0)
    with pytest.raises(ValueError, match="skr: `order`"):
        skr(lambda t: Linear(jnp.eye(2), t), jnp.ones((3, 2)), order=jnp.arange(2))


def test_an_order_that_is_no_permutation_is_refused():
    make = lambda t: jaxnum.Linear((4 + t) * jnp.eye(2), jnp.ones(2), symmetric=False)  # noqa: E731
    with pytest.raises(ValueError, match="skr: `order` must hold each of 0 to 2 once"):
        jaxnum.solvers.skr(make, jnp.arange(3.0), m=4, k=2, order=jnp.array([0, 0, 1]))


def test_orders_are_permutations_whatever_the_numbers():
    for params in (
        jnp.array([0.0, 300.0, 600.0], jnp.float16),
        jnp.array([0.0, 1e20, 3e20], jnp.float32),
        jnp.array([0.0, jnp.nan, 1.0]),
        jnp.arange(5),
        jnp.zeros(4),
    ):
        order = jaxnum.solvers.skr_order(params, chunk=2)
        assert sorted(order.tolist()) == list(range(params.size))
