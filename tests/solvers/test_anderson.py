"""Anderson acceleration: GMRES exactly on affine maps, a plain least-squares transcription, and fewer steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import jaxnum
from jaxnum import FixedPoint
from jaxnum.solvers import anderson, picard
from tests.tolerances import tolerance


def affine(n=12):
    rng = np.random.default_rng(0)
    M = rng.normal(size=(n, n))
    return 0.8 * M / np.linalg.norm(M, 2), rng.normal(size=n)


def iterates(solver, T, x0, count):
    problem = FixedPoint(T)

    def body(pair, _):
        pair = solver.step(solver.hyper, *pair, problem)
        return pair, pair[0]

    return np.asarray(jax.lax.scan(body, (x0, solver.init(solver.hyper, x0, problem)), None, length=count)[1])


def test_affine_maps_give_gmres(x64):
    M, b = affine()
    ours = iterates(anderson(12, regularisation=0.0), lambda x: M @ x + b, jnp.zeros(12), 9)
    residuals = []
    scipy.sparse.linalg.gmres(
        np.eye(12) - M, b, restart=12, maxiter=1, rtol=1e-15, callback=residuals.append, callback_type="pr_norm"
    )
    for k in range(1, 9):
        theirs, _ = scipy.sparse.linalg.gmres(np.eye(12) - M, b, restart=k, maxiter=1, rtol=1e-15)
        # The normal equations square the condition of the differences.
        np.testing.assert_allclose(ours[k], M @ theirs + b, atol=1e-9)
        # f at iterate k + 1 is M times the residual that GMRES reports at k.
        f = M @ ours[k] + b - ours[k]
        assert np.linalg.norm(f) <= 0.8 * residuals[k - 1] * np.linalg.norm(b) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_ring_is_the_least_squares_of_the_last_differences(damping, x64):
    M, b = affine(6)
    T = lambda x: np.tanh(M @ x) + b  # noqa: E731
    x, xs, fs, want = np.zeros(6), [], [], []
    for _ in range(9):
        xs.append(x)
        fs.append(T(x) - x)
        dx, df = np.diff(xs, axis=0)[-3:].T, np.diff(fs, axis=0)[-3:].T
        x = x + damping * fs[-1]
        if df.size:
            gamma = np.linalg.lstsq(df, fs[-1], rcond=None)[0]
            x = x - (dx + damping * df) @ gamma
        want.append(x)
    ours = iterates(anderson(3, damping=damping, regularisation=0.0), lambda x: jnp.tanh(M @ x) + b, jnp.zeros(6), 9)
    np.testing.assert_allclose(ours, want, atol=1e-9)


def test_fewer_steps_than_picard_and_optimistix(x64):
    import optimistix as optx

    M, b = affine()
    T = lambda x, _: jnp.tanh(M @ x / 0.8) + b  # noqa: E731
    options = {"rtol": 1e-9, "atol": 1e-9}
    ours = jaxnum.fixed_point(T, jnp.zeros(12), None, solver=anderson(), **options)
    plain = jaxnum.fixed_point(T, jnp.zeros(12), None, solver=picard(), **options)
    peer = optx.fixed_point(T, optx.FixedPointIteration(rtol=1e-9, atol=1e-9), jnp.zeros(12), max_steps=5000)
    assert int(ours.steps) <= min(int(plain.steps), int(peer.stats["num_steps"]))
    np.testing.assert_allclose(ours.x, peer.value, atol=1e-7)


def test_trees_in_float32_reach_their_tolerance():
    T = lambda z: {"u": jnp.cos(z["u"]), "v": 0.95 * z["v"] + 1}  # noqa: E731
    solution = jaxnum.fixed_point(T, {"u": jnp.zeros(3), "v": jnp.zeros(2)}, solver=anderson(3))
    np.testing.assert_allclose(solution.x["u"], 0.7390851, rtol=tolerance("float32", condition=100))
    np.testing.assert_allclose(solution.x["v"], 20, rtol=tolerance("float32", condition=100))


def test_arguments_outside_their_range():
    with pytest.raises(ValueError, match="anderson: `memory` must be a Python int >= 1; got 0"):
        anderson(0)
    with pytest.raises(ValueError, match=r"anderson: `damping` must be in \(0, 1\]; got"):
        anderson(damping=0.0)
    with pytest.raises(ValueError, match="anderson: `regularisation` must be a finite real number >= 0, or None; got"):
        anderson(regularisation=-1.0)
