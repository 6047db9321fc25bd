"""Conjugate gradients: scipy's iterates, exact termination, conjugacy, flexible directions, null spaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spla

import jaxnum
from jaxnum import Linear, Status
from jaxnum.core.loops import begin
from jaxnum.solvers import cg, gcro_dr, minres
from tests.tolerances import tolerance


def spd(n, kappa, seed=0):
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    A = Q * np.geomspace(1, kappa, n) @ Q.T
    return (A + A.T) / 2


def iterates(solver, problem, steps):
    x = jnp.zeros_like(problem.b)
    state = begin(solver, x, problem)

    def body(pair, _):
        pair = solver.step(solver.hyper, *pair, problem)
        return pair, pair

    return jax.lax.scan(body, (x, state), None, length=steps)[1]


@pytest.mark.parametrize("preconditioned", [False, True])
def test_iterates_equal_scipy(preconditioned, x64):
    A, b = spd(60, 100), np.random.default_rng(1).normal(size=60)
    M = np.diag(1 / np.diag(A)) if preconditioned else None
    seen = []
    spla.cg(A, b, rtol=1e-14, maxiter=20, M=M, callback=lambda x: seen.append(x.copy()))
    problem = Linear(jnp.asarray(A), jnp.asarray(b), None if M is None else jnp.asarray(M))
    xs, _ = iterates(cg(), problem, 20)
    np.testing.assert_allclose(xs, np.stack(seen), atol=1e-8)


def test_terminates_after_as_many_steps_as_distinct_eigenvalues(x64):
    d = np.repeat([1.0, 2.0, 5.0, 7.0, 11.0], 10)
    solution = jaxnum.linear_solve(jnp.diag(d), jnp.ones(50), max_steps=5, rtol=1e-11)
    assert int(solution.status) == Status.converged
    assert float(solution.residual) < 1e-10


def test_error_bound_and_conjugacy(x64):
    A, b = spd(80, 50), np.random.default_rng(2).normal(size=80)
    problem = Linear(jnp.asarray(A), jnp.asarray(b))
    xs, states = iterates(cg(), problem, 30)
    exact = np.linalg.solve(A, b)
    error = lambda x: np.sqrt((x - exact) @ A @ (x - exact))  # noqa: E731
    rate = (np.sqrt(50) - 1) / (np.sqrt(50) + 1)
    for k, x in enumerate(np.asarray(xs), start=1):
        assert error(x) <= 2 * rate**k * error(np.zeros(80)) * (1 + 1e-6)
    P = np.array(states.p)[:20]
    P /= np.sqrt(np.einsum("ki,ij,kj->k", P, A, P))[:, None]
    gram = P @ A @ P.T
    for i in range(20):
        for j in range(max(0, i - 5), i):
            assert abs(gram[i, j]) <= 1e-8


def test_flexible_of_full_memory_equals_plain_with_a_fixed_preconditioner(x64):
    A, b = spd(40, 30), np.random.default_rng(3).normal(size=40)
    problem = Linear(jnp.asarray(A), jnp.asarray(b), jnp.diag(jnp.asarray(1 / np.diag(A))))
    plain, _ = iterates(cg(), problem, 12)
    for m in (1, 2, 4):
        flexible, _ = iterates(cg(flexible=m), problem, 12)
        np.testing.assert_allclose(flexible, plain, atol=tolerance("float64", 40, condition=1e4))


def test_flexible_survives_a_preconditioner_that_varies(x64):
    """A preconditioner that is not linear, and so differs at every residual: plain CG loses conjugacy."""
    d = jnp.geomspace(1, 1e3, 200)
    b = jnp.ones(200)
    varying = lambda r: r * (1 + jnp.mod(1e5 * jnp.abs(r) / jnp.linalg.norm(r), 1.0))  # noqa: E731
    steps = {}
    for flexible in (None, 1, 2):
        solution = jaxnum.linear_solve(
            lambda v: d * v,
            b,
            preconditioner=varying,
            solver=cg(flexible=flexible),
            rtol=1e-8,
            max_steps=20_000,
            on_failure="return",
        )
        steps[flexible] = int(solution.steps) if int(solution.status) == Status.converged else 20_000
    assert steps[1] * 2 < steps[None]
    assert steps[2] <= steps[1]


def test_float32_does_not_run_away_near_its_rounding():
    """Recomputed residuals that differ from the recurrence's once made every later line search overshoot."""
    n = 64
    A = (poisson(n)[0] / (n + 1) ** 2).astype(np.float32)
    seen = []
    spla.cg(A, np.ones(n * n, np.float32), rtol=1e-4, callback=seen.append)

    def stencil(u):
        p = jnp.pad(u, 1)
        return 4 * u - p[:-2, 1:-1] - p[2:, 1:-1] - p[1:-1, :-2] - p[1:-1, 2:]

    solution = jaxnum.linear_solve(stencil, jnp.ones((n, n), jnp.float32), rtol=1e-4, max_steps=200)
    assert int(solution.steps) <= 1.05 * len(seen)


