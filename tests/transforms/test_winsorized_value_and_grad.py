"""The single pass against scipy's winsorised mean of a Jacobian, whatever the batches; what is kept, not stored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import mstats

from jaxnum.transforms import winsorized_mean, winsorized_value_and_grad
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance
from tests.transforms.aggregators import counts


def loss(params, example):
    x, y = example
    return jnp.sum((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2)


def problem(m):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=2))}
    return params, (rng.normal(size=(m, 3)), rng.normal(size=(m, 2)))


@pytest.mark.parametrize(("m", "c"), [(9, 2), (8, 3), (7, 3), (5, 0), (1, 0), (40, 6)])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 100])
def test_equals_scipy_for_any_batches(m, c, batch_size, x64):
    params, data = problem(m)
    losses = jax.jit(lambda p: jax.vmap(loss, (None, 0))(p, data))
    rows = jax.jacrev(losses)(params)
    want = jax.tree.map(lambda g: mstats.winsorize(np.asarray(g), limits=(c / m, c / m), axis=0).mean(axis=0), rows)
    value, got = jax.jit(winsorized_value_and_grad(loss, c, batch_size=batch_size))(params, data)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance("float64", m), atol=1e-15), got, want)
    np.testing.assert_allclose(value, np.mean(losses(params)), rtol=1e-12)


def test_infinities_are_pulled_in_and_nan_shows():
    def linear(w, x):
        return jnp.sum(w * x)

    g = jax.random.normal(jax.random.key(0), (9, 4))
    for at in (0, 3, 8):
        wild = g.at[at, 0].set(jnp.inf).at[at, 1].set(-jnp.inf).at[at, 2].set(jnp.nan)
        _, got = winsorized_value_and_grad(linear, 1, batch_size=2)(jnp.ones(4), wild)
        want, _ = winsorized_mean(1).update(wild, (), g[0])
        np.testing.assert_allclose(got, want, rtol=tolerance("float32", 9), atol=1e-7)
        assert np.isnan(got).tolist() == [False, False, True, False]


def test_dtypes_trees_and_complex_parameters_are_kept(key):
    params = {"a": jnp.ones(3, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64), "s": jnp.float32(1.0)}
    data = jax.random.normal(key, (6, 4))

    def mixed(params, x):
        return (
            jnp.sum(params["a"] * x[:3]) + jnp.real(jnp.sum(params["z"] * (x[0] + 1j * x[1]) ** 2)) + params["s"] * x[3]
        )

    value, got = jax.jit(winsorized_value_and_grad(mixed, 1, batch_size=4))(params, data)
    each = jax.vmap(jax.grad(mixed), (None, 0))(params, data)
    want, _ = winsorized_mean(1).update(each, (), params)
    assert jax.tree.map(lambda g: (g.shape, g.dtype), got) == jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert value.dtype == jnp.float32

    def close(x, y):
        dtype = "bfloat16" if x.dtype == "bfloat16" else "float32"
        np.testing.assert_allclose(x, y, rtol=tolerance(dtype, 3), atol=tolerance(dtype, 3))

    jax.tree.map(close, got, want)


def test_under_vmap_and_in_training():
    params, data = problem(12)
    value_and_grad = jax.jit(winsorized_value_and_grad(loss, 2, batch_size=5))
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    values, grads = jax.vmap(value_and_grad, (0, None))(many, data)
    value, grad = value_and_grad(params, data)
    np.testing.assert_allclose(values[0], value, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-5, atol=1e-6), grads, grad)
    optimiser = optax.adam(0.1)
    state, first = optimiser.init(params), value
    for _ in range(20):
        value, grad = value_and_grad(params, data)
        updates, state = jax.jit(optimiser.update)(grad, state, params)
        params = optax.apply_updates(params, updates)
    assert float(value) < 0.8 * float(first)


def test_no_more_gradients_are_held_than_it_says():
    size, c, m = 50_000, 2, 64
    function = jax.jit(winsorized_value_and_grad(lambda w, x: jnp.sum(w * x), c, batch_size=4))
    held = function.lower(jnp.ones(size), jnp.ones(m)).compile().memory_analysis().temp_size_in_bytes
    # A carry and the next one, beside the gradients of the batch.
    assert held < 4 * size * (2 * (2 * c + 3) + 2 * 4) < 4 * size * m / 2


def test_bad_input_is_named():
    name = "winsorized_value_and_grad"
    counts(name, "c", 0, lambda c: winsorized_value_and_grad(loss, c))
    counts(name, "batch_size", 1, lambda b: winsorized_value_and_grad(loss, 1, batch_size=b))
    params, (x, y) = problem(4)
    with pytest.raises(ValueError, match=f"^{name}: `data` must have at least 5 examples; got 4"):
        winsorized_value_and_grad(loss, 2)(params, (x, y))
    with pytest.raises(ShapeError, match=rf"^{name}: `data\[1\]` must have 4 examples; got 3"):
        winsorized_value_and_grad(loss, 1)(params, (x, y[:3]))
    with pytest.raises(ShapeError, match=f"^{name}: `loss` must have shape \\(\\); got \\(2,\\)"):
        winsorized_value_and_grad(lambda p, one: p["b"], 1)(params, (x, y))
    with pytest.raises(DtypeError, match=rf"^{name}: `params\['b'\]` must have a floating-point or complex dtype"):
        winsorized_value_and_grad(loss, 1)(params | {"b": jnp.arange(2)}, (x, y))
