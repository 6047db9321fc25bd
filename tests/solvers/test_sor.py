"""SOR: scipy's triangular solves, the optimal relaxation of the Poisson matrix, sparse sweeps in natural order."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp

import jaxnum
from jaxnum import Linear, Status
from jaxnum.core.loops import begin
from jaxnum.solvers import sor, sor_schedule
from jaxnum.solvers.linear.sweeps import Colours, Schedule
from tests.tolerances import tolerance


def poisson(n):
    one = sp.diags([-1.0, 2.0, -1.0], (-1, 0, 1), shape=(n, n))  # pyright: ignore[reportArgumentType]
    return (sp.kron(one, sp.eye(n)) + sp.kron(sp.eye(n), one)).tocsr()


def scattered(n=60, seed=0):
    """Diagonally dominant, not symmetric, one long row: ELL in slices."""
    rng = np.random.default_rng(seed)
    A = sp.random(n, n, density=0.05, rng=rng, data_rvs=rng.standard_normal).tolil()
    A[7, :40] = rng.standard_normal(40)
    A = A.tocsr()
    return (A + sp.diags(1 + np.asarray(abs(A).sum(axis=1)).ravel())).tocsr()


@partial(jax.jit, static_argnums=3)
def iterates(solver, A, b, steps):
    problem, x = Linear(A, b), jnp.zeros_like(b)

    def body(pair, _):
        pair = solver.step(solver.hyper, *pair, problem)
        return pair, pair[0]

    return jax.lax.scan(body, (x, begin(solver, x, problem)), None, length=steps)[1]


@pytest.mark.parametrize("make", [lambda: poisson(7), scattered], ids=["dia", "ell"])
def test_iterates_equal_scipy(make, x64):
    A, omega = make(), 1.3
    dense = A.toarray()
    b = np.random.default_rng(1).normal(size=A.shape[0])
    M = np.diag(np.diag(dense)) / omega + np.tril(dense, -1)
    x, want = np.zeros_like(b), []
    for _ in range(6):
        x = x + scipy.linalg.solve_triangular(M, b - dense @ x, lower=True)
        want.append(x)
    ours = jaxnum.sparse_operator(A)
    for matrix, schedule in ((jnp.asarray(dense), None), (ours, sor_schedule(ours))):
        got = iterates(sor(omega, schedule=schedule), matrix, jnp.asarray(b), 6)
        np.testing.assert_allclose(got, np.stack(want), atol=tolerance("float64", b.size, condition=10))


def by_colour(dense):
    """The unknowns sorted by greedy colours, found one by one."""
    coupled, colours = (dense != 0) | (dense.T != 0), []
    for i in range(len(dense)):
        taken = {colours[j] for j in range(i) if coupled[i, j]}
        colours.append(min(set(range(len(taken) + 1)) - taken))
    return np.argsort(colours, kind="stable"), max(colours) + 1


@pytest.mark.parametrize("make", [lambda: poisson(6), scattered], ids=["dia", "ell"])
def test_multicolour_is_the_natural_order_of_the_permuted_matrix(make, x64):
    A, omega = make(), 1.3
    order, colours = by_colour(A.toarray())
    sorted_, b = A.toarray()[np.ix_(order, order)], np.random.default_rng(1).normal(size=A.shape[0])
    M = np.diag(np.diag(sorted_)) / omega + np.tril(sorted_, -1)
    x, want = np.zeros_like(b), []
    for _ in range(4):
        x = x + scipy.linalg.solve_triangular(M, b[order] - sorted_ @ x, lower=True)
        want.append(x)
    ours = jaxnum.sparse_operator(A)
    schedule = sor_schedule(ours, ordering="multicolour")
    got = iterates(sor(omega, schedule=schedule), ours, jnp.asarray(b), 4)
    np.testing.assert_allclose(got[:, order], np.stack(want), atol=tolerance("float64", b.size, condition=10))
    if isinstance(schedule, Colours):
        assert schedule.count == colours == 2
        # Values where two rows of a colour meet are not those it was made for.
        moved = dataclasses.replace(ours, diagonals=jnp.ones_like(ours.diagonals))
        solver = sor(schedule=schedule)
        assert int(jaxnum.linear_solve(moved, b, solver=solver, on_failure="return").status) == Status.breakdown


def test_spectral_radius_at_the_optimum(x64):
    """It is omega - 1, of a consistently ordered matrix; the error after one step from 0 is the iteration matrix's."""
    n = 6
    A = jnp.asarray(poisson(n).toarray())
    beta = np.cos(np.pi / (n + 1))
    best = 1 + (beta / (1 + np.sqrt(1 - beta**2))) ** 2
    solver = sor(best)
    images = jax.vmap(lambda x: x - iterates(solver, A, A @ x, 1)[0])(jnp.eye(n * n))
    # An eigenvalue error of 1e-8 is what a Jordan block of two makes of rounding.
    assert abs(np.max(np.abs(np.linalg.eigvals(images.T))) - (best - 1)) < 1e-6


