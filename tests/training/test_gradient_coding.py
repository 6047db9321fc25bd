"""Gradient coding: every set of survivors decodes, fewer are refused, and pytrees go through under jit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import (
    gradient_coding,
    gradient_coding_decode,
    gradient_coding_encode,
    gradient_coding_scheme,
    gradient_coding_vector,
)
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance
from tests.training import coded


@pytest.mark.parametrize("kind", ["cyclic", "roots", "fractional"])
def test_all_sets_of_n_minus_s_survivors_decode(kind):
    for n in range(1, 9):
        for s in range(n):
            if kind == "fractional" and n % (s + 1):
                continue
            code = gradient_coding(n, s, kind=kind)
            assert (np.count_nonzero(code.matrix, axis=1) == s + 1).all()
            assert (np.count_nonzero(code.matrix, axis=0) == s + 1).all()
            for dead in itertools.combinations(range(n), s):
                alive = ~np.isin(np.arange(n), dead)
                coded.check_decoding(gradient_coding_vector(code, alive), code.matrix, alive)


@pytest.mark.parametrize("kind", ["cyclic", "roots", "fractional"])
def test_what_is_not_promised_is_refused(kind):
    code = gradient_coding(6, 2, kind=kind)
    for answered in itertools.product([False, True], repeat=6):
        alive = np.array(answered)
        promised = alive.reshape(2, 3).any(axis=1).all() if kind == "fractional" else alive.sum() >= 4
        if promised:
            coded.check_decoding(gradient_coding_vector(code, alive), code.matrix, alive)
        else:
            with pytest.raises(ValueError, match="^gradient_coding_vector: `alive` must have"):
                gradient_coding_vector(code, alive)


def test_chunks_are_those_of_the_paper():
    for kind in ("cyclic", "roots"):
        matrix = gradient_coding(5, 2, kind=kind).matrix
        assert [np.flatnonzero(row).tolist() for row in matrix] == [
            [0, 1, 2],
            [1, 2, 3],
            [2, 3, 4],
            [0, 3, 4],
            [0, 1, 4],
        ]
    np.testing.assert_array_equal(gradient_coding(4, 1, kind="fractional").matrix, np.kron(np.eye(2), np.ones((2, 2))))
    for s in range(4):
        scheme = gradient_coding_scheme(4, s)
        assert (scheme.load, scheme.delay) == ((s + 1) / 4, 0)
    other = gradient_coding(5, 2, key=jax.random.key(7)).matrix
    assert not np.allclose(other, gradient_coding(5, 2).matrix)


def test_trees_decode_to_the_sum_and_the_missing_may_be_anything(float_dtype, key):
    code = gradient_coding(7, 2, kind="roots")
    keys = jax.random.split(key, 2)
    gradients = {
        "w": jax.random.normal(keys[0], (7, 3, 2), float_dtype),
        "b": jax.random.normal(keys[1], (7,), float_dtype),
    }
    alive = ~np.isin(np.arange(7), [2, 5])
    vector = gradient_coding_vector(code, alive)
    traces = []

    @jax.jit
    def decode(vector, results):
        traces.append(0)
        return gradient_coding_decode(vector, results)

    results = jax.jit(lambda g: gradient_coding_encode(code.matrix, g))(gradients)
    results = jax.tree.map(lambda r: r.at[2].set(jnp.nan).at[5].set(jnp.inf), results)
    got = decode(vector, results)
    bound = tolerance(float_dtype, 21, condition=(np.abs(vector) @ np.abs(code.matrix)).max())
    for name, leaf in gradients.items():
        np.testing.assert_allclose(got[name], leaf.sum(axis=0), rtol=0, atol=bound * np.abs(leaf).max())
        assert got[name].dtype == leaf.dtype
    assert jnp.isnan(decode(vector, jax.tree.map(lambda r: r.at[0].set(jnp.nan), results))["b"])
    decode(gradient_coding_vector(code, np.arange(7) > 1), jax.tree.map(jnp.zeros_like, results))
    assert len(traces) == 1


def test_sums_are_wide_and_the_result_has_the_gradients_dtype():
    ones = jnp.full((512,), 1 / 256, jnp.bfloat16)
    got = gradient_coding_decode(np.ones(512), gradient_coding_encode(np.eye(512), ones))
    assert (got.dtype, float(got)) == (jnp.bfloat16, 2.0)
    turned = gradient_coding_encode(np.ones((1, 2)), jnp.array([1j, 2.0]))
    np.testing.assert_allclose(turned, [2 + 1j])


def test_one_backward_pass_of_a_weighted_loss_is_a_workers_result(x64, key):
    code = gradient_coding(5, 2, key=key)
    inputs = jax.random.normal(key, (5, 8, 3))
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2)  # noqa: E731
    w = jnp.array([0.3, -1.0, 0.5])
    chunks = jax.vmap(jax.grad(loss), (None, 0))(w, inputs)
    weighted = jax.grad(lambda w: code.matrix[3] @ jax.vmap(loss, (None, 0))(w, inputs))(w)
    got = gradient_coding_encode(code.matrix[3:4], chunks)[0]
    condition = np.abs(code.matrix[3]).sum()
    np.testing.assert_allclose(got, weighted, rtol=0, atol=tolerance("float64", 40, condition=condition))


def test_bad_arguments_are_named():
    for wrong in ({"workers": 0}, {"stragglers": 4}, {"stragglers": 1.5}, {"kind": "polynomial"}):
        with pytest.raises(ValueError, match=f"^gradient_coding: `{next(iter(wrong))}` must be "):
            gradient_coding(**{"workers": 4, "stragglers": 1} | wrong)
    with pytest.raises(ValueError, match=r"^gradient_coding: `stragglers` must lead to groups .* divide 5 .*cyclic"):
        gradient_coding(5, 1, kind="fractional")
    with pytest.raises(ValueError, match="^gradient_coding: `stragglers` must be fewer for 64 workers"):
        gradient_coding(64, 20, kind="roots")
    with pytest.raises(DtypeError, match="^gradient_coding: `key` must be a typed random key"):
        gradient_coding(4, 1, key=jnp.zeros(2, jnp.uint32))
    code = gradient_coding(4, 1)
    with pytest.raises(ShapeError, match="^gradient_coding_vector: `alive`"):
        gradient_coding_vector(code, np.ones(3, bool))
    with pytest.raises(DtypeError, match="^gradient_coding_vector: `alive` must have dtype bool"):
        gradient_coding_vector(code, np.ones(4))
    with pytest.raises(ValueError, match="^gradient_coding_vector: `alive` must be concrete"):
        jax.jit(lambda alive: gradient_coding_vector(code, alive))(jnp.ones(4, bool))
    with pytest.raises(ShapeError, match=r"^gradient_coding_encode: `gradients\['w'\]` must have shape \(4, "):
        gradient_coding_encode(code.matrix, {"w": jnp.ones((3, 2))})
    with pytest.raises(DtypeError, match="^gradient_coding_decode: `results`"):
        gradient_coding_decode(np.ones(4), jnp.ones((4, 2), jnp.int32))
    # A code that is nearly singular is refused rather than trusted.
    singular = code._replace(matrix=np.diag([1, 1, 1, 1e-17]))
    with pytest.raises(ValueError, match="^gradient_coding_vector: `code` must be well conditioned"):
        gradient_coding_vector(singular, np.ones(4, bool))


def test_a_traced_key_is_named(key):
    with pytest.raises(ValueError, match="gradient_coding: `key` must be concrete"):
        jax.jit(lambda key: gradient_coding(4, 1, key=key).matrix)(key)
