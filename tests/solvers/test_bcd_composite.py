"""Block coordinate descent with a separable part that is not smooth: scikit-learn's lasso, SciPy, closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn.linear_model import Lasso

import jaxnum
from jaxnum import Minimize, Status
from jaxnum.solvers import bcd, bcd_partition, newton_cg, resolvents
from jaxnum.solvers.minimize import selection as rules
from tests.tolerances import tolerance

N, D, TRUE = 40, 20, 5
ALPHA = 6.0


def data(seed=0, n=N, d=D, true=TRUE):
    """A with columns of different size, b of `true` coordinates and noise."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, d)) * rng.lognormal(size=d, sigma=0.3)
    x = np.zeros(d)
    x[:true] = 3 * rng.normal(size=true)
    return A, A @ x + 0.1 * rng.normal(size=n)


def squares(r, b):
    return 0.5 * jnp.sum((r - b) ** 2)


def lasso(A, b, weight=ALPHA):
    penalty = lambda x: weight * jnp.abs(x)  # noqa: E731
    return Minimize(squares, (jnp.asarray(b),), resolvents.l1(weight), penalty, jnp.asarray(A))


def scikit_learn(A, b, weight=ALPHA):
    return Lasso(alpha=weight / len(b), fit_intercept=False, tol=1e-15, max_iter=100_000).fit(A, b).coef_


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 4},
        {"selection": "gsl", "update": "gradient", "block_size": 3},
        {"selection": "gsd", "update": "matrix", "blocks": "sorted", "hessian": True},
        {"selection": "cyclic", "update": "gradient", "block_size": 1, "hessian": True},
    ],
    ids=lambda options: "_".join(map(str, options.values())),
)
def test_the_lasso_of_scikit_learn(options, x64):
    """Its solution and support; and what makes it one: a gradient inside the subdifferential."""
    A, b = data()
    options = options | ({"hessian": A.T @ A} if "hessian" in options else {})
    options = options | ({"blocks": bcd_partition((A**2).sum(0), 4)} if "blocks" in options else {})
    x = jaxnum.solve(bcd(**options), jnp.zeros(D), lasso(A, b), rtol=1e-9).x
    want = scikit_learn(A, b)
    np.testing.assert_allclose(x, want, atol=1e-8)
    np.testing.assert_array_equal(x != 0, want != 0)
    assert 0 < np.sum(want != 0) < D
    g = A.T @ (A @ x - b)
    np.testing.assert_allclose(g[x != 0], -ALPHA * np.sign(x[x != 0]), atol=1e-8)
    assert np.all(np.abs(g[x == 0]) < ALPHA)


def test_bounds_on_a_tree_of_unknowns(float_dtype):
    """Two leaves, one of them at least 0, the other between bounds; a resolvent alone, and the constants estimated."""
    A, b = (array.astype(float_dtype) for array in data(1, 12, 6))
    sets = resolvents.product({"u": resolvents.nonnegative(), "v": resolvents.box(-0.3, jnp.array([0.1, 0.4]))})
    problem = Minimize(lambda x, b: squares(A @ jnp.concatenate([x["u"], x["v"]]), b), (jnp.asarray(b),), sets)
    x0 = {"u": jnp.zeros(4, float_dtype), "v": jnp.zeros(2, float_dtype)}
    rtol = 1e-4 if float_dtype == "float32" else 1e-10
    x = jaxnum.solve(bcd(selection="gsl", update="gradient", block_size=2), x0, problem, rtol=rtol).x
    bounds = ([0] * 4 + [-0.3] * 2, [np.inf] * 4 + [0.1, 0.4])
    want = scipy.optimize.lsq_linear(A.astype(np.float64), b.astype(np.float64), bounds, tol=1e-14).x
    scale = max(1e-9, tolerance(float_dtype, 12, condition=np.linalg.cond(A) ** 2))
    np.testing.assert_allclose(np.concatenate([x["u"], x["v"]]), want, atol=scale)
    assert np.all(x["u"] >= 0)
    assert np.all(x["v"] <= np.asarray([0.1, 0.4], float_dtype))


