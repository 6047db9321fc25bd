"""Partitions for block coordinate descent: by hand, forests by SciPy's components, and descent on forests of a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

import jaxnum
from jaxnum import Minimize
from jaxnum.solvers import bcd, bcd_partition, bcd_partition_forests


def grid(n):
    """The Laplacian of an n x n grid, and a little more on the diagonal."""
    one = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    return sp.csr_array(np.kron(one, np.eye(n)) + np.kron(np.eye(n), one) + 0.2 * np.eye(n * n))


def test_blocks():
    L = np.array([1.0, 9.0, 2.0, 8.0, 3.0])
    assert bcd_partition(L, 2).tolist() == [[1, 3], [4, 2], [0, -1]]
    assert bcd_partition(L, 2, order="given").tolist() == [[0, 1], [2, 3], [4, -1]]
    assert bcd_partition(L, 2, order="average").tolist() == [[1, 2], [3, 0], [4, -1]]
    with pytest.raises(ValueError, match="bcd_partition: `block_size` must be a Python int >= 1; got 0"):
        bcd_partition(L, 0)


@pytest.mark.parametrize("scored", [False, True])
def test_forests_hold_every_coordinate_and_no_cycle(scored):
    A = grid(7)
    forests = bcd_partition_forests(A, scores=np.random.default_rng(0).uniform(size=49) if scored else None)
    masks = np.asarray(forests.mask)
    assert masks.any(axis=0).all()
    assert len(masks) <= 3
    for mask, nodes in zip(masks, np.asarray(forests.nodes), strict=True):
        inside = A.toarray()[np.ix_(mask, mask)] != 0
        assert (inside.sum() - mask.sum()) / 2 == mask.sum() - connected_components(inside)[0]
        assert sorted(nodes[nodes < 49]) == np.flatnonzero(mask).tolist()
        assert mask.sum() > 49 / 2


def test_a_step_is_the_dense_solve_on_its_forest(x64):
    """Of a function that is no quadratic, by the Hessian at x that NumPy has entry by entry."""
    A, rng = grid(6).toarray(), np.random.default_rng(1)
    b, x = rng.normal(size=36), rng.normal(size=36)
    f = lambda x: 0.5 * x @ A @ x - b @ x + 0.05 * jnp.sum(x**4)  # noqa: E731
    g, H = A @ x - b + 0.2 * x**3, A + np.diag(0.6 * x**2)
    forests = bcd_partition_forests(A)
    masks = np.asarray(forests.mask)
    best = np.argmax((masks * g**2).sum(axis=1))
    B = np.flatnonzero(masks[best])
    want = x.copy()
    want[B] -= np.linalg.solve(H[np.ix_(B, B)], g[B])
    solver, problem, x = bcd(blocks=forests), Minimize(f), jnp.asarray(x)
    step = jax.jit(lambda x: solver.step(solver.hyper, x, solver.init(solver.hyper, x, problem), problem)[0])
    np.testing.assert_allclose(step(x), want, atol=1e-12)


def test_descent_on_forests(x64):
    """The grid by cycles of them; and a double well, whose Hessian is indefinite where it starts."""
    A, b = grid(6).toarray(), np.random.default_rng(2).normal(size=36)
    forests = bcd_partition_forests(A)
    solver = bcd(blocks=forests, selection="cyclic")
    solution = jaxnum.solve(solver, jnp.zeros(36), Minimize(lambda x: 0.5 * x @ A @ x - b @ x), rtol=1e-10)
    np.testing.assert_allclose(solution.x, np.linalg.solve(A, b), atol=1e-10)
    wells = lambda x: 0.05 * x @ A @ x + jnp.sum((x**2 - 1) ** 2)  # noqa: E731
    start = 0.1 + 0.2 * jnp.abs(jnp.asarray(b))
    solution = jaxnum.solve(bcd(blocks=forests), start, Minimize(wells), rtol=1e-8)
    assert np.linalg.norm(0.1 * A @ solution.x + 4 * solution.x * (solution.x**2 - 1)) < 1e-7
    assert np.all(solution.x > 0.5)


def test_bad_forests():
    forests = bcd_partition_forests(grid(3))
    cases = [
        ({"selection": "gsl", "lipschitz": np.ones(9)}, "bcd: `selection` must be 'gs' or 'gsd' where the blocks are"),
        ({"update": "gradient"}, "bcd: `update` must be 'newton' where the blocks are forests"),
        ({"blocks": forests._replace(mask=forests.mask & (np.arange(9) > 0))}, "bcd: `blocks` must cover every"),
        ({"blocks": forests._replace(nodes=forests.nodes[0])}, "bcd: `nodes` must have shape"),
    ]
    for options, match in cases:
        with pytest.raises(ValueError, match=match):
            bcd(**({"blocks": forests} | options))
    with pytest.raises(ValueError, match="bcd: `blocks` must hold the 4 entries of x; got 9 coordinates"):
        jaxnum.solve(bcd(blocks=forests), jnp.zeros(4), Minimize(lambda x: jnp.sum(x**2)))
