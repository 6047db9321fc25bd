"""The inverse of the empirical Fisher matrix: dense inverses, the paper's recursion, and blocks of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.curvature import fisher_inverse, fisher_inverse_product
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance

M, D, DAMPING = 8, 40, 1e-3


def problem(dtype="float64"):
    rng = np.random.default_rng(3)
    return rng.normal(size=(M, D)).astype(dtype), rng.normal(size=D).astype(dtype)


def dense(G):
    return np.linalg.inv(DAMPING * np.eye(G.shape[1]) + G.T @ G / len(G))


def recursion(G, x):
    """F^-1 x as the paper's static algorithm computes it, row by row."""
    rows, q = [], []

    def apply(v):
        return v / DAMPING - sum((h * (h @ v) / c for h, c in zip(rows, q, strict=True)), np.zeros_like(v))

    for g in G:
        h = apply(g)
        rows, q = [*rows, h], [*q, len(G) + g @ h]
    return apply(x)


def test_products_diagonal_and_elements_equal_the_dense_inverse_and_the_recursion(x64):
    G, x = problem()
    want = dense(G)
    inverse = fisher_inverse(G, DAMPING)
    scale = 1e-11 / DAMPING
    np.testing.assert_allclose(inverse.product(x), want @ x, rtol=0, atol=scale)
    np.testing.assert_allclose(inverse.product(x), recursion(G, x), rtol=0, atol=scale)
    np.testing.assert_allclose(fisher_inverse_product(G, x, DAMPING), want @ x, rtol=0, atol=scale)
    np.testing.assert_allclose(inverse.diagonal(), np.diag(want), rtol=0, atol=scale)
    i, j = jnp.array([0, 7, 39, 5]), jnp.array([0, 9, 0, 5])
    np.testing.assert_allclose(jax.vmap(inverse.element)(i, j), want[i, j], rtol=0, atol=scale)
    assert [bool(jnp.isnan(inverse.element(*at))) for at in ((-1, 0), (0, D), (D - 1, D - 1))] == [True, True, False]


def test_float32_outside_the_window_keeps_its_digits():
    G, x = problem("float32")
    want = dense(G.astype("float64")) @ x
    got = jax.jit(lambda G, x: fisher_inverse(G, DAMPING).product(x))(G, x)
    assert np.linalg.norm(got - want) < tolerance("float32", D) * np.linalg.norm(want)


@pytest.mark.parametrize("block", [7, 100])
def test_blocks_are_inverted_for_themselves(block, x64):
    G, x = problem()
    want = np.zeros((D, D))
    for start in range(0, D, block):
        part = slice(start, start + block)
        want[part, part] = dense(G[:, part])
    inverse = fisher_inverse(G, DAMPING, block=block)
    scale = 1e-11 / DAMPING
    np.testing.assert_allclose(inverse.product(x), want @ x, rtol=0, atol=scale)
    np.testing.assert_allclose(inverse.diagonal(), np.diag(want), rtol=0, atol=scale)
    np.testing.assert_allclose(inverse.element(3, 5), want[3, 5], rtol=0, atol=scale)
    np.testing.assert_allclose(inverse.element(3, 39), want[3, 39], rtol=0, atol=scale)


def test_singular_blocks_raise_their_damping_and_say_so():
    # More gradients than numbers in a block: G Gᵀ is singular.
    G = 100 * np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    inverse = fisher_inverse(G, 1e-6, block=3)
    eps = float(jnp.finfo("float32").eps)
    want = [512 * eps * np.sum(np.square(part)) / 16 for part in (G[:, :3], G[:, 3:])]
    np.testing.assert_allclose(inverse.damping, want, rtol=tolerance("float32", 48))
    assert bool((inverse.diagonal() > 0).all())
    assert fisher_inverse(G, 100.0, block=3).damping.tolist() == [100.0, 100.0]


def test_bad_input():
    G, x = problem("float32")
    with pytest.raises(ShapeError, match=r"fisher_inverse: `gradients` must have shape \(M, D\); got \(8,\)"):
        fisher_inverse(G[:, 0], 1.0)
    with pytest.raises(DtypeError, match="fisher_inverse: `gradients` must have a floating-point dtype"):
        fisher_inverse(jnp.ones((2, 2), jnp.int32), 1.0)
    with pytest.raises(ValueError, match="fisher_inverse: `damping` must be greater than 0; got 0"):
        fisher_inverse(G, 0)
    with pytest.raises(ValueError, match="fisher_inverse: `block` must be a Python int of at least 1"):
        fisher_inverse(G, 1.0, block=0)
    with pytest.raises(ShapeError, match="fisher_inverse_product: `x` must have shape"):
        fisher_inverse_product(G, x[1:], 1.0)
    with pytest.raises(ShapeError, match="FisherInverse.product: `x` must have shape"):
        fisher_inverse(G, 1.0).product(G)


def test_singular_blocks_are_found_among_many():
    # In a compiled batch the minimum of NaNs need not be NaN, and a failed factorisation looked regular.
    G = np.random.default_rng(0).normal(size=(2000, 4, 6)).astype("float32") * np.float32([1e3, 1e3, 1, 1, 1, 1])
    diagonals = jax.jit(jax.vmap(lambda G: fisher_inverse(G, 1e-3).diagonal()))(G)
    assert bool(jnp.isfinite(diagonals).all())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_gradients_and_many_dampings_are_named(shape):
    with pytest.raises(ShapeError, match="fisher_inverse: `gradients` must have no axis of size 0"):
        fisher_inverse(jnp.zeros(shape), 1.0)
    with pytest.raises(ShapeError, match=r"fisher_inverse: `damping` must have shape \(\)"):
        fisher_inverse(jnp.ones((3, 3)), jnp.ones(3))
