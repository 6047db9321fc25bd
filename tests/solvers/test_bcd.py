"""Block coordinate descent: brute force over every block, guaranteed progress, least squares, what each rule needs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import Minimize, Status
from jaxnum.solvers import bcd, bcd_partition
from jaxnum.solvers.minimize import selection as rules
from tests.compiles import count_compiles

D, TAU = 10, 3
EVERY = np.array(list(itertools.combinations(range(D), TAU)), np.int32)


def quadratic(seed=0, n=30, d=D):
    """A = columns of very different size, b, H = A^T A, and 0.5 |A x - b|^2."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, d)) * rng.lognormal(size=d)
    b = rng.normal(size=n)
    return A, b, A.T @ A, lambda x: 0.5 * jnp.sum((A @ x - b) ** 2)


def one_step(solver, f, x):
    problem = Minimize(f)
    state = solver.init(solver.hyper, x, problem)
    return solver.step(solver.hyper, x, state, problem)[0]


def by_hand(rule, g, H):
    """The score of every block of three, in NumPy, one block at a time."""
    rows = np.abs(H).sum(axis=1)
    measure = {
        "gs": lambda B: g[B] @ g[B],
        "gsl": lambda B: g[B] @ g[B] / np.linalg.eigvalsh(H[np.ix_(B, B)])[-1],
        "gsd": lambda B: np.sum(g[B] ** 2 / rows[B]),
        "gsq": lambda B: g[B] @ np.linalg.solve(H[np.ix_(B, B)], g[B]),
        "gsn": lambda B: g[B] @ np.linalg.solve(H[np.ix_(B, B)], g[B]),
    }[rule]
    return np.array([measure(B) for B in EVERY])


@pytest.mark.parametrize("rule", ["gs", "gsl", "gsd", "gsq", "gsn"])
def test_the_chosen_block_is_the_best_of_all(rule, x64):
    """With every block of three of ten offered; and the step on it decreases f by half its score at least."""
    A, b, H, f = quadratic()
    x = jnp.asarray(np.random.default_rng(1).normal(size=D))
    g = A.T @ (A @ x - b)
    score = by_hand(rule, g, H)
    update = {"gs": "newton", "gsl": "gradient", "gsd": "matrix", "gsq": "matrix", "gsn": "newton"}[rule]
    after = one_step(bcd(selection=rule, update=update, blocks=EVERY, hessian=H), f, x)
    np.testing.assert_array_equal(np.flatnonzero(after != x), EVERY[np.argmax(score)])
    if rule != "gs":
        assert float(f(x) - f(after)) >= 0.5 * score.max() * (1 - 1e-9)


@pytest.mark.parametrize("rule", ["gs", "gsd", "gsq"])
def test_variable_blocks_against_brute_force(rule, x64):
    """Where the score is a sum, the best of all blocks; hard thresholding comes near it."""
    hits, share = 0, []
    for seed in range(5):
        A, b, H, f = quadratic(seed)
        score = by_hand(rule, -A.T @ b, H)
        after = one_step(bcd(selection=rule, update="matrix", block_size=TAU, hessian=H), f, jnp.zeros(D))
        got = score[[tuple(B) == tuple(np.flatnonzero(after)) for B in EVERY.tolist()]].item()
        hits += got == score.max()
        share.append(got / score.max())
    assert hits == 5 or rule == "gsq"
    assert np.mean(share) > 0.8


@pytest.mark.parametrize(("update", "fixed"), [("newton", True), ("matrix", False), ("gradient", False)])
def test_least_squares(update, fixed, x64):
    A, b, H, f = quadratic(3)
    blocks = bcd_partition(np.diag(H), 4) if fixed else None
    solver = bcd(selection="gsl", update=update, block_size=4, blocks=blocks, hessian=H)
    solution = jaxnum.solve(solver, jnp.zeros(D), Minimize(f), rtol=1e-9, max_steps=200_000)
    np.testing.assert_allclose(solution.x, np.linalg.lstsq(A, b)[0], atol=1e-8)


@pytest.mark.parametrize(("selection", "fixed"), [("cyclic", False), ("random", True)])
def test_rules_that_ignore_the_gradient_reach_every_coordinate(selection, fixed, key, x64):
    A, b, H, f = quadratic(4)
    blocks = bcd_partition(np.diag(H), 4, order="average") if fixed else None
    solver = bcd(selection=selection, block_size=4, blocks=blocks, key=key)
    solution = jaxnum.solve(solver, jnp.zeros(D), Minimize(f), max_steps=50_000)
    np.testing.assert_allclose(solution.x, np.linalg.lstsq(A, b)[0], atol=1e-6)


