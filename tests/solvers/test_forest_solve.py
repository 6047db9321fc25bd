"""Forest blocks: dense solves, the chain that is known, and SciPy's components as the judge of cycles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from jaxnum.solvers import forest_solve, forest_solve_order
from tests.tolerances import tolerance

CHAIN = 4 * np.eye(7) - np.eye(7, k=1) - np.eye(7, k=-1)


def solve(A, rhs, scores=None):
    forest = forest_solve_order(A, scores=scores)
    dense = jnp.asarray(A.toarray() if sp.issparse(A) else A)
    return forest, forest_solve(forest, jnp.diag(dense), dense[forest.nodes, forest.parents], jnp.asarray(rhs))


def random_forest(n, seed):
    """Every node but a few hangs on an earlier one; diagonally dominant."""
    rng = np.random.default_rng(seed)
    A = np.zeros((n, n))
    for i in range(1, n):
        if rng.uniform() < 0.85:
            j = rng.integers(i)
            A[i, j] = A[j, i] = rng.normal()
    return A + np.diag(np.abs(A).sum(axis=1) + 0.5), rng.normal(size=n)


def test_chain_of_seven(float_dtype):
    x = solve(CHAIN.astype(float_dtype), np.arange(1.0, 8).astype(float_dtype))[1]
    want = [0.49963181, 0.99852725, 1.49447717, 1.97938144, 2.4230486, 2.71281296, 2.42820324]
    np.testing.assert_allclose(x, want, atol=max(5e-9, tolerance(float_dtype, 7, condition=3)))


@pytest.mark.parametrize("seed", [0, 1])
def test_random_forests_equal_the_dense_solve(seed, x64):
    A, rhs = random_forest(40, seed)
    scores = np.random.default_rng(seed + 9).normal(size=40)
    forest, x = solve(sp.csr_array(A), rhs, scores)
    assert bool(forest.mask.all())
    np.testing.assert_allclose(x, np.linalg.solve(A, rhs), atol=1e-10)


def test_a_greedy_forest_of_a_grid_has_no_cycle_and_cannot_grow(x64):
    n = 9
    one = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))
    A = (sp.kron(one, sp.eye_array(n)) + sp.kron(sp.eye_array(n), one)).tocsr()
    A = A + sp.eye_array(n * n)
    rng = np.random.default_rng(2)
    forest, x = solve(A, b := rng.normal(size=n * n), rng.uniform(size=n * n))

    def has_cycle(mask):
        inside = A.toarray()[np.ix_(mask, mask)] != 0
        edges = (inside.sum() - inside.shape[0]) // 2
        return edges != inside.shape[0] - connected_components(inside)[0]

    mask = np.asarray(forest.mask)
    assert not has_cycle(mask)
    assert mask.sum() > n * n / 2
    for i in np.flatnonzero(~mask):
        assert has_cycle(mask | (np.arange(n * n) == i))
    np.testing.assert_allclose(x[mask], np.linalg.solve(A.toarray()[np.ix_(mask, mask)], b[mask]), atol=1e-10)
    np.testing.assert_array_equal(x[~mask], 0)


def test_stored_zeros_are_no_edges():
    A = sp.csr_array(CHAIN)
    A.data[A.data == -1] = 0
    assert forest_solve_order(A).nodes.shape[0] == 1


def test_derivative_equals_the_dense_one(x64):
    A, rhs = random_forest(12, 3)
    forest = forest_solve_order(A)
    of_forest = lambda b: jnp.sum(  # noqa: E731
        jnp.sin(forest_solve(forest, jnp.diag(jnp.asarray(A)), jnp.asarray(A)[forest.nodes, forest.parents], b))
    )
    got = jax.grad(of_forest)(jnp.asarray(rhs))
    want = jax.grad(lambda b: jnp.sum(jnp.sin(jnp.linalg.solve(A, b))))(jnp.asarray(rhs))
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_an_indefinite_block_is_nan():
    assert bool(jnp.isnan(solve(CHAIN - 4 * np.eye(7), np.ones(7))[1]).all())


def test_bad_input():
    with pytest.raises(ValueError, match="forest_solve_order: `A` must have a symmetric pattern"):
        forest_solve_order(np.triu(np.ones((3, 3))))
    with pytest.raises(ValueError, match="forest_solve_order: `A` must have shape"):
        forest_solve_order(np.ones((2, 3)))
    forest = forest_solve_order(CHAIN)
    with pytest.raises(ValueError, match="forest_solve: `rhs` must have shape"):
        forest_solve(forest, jnp.ones(7), jnp.ones(forest.nodes.shape), jnp.ones(6))
