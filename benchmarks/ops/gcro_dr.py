"""Recycling over forty Darcy systems with close permeabilities, counted in products with the matrix.

Cells of a 32 x 32 grid with a log-permeability of four cosine modes, whose weights are 0.7 times normal; Jacobi from
the right, residual 1e-8 relative. GMRES(40) forgets at every restart and every system; scipy's `gcrotmk` recycles.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Peer, Row, Target, register

RTOL = 1e-8
MODES = ((1, 0), (0, 1), (1, 1), (2, 1))
SHAPE = {"n": 32, "systems": 40}


def make(params: Params) -> tuple:
    rng = np.random.default_rng(0)
    return (jnp.asarray(0.7 * rng.normal(size=(params["systems"], len(MODES)))),)


def faces(theta, n: int, xp=jnp):
    """Transmissibilities across the faces of cells [n, n], along both axes; harmonic means, pressure 0 outside."""
    middle = (xp.arange(n) + 0.5) / n
    waves = [xp.cos(np.pi * i * middle)[:, None] * xp.cos(np.pi * j * middle) for i, j in MODES]
    K = xp.exp(sum(weight * wave for weight, wave in zip(theta, waves, strict=True)))

    def along(K):
        return xp.concatenate([2 * K[:1], 2 * K[1:] * K[:-1] / (K[1:] + K[:-1]), 2 * K[-1:]])

    return along(K), along(K.T).T


def system(theta, n: int):
    """The Darcy system of one theta as a stencil."""
    import jaxnum

    x, y = faces(theta, n)
    diagonal = x[1:] + x[:-1] + y[:, 1:] + y[:, :-1]

    def apply(v):
        p = jnp.pad(v, 1)
        sides = x[1:] * p[2:, 1:-1] + x[:-1] * p[:-2, 1:-1] + y[:, 1:] * p[1:-1, 2:] + y[:, :-1] * p[1:-1, :-2]
        return diagonal * v - sides

    b = jnp.full((n, n), 1 / n**2)
    return jaxnum.Linear(apply, b, lambda r: r / diagonal, symmetric=False)


def matrix(theta, n: int):
    """The same as a sparse matrix of scipy's."""
    import scipy.sparse

    x, y = faces(np.asarray(theta), n, np)
    diagonal = (x[1:] + x[:-1] + y[:, 1:] + y[:, :-1]).ravel()
    down = -x[1:-1].ravel()
    inner = y[:, 1:].copy()
    inner[:, -1] = 0
    right = -inner.ravel()[:-1]
    return scipy.sparse.diags([diagonal, down, down, right, right], (0, n, -n, 1, -1)).tocsr()  # pyright: ignore[reportArgumentType]


def solve_all(thetas, n: int, *, m: int = 40, k: int = 10, order=None):
    import jaxnum

    return jaxnum.solvers.skr(lambda theta: system(theta, n), thetas, m=m, k=k, order=order, rtol=RTOL)


def run(params: Params):
    return lambda thetas: solve_all(thetas, params["n"]).x


def reference(params: Params):
    n = params["n"]

    def dense(theta):
        problem = system(theta, n)
        A = jax.vmap(lambda e: problem.matvec(e.reshape(n, n)).ravel(), out_axes=1)(jnp.eye(n * n))
        return jnp.linalg.solve(A, problem.b.ravel()).reshape(n, n)

    return lambda thetas: jax.lax.map(dense, thetas)


def jax_scipy(params: Params):
    def one(theta):
        problem = system(theta, params["n"])
        options = {"tol": RTOL, "restart": 40, "maxiter": 100, "solve_method": "incremental"}
        return jax.scipy.sparse.linalg.gmres(problem.matvec, problem.b, M=problem.preconditioned, **options)[0]

    return lambda thetas: jax.lax.map(one, thetas)


def scipys(thetas, n: int, solve, products: list | None = None):
    """Every system by a solver of scipy's; the products with each matrix are appended to `products`."""
    import scipy.sparse
    import scipy.sparse.linalg

    class Counted(scipy.sparse.linalg.LinearOperator):
        def __init__(self, A):
            super().__init__(A.dtype, A.shape)
            self.A, self.seen = A, 0

        def _matvec(self, x):
            self.seen += 1
            return self.A @ x

    b, solutions = np.full(n * n, 1 / n**2), []
    for theta in thetas:
        operator = Counted(matrix(theta, n))
        solutions.append(solve(operator, b, scipy.sparse.diags(1 / operator.A.diagonal()))[0].reshape(n, n))
        if products is not None:
            products.append(operator.seen)
    return np.stack(solutions)


