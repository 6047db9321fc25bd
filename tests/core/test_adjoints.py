"""The implicit derivative through its three linear solvers, and what it does where there is no derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxnum
from tests.tolerances import tolerance


@pytest.mark.parametrize("n", [20, 400])
def test_nonsymmetric_jacobian_dense_and_gmres(n, x64):
    rng = np.random.default_rng(0)
    M = jnp.asarray(0.5 * rng.normal(size=(n, n)) / np.sqrt(n))
    c = jnp.asarray(rng.normal(size=n))

    def solved(c):
        return jaxnum.fixed_point(lambda x: M @ x + c, jnp.zeros(n), rtol=1e-13, max_steps=5000).x

    want = jnp.linalg.solve(jnp.eye(n) - M, c)
    np.testing.assert_allclose(solved(c), want, atol=tolerance("float64", n, condition=1e2))
    v = jnp.asarray(rng.normal(size=n))
    _, forward = jax.jvp(solved, (c,), (v,))
    backward = jax.grad(lambda c: solved(c) @ v)(c)
    atol = tolerance("float64", n, condition=1e4)
    np.testing.assert_allclose(forward, jnp.linalg.solve(jnp.eye(n) - M, v), atol=atol)
    np.testing.assert_allclose(backward, jnp.linalg.solve(jnp.eye(n) - M.T, v), atol=atol)


def test_second_order_every_mode(x64):
    def f(A):
        return jaxnum.fixed_point(lambda y: jnp.tanh(A @ y + 1), jnp.zeros(2), rtol=1e-14, atol=1e-14).x.sum()

    A = jnp.array([[0.3, 0.1], [0.2, 0.4]])
    gradient = jax.jit(jax.grad(f))
    modes = (jax.jacfwd(jax.grad(f)), jax.jacrev(jax.grad(f)), jax.jacrev(jax.jacfwd(f)))
    hessians = [jax.jit(mode)(A) for mode in modes]
    for other in hessians[1:]:
        np.testing.assert_allclose(other, hessians[0], atol=tolerance("float64", 4, condition=1e3))
    h = 1e-5
    steps = h * np.eye(4).reshape(4, 2, 2)
    numeric = [(gradient(A + step) - gradient(A - step)) / (2 * h) for step in steps]
    # Central differences are wrong by h^2 times the third derivative, and by rounding over h.
    np.testing.assert_allclose(hessians[0].reshape(2, 2, 4), np.stack(numeric, axis=-1), atol=1e2 * h**2)


def test_singular_jacobian_gives_nan_not_a_number_that_looks_right(x64):
    # For c = 1 every point of the second axis is fixed, for any other c none: no derivative exists.
    def second(c):
        return jaxnum.fixed_point(lambda x: jnp.stack([0.5 * x[0] + c - 1, x[1] + c - 1]), jnp.ones(2)).x[1]

    assert second(1.0) == 1
    assert np.isnan(jax.grad(second)(1.0))


def test_integer_and_key_leaves_pass(x64):
    def solved(c, shift, key):
        noise = jax.random.normal(key, (2,)) * 0.1
        return jaxnum.fixed_point(lambda x, s, k: 0.5 * x + c + s + 0 * jax.random.normal(k, (2,)), noise, shift, key).x

    grad = jax.grad(lambda c: solved(c, jnp.int32(2), jax.random.key(0)).sum())(1.0)
    np.testing.assert_allclose(grad, 4.0, rtol=tolerance("float64", condition=10))


def test_explicit_sharding_through_the_nonsymmetric_solvers(x64):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Explicit,))
    c = jnp.linspace(0.1, 1.0, 8)

    @jax.jit
    def f(c):
        return jaxnum.fixed_point(lambda x: {"u": 0.3 * jnp.sin(x["u"]) + c}, {"u": jnp.zeros_like(c)}).x["u"].sum()

    want = jax.grad(f)(c)
    with jax.set_mesh(mesh):
        placed = jax.device_put(c, NamedSharding(mesh, PartitionSpec("i")))
        got = jax.grad(f)(placed)
        assert got.sharding.spec == PartitionSpec("i")
        np.testing.assert_allclose(np.asarray(got), want, atol=tolerance("float64", 8, condition=10))


def test_a_solve_that_nothing_perturbs_is_a_constant(x64):
    f = lambda c: jaxnum.fixed_point(lambda x: jnp.cos(x), jnp.float64(0.5)).x * c  # noqa: E731
    np.testing.assert_allclose(jax.grad(f)(2.0), 0.7390851332, atol=1e-8)