def poisson(n):
    h = 1 / (n + 1)
    one = sp.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(n, n)) / h**2
    return (sp.kron(one, sp.eye(n)) + sp.kron(sp.eye(n), one)).tocsr(), h


def test_poisson_with_ssor_needs_a_third_of_the_steps(x64):
    """64 x 64 Dirichlet problem; scipy is the referee of both step counts."""
    n = 64
    A, h = poisson(n)
    b = np.ones(n * n)
    omega = 2 / (1 + np.sin(np.pi * h))
    D, L = sp.diags(A.diagonal()), sp.tril(A, -1)
    lower = (D / omega + L).tocsr()

    def ssor(r):
        y = spla.spsolve_triangular(lower, r, lower=True)
        return spla.spsolve_triangular(lower.T.tocsr(), D @ y * (2 - omega) / omega, lower=False)

    def stencil(v):
        u = jnp.pad(v.reshape(n, n), 1)
        return ((4 * u[1:-1, 1:-1] - u[2:, 1:-1] - u[:-2, 1:-1] - u[1:-1, 2:] - u[1:-1, :-2]) / h**2).ravel()

    host = lambda r: jax.pure_callback(  # noqa: E731
        lambda r: ssor(np.asarray(r)), jax.ShapeDtypeStruct((n * n,), jnp.float64), r
    )
    plain = jaxnum.linear_solve(stencil, jnp.asarray(b), rtol=1e-8)
    better = jaxnum.linear_solve(stencil, jnp.asarray(b), preconditioner=host, rtol=1e-8, adjoint="none")
    counts = {"plain": 0, "ssor": 0}

    def count(which):
        return lambda _: counts.__setitem__(which, counts[which] + 1)

    want, _ = spla.cg(A, b, rtol=1e-8, callback=count("plain"))
    spla.cg(A, b, rtol=1e-8, M=spla.LinearOperator(A.shape, ssor), callback=count("ssor"))
    assert abs(int(plain.steps) - counts["plain"]) <= 1
    assert abs(int(better.steps) - counts["ssor"]) <= 1
    assert int(plain.steps) >= 3 * int(better.steps)
    np.testing.assert_allclose(plain.x, want, rtol=1e-6)


def test_neumann_null_space(x64):
    """The 1-D Neumann Laplacian is singular along constants; the solution of mean zero comes back, and its gradient."""
    n = 30
    L = np.diag(np.r_[1, np.full(n - 2, 2), 1]) - np.eye(n, k=1) - np.eye(n, k=-1)
    b = np.random.default_rng(4).normal(size=n)
    b -= b.mean()
    basis = jnp.full((1, n), 1 / np.sqrt(n))
    solution = jaxnum.linear_solve(jnp.asarray(L), jnp.asarray(b), null_space=basis)
    # The pseudo-inverse without a cutoff: whether the smallest singular value falls below one differs between LAPACKs.
    inverse = np.linalg.inv(L + 1 / n) - 1 / n
    np.testing.assert_allclose(solution.x, inverse @ b, atol=1e-7)
    grad = jax.grad(lambda b: jaxnum.linear_solve(jnp.asarray(L), b, null_space=basis, rtol=1e-12).x[3])(jnp.asarray(b))
    np.testing.assert_allclose(grad, inverse[3], atol=1e-9)