def gcrotmk(recycling: bool = True):
    """scipy's recycler for a sequence of systems."""
    import scipy.sparse.linalg

    kept: list = []

    def solve(A, b, M):
        options = {"m": 20, "k": 20, "rtol": RTOL, "atol": 0.0, "maxiter": 1000}
        if not recycling:
            return scipy.sparse.linalg.gcrotmk(A, b, M=M, **options)
        return scipy.sparse.linalg.gcrotmk(A, b, M=M, CU=kept, discard_C=True, **options)

    return solve


def gmres(A, b, M):
    import scipy.sparse.linalg

    return scipy.sparse.linalg.gmres(A, b, M=M, restart=40, rtol=RTOL, atol=0.0, maxiter=100)


def products() -> dict[str, float]:
    """Mean products with the matrix a system, for every method and order."""
    import jaxnum

    thetas, n = make(SHAPE)[0], SHAPE["n"]
    given = jnp.arange(thetas.shape[0])

    def ours(**options):
        return float(jnp.mean(solve_all(thetas, n, **options).state.matvecs))

    def alone(k):
        solver = jaxnum.solvers.gcro_dr(m=40, k=k)
        one = lambda theta: jaxnum.solve(solver, jnp.zeros((n, n)), system(theta, n), rtol=RTOL).state.matvecs  # noqa: E731
        return float(jnp.mean(jax.lax.map(one, thetas)))

    def theirs(solve, order):
        seen: list = []
        scipys(np.asarray(thetas)[order], n, solve, seen)
        return float(np.mean(seen))

    tour = np.asarray(jaxnum.solvers.skr_order(thetas))
    figures = {
        "gmres_40_scipy": theirs(gmres, given),
        "gmres_40_ours": alone(0),
        "gcrotmk_without_recycling": theirs(gcrotmk(False), given),
        "gcrotmk_unsorted": theirs(gcrotmk(), given),
        "gcrotmk_sorted": theirs(gcrotmk(), tour),
        "deflated_restarts_alone": alone(10),
        "unsorted": ours(order=given),
        "sorted": ours(),
        "unsorted_k20": ours(k=20, order=given),
        "sorted_k20": ours(k=20),
        "sorted_cloud_a_tenth_as_wide": float(jnp.mean(solve_all(thetas / 10, n).state.matvecs)),
    }
    least = min(figures["gmres_40_scipy"], figures["gmres_40_ours"])
    return figures | {
        "sorted_over_gmres_40": figures["sorted"] / least,
        "unsorted_over_gmres_40": figures["unsorted"] / least,
        "sorted_over_unsorted": figures["sorted"] / figures["unsorted"],
        "sorted_over_gcrotmk_sorted": figures["sorted"] / figures["gcrotmk_sorted"],
    }


register(
    Row(
        name="gcro_dr",
        covers=("gcro_dr", "skr", "skr_order"),
        shapes={"darcy_32": SHAPE},
        make=make,
        run=run,
        reference=reference,
        modes=("solve",),
        tests=("tests/solvers/test_gcro_dr.py", "tests/solvers/test_skr.py"),
        peers={
            "jax.scipy gmres": Peer("jax", jax_scipy),
            "scipy gmres": Peer("scipy", lambda params: lambda t: scipys(t, params["n"], gmres), jit=False),
            "scipy gcrotmk": Peer("scipy", lambda params: lambda t: scipys(t, params["n"], gcrotmk()), jit=False),
        },
        targets=(
            Target(
                "figure",
                0.6,
                "Recycling at most 0.6x GMRES(40)'s matvecs on the 40 Darcy systems.",
                figure="sorted_over_gmres_40",
            ),
            Target(
                "figure",
                1.5,
                "scipy's gcrotmk(m=20, k=20) recycling: counts within 1.5x.",
                figure="sorted_over_gcrotmk_sorted",
            ),
        ),
        figures={"products": products},
        x64=True,
    )
)
