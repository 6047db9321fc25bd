"""Lanczos beside matfree on a matrix of full rank, and on matrices with few eigenvalues, where the recursion ends."""

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, Target, register

STEPS = 40


def make(params: Params) -> tuple:
    n = params["n"]
    q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (n, n), jnp.float64))
    A = (q * jnp.logspace(-3, 0, n)) @ q.T
    return (A + A.T) / 2, jax.random.normal(jax.random.key(1), (n,), jnp.float64)


def run(params: Params):
    from jaxnum.curvature import lanczos

    return lambda A, v: lanczos(lambda x: A @ x, v, STEPS).values


def matfree(params: Params):
    from matfree import decomp

    decompose = decomp.tridiag_sym(STEPS, reortho="full")
    return lambda A, v: jnp.linalg.eigvalsh(decompose(lambda x: A @ x, v).J_small)


def projection(params: Params):
    """Eigenvalues of A in the Krylov space, its basis made by QR one vector at a time."""

    def values(A, v):
        columns = [v / jnp.linalg.norm(v)]
        for _ in range(STEPS - 1):
            basis = jnp.stack(columns, axis=1)
            r = A @ columns[-1]
            for _ in range(3):
                r = r - basis @ (basis.T @ r)
            columns.append(r / jnp.linalg.norm(r))
        basis = jnp.stack(columns, axis=1)
        return jnp.linalg.eigvalsh(basis.T @ A @ basis)

    return values


def breakdown() -> dict[str, float]:
    """Largest error of the Ritz values of matrices with few eigenvalues, and of the rank; matfree's beside it."""
    import numpy as np
    from matfree import decomp

    from jaxnum.curvature import lanczos

    ours, theirs, wrong = [], [], 0
    for values in (np.full(8, 2.0), np.repeat([1.0, 4.0, 9.0], 4), np.r_[np.zeros(29), 1.0, 3.0, 7.0]):
        n = len(values)
        q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
        A = jnp.asarray(q * values @ q.T)
        v = jnp.asarray(np.random.default_rng(1).normal(size=n))
        result = lanczos(A, v, 6)
        wanted = np.unique(values)
        wrong += abs(int(result.rank) - len(wanted))
        ours.append(float(np.max(np.abs(np.asarray(result.values[: len(wanted)]) - wanted))))
        peer = np.asarray(jnp.linalg.eigvalsh(decomp.tridiag_sym(6, reortho="full")(lambda x, A=A: A @ x, v).J_small))
        # Every Ritz value of theirs should be near some eigenvalue.
        theirs.append(float(np.max(np.min(np.abs(peer[:, None] - wanted), axis=1))))
    return {
        "breakdown_error": max(ours),
        "breakdown_rank_error": float(wrong),
        "breakdown_error_of_matfree": float(np.max(theirs)),
    }


register(
    Row(
        name="lanczos",
        covers=("lanczos",),
        shapes={"dense_512": {"n": 512}},
        make=make,
        run=run,
        reference=projection,
        modes=("fwd",),
        tests=("tests/curvature/test_lanczos.py",),
        peers={"matfree": Peer("matfree", matfree)},
        targets=(
            Target("error", 1e-8, "Lanczos recovers eigenvalues to 1e-8 (float64)."),
            Target("figure", 1e-8, "Few eigenvalues: no NaN, Ritz values are eigenvalues.", figure="breakdown_error"),
            Target("figure", 0.0, "A = 2I gives rank 1.", figure="breakdown_rank_error"),
        ),
        figures={"breakdown": breakdown},
        x64=True,
    )
)
