"""SSOR: scipy's triangular solves, scipy's preconditioned CG, and a third of the steps of plain CG."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg as spla

import jaxnum
from jaxnum.solvers import sor_schedule, ssor, ssor_preconditioner
from tests.solvers.test_sor import by_colour, iterates, poisson, scattered
from tests.tolerances import tolerance


def inverse(A, omega):
    """M as scipy's triangular solves make it."""
    D, L, U = np.diag(np.diag(A)), np.tril(A, -1), np.triu(A, 1)
    forth = scipy.linalg.solve_triangular(D + omega * L, np.eye(len(A)), lower=True)
    return omega * (2 - omega) * scipy.linalg.solve_triangular(D + omega * U, D @ forth)


@jax.jit
def both_ways(A, v, omega, schedule):
    ours = ssor_preconditioner(A, omega, schedule=schedule)
    return ours.matvec(v), jax.linear_transpose(ours.matvec, v)(v)[0]


@pytest.mark.parametrize("make", [lambda: poisson(7), scattered], ids=["dia", "ell"])
def test_iterates_and_preconditioner_equal_scipy(make, x64):
    A, omega = make(), 1.4
    dense = A.toarray()
    M, b = inverse(dense, omega), np.random.default_rng(2).normal(size=A.shape[0])
    x, want = np.zeros_like(b), []
    for _ in range(5):
        x = x + M @ (b - dense @ x)
        want.append(x)
    atol = tolerance("float64", b.size, condition=30)
    for matrix, schedule in ((jnp.asarray(dense), None), (jaxnum.sparse_operator(A), sor_schedule(A))):
        got = iterates(ssor(omega, schedule=schedule), matrix, jnp.asarray(b), 5)
        np.testing.assert_allclose(got, np.stack(want), atol=atol)
        image, transposed = both_ways(matrix, jnp.asarray(b), omega, schedule)
        np.testing.assert_allclose(image, M @ b, atol=atol)
        np.testing.assert_allclose(transposed, M.T @ b, atol=atol)
    # Colour by colour it is that of the permuted matrix.
    order, _ = by_colour(dense)
    permuted = np.zeros_like(dense)
    permuted[np.ix_(order, order)] = inverse(dense[np.ix_(order, order)], omega)
    schedule = sor_schedule(A, ordering="multicolour")
    image, transposed = both_ways(jaxnum.sparse_operator(A), jnp.asarray(b), omega, schedule)
    np.testing.assert_allclose(image, permuted @ b, atol=atol)
    np.testing.assert_allclose(transposed, permuted.T @ b, atol=atol)


def test_preconditioned_cg_needs_a_third_of_the_steps(x64):
    """And as many as scipy's with the same M, on 64 x 64 unknowns."""
    A, b = poisson(64), jnp.ones(64 * 64)
    omega = 2 / (1 + np.sin(np.pi / 65))
    operator = jaxnum.sparse_operator(A)
    M = ssor_preconditioner(operator, omega)
    plain = jaxnum.linear_solve(operator, b, rtol=1e-8)
    ours = jaxnum.linear_solve(operator, b, preconditioner=M, rtol=1e-8)
    assert int(plain.steps) >= 3 * int(ours.steps)
    product, seen = jax.jit(M.matvec), []
    theirs = spla.LinearOperator(A.shape, lambda v: np.asarray(product(v)), dtype=float)  # pyright: ignore[reportCallIssue]
    x, _ = spla.cg(A, np.ones(64 * 64), rtol=1e-8, M=theirs, callback=lambda x: seen.append(0))
    assert abs(len(seen) - int(ours.steps)) <= 1
    np.testing.assert_allclose(ours.x, x, rtol=1e-6)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"ssor: `omega` must be in \(0, 2\)"):
        ssor(0.0)
    with pytest.raises(TypeError, match="ssor_preconditioner: `A` must be an array or a sparse matrix; got function"):
        ssor_preconditioner(lambda v: v)
