"""Lanczos: NumPy's eigenvalues, SciPy's quadrature, and operators whose Krylov space ends early."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matfree import decomp

from jaxnum.curvature import empirical_fisher_product, lanczos
from kernels_pallas.checks import DtypeError, ShapeError
from tests.compiles import count_compiles
from tests.curvature.problems import flat, losses, network
from tests.tolerances import tolerance


def with_spectrum(values, seed=0):
    n = len(values)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    A = Q * np.asarray(values) @ Q.T
    return (A + A.T) / 2


def start(n, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(7).normal(size=n), dtype)


def test_as_many_steps_as_unknowns_give_all_eigenpairs(x64):
    A = with_spectrum(np.linspace(-3, 5, 20))
    result = lanczos(A, start(20), 20)
    values, vectors = np.linalg.eigh(A)
    np.testing.assert_allclose(result.values, values, atol=1e-10)
    v = start(20) / jnp.linalg.norm(start(20))
    np.testing.assert_allclose(result.weights, (vectors.T @ v) ** 2, atol=1e-10)
    for i in (0, 7, 19):
        u = result.vector(i)
        np.testing.assert_allclose(A @ u, values[i] * u, atol=1e-10)
    assert int(result.rank) == 20


def test_equals_matfree_where_nothing_breaks_down(x64):
    A = with_spectrum(np.geomspace(1, 50, 30))
    v = start(30)
    result = lanczos(A, v, 8)
    peer = decomp.tridiag_sym(8, reortho="full")(lambda x: jnp.asarray(A) @ x, v)
    np.testing.assert_allclose(result.values, np.linalg.eigvalsh(peer.J_small), rtol=1e-10)


@pytest.mark.parametrize(
    ("values", "rank"),
    [(np.full(8, 2.0), 1), (np.repeat([1.0, 4.0, 9.0], 4), 3), (np.r_[np.zeros(9), 1.0, 3.0], 3), (np.zeros(5), 1)],
    ids=["2 I", "three eigenvalues", "low rank", "zero"],
)
def test_stops_where_the_krylov_space_ends(values, rank, float_dtype):
    """One Ritz value for each distinct eigenvalue, of weight the share of v0 there; all else is zero, and no NaN."""
    A = np.asarray(with_spectrum(values), float_dtype)
    A = 2 * np.eye(8, dtype=float_dtype) if rank == 1 and values[0] else A
    result = lanczos(A, start(len(values), float_dtype), 6)
    assert int(result.rank) == rank
    bound = tolerance(float_dtype, len(values), condition=10)
    np.testing.assert_allclose(result.values[:rank], np.unique(values), atol=bound * (1 + max(values)))
    np.testing.assert_array_equal(result.values[rank:], 0)
    np.testing.assert_array_equal(result.weights[rank:], 0)
    np.testing.assert_array_equal(result.active, np.arange(6) < rank)
    assert abs(float(jnp.sum(result.weights)) - 1) < bound
    assert float(jnp.max(result.residuals)) < bound * (1 + max(values))


def test_empirical_fisher_of_a_network_on_its_tree(x64):
    """Rank 5 of 31, and 0 in the spectrum of the start: six Ritz values."""
    params, logits = network()
    product = empirical_fisher_product(lambda p: losses(logits(p)), params)
    result = lanczos(product, jax.tree.map(jnp.ones_like, params), 12)
    vector, f, _ = flat(lambda p: losses(logits(p)), params)
    J = jax.jacobian(f)(vector)
    assert int(result.rank) == 6
    np.testing.assert_allclose(result.values[1:6], np.linalg.eigvalsh(J @ J.T / 5), rtol=1e-9)
    u = result.vector(5)
    want = jax.tree.map(lambda leaf: leaf * result.values[5], u)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), product(u), want)


def test_no_ghosts_in_float32():
    values = np.r_[np.linspace(0, 1, 60), 100.0, 200.0]
    result = lanczos(with_spectrum(values).astype(np.float32), start(62, np.float32), 40)
    assert int(jnp.sum(result.values > 50)) == 2
    np.testing.assert_allclose(result.values[-2:], [100, 200], rtol=1e-5)


def test_jit_and_vmap_equal_the_plain_call(x64):
    A = jnp.asarray(np.stack([with_spectrum(np.arange(1.0, 7)), with_spectrum(np.repeat([1.0, 2.0, 3.0], 2))]))
    one = lambda A: lanczos(lambda v: A @ v, start(6), 5)[:5]  # noqa: E731
    together = jax.jit(jax.vmap(one))(A)
    for i in range(2):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-11), together, one(A[i]))
    np.testing.assert_array_equal(together[4], [5, 3])


def test_a_fresh_operator_of_the_same_program_compiles_nothing(x64):
    v = start(6)
    matrices = [jnp.asarray(with_spectrum(np.arange(1.0, 7), seed)) for seed in (0, 1)]
    operators = [lambda v, A=A: A @ v for A in matrices]
    lanczos(operators[0], v, 4)
    with count_compiles() as compiled:
        lanczos(operators[1], v, 4)
    assert compiled() == 0


def test_bfloat16_unknowns_keep_their_basis_in_float32():
    result = lanczos(lambda v: jnp.arange(1, 9, dtype=v.dtype) * v, jnp.ones(8, jnp.bfloat16), 3)
    assert result.values.dtype == result.basis.dtype == jnp.float32
    gram = result.basis @ result.basis.T
    np.testing.assert_allclose(gram, np.eye(3), atol=tolerance("float32", 8))


def test_zero_start_and_nan():
    nothing = lanczos(jnp.eye(4), jnp.zeros(4), 3)
    assert int(nothing.rank) == 0
    np.testing.assert_array_equal(nothing.values, 0)
    assert bool(jnp.isnan(lanczos(jnp.full((4, 4), jnp.nan), jnp.ones(4), 3).values).all())


def test_an_operator_whose_squares_vanish_has_its_spectrum():
    A = np.diag([1.0, 2.0, 4.0])
    small = lanczos(jnp.asarray(A * 1e-22, jnp.float32), jnp.ones(3), 5)
    assert int(small.rank) == 3
    np.testing.assert_allclose(small.values[:3] * 1e22, [1, 2, 4], rtol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="lanczos: `num_steps` must be a Python int >= 1; got 0"):
        lanczos(jnp.eye(3), jnp.ones(3), 0)
    with pytest.raises(ValueError, match=r"lanczos: `tol` must be in \[0, 1\); got -1"):
        lanczos(jnp.eye(3), jnp.ones(3), 2, tol=-1)
    with pytest.raises(TypeError, match="lanczos: `op` must be a linear function v -> A v or an array"):
        lanczos("A", jnp.ones(3), 2)
    with pytest.raises(ShapeError, match=r"lanczos: `op\(v0\)` must have shape \(3,\)"):
        lanczos(lambda v: v[:2], jnp.ones(3), 2)
    with pytest.raises(DtypeError, match="lanczos: `v0` must have a floating-point dtype; got int32"):
        lanczos(jnp.eye(3), jnp.arange(3), 2)
