"""GCRO-DR: GMRES when nothing is kept, scipy's recycling beside it, what a recycle space is worth and survives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spla

import jaxnum
from jaxnum import Linear, Status
from jaxnum.core.loops import begin
from jaxnum.solvers import gcro_dr
from tests.tolerances import tolerance

N = 12


def convection(t, n=N):
    """Upwind convection-diffusion on n x n points; t turns the wind a little."""
    one = lambda wind: sp.diags([-1.0 - wind, 2.0 + wind, -1.0], [-1, 0, 1], shape=(n, n))  # noqa: E731
    return (sp.kron(one(0.3 + t), sp.eye(n)) + sp.kron(sp.eye(n), one(0.1 - t))).tocsr()


def systems(count=4):
    rng = np.random.default_rng(0)
    return [(convection(0.02 * i), rng.normal(size=N * N)) for i in range(count)]


def solve(solver, A, b, *, M=None, **options):
    problem = Linear(jnp.asarray(A.toarray()), jnp.asarray(b), M, symmetric=False)
    return jaxnum.solve(solver, jnp.zeros_like(b), problem, rtol=1e-8, **options)


def counted(A):
    count = [0]

    def matvec(v):
        count[0] += 1
        return A @ v

    return spla.LinearOperator(A.shape, matvec, dtype=float), count


def test_keeping_nothing_is_restarted_gmres(x64):
    A, b = systems(1)[0]
    norms = []
    spla.gmres(A, b, restart=8, rtol=1e-9, atol=0, maxiter=6, callback=norms.append, callback_type="pr_norm")
    steps = 40
    solution = solve(gcro_dr(m=8, k=0), A, b, max_steps=steps, history=True, on_failure="return")
    np.testing.assert_allclose(solution.history[1 : steps + 1] / np.linalg.norm(b), norms[:steps], rtol=1e-6)


def test_first_cycle_with_a_preconditioner_is_gmres_from_the_right(x64):
    """Also where a residual does not fall at all: a shift, whose GMRES stands still until the last step."""
    A, b = np.roll(np.eye(6), 1, axis=0), np.eye(6)[0]
    M = np.diag(np.arange(1.0, 7))
    problem = Linear(jnp.asarray(A), jnp.asarray(b), jnp.asarray(M), symmetric=False)
    solution = jaxnum.solve(gcro_dr(m=8, k=2), jnp.zeros(6), problem, history=True)
    np.testing.assert_allclose(solution.history[:7], [1, 1, 1, 1, 1, 1, 0], atol=1e-12)
    np.testing.assert_allclose(solution.x, np.linalg.solve(A, b), atol=1e-12)


def test_pairs_stay_pairs_through_restarts(x64):
    A, b = systems(1)[0]
    problem = Linear(jnp.asarray(A.toarray()), jnp.asarray(b), symmetric=False)
    solver, x = gcro_dr(m=8, k=3), jnp.zeros(b.size)
    carry = (x, begin(solver, x, problem))
    x, state = jax.lax.fori_loop(0, 30, lambda _, c: solver.step(solver.hyper, *c, problem), carry)
    held = int(state.count)
    U, C = np.asarray(state.directions)[:held], np.asarray(state.images)[:held]
    atol = tolerance("float64", N * N, condition=1e3)
    np.testing.assert_allclose(C @ C.T, np.eye(held), atol=atol)
    np.testing.assert_allclose(U @ A.toarray().T, C, atol=atol)
    np.testing.assert_allclose(state.gram[:held, :held], U @ U.T, atol=atol)
    np.testing.assert_allclose(state.r, b - A @ np.asarray(x), atol=atol)
    np.testing.assert_allclose(C @ np.asarray(state.r), np.zeros(held), atol=atol)
    assert int(state.matvecs) == 31


def test_recycling_needs_no_more_products_than_scipys(x64):
    ours, theirs, CU, recycle = [], [], [], None
    for A, b in systems():
        solution = solve(gcro_dr(m=16, k=8, recycle=recycle), A, b)
        recycle = solution.state.recycle
        np.testing.assert_allclose(solution.x, spla.spsolve(A, b), atol=1e-6)
        ours.append(int(solution.state.matvecs))
        operator, count = counted(A)
        spla.gcrotmk(operator, b, m=8, k=8, CU=CU, discard_C=True, rtol=1e-8, atol=0)
        theirs.append(count[0])
    assert sum(ours) <= 1.5 * sum(theirs), (ours, theirs)
    assert sum(theirs) <= 1.5 * sum(ours), (ours, theirs)


def test_the_same_system_again_is_cheaper(x64):
    A, b = systems(1)[0]
    first = solve(gcro_dr(m=16, k=8), A, b)
    for rhs in (b, np.random.default_rng(5).normal(size=b.size)):
        second = solve(gcro_dr(m=16, k=8, recycle=first.state.recycle), A, rhs)
        assert int(second.state.matvecs) < int(first.state.matvecs)
    assert int(first.state.matvecs) == int(first.steps) + 2


def test_stale_images_do_no_harm(x64):
    """The matrix changes altogether: what is recycled is multiplied by the new one, so the answer is right."""
    A, b = systems(1)[0]
    recycle = solve(gcro_dr(m=16, k=8), A, b).state.recycle
    other = (sp.diags(np.linspace(1, 3, b.size)) - 0.5 * convection(0.5)).tocsr()
    other = (other @ other.T).tocsr()
    solution = solve(gcro_dr(m=16, k=8, recycle=recycle), other, b)
    assert np.linalg.norm(b - other @ np.asarray(solution.x)) <= 1e-8 * np.linalg.norm(b)


def test_scan_over_systems_on_trees(x64):
    """Zeros start the carry; the second system is preconditioned by a function and finds its recycled vectors."""
    pairs = systems(3)
    As, bs = (
        jnp.stack([jnp.asarray(v) for v in part]) for part in ([A.toarray() for A, _ in pairs], [b for _, b in pairs])
    )
    join = lambda v: jnp.concatenate([v["u"], v["w"]])  # noqa: E731
    split = lambda v: {"u": v[:44], "w": v[44:]}  # noqa: E731

    def body(recycle, system):
        A, b = system
        problem = Linear(lambda v: split(A @ join(v)), split(b), lambda r: split(join(r) / 4), symmetric=False)
        x0 = jax.tree.map(jnp.zeros_like, problem.b)
        solution = jaxnum.solve(gcro_dr(m=16, k=8, recycle=recycle), x0, problem)
        return solution.state.recycle, (join(solution.x), solution.state.matvecs, solution.status)

    empty = {"u": jnp.zeros((8, 44)), "w": jnp.zeros((8, N * N - 44))}
    _, (xs, matvecs, statuses) = jax.jit(lambda: jax.lax.scan(body, empty, (As, bs)))()
    np.testing.assert_array_equal(statuses, Status.converged)
    for x, (A, b) in zip(xs, pairs, strict=True):
        np.testing.assert_allclose(x, spla.spsolve(A, b), atol=1e-6)
    assert max(matvecs[1:]) < matvecs[0]


def test_complex_system(x64):
    A, b = systems(1)[0]
    A = (A + 0.5j * sp.eye(b.size)).tocsr()
    solution = solve(gcro_dr(m=16, k=6), A, b + 1j * b[::-1])
    np.testing.assert_allclose(solution.x, spla.spsolve(A, b + 1j * b[::-1]), atol=1e-6)


def test_zero_right_hand_side_from_a_warm_start(x64):
    problem = Linear(2 * jnp.eye(5), jnp.zeros(5), symmetric=False)
    np.testing.assert_array_equal(jaxnum.solve(gcro_dr(m=4, k=1), jnp.ones(5), problem).x, np.zeros(5))


def test_a_recycle_space_of_nan_is_none(x64):
    problem = Linear(jnp.diag(jnp.arange(1.0, 6)), jnp.ones(5), symmetric=False)
    solution = jaxnum.solve(gcro_dr(m=4, k=1, recycle=jnp.full((1, 5), jnp.nan)), jnp.zeros(5), problem)
    np.testing.assert_allclose(solution.x, 1 / np.arange(1.0, 6), atol=1e-6)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="gcro_dr: `m` must be a Python int >= 1; got 0"):
        gcro_dr(m=0)
    with pytest.raises(ValueError, match=r"gcro_dr: `k` must be a Python int in \[0, m = 4\); got 4"):
        gcro_dr(m=4, k=4)
    with pytest.raises(ValueError, match=r"gcro_dr: `recycle` must have shape \[2, ...\]; got \(3, 5\)"):
        gcro_dr(m=4, k=2, recycle=jnp.zeros((3, 5)))
    problem = Linear(jnp.eye(4), jnp.ones(4), symmetric=False)
    with pytest.raises(ValueError, match=r"gcro_dr: `recycle\[i\]` must have shape \(4,\)"):
        jaxnum.solve(gcro_dr(m=4, k=2, recycle=jnp.zeros((2, 5))), jnp.zeros(4), problem)
