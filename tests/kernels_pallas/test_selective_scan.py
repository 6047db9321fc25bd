"""Selective scan against sums written in NumPy, SciPy's filters, its own pieces, and the memory it must not use."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from benchmarks.ops import selective_scan as row
from kernels_pallas import selective_scan, selective_scan_step
from tests.tolerances import tolerance


def arrays(dtype="float64", T=37, N=5, D=6, groups=2, seed=0):
    rng = np.random.default_rng(seed)
    given = {
        "u": rng.normal(size=(2, T, D)),
        "delta": rng.normal(size=(2, T, D)),
        "A": -rng.uniform(0.1, 2.0, size=(D, N)),
        "B": rng.normal(size=(2, T, groups, N)),
        "C": rng.normal(size=(2, T, groups, N)),
        "D": rng.normal(size=D),
        "z": rng.normal(size=(2, T, D)),
        "delta_bias": rng.normal(size=D),
        "initial_state": rng.normal(size=(2, D, N)),
    }
    return {name: jnp.asarray(x, dtype) for name, x in given.items()}


def by_hand(u, delta, A, B, C, D, z, delta_bias, initial_state, symmetric=False):
    u, delta, A, B, C, D, z, delta_bias, h = (
        np.asarray(x, np.float64) for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)
    )
    width = u.shape[2] // B.shape[2]
    dt = np.logaddexp(delta + delta_bias, 0)
    y = np.zeros(u.shape)
    for t in range(u.shape[1]):
        a = np.exp(dt[:, t, :, None] * A)
        a = 2 * a - 1 if symmetric else a
        write, read = (np.repeat(x[:, t], width, axis=1) for x in (B, C))
        h = a * h + (dt * u)[:, t, :, None] * write
        y[:, t] = ((read * h).sum(-1) + D * u[:, t]) * z[:, t] / (1 + np.exp(-z[:, t]))
    return y, h


def close(got, want, dtype, size=40, condition=1.0):
    for g, w in zip(got, want, strict=True):
        scale = max(1.0, float(np.max(np.abs(w))))
        np.testing.assert_allclose(g, w, rtol=0, atol=scale * tolerance(dtype, size, condition=condition))


@pytest.mark.parametrize("eigenvalues", ["positive", "symmetric"])
def test_equals_the_sums_by_hand(eigenvalues, float_dtype):
    given = arrays(float_dtype)
    got = selective_scan(**given, eigenvalues=eigenvalues)
    close(got, by_hand(**given, symmetric=eigenvalues == "symmetric"), float_dtype, condition=4.0)


def test_constant_parameters_are_a_filter(x64):
    T, a, dt = 60, 0.8, 0.3
    u = np.random.default_rng(3).normal(size=(1, T, 1))
    ones = jnp.ones((1, T, 1))
    y, _ = selective_scan(
        jnp.asarray(u), dt * ones, jnp.log(jnp.array([[a]])) / dt, ones, 2.0 * ones, delta_softplus=False
    )
    close((y[0, :, 0],), (2.0 * scipy.signal.lfilter([dt], [1, -a], u[0, :, 0]),), "float64", T)


@pytest.mark.parametrize("T", [1, 7, 64, 65, 133])
def test_gradients_equal_the_recurrence(T, x64):
    given = arrays(T=T)
    rng = np.random.default_rng(5)
    weights = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in (given["u"], given["initial_state"]))

    def gradients(implementation):
        def loss(given):
            y, state = selective_scan(**given, eigenvalues="symmetric", implementation=implementation, chunk_size=16)
            return jnp.sum(y * weights[0]) + jnp.sum(state * weights[1])

        return jax.tree.leaves(jax.jit(jax.grad(loss))(given))

    close(gradients("xla"), gradients("reference"), "float64", T, condition=4.0)


def test_pieces_steps_and_directions(x64):
    given = arrays()
    y, state = selective_scan(**given)
    in_time = ("u", "delta", "B", "C", "z")
    constant = {name: x for name, x in given.items() if name not in (*in_time, "initial_state")}
    tokens = {name: given[name] for name in in_time}
    part, h = [], given["initial_state"]
    for piece in (slice(0, 20), slice(20, None)):
        one, h = selective_scan(**{n: x[:, piece] for n, x in tokens.items()}, **constant, initial_state=h)
        part.append(one)
    close((np.concatenate(part, 1), h), (y, state), "float64")
    h, part = given["initial_state"], []
    step = jax.jit(lambda h, token: selective_scan_step(h, **token, **constant))
    for t in range(y.shape[1]):
        one, h = step(h, {n: x[:, t] for n, x in tokens.items()})
        part.append(one)
    close((np.stack(part, 1), h), (y, state), "float64")
    flipped = {n: jnp.flip(x, 1) for n, x in tokens.items()}
    back, end = selective_scan(**flipped, **constant, initial_state=given["initial_state"], reverse=True)
    close((jnp.flip(back, 1), end), (y, state), "float64")


def test_the_gradient_keeps_no_state_of_every_token():
    params = {"length": 4096, "width": 128}
    spec = jax.eval_shape(lambda: row.make(params))

    def scratch(function):
        gradient = jax.grad(lambda *a: function(*a).sum(), tuple(range(5)))
        return jax.jit(gradient).lower(*spec).compile().memory_analysis().temp_size_in_bytes

    assert scratch(row.run(params)) <= scratch(row.associative(params)) / 8


GIVEN = arrays("float32")
ERRORS = {
    "positive rates": ({"A": -GIVEN["A"]}, ValueError, "selective_scan: `A` must"),
    "states": ({"C": GIVEN["C"][..., :3]}, ValueError, "selective_scan: `C` must have shape"),
    "groups": ({"B": GIVEN["B"][:, :, :1].repeat(4, 2)}, ValueError, "selective_scan: "),
    "eigenvalues": ({"eigenvalues": "complex"}, ValueError, "selective_scan: `eigenvalues` must be one of"),
    "chunk": ({"chunk_size": 48}, ValueError, "selective_scan: `chunk_size` must be a power of two"),
    "state": ({"initial_state": GIVEN["initial_state"][:, :2]}, ValueError, "selective_scan: `initial_state` must"),
    "gpu": ({"implementation": "gpu"}, NotImplementedError, "selective_scan: implementation 'gpu' cannot do this call"),
}


@pytest.mark.parametrize(("change", "error", "sentence"), ERRORS.values(), ids=ERRORS)
def test_bad_input(change, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        selective_scan(**(GIVEN | change))