def test_of_all_coordinates_it_is_newton_and_minimises_rosenbrock(x64):
    f = lambda x: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)  # noqa: E731
    solution = jaxnum.solve(bcd(block_size=9), jnp.array([1.3, 0.7, 0.8, 1.9]), Minimize(f))
    np.testing.assert_allclose(solution.x, np.ones(4), atol=1e-6)
    assert int(solution.steps) < 40


def test_a_saddle_is_left(x64):
    """At a point of negative curvature a Newton step would climb."""
    f = lambda x: x[0] ** 2 - x[1] ** 2 + 0.25 * x[1] ** 4  # noqa: E731
    solution = jaxnum.solve(bcd(block_size=2), jnp.array([1.0, 1e-3]), Minimize(f))
    np.testing.assert_allclose(solution.x, [0, 2**0.5], atol=1e-7)


def test_bounds_that_are_too_small_diverge_with_a_status(x64):
    _, _, H, f = quadratic(5)
    solver = bcd(update="gradient", lipschitz=1e-3 * np.diag(H), block_size=5)
    solution = jaxnum.solve(solver, jnp.zeros(D), Minimize(f), on_failure="return")
    assert int(solution.status) == Status.nonfinite
    assert bool(jnp.isfinite(solution.x).all())


def test_scores_of_short_blocks_count_only_what_they_hold(x64):
    _, _, H, _ = quadratic(6)
    g = jnp.asarray(np.random.default_rng(2).normal(size=D))
    blocks = rules.fixed(jnp.array([[4, 7, -1], [0, -1, -1]], jnp.int32))
    got = rules.scores("gsq", blocks, g, None, jnp.asarray(H))
    B = [4, 7]
    want = [g[jnp.array(B)] @ np.linalg.solve(H[np.ix_(B, B)], g[jnp.array(B)]), g[0] ** 2 / H[0, 0]]
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"selection": "best"}, "bcd: `selection` must be one of 'gs', 'gsl'"),
        ({"update": "exact"}, "bcd: `update` must be one of 'newton'"),
        ({"block_size": 0}, "bcd: `block_size` must be a Python int >= 1; got 0. An empty block cannot move"),
        ({"selection": "gsl"}, "bcd: `lipschitz` must be given, or `hessian`, for 'gsl'"),
        ({"identify_after": 0}, "bcd: `identify_after` must be None or a Python int >= 1; got 0"),
        ({"update": "matrix"}, "bcd: `hessian` must be given for 'gs' and 'matrix'"),
        ({"selection": "random"}, "bcd: `key` must be given for 'random'"),
        ({"blocks": np.array([[0, 1], [-1, -1]])}, r"bcd: `blocks` must have a coordinate in every block; got empty"),
        ({"blocks": np.zeros((0, 2), int)}, r"bcd: `blocks` must have a coordinate in every block"),
        ({"blocks": np.array([[0, 2]])}, r"bcd: `blocks` must cover every coordinate; got blocks without \[1\]"),
        ({"blocks": np.array([[0, 0]])}, "bcd: `blocks` must name a coordinate once in a block"),
        ({"hessian": np.ones((2, 3))}, "bcd: `hessian` must have shape"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        bcd(**options)


def test_bounds_and_blocks_of_another_size():
    f, x = lambda x: jnp.sum(x**2), jnp.ones(3)  # noqa: E731
    with pytest.raises(ValueError, match="bcd: `lipschitz` must be greater than 0 everywhere; got -1.0"):
        bcd(lipschitz=jnp.array([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"bcd: `hessian` must have shape \(3, 3\); got \(2, 2\)"):
        jaxnum.solve(bcd(hessian=np.eye(2)), x, Minimize(f))
    with pytest.raises(ValueError, match="bcd: `blocks` must hold the 3 entries of x; got 2 coordinates"):
        jaxnum.solve(bcd(blocks=np.array([[0, 1]])), x, Minimize(f))


def test_one_compilation_for_other_bounds(x64):
    """Bounds and blocks are leaves: another problem of the same shapes compiles nothing."""
    problems = [quadratic(seed) for seed in (7, 8)]
    solvers = [bcd(selection="gsd", hessian=H, block_size=4) for _, _, H, _ in problems]
    f = lambda x, A, b: 0.5 * jnp.sum((A @ x - b) ** 2)  # noqa: E731
    minimised = [Minimize(f, (jnp.asarray(A), jnp.asarray(b))) for A, b, *_ in problems]
    jaxnum.solve(solvers[0], jnp.zeros(D), minimised[0])
    x0 = jnp.zeros(D)
    with count_compiles() as compiled:
        jaxnum.solve(solvers[1], x0, minimised[1])
    assert compiled() == 0
    assert jax.tree.structure(solvers[0]) == jax.tree.structure(solvers[1])