@pytest.mark.parametrize("n", [40, 300])
def test_gradient_equals_lineax_and_dense(n, x64):
    """Below 256 unknowns the tangent is solved by LU, above by CG."""
    lx = pytest.importorskip("lineax")
    A, b = jnp.asarray(spd(n, 20)), jnp.asarray(np.random.default_rng(5).normal(size=n))
    loss = lambda x: jnp.sum(jnp.sin(x))  # noqa: E731
    ours = jax.grad(lambda A, b: loss(jaxnum.linear_solve(A, b, rtol=1e-12).x), (0, 1))(A, b)
    dense = jax.grad(lambda A, b: loss(jnp.linalg.solve(A, b)), (0, 1))(A, b)

    def peer(b):
        operator = lx.MatrixLinearOperator(A, lx.positive_semidefinite_tag)
        return loss(lx.linear_solve(operator, b, lx.CG(rtol=1e-12, atol=1e-12)).value)

    for got, want in zip(ours, dense, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance("float64", n, condition=1e4))
    np.testing.assert_allclose(ours[1], jax.grad(peer)(b), atol=tolerance("float64", n, condition=1e5))


def test_accepts_a_lineax_operator(x64):
    lx = pytest.importorskip("lineax")
    A, b = jnp.asarray(spd(10, 5)), jnp.ones(10)
    operator = lx.MatrixLinearOperator(A)
    np.testing.assert_allclose(jaxnum.linear_solve(operator, b).x, jnp.linalg.solve(A, b), atol=1e-7)


def test_hermitian_system_and_its_gradient(x64):
    rng = np.random.default_rng(6)
    G = rng.normal(size=(8, 8)) + 1j * rng.normal(size=(8, 8))
    A = jnp.asarray(G @ G.conj().T + 8 * np.eye(8))
    b = jnp.asarray(rng.normal(size=8) + 1j * rng.normal(size=8))
    np.testing.assert_allclose(jaxnum.linear_solve(A, b, rtol=1e-12).x, jnp.linalg.solve(A, b), atol=1e-11)
    loss = lambda solve: jax.grad(lambda b: jnp.sum(jnp.abs(solve(A, b)) ** 2))(b)  # noqa: E731
    ours = loss(lambda A, b: jaxnum.linear_solve(A, b, rtol=1e-12).x)
    np.testing.assert_allclose(ours, loss(jnp.linalg.solve), atol=1e-9)


def test_zero_right_hand_side_from_a_warm_start(x64):
    solution = jaxnum.linear_solve(jnp.asarray(spd(6, 3)), jnp.zeros(6), jnp.ones(6))
    np.testing.assert_array_equal(solution.x, np.zeros(6))
    assert int(solution.steps) == 1


@pytest.mark.parametrize("flexible", [0, -1, 1.5, True])
def test_flexible_outside_its_range(flexible):
    with pytest.raises(ValueError, match=f"cg: `flexible` must be None or a Python int >= 1; got {flexible}"):
        cg(flexible=flexible)


def test_zero_is_the_answer_to_zero_whatever_the_matrix(x64):
    solution = jaxnum.linear_solve(jnp.diag(jnp.array([1.0, -1.0])), jnp.zeros(2), jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(solution.x, np.zeros(2))


@pytest.mark.parametrize(("solver", "symmetric"), [(cg, True), (minres, "indefinite"), (gcro_dr, False)])
def test_squares_that_vanish_are_not_convergence(solver, symmetric):
    """In float32 the square of a residual below 1e-19 is zero, and so is that of a right-hand side of 1e-22."""
    A = jnp.diag(jnp.linspace(1.0, 5.0, 20))
    for size, rtol in ((1e-12, 1e-5), (1e-17, 0.1)):
        solution = jaxnum.linear_solve(A, jnp.full(20, size), solver=solver(), symmetric=symmetric, rtol=rtol)
        np.testing.assert_allclose(A @ solution.x, size, rtol=2 * rtol)
    for size in (1e-17, 1e-22):
        b = jnp.full(20, size)
        solution = jaxnum.linear_solve(A, b, solver=solver(), symmetric=symmetric, on_failure="return")
        assert int(solution.status) == Status.stagnated


def test_a_small_gradient_is_not_zero():
    d = jnp.linspace(1.0, 5.0, 300)
    total = lambda b, size: size * jnp.sum(jaxnum.linear_solve(lambda v: d * v, b).x)  # noqa: E731
    small, plain = (jax.grad(total)(jnp.ones(300), jnp.float32(size)) for size in (1e-22, 1.0))
    np.testing.assert_allclose(1e22 * small, plain, rtol=tolerance("float32", 300))