@pytest.mark.parametrize("valued", [True, False])
def test_the_coordinate_that_promises_most(valued, x64):
    """By the best step of each of the models, written in NumPy; without values, by what convexity promises."""
    A, b = data(2)
    x = np.random.default_rng(3).normal(size=D) * (np.arange(D) % 3 > 0)
    g, L = A.T @ (A @ x - b), (A**2).sum(0)
    v = x - g / L
    d = np.sign(v) * np.maximum(np.abs(v) - ALPHA / L, 0) - x
    decrease = -(g * d + L / 2 * d**2 + ALPHA * (np.abs(x + d) - np.abs(x))) if valued else L / 2 * d**2
    penalty = (lambda z: ALPHA * jnp.abs(z)) if valued else None
    like = rules.promised(jnp.asarray(g), jnp.asarray(x), jnp.asarray(L), resolvents.l1(ALPHA), penalty)
    np.testing.assert_allclose(like**2 / (2 * L), decrease, rtol=1e-10)
    solver = bcd(selection="gsl", update="gradient", lipschitz=L, block_size=1)
    problem = Minimize(squares, (jnp.asarray(b),), resolvents.l1(ALPHA), penalty, jnp.asarray(A))
    step = jax.jit(lambda x: solver.step(solver.hyper, x, solver.init(solver.hyper, x, problem), problem)[0])
    after = np.asarray(step(jnp.asarray(x)))
    assert np.flatnonzero(after != x).tolist() == [np.argmax(decrease)]
    np.testing.assert_allclose(after, x + d * (np.arange(D) == np.argmax(decrease)), rtol=1e-12)


@pytest.mark.parametrize("update", ["gradient", "matrix"])
def test_the_support_is_identified_and_the_end_is_newtons(update, x64):
    """Finitely many steps until the support stays; from there to rounding in three."""
    A, b = data(4, 100, 50, 8)
    H = A.T @ A if update == "matrix" else None
    solver = bcd(selection="gs" if H is None else "gsl", update=update, hessian=H, block_size=5, identify_after=4)
    problem, want = lasso(A, b), scikit_learn(A, b)
    objective = lambda x: 0.5 * np.sum((A @ np.asarray(x) - b) ** 2) + ALPHA * np.sum(np.abs(x))  # noqa: E731
    best, x = objective(want), jnp.zeros(50)
    state, step = jax.jit(solver.init)(solver.hyper, x, problem), jax.jit(solver.step)
    gaps, supports, newton = [], [], []
    for _ in range(40):
        newton.append(bool(state.active.waited >= 4))
        x, state = step(solver.hyper, x, state, problem)
        gaps.append(objective(x) - best)
        supports.append(np.asarray(x != 0))
    right = [np.array_equal(support, want != 0) for support in supports]
    settled = len(right) - right[::-1].index(False)
    assert settled < 36
    first = newton.index(True, settled)
    assert gaps[first + 2] < 1e-12 * best
    np.testing.assert_allclose(x, want, atol=1e-12)


def test_newton_steps_that_do_not_help_are_refused(x64):
    """Far out, where they lead from one bound to the other: descent has the last word."""
    f = lambda x: jnp.sum(jnp.where(x > 0, 1.0, 0.5) * (jnp.sqrt(1 + x**2) - 1) * 9) - 0.2 * jnp.sum(x)  # noqa: E731
    problem = Minimize(f, resolvent=resolvents.box(-9.0, 9.0))
    solver = bcd(update="gradient", block_size=1, identify_after=1)
    solution = jaxnum.solve(solver, jnp.array([8.0, -8.0]), problem, rtol=1e-10)
    want = 0.2 / np.sqrt(81 - 0.04)
    np.testing.assert_allclose(solution.x, want, atol=1e-9)


def test_estimated_constants_stay_below_twice_the_true_ones(x64):
    A, b = data(5)
    solver = bcd(selection="gsl", update="gradient", block_size=1)
    solution = jaxnum.solve(solver, jnp.zeros(D), Minimize(squares, (jnp.asarray(b),), A=jnp.asarray(A)), rtol=1e-9)
    assert np.all(solution.state.bounds <= 2 * (A**2).sum(0) * (1 + 1e-9))
    np.testing.assert_allclose(solution.x, np.linalg.lstsq(A, b)[0], atol=1e-8)


