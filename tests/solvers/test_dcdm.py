"""Deep conjugate directions: CG for the identity, one step for the inverse, and never up whatever is proposed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import Linear, Status
from jaxnum.core.loops import begin
from jaxnum.solvers import cg, dcdm, dcdm_loss
from tests.tolerances import tolerance

N = 40
RNG = np.random.default_rng(0)
Q, _ = np.linalg.qr(RNG.normal(size=(N, N)))
B = RNG.normal(size=N)


def spd(kappa):
    A = Q * np.geomspace(1, kappa, N) @ Q.T
    return jnp.asarray((A + A.T) / 2)


def identity(params, r):
    return r


def noise(key, r):
    """A direction that has nothing to do with the problem, another for every residual."""
    return jax.random.normal(jax.random.fold_in(key, jnp.abs(1e6 * r[0]).astype(int)), r.shape, r.dtype)


def nothing(params, r):
    return jnp.zeros_like(r)


def iterates(solver, problem, steps):
    x = jnp.zeros_like(problem.b)

    def body(pair, _):
        pair = solver.step(solver.hyper, *pair, problem)
        return pair, pair[0]

    return jax.lax.scan(body, (x, begin(solver, x, problem)), None, length=steps)[1]


@pytest.mark.parametrize("keep", [1, 2])
def test_the_identity_gives_conjugate_gradients(keep, x64):
    # Sixteen steps: from there on the rounding of either method grows tenfold a step.
    problem = Linear(spd(1e3), jnp.asarray(B))
    want = iterates(cg(), problem, 16)
    np.testing.assert_allclose(iterates(dcdm(identity, keep=keep), problem, 16), want, atol=1e-8)


def test_the_inverse_gives_the_solution_in_one_step(x64):
    A = spd(1e3)
    solution = jaxnum.linear_solve(A, jnp.asarray(B), solver=dcdm(lambda M, r: -3 * M @ r, jnp.linalg.inv(A)))
    assert int(solution.steps) == 1
    np.testing.assert_allclose(solution.x, np.linalg.solve(A, B), rtol=1e-9)


def test_the_error_falls_for_any_direction(x64):
    A = spd(100)
    xs = np.asarray(iterates(dcdm(noise, jax.random.key(0)), Linear(A, jnp.asarray(B)), 60))
    e = xs - np.linalg.solve(A, B)
    energy = np.einsum("ki,ij,kj->k", e, A, e)
    assert np.all(np.diff(energy) <= 0)
    assert energy[-1] < 0.9 * energy[0]


def test_a_useless_direction_is_replaced_and_counted(x64):
    A = spd(30)
    solution = jaxnum.linear_solve(A, jnp.asarray(B), solver=dcdm(nothing), rtol=1e-6)
    plain = jaxnum.linear_solve(A, jnp.asarray(B), rtol=1e-6)
    assert int(solution.state.replaced) == int(solution.steps) == int(plain.steps)


def test_what_is_not_finite_becomes_a_status(x64):
    solution = jaxnum.linear_solve(
        spd(30), jnp.asarray(B), solver=dcdm(lambda params, r: r * jnp.nan), on_failure="return"
    )
    assert int(solution.status) == Status.nonfinite
    np.testing.assert_array_equal(solution.x, np.zeros(N))


def test_loss_of_nothing():
    loss = lambda scale, b: dcdm_loss(lambda scale, r: scale * r, scale, lambda v: v, b)  # noqa: E731
    for scale, b, want in ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)):
        value, slope = jax.value_and_grad(loss)(jnp.float32(scale), jnp.full(3, b))
        np.testing.assert_allclose(value, want, rtol=1e-6)
        assert np.isfinite(slope)


def test_loss_is_zero_for_the_inverse_alone_and_scale_free(x64):
    A, b = spd(30), jnp.asarray(B)
    loss = lambda M, b: dcdm_loss(lambda M, r: M @ r, M, lambda v: A @ v, b)  # noqa: E731
    inverse = jnp.linalg.inv(A)
    assert float(loss(inverse, b)) <= tolerance("float64", N, condition=30) ** 2
    other = inverse + 0.1 * jnp.diag(jnp.arange(N) / N)
    assert float(loss(other, b)) > 1e-3
    np.testing.assert_allclose(loss(-7 * other, 100 * b), loss(other, b), rtol=1e-10)
    d = other @ b / jnp.linalg.norm(b)
    unit, q = b / jnp.linalg.norm(b), A @ d
    np.testing.assert_allclose(loss(other, b), jnp.sum((unit - (d @ unit) / (d @ q) * q) ** 2), rtol=1e-10)


def test_bad_input():
    with pytest.raises(TypeError, match="dcdm: `direction` must be a function; got Array"):
        dcdm(jnp.ones(3))
    with pytest.raises(ValueError, match="dcdm: `keep` must be a Python int >= 1; got 0"):
        dcdm(identity, keep=0)
    with pytest.raises(ValueError, match="dcdm: `direction"):
        jaxnum.linear_solve(jnp.eye(3), jnp.ones(3), solver=dcdm(lambda params, r: r[:2]))
