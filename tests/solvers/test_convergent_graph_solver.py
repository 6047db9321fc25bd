"""The convergent graph solver: dense solves, value iteration, implicit gradients, every status it can reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxnum import SolverError, Status
from jaxnum.solvers import convergent_graph_solver, convergent_graph_solver_weights
from tests.compiles import count_compiles
from tests.tolerances import tolerance

N, E, H = 12, 40, 3
RNG = np.random.default_rng(0)
SENDERS, RECEIVERS = (jnp.asarray(RNG.integers(0, N, E)) for _ in range(2))


def arrays(dtype):
    return jnp.asarray(RNG.normal(size=(E, H)), dtype), jnp.asarray(RNG.normal(size=(N, H)), dtype)


def dense(weights):
    A = np.zeros((H, N, N))
    for e in range(E):
        A[:, SENDERS[e], RECEIVERS[e]] += np.asarray(weights[e], np.float64)
    return A


@pytest.mark.parametrize("mode", ["degree", "softmax"])
def test_equals_a_dense_solve(mode, float_dtype):
    logits, b = arrays(float_dtype)
    weights = convergent_graph_solver_weights(logits, SENDERS, N, mode=mode)
    A = dense(weights)
    assert A.sum(axis=2).max() <= 1 + tolerance(float_dtype, N)
    solution = convergent_graph_solver(weights, b, SENDERS, RECEIVERS, gamma=0.9)
    assert int(solution.status) == Status.converged
    want = np.stack([np.linalg.solve(np.eye(N) - 0.9 * A[h], np.asarray(b[:, h], np.float64)) for h in range(H)], 1)
    rtol = 1e-5 if float_dtype == "float32" else 1e-8
    np.testing.assert_allclose(solution.x, want, atol=10 * rtol * np.abs(want).max())


def test_softmax_sums_to_one(x64):
    weights = convergent_graph_solver_weights(arrays("float64")[0] * 100, SENDERS, N, mode="softmax")
    sums = jax.ops.segment_sum(weights, SENDERS, N)[jnp.unique(SENDERS)]
    np.testing.assert_allclose(sums, 1, rtol=1e-12)


def test_gamma_to_zero_gives_b(x64):
    logits, b = arrays("float64")
    weights = convergent_graph_solver_weights(logits, SENDERS, N)
    np.testing.assert_allclose(convergent_graph_solver(weights, b, SENDERS, RECEIVERS, gamma=1e-14).x, b, atol=1e-12)


@pytest.mark.parametrize("activation", [None, jnp.tanh])
def test_implicit_gradients(activation, x64):
    logits, b = arrays("float64")

    @jax.jit
    def solved(logits, b, gamma):
        weights = convergent_graph_solver_weights(logits, SENDERS, N, mode="softmax")
        return convergent_graph_solver(
            weights, b, SENDERS, RECEIVERS, gamma=gamma, activation=activation, rtol=1e-13, atol=1e-13
        ).x

    check_grads(solved, (logits, b, jnp.float64(0.6)), order=1, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)


def test_a_second_call_compiles_nothing():
    logits, b = arrays("float32")
    weights = jnp.clip(logits, 0, 1) / E
    for _ in range(2):
        with count_compiles() as compiled:
            convergent_graph_solver(weights, b, SENDERS, RECEIVERS, activation=jax.nn.relu)
    assert compiled() == 0


def test_a_map_that_does_not_contract_becomes_a_status():
    _, b = arrays("float32")
    weights = jnp.full((E, H), 2.0)
    solution = convergent_graph_solver(weights, b, SENDERS, RECEIVERS, gamma=0.99, on_failure="return")
    assert int(solution.status) == Status.nonfinite
    assert np.all(np.isfinite(solution.x))
    with pytest.raises(SolverError, match="nonfinite"):
        convergent_graph_solver(weights, b, SENDERS, RECEIVERS, gamma=0.99)


def test_places_outside_the_graph_become_a_status():
    weights, b = jnp.ones((1, 1)), jnp.ones((3, 1))
    for sender, receiver in ((0, 3), (3, 0), (0, -1), (-1, 0)):
        ends = jnp.array([sender]), jnp.array([receiver])
        solution = convergent_graph_solver(weights, b, *ends, on_failure="return")
        assert int(solution.status) == Status.nonfinite


def test_bad_input():
    logits, b = arrays("float32")
    with pytest.raises(ValueError, match=r"convergent_graph_solver: `gamma` must be in \(0, 1\); got 1.0"):
        convergent_graph_solver(logits, b, SENDERS, RECEIVERS, gamma=1.0)
    with pytest.raises(ValueError, match="convergent_graph_solver: `b`"):
        convergent_graph_solver(logits, b[:, :1], SENDERS, RECEIVERS)
    with pytest.raises(ValueError, match="convergent_graph_solver_weights: `mode` must be one of"):
        convergent_graph_solver_weights(logits, SENDERS, N, mode="sum")
