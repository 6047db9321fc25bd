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
    """Largest error of the Ritz values of matrices with few eigenvalues, and of the rank; matfree on 2I beside it."""
    import numpy as np
    from matfree import decomp

    from jaxnum.curvature import lanczos

    error, wrong = 0.0, 0
    for values in (np.full(8, 2.0), np.repeat([1.0, 4.0, 9.0], 4), np.r_[np.zeros(29), 1.0, 3.0, 7.0]):
        q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(len(values), len(values))))
        A = np.diag(values) if len(set(values)) == 1 else q * values @ q.T
        result = lanczos(A, jnp.asarray(np.random.default_rng(1).normal(size=len(values))), 6)
        wanted = np.unique(values)
        wrong += abs(int(result.rank) - len(wanted))
        error = max(error, float(np.max(np.abs(np.asarray(result.values[: len(wanted)]) - wanted))))
    v = np.random.default_rng(1).normal(size=8)
    theirs = {
        dtype: decomp.tridiag_sym(6, reortho="full")(lambda x: 2 * x, jnp.asarray(v, dtype)).J_small
        for dtype in ("float64", "float32")
    }
    return {
        "breakdown_error": error,
        "breakdown_rank_error": float(wrong),
        "twice_identity_nan_of_matfree_float64": float(jnp.sum(jnp.isnan(theirs["float64"]))),
        "twice_identity_error_of_matfree_float32": float(jnp.max(jnp.abs(jnp.linalg.eigvalsh(theirs["float32"]) - 2))),
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
