"""Sparse operators: products, diagonals and derivatives equal scipy's; what cannot be converted says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spla
from jax.experimental import sparse

import jaxnum
from jaxnum import Status
from tests.tolerances import tolerance


def uneven(n, seed=0):
    """Symmetric positive definite, a few entries a row and one full row."""
    rng = np.random.default_rng(seed)
    A = sp.random(n, n, 3 / n, random_state=seed, data_rvs=lambda size: rng.normal(size=size)).tolil()
    A[0, :] = rng.normal(size=n)
    A = (A + A.T).tocsr()
    return A + sp.diags(np.asarray(abs(A).sum(axis=1)).ravel() + 1)


def poisson(n):
    one = sp.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(n, n))
    return (sp.kron(one, sp.eye(n)) + sp.kron(sp.eye(n), one)).tocsr()


@pytest.mark.parametrize("form", ["dia", "ell"])
@pytest.mark.parametrize("make", [lambda: uneven(90), lambda: poisson(6)], ids=["uneven", "poisson"])
def test_products_equal_scipy(make, form, float_dtype):
    A = make().astype(float_dtype)
    v = np.random.default_rng(1).normal(size=A.shape[0]).astype(float_dtype)
    operator = jaxnum.sparse_operator(A, form)
    bound = tolerance(float_dtype, A.shape[0], condition=abs(A).sum(axis=1).max())
    np.testing.assert_allclose(operator.matvec(v), A @ v, atol=bound)
    np.testing.assert_allclose(operator.diagonal(), A.diagonal())
    (back,) = jax.linear_transpose(operator.matvec, jnp.asarray(v))(jnp.asarray(v))
    np.testing.assert_allclose(back, A.T @ v, atol=bound)
    assert operator.dtype == float_dtype
    assert operator.shape == A.shape


def test_uneven_rows_cost_little(x64):
    A = uneven(400)
    operator = jaxnum.sparse_operator(A)
    assert sum(v.size for v in operator.values) <= 1.3 * A.nnz
    assert repr(operator).startswith("EllOperator(400 x 400, float64, rows of ")
    assert f"{A.nnz} entries" in repr(operator)


def test_rectangular_duplicates_and_empty_rows(x64):
    A = sp.coo_matrix(([1.0, 2.0, 3.0], ([3, 0, 3], [1, 2, 1])), shape=(4, 3))
    operator = jaxnum.sparse_operator(A)
    np.testing.assert_allclose(operator.matvec(jnp.arange(1.0, 4)), A @ np.arange(1.0, 4))
    padded = sparse.BCOO.fromdense(A.toarray(), nse=7)
    np.testing.assert_allclose(jaxnum.sparse_operator(padded).matvec(jnp.arange(1.0, 4)), A @ np.arange(1.0, 4))


def test_solves_and_gradients(x64):
    A, b = uneven(60), np.random.default_rng(2).normal(size=60)
    want = np.linalg.solve(A.toarray(), b)
    theirs = sparse.BCOO.from_scipy_sparse(A)
    for given in (A, theirs, jaxnum.sparse_operator(A)):
        np.testing.assert_allclose(jaxnum.linear_solve(given, jnp.asarray(b), rtol=1e-12).x, want, atol=1e-10)
    operator = jaxnum.sparse_operator(A)
    grad = jax.grad(lambda A: jaxnum.linear_solve(A, jnp.asarray(b), rtol=1e-12).x.sum(), allow_int=True)(operator)
    # d sum(x) / dA_ij = -y_i x_j with A y = 1, here on the diagonal.
    np.testing.assert_allclose(
        _at_diagonal(operator, grad), -np.linalg.solve(A.toarray(), np.ones(60)) * want, atol=1e-10
    )


def _at_diagonal(operator, grad):
    """The derivative's values where the operator's columns meet the diagonal."""
    ids = np.argsort(np.asarray(operator.place))
    out, start = np.zeros(60), 0
    for values, columns in zip(grad.values, operator.columns, strict=True):
        mine = ids[start : start + columns.shape[1]]
        hit = np.asarray(columns) == mine
        # Padding looks at the diagonal too; entries come first.
        out[mine] = np.asarray(values)[hit.argmax(axis=0), np.arange(mine.size)]
        start += mine.size
    return out


def test_iteration_counts_and_several_right_hand_sides(x64):
    A = poisson(20)
    B = np.random.default_rng(3).normal(size=(400, 3))
    operator = jaxnum.sparse_operator(A)
    counts = []
    for b in B.T:
        counts.append(0)
        spla.cg(A, b, rtol=1e-8, callback=lambda _: counts.__setitem__(-1, counts[-1] + 1))
    together = jax.vmap(lambda b: jaxnum.linear_solve(operator, b, rtol=1e-8), in_axes=1)(B)
    np.testing.assert_allclose(together.x.T, spla.spsolve(A.tocsc(), B), atol=1e-6)
    assert np.max(np.abs(np.asarray(together.steps) - counts)) <= 1


def test_what_is_not_sparse():
    A = sparse.BCOO.fromdense(jnp.eye(3))
    with pytest.raises(TypeError, match="sparse_operator: `A` must be concrete; got a traced matrix"):
        jax.jit(jaxnum.sparse_operator)(A)
    with pytest.raises(TypeError, match="sparse_operator: `A` must be a scipy sparse matrix"):
        jaxnum.sparse_operator(np.eye(3))
    with pytest.raises(TypeError, match="sparse_operator: `A` must have a floating-point"):
        jaxnum.sparse_operator(sp.eye(3, dtype=int))
    with pytest.raises(ValueError, match='must be square.*Use format="ell"'):
        jaxnum.sparse_operator(sp.eye(3, 4), "dia")


def test_symmetry_check(x64):
    A = jnp.asarray(uneven(30).toarray())
    key = jax.random.key(0)
    assert float(jaxnum.check_symmetric(lambda v: A @ v, key, jnp.ones(30))) < 1e-14
    wrong = A.at[3, 4].add(1.0)
    assert float(jaxnum.check_symmetric(wrong, key)) > 1e-6
    for flexible in (None, 1):
        for M, status in ((A, Status.converged), (wrong, Status.breakdown)):
            solver = jaxnum.solvers.cg(flexible=flexible, verify_symmetry=True)
            solution = jaxnum.linear_solve(lambda v: M @ v, jnp.ones(30), solver=solver, on_failure="return")  # noqa: B023
            assert int(solution.status) == status


def test_breakdown_names_its_direction(x64):
    A = jnp.diag(jnp.array([3.0, 2.0, -1.0]))
    p = jaxnum.linear_solve(A, jnp.ones(3), on_failure="return").state.p
    assert float(p @ A @ p) <= 0
    assert float(p @ p) > 0


@pytest.mark.parametrize("format", ["dia", "ell"])
def test_a_block_or_another_length_is_refused(format):
    A = (np.diag([1.0, 2.0, 3.0]) + np.eye(3, k=1)).astype(np.float32)
    operator = jaxnum.sparse_operator(sp.csr_array(A), format)
    for v in (jnp.eye(3), jnp.ones(2), jnp.ones(1)):
        with pytest.raises(ValueError, match="Operator.matvec: `v` must have shape"):
            operator.matvec(v)
    np.testing.assert_allclose(jax.vmap(operator.matvec, 1, 1)(jnp.eye(3)), A)


@pytest.mark.parametrize("format", ["dia", "ell"])
def test_a_stored_matrix_that_is_not_symmetric_breaks_cg_down(format, x64):
    skew = sp.diags([-1.0, 4.0, -1.05], [-1, 0, 1], shape=(50, 50)).tocsr()
    for A, status in ((skew, jaxnum.Status.breakdown), ((skew + skew.T) / 2, jaxnum.Status.converged)):
        solution = jaxnum.linear_solve(jaxnum.sparse_operator(A, format), jnp.ones(50), on_failure="return")
        assert int(solution.status) == status