def test_levels_of_a_grid_are_its_antidiagonals():
    schedule = sor_schedule(poisson(8))
    assert isinstance(schedule, Schedule)
    level = np.asarray(schedule.place) // schedule.rows.shape[1]
    i, j = np.divmod(np.arange(64), 8)
    np.testing.assert_array_equal(level, i + j)


def test_solves_in_a_batch_of_relaxations(float_dtype):
    A = poisson(5).astype(float_dtype)
    b, operator = jnp.ones(25, float_dtype), jaxnum.sparse_operator(A)
    schedule = sor_schedule(operator)

    @jax.jit
    @jax.vmap
    def solved(omega):
        return jaxnum.linear_solve(operator, b, solver=sor(omega, schedule=schedule), rtol=1e-5)

    solution = solved(jnp.asarray([1.0, 1.3, 1.6], float_dtype))
    assert np.all(np.asarray(solution.status) == Status.converged)
    assert solution.steps[1] < solution.steps[0]
    np.testing.assert_allclose(solution.x, np.tile(np.linalg.solve(A.toarray(), b), (3, 1)), rtol=2e-4)
    assert solution.x.dtype == float_dtype


def test_statuses_and_the_derivative(x64):
    A, b = jnp.asarray(poisson(3).toarray()), jnp.ones(9)
    grad = jax.grad(lambda b: jnp.sum(jaxnum.linear_solve(A, b, solver=sor(1.2), rtol=1e-12).x ** 2))(b)
    want = jax.grad(lambda b: jnp.sum(jnp.linalg.solve(A, b) ** 2))(b)
    np.testing.assert_allclose(grad, want, rtol=1e-9)
    hollow = jaxnum.linear_solve(A.at[4, 4].set(0), b, solver=sor(), on_failure="return")
    assert int(hollow.status) == Status.breakdown
    # A schedule of one pattern does not fit another.
    operator = jaxnum.sparse_operator(poisson(3), format="ell")
    first, second = operator.columns[0][0, 0], operator.columns[0][1, 0]
    assert first != second
    swapped = operator.columns[0].at[0, 0].set(second).at[1, 0].set(first)
    moved = dataclasses.replace(operator, columns=(swapped, *operator.columns[1:]))
    schedule = sor_schedule(operator)
    other = jaxnum.linear_solve(moved, b, solver=sor(schedule=schedule), on_failure="return")
    assert int(other.status) == Status.breakdown
    with pytest.raises(ValueError, match="sor: `schedule` must be made for the format and size of A"):
        jaxnum.linear_solve(jaxnum.sparse_operator(poisson(3), "dia"), b, solver=sor(schedule=schedule))


def test_arguments_that_do_not_fit():
    b = jnp.ones(4)
    with pytest.raises(ValueError, match=r"sor: `omega` must be in \(0, 2\); got 2.0"):
        sor(2.0)
    with pytest.raises(TypeError, match="sor: `A` must be an array or a sparse matrix; got Function"):
        jaxnum.linear_solve(lambda v: 2 * v, b, solver=sor())
    with pytest.raises(ValueError, match="sor: `schedule` must be given for a sparse A"):
        jaxnum.linear_solve(sp.eye(4).astype(np.float32), b, solver=sor())
    with pytest.raises(ValueError, match="sor: `preconditioner` must be None"):
        jaxnum.linear_solve(jnp.eye(4), b, preconditioner=jnp.eye(4), solver=sor())
    with pytest.raises(TypeError, match="sor_schedule: `A` must be a sparse matrix; got"):
        sor_schedule(jnp.eye(4))
    with pytest.raises(ValueError, match="sor_schedule: `ordering` must be one of 'natural', 'multicolour'; got 'red'"):
        sor_schedule(sp.eye(4), ordering="red")