@pytest.mark.parametrize(
    ("options", "penalised"),
    [
        ({"selection": "cyclic", "update": "gradient", "hessian": True}, True),
        ({"selection": "random", "update": "newton"}, False),
    ],
    ids=["cyclic", "random"],
)
def test_keeping_the_image_changes_nothing_but_roundings(options, penalised, key, x64, monkeypatch):
    """A x moved by the columns of the block, computed anew at every seventh step, against f(A x) as a whole."""
    monkeypatch.setattr("jaxnum.solvers.minimize._bcd._RECOMPUTE", 7)
    A, b = data(6)
    options = options | ({"hessian": A.T @ A} if "hessian" in options else {})
    solver = bcd(block_size=3, key=key, **options)
    tracked = lasso(A, b) if penalised else Minimize(squares, (jnp.asarray(b),), A=jnp.asarray(A))
    whole = Minimize(lambda x, b: squares(A @ x, b), tracked.args, tracked.resolvent, tracked.penalty)
    paths = []
    for problem in (tracked, whole):

        def turn(pair, _, problem=problem):
            pair = solver.step(solver.hyper, *pair, problem)
            return pair, pair[0]

        x = jnp.zeros(D)
        (x, state), path = jax.lax.scan(turn, (x, solver.init(solver.hyper, x, problem)), None, length=20)
        paths.append(path)
        np.testing.assert_allclose(solver.measure(solver.hyper, x, state, problem).residual, _residual(whole, x))
    np.testing.assert_allclose(*paths, atol=1e-12)


def _residual(problem, x):
    return np.linalg.norm(problem.root(x))


def test_derivatives_of_the_lasso(x64):
    """With respect to the weight and the data, on the support, by the closed form."""
    A, b = data(7)

    c = np.random.default_rng(8).normal(size=D)

    def weighted(weight, b):
        solver = bcd(selection="cyclic", update="gradient", lipschitz=(A**2).sum(0), block_size=1)
        x = jaxnum.solve(solver, jnp.zeros(D), lasso(A, b, weight), rtol=1e-11).x
        return jnp.sum(c * x), x

    (by_weight, by_data), x = jax.grad(weighted, (0, 1), has_aux=True)(jnp.float64(ALPHA), jnp.asarray(b))
    S = np.flatnonzero(x)
    inverse = np.linalg.inv(A[:, S].T @ A[:, S])
    np.testing.assert_allclose(by_weight, -c[S] @ inverse @ np.sign(x[S]), atol=1e-9)
    np.testing.assert_allclose(by_data, c[S] @ inverse @ A[:, S].T, atol=1e-9)


def test_bad_problems():
    x, f = jnp.ones(3), lambda x: jnp.sum(x**2)
    l1 = resolvents.l1(1.0)
    cases = [
        (bcd(), Minimize(f, resolvent=l1), "bcd: `problem` must have a penalty beside its resolvent for 'newton'"),
        (bcd(selection="gsn"), Minimize(f, (), l1, jnp.abs), "bcd: `selection` must be 'gs', 'gsl' or 'gsd'"),
        (bcd(identify_after=2), Minimize(f), "bcd: `identify_after` must be None for a problem without"),
        (newton_cg(), Minimize(f, resolvent=l1), "newton_cg: `problem` must have no resolvent"),
        (bcd(), Minimize(f, penalty=jnp.abs), "solve: `penalty` must come with its `resolvent`"),
        (bcd(), Minimize(f, (), l1, jnp.sum), r"solve: `penalty\(x0\)` must have shape \(3,\)"),
        (bcd(), Minimize(f, A=jnp.ones((4, 2))), "solve: `x0` must have shape"),
    ]
    for solver, problem, match in cases:
        with pytest.raises(ValueError, match=match):
            jaxnum.solve(solver, x, problem)


def test_a_resolvent_that_couples_coordinates_is_no_silent_answer():
    problem = Minimize(lambda x: jnp.sum((x - jnp.arange(3.0)) ** 2), resolvent=resolvents.simplex())
    solver = bcd(update="gradient", block_size=1, lipschitz=2 * np.ones(3))
    solution = jaxnum.solve(solver, jnp.zeros(3), problem, max_steps=200, on_failure="return")
    converged = int(solution.status) == Status.converged
    assert not converged or np.allclose(solution.x, [0, 0, 1], atol=1e-4)
