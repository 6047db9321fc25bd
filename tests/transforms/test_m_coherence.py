"""m-coherence: orthogonal, equal, opposed and random gradients; pieces; pairs by brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.transforms import m_coherence, m_coherence_from_loss, m_coherence_stream
from kernels_pallas.checks import DtypeError, ShapeError, TreeError
from tests.tolerances import tolerance
from tests.transforms.aggregators import counts


def test_known_values():
    opposed = jnp.concatenate([jnp.ones((16, 3)), -jnp.ones((16, 3))])
    for gradients, want in ((jnp.eye(8), 1.0), (jnp.ones((32, 5)), 32.0), (opposed, 0.0)):
        np.testing.assert_allclose(m_coherence(gradients), want, rtol=tolerance("float32", 32))
    gaussian = jax.random.normal(jax.random.key(0), (32, 100_000))
    assert abs(float(m_coherence(gaussian)) - 1) < 0.02
    assert abs(float(m_coherence(gaussian, unbiased=True))) < 1e-3
    assert np.isnan(m_coherence(jnp.zeros((4, 2))))


def test_pairs_by_brute_force(x64):
    g = jax.random.normal(jax.random.key(1), (7, 10)) + 0.3
    products = g @ g.T
    np.testing.assert_allclose(m_coherence(g), products.sum() / jnp.trace(products), rtol=1e-10)
    pairs = (products.sum() - jnp.trace(products)) / (7 * 6)
    np.testing.assert_allclose(m_coherence(g, unbiased=True), pairs / (jnp.trace(products) / 7), rtol=1e-10)


def test_pieces_equal_the_whole_and_leaves_add(key):
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}
    grads = {k: (jax.random.normal(key, (12, *p.shape)) + 0.5).astype(p.dtype) for k, p in params.items()}
    for by_leaf in (False, True):
        init, add, value = m_coherence_stream(by_leaf=by_leaf)
        state = init(params)
        for a, b in ((0, 1), (1, 7), (7, 12)):
            state = jax.jit(add)(state, jax.tree.map(lambda g, a=a, b=b: g[a:b], grads))
        want = m_coherence(grads, by_leaf=by_leaf)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), value(state), want)
        assert int(state.count) == 12
    flat = jnp.concatenate([g.astype("float32").reshape(12, -1) for g in jax.tree.leaves(grads)], axis=1)
    np.testing.assert_allclose(m_coherence(grads), m_coherence(flat), rtol=1e-6)
    last = jax.tree.map(lambda g: jnp.moveaxis(g, 0, -1), grads)
    np.testing.assert_allclose(m_coherence(last, axis=-1), m_coherence(flat), rtol=1e-6)


def test_a_loss_equals_its_dense_jacobian(x64):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=2))}
    data = rng.normal(size=(11, 3))
    loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + p["b"]))  # noqa: E731
    jacobian = jax.jacrev(jax.jit(lambda p: jax.vmap(loss, (None, 0))(p, data)))(params)
    flat = np.concatenate([np.asarray(g).reshape(11, -1) for g in jax.tree.leaves(jacobian)], axis=1)
    want = (flat.sum(axis=0) ** 2).sum() / (flat**2).sum()
    for batch_size in (None, 1, 4, 20):
        got = jax.jit(lambda p, b=batch_size: m_coherence_from_loss(loss, p, data, batch_size=b))(params)
        np.testing.assert_allclose(got, want, rtol=1e-10)
    got = m_coherence_from_loss(loss, params, data, batch_size=4, unbiased=True)
    np.testing.assert_allclose(got, (want - 1) / 10, rtol=1e-10)
    leaves = m_coherence_from_loss(loss, params, data, by_leaf=True, batch_size=3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), leaves, m_coherence(jacobian, by_leaf=True))


@pytest.mark.parametrize("sizes", [(1e-30, 1e-30), (1e30, 1e30), (1e-30, 1e30), (1e30, 1e28), (0.0, 1e-25)])
@pytest.mark.parametrize("pair", [False, True])
def test_squares_neither_overflow_nor_vanish(sizes, pair):
    g = np.random.default_rng(0).normal(size=(8, 5, 1 + pair)) + 0.5
    g[:4] *= sizes[0]
    g[4:] *= sizes[1]
    want = (g.sum(axis=0) ** 2).sum() / (g**2).sum()
    short = jnp.asarray(g, jnp.float32)
    short = {"a": short[..., 0]} | ({"b": 1j * short[..., 1]} if pair else {})
    np.testing.assert_allclose(m_coherence(short), want, rtol=1e-6)
    init, add, value = m_coherence_stream()
    state = init(jax.tree.map(lambda x: x[0], short))
    for part in (slice(0, 4), slice(4, 8)):
        state = add(state, jax.tree.map(lambda x, part=part: x[part], short))
    np.testing.assert_allclose(value(state), want, rtol=1e-6)


def test_what_is_not_finite_shows():
    for bad in (jnp.inf, jnp.nan):
        g = {"a": jnp.ones((4, 2)).at[1, 0].set(bad), "b": jnp.ones(4)}
        assert np.isnan(m_coherence(g))
        leaves = m_coherence(g, by_leaf=True)
        assert np.isnan(leaves["a"])
        np.testing.assert_allclose(leaves["b"], 4.0)


def test_bad_gradients_are_named():
    init, add, _ = m_coherence_stream()
    with pytest.raises(ShapeError, match="^m_coherence: `updates` must have an axis 0 of examples"):
        m_coherence(jnp.float32(1))
    with pytest.raises(TreeError, match="^m_coherence_stream: `updates` must "):
        add(init({"w": jnp.zeros(2)}), jnp.ones((3, 2)))
    loss = lambda w, x: jnp.sum(w * x)  # noqa: E731
    name = "m_coherence_from_loss"
    counts(name, "batch_size", 1, lambda b: m_coherence_from_loss(loss, jnp.ones(2), jnp.ones((3, 2)), batch_size=b))
    with pytest.raises(ShapeError, match=rf"^{name}: `data\[1\]` must have 2 examples; got 3"):
        m_coherence_from_loss(loss, jnp.ones(2), (jnp.ones(2), jnp.ones(3)))
    with pytest.raises(ShapeError, match=rf"^{name}: `loss` must have shape \(\); got \(2,\)"):
        m_coherence_from_loss(lambda w, x: w, jnp.ones(2), jnp.ones(3))
    with pytest.raises(DtypeError, match=f"^{name}: `params` must have a floating-point or complex dtype"):
        m_coherence_from_loss(loss, jnp.arange(2), jnp.ones((3, 2)))
