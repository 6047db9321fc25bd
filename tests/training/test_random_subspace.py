"""Random subspaces: adjoints, norms and angles of the columns, Fastfood by scipy's matrix, a toy of known dimension."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import hadamard

from jaxnum.training import random_subspace, random_subspace_projection
from kernels_pallas.checks import DtypeError, ShapeError, TreeError
from tests.tolerances import tolerance

KINDS = ("dense", "sparse", "fastfood")


@jax.jit
def matrix(P):
    """P as an array [D, d]."""
    return jax.vmap(P.apply, out_axes=1)(jnp.eye(P.dimension))


@jax.jit
def products(P, u, g):
    """P u, Pᵀ g, and Pᵀ g by reverse mode."""
    return P.apply(u), P.adjoint(g), jax.grad(lambda u: jnp.vdot(g, P.apply(u)))(u)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_adjoint_and_memory(kind, key):
    D, d = 3000, 50
    P = random_subspace_projection(key, d, D, kind=kind)
    columns = np.asarray(matrix(P), np.float64)
    norms = np.linalg.norm(columns, axis=0)
    if kind == "fastfood":
        assert abs(norms - 1).max() < 0.03
    else:
        np.testing.assert_allclose(norms, 1, rtol=tolerance("float32", D))
    assert abs(columns.T @ columns - np.diag(norms**2)).max() < 0.1
    if kind == "sparse":
        assert ((columns != 0).sum(axis=0) == 55).all()
        edges = np.arange(56) * D // 55
        assert (np.add.reduceat(columns != 0, edges[:-1], axis=0) == 1).all()
    u, g = (np.random.default_rng(0).normal(size=n).astype(np.float32) for n in (d, D))
    drawn_again = random_subspace_projection(key, d, D, kind=kind, memory="key")
    for projection in (P, drawn_again):
        for got, want in zip(products(projection, u, g), (columns @ u, columns.T @ g, columns.T @ g), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_fastfood_is_its_product_of_matrices(key, x64):
    D, d, L = 100, 7, 128
    P = random_subspace_projection(key, d, D, kind="fastfood")
    signs, order, normal = (np.asarray(part, np.float64) for part in P.held)
    H = hadamard(L).astype(float)
    want = (H * normal) @ np.eye(L)[order.astype(int)] @ H[:, :d] * signs
    scale = np.sqrt(L * (normal**2).sum()) * np.sqrt(D / L)
    np.testing.assert_allclose(matrix(P), want[:D] / scale, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_constraints_have_ten_dimensions(kind, key, x64):
    # Of 1000 numbers ten sums of 100 shall be 1 to 10: exp(-mean squared error) of the best point.
    P = random_subspace_projection(key, 12, 1000, kind=kind)
    sums = np.asarray(matrix(P)).reshape(10, 100, 12).sum(axis=1)
    wanted = np.arange(1.0, 11.0)
    for d in (9, 10, 12):
        best = np.linalg.lstsq(sums[:, :d], wanted)[0]
        score = np.exp(-np.mean((sums[:, :d] @ best - wanted) ** 2))
        assert score < 0.5 if d < 10 else abs(score - 1) < 1e-6


def test_trees_keep_shapes_dtypes_and_gradients(key):
    params = {"w": jax.random.normal(key, (20, 6)), "b": jnp.ones(6, jnp.bfloat16)}
    theta, subspace = random_subspace(params, key, 5, kind="dense")
    assert theta.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, subspace.params(theta), params)
    moved = subspace.params(theta.at[2].set(3.0))
    assert jax.tree.map(lambda p: (p.shape, p.dtype), moved) == jax.tree.map(lambda p: (p.shape, p.dtype), params)

    def loss(params):
        return jnp.sum(jnp.tanh(params["w"]) @ params["b"].astype("float32"))

    gradient = jax.jit(jax.grad(lambda theta, subspace: loss(subspace.params(theta))))(theta, subspace)
    rounded = float(jnp.finfo(jnp.bfloat16).eps)  # one leaf, and its gradient, are rounded to bfloat16
    np.testing.assert_allclose(gradient, subspace.adjoint(jax.grad(loss)(params)), rtol=rounded)
    flat = np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(moved)])
    start = np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(params)])
    np.testing.assert_allclose(flat - start, 3 * subspace.projection.held[2], atol=rounded * np.abs(flat).max())


def test_it_trains_under_scan_and_vmap_and_shows_nan(key):
    def train(key):
        theta, subspace = random_subspace(jnp.zeros(64), key, 16, memory="key")
        optimiser = optax.adam(0.1)

        def step(carry, _):
            theta, state = carry
            value, slope = jax.value_and_grad(lambda t: jnp.sum((subspace.params(t)[:4] - 1) ** 2))(theta)
            updates, state = optimiser.update(slope, state)
            return (optax.apply_updates(theta, updates), state), value

        return jax.lax.scan(step, (theta, optimiser.init(theta)), None, 100)[1]

    losses = jax.jit(jax.vmap(train))(jax.random.split(key, 2))
    assert (losses[:, -1] < 1e-3 * losses[:, 0]).all()
    theta, subspace = random_subspace(jnp.zeros(64), key, 16)
    assert np.isnan(subspace.params(theta.at[3].set(jnp.nan))).all()


def test_a_gradient_by_key_keeps_no_columns(key):
    theta, subspace = random_subspace(jnp.zeros(10_000), key, 100, kind="dense", memory="key")
    slope = jax.jit(jax.grad(lambda theta, subspace: jnp.sum(jnp.sin(subspace.params(theta)))))
    held = slope.lower(theta, subspace).compile().memory_analysis()
    assert held is not None
    assert held.temp_size_in_bytes < 100 * 10_000 * 4 / 4


def test_bad_input_is_named(key):
    ones = jnp.ones(8)
    with pytest.raises(ValueError, match="^random_subspace: `dimension` must be a Python int from 1 to 8, the"):
        random_subspace(ones, key, 9)
    with pytest.raises(DtypeError, match=r"^random_subspace: `params\['n'\]` must have a floating-point dtype"):
        random_subspace({"n": jnp.arange(3)}, key, 1)
    with pytest.raises(ValueError, match="^random_subspace: `params` must have at least one entry"):
        random_subspace({}, key, 1)
    with pytest.raises(ValueError, match="^random_subspace_projection: `kind` must be one of 'dense', 'sparse'"):
        random_subspace_projection(key, 2, 8, kind="fast")
    with pytest.raises(DtypeError, match="^random_subspace: `key` must be a typed random key"):
        random_subspace(ones, jax.random.PRNGKey(0), 2)
    _, subspace = random_subspace(ones, key, 2)
    with pytest.raises(ShapeError, match=r"^Projection.apply: `theta` must have shape \(2,\); got \(3,\)"):
        subspace.params(jnp.zeros(3))
    with pytest.raises(TreeError, match="^Subspace.adjoint: `gradient` must"):
        subspace.adjoint({"w": ones})


@pytest.mark.parametrize("kind", ["dense", "fastfood"])
def test_norms_of_long_columns_fit_in_float16(kind, key):
    P = random_subspace_projection(key, 2, 70_000, kind=kind, dtype=jnp.float16)
    column = P.apply(jnp.array([0.0, 1.0])).astype(jnp.float32)
    np.testing.assert_allclose(jnp.linalg.norm(column), 1, atol=0.02)


def test_a_size_that_is_no_integer_is_named(key):
    with pytest.raises(ValueError, match="`size` must be a Python int of at least 1; got 10.0"):
        random_subspace_projection(key, 3, 10.0)
