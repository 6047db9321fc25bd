"""A learned relaxation: the solves are those of sor, and the choice beats chance on a small Laplacian."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import Linear, Status
from jaxnum.solvers import cheb_cb, learned_relaxation, sor, sor_schedule
from tests.solvers.test_sor import poisson

SYSTEMS, OMEGAS = 200, jnp.linspace(1, 1.9, 7)


def test_learns_what_it_solves(x64):
    operator = jaxnum.sparse_operator(poisson(6))
    A = jnp.asarray(poisson(6).toarray())
    b = jax.random.normal(jax.random.key(0), (SYSTEMS, 36))
    make = lambda b: Linear(A, b)  # noqa: E731
    ours = learned_relaxation(make, b, jax.random.key(1), omegas=OMEGAS, rtol=1e-8)
    assert np.all(np.asarray(ours.status) == Status.converged)
    # ||x - A^-1 b|| <= ||A^-1|| rtol ||b||.
    bound = 1e-8 * float(jnp.linalg.norm(b[5]) / jnp.linalg.eigvalsh(A)[0])
    np.testing.assert_allclose(ours.x[5], jnp.linalg.solve(A, b[5]), rtol=0, atol=bound)
    # Every system was solved by sor with the omega of its arm.
    one = jaxnum.linear_solve(A, b[5], solver=sor(OMEGAS[ours.arms[5]]), rtol=1e-8)
    assert int(one.steps) == int(ours.steps[5])
    # A fixed choice is a sequence with one arm.
    fixed = [learned_relaxation(make, b[:20], jax.random.key(1), omegas=w[None], rtol=1e-8) for w in OMEGAS[::3]]
    means = [float(jnp.mean(run.steps)) for run in fixed]
    second = float(jnp.mean(ours.steps[SYSTEMS // 2 :]))
    assert second < np.mean(means)
    # Sparse systems take the same steps.
    schedule = sor_schedule(operator)
    sparse = learned_relaxation(
        lambda b: Linear(operator, b), b[:20], jax.random.key(1), omegas=OMEGAS[3:4], schedule=schedule, rtol=1e-8
    )
    np.testing.assert_array_equal(sparse.steps, fixed[1].steps)


def test_a_bad_relaxation_has_a_status_and_a_price():
    A = jnp.asarray(poisson(4).toarray(), jnp.float32)
    make = lambda shift: Linear(A + shift * jnp.eye(16), jnp.ones(16))  # noqa: E731
    # The shift of the second leaves no diagonal.
    shifts = jnp.asarray([0.0, -4.0, 0.0])
    run = learned_relaxation(make, shifts, jax.random.key(0), omegas=jnp.array([1.9]), max_steps=5)
    assert run.steps.tolist() == [5, 0, 5]
    assert run.status.tolist() == [Status.max_steps, Status.breakdown, Status.max_steps]
    assert float(run.bandit.seen) == 3 * (5 - 1)
    with pytest.raises(ValueError, match=r"learned_relaxation: `omegas` must be in \(0, 2\)"):
        learned_relaxation(make, shifts, jax.random.key(0), omegas=jnp.array([2.0]))


def test_looks_at_a_context(x64):
    """Of shifted matrices it learns another omega for each shift, and passes the best fixed one."""
    A, grid = jnp.asarray(poisson(4).toarray()), jnp.asarray([1.05, 1.3, 1.6])
    shifts = -0.7 + 2 * jax.random.uniform(jax.random.key(0), (SYSTEMS,)) ** 2
    make = lambda shift: Linear(A + shift * jnp.eye(16), jnp.ones(16))  # noqa: E731
    run = partial(learned_relaxation, make, shifts, jax.random.key(1), rtol=1e-8)
    ours = run(omegas=grid, bandit=cheb_cb(3, -0.7, 1.3), bandit_contexts=shifts)
    assert np.all(np.asarray(ours.status) == Status.converged)
    second = slice(SYSTEMS // 2, None)
    fixed = jax.vmap(lambda omega: run(omegas=omega[None]).steps)(grid)
    assert float(jnp.mean(ours.steps[second])) < float(jnp.min(jnp.mean(fixed[:, second], axis=1)))
    with pytest.raises(ValueError, match="learned_relaxation: `bandit_contexts` must have shape"):
        run(bandit=cheb_cb(20, -0.7, 1.3), bandit_contexts=shifts[1:])
    with pytest.raises(ValueError, match="tsallis_inf: `context` must be left out"):
        run(bandit_contexts=shifts)
