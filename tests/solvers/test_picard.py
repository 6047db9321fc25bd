"""Picard iteration: the oracle is optimistix, and the geometric rate of a contraction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from tests.tolerances import tolerance

A = np.array([[0.3, 0.1], [0.2, 0.4]])
GRADIENT = [[0.22887216, 0.2385955], [0.16179225, 0.16866578]]


def test_gradient_equals_optimistix_and_the_recorded_figures(x64):
    optx = pytest.importorskip("optimistix")
    ours = jax.grad(lambda a: jaxnum.fixed_point(lambda y, a: jnp.tanh(a @ y + 1), jnp.zeros(2), a, rtol=1e-13).x.sum())
    peer = jax.grad(
        lambda a: optx.fixed_point(
            lambda y, a: jnp.tanh(a @ y + 1),
            optx.FixedPointIteration(rtol=1e-12, atol=1e-12),
            jnp.zeros(2),
            a,
            max_steps=1000,
        ).value.sum()
    )
    got = ours(jnp.asarray(A))
    np.testing.assert_allclose(got, GRADIENT, atol=1e-7)
    np.testing.assert_allclose(got, peer(jnp.asarray(A)), rtol=tolerance("float64", 4, condition=1e4))


def test_converges_at_the_rate_of_the_contraction(x64):
    solution = jaxnum.fixed_point(lambda x: 0.5 * x + 1, jnp.zeros(3), history=True)
    ratios = np.asarray(solution.history[1:20]) / np.asarray(solution.history[:19])
    np.testing.assert_allclose(ratios, 0.5, rtol=tolerance("float64", condition=1e6))


def test_damping_turns_a_rotation_into_convergence(x64):
    rotate = lambda z: jnp.stack([-z[1], z[0]])  # noqa: E731
    plain = jaxnum.fixed_point(rotate, jnp.ones(2), max_steps=50, on_failure="return")
    assert int(plain.status) == jaxnum.Status.max_steps
    damped = jaxnum.fixed_point(rotate, jnp.ones(2), solver=jaxnum.solvers.picard(damping=0.5))
    np.testing.assert_allclose(damped.x, 0, atol=1e-8)


def test_second_call_with_a_library_activation_compiles_nothing(x64):
    # jax.nn.relu carries a custom derivative rule, which every trace wraps anew.
    from tests.compiles import count_compiles

    c = jnp.arange(3.0)
    call = lambda c: jaxnum.fixed_point(lambda x: 0.3 * jax.nn.relu(x) + jax.nn.softplus(c), jnp.zeros(3))  # noqa: E731
    call(c)
    c = c + 1
    with count_compiles() as compiled:
        call(c)
    assert compiled() == 0


def test_functions_that_differ_in_a_derivative_rule_alone_are_kept_apart(x64):
    def make(slope):
        @jax.custom_jvp
        def surrogate(x):
            return 0.5 * x

        surrogate.defjvp(lambda primals, tangents: (0.5 * primals[0], slope * tangents[0]))
        return surrogate

    def gradient(slope):
        s = make(slope)
        return jax.grad(lambda c: jaxnum.fixed_point(lambda x: s(x) + c, jnp.zeros(())).x)(1.0)

    # x* = 1 / (1 - slope) by the rule: 1 / (1 - slope) is the derivative with respect to c.
    np.testing.assert_allclose(gradient(0.5), 2.0, rtol=tolerance("float64", condition=1e2))
    np.testing.assert_allclose(gradient(0.75), 4.0, rtol=tolerance("float64", condition=1e2))


@pytest.mark.parametrize("damping", [0.0, -1.0, 1.5])
def test_damping_outside_its_range(damping):
    with pytest.raises(ValueError, match=r"picard: `damping` must be in \(0, 1\]; got"):
        jaxnum.solvers.picard(damping=damping)
