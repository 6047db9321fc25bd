"""Row log-sum-exps of point-cloud costs: sweeps over 50,000 points in 3-D, pairs a second and memory.

ott-jax's online point clouds raise on jax 0.10.2, so the peers are what their users would write: blocks of rows in
jax.numpy, and in torch.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Peer, Row, Target, register

EPSILON = 0.01
ROWS = 64
POINTS, SWEEPS = 50_000, 3


def make(params: Params) -> tuple:
    """Two clouds in the unit cube, and logarithms of weights."""
    n, keys = params["n"], jax.random.split(jax.random.key(0), 3)
    x, y = (jax.random.uniform(key, (n, 3), params["dtype"]) for key in keys[:2])
    return x, y, jax.random.normal(keys[2], (n,), params["dtype"])


def run(params: Params):
    import kernels_pallas

    return lambda x, y, v: kernels_pallas.softmin(x, y, v, EPSILON)


def reference(params: Params):
    import kernels_pallas

    return lambda x, y, v: kernels_pallas.softmin(x, y, v, EPSILON, implementation="reference")


def blocks(params: Params):
    """Blocks of rows as one writes them: all differences at once, then jax.nn's log-sum-exp."""

    def call(x, y, v):
        row = lambda point: jax.nn.logsumexp(v - jnp.sum((point - y) ** 2, axis=-1) / EPSILON)  # noqa: E731
        return jax.lax.map(row, x, batch_size=ROWS)

    return call


def torch_blocks(params: Params):
    import torch

    def call(x, y, v):
        x, y, v = (torch.from_numpy(np.array(a)) for a in (x, y, v))
        parts = [torch.logsumexp(v - torch.cdist(part, y) ** 2 / EPSILON, dim=1) for part in x.split(ROWS)]
        return torch.cat(parts).numpy()

    return call


def sweeps() -> dict[str, float]:
    """Three Sinkhorn sweeps of 50,000 points: G pairs a second, and the temporary memory of the compiled program."""
    import kernels_pallas

    figures = {}
    for dtype in ("float64", "float32"):
        x, y, v = make({"n": POINTS, "dtype": dtype})

        def sweep(_, v, x=x, y=y):
            u = -kernels_pallas.softmin(x, y, v, EPSILON)
            return -kernels_pallas.softmin(y, x, u, EPSILON)

        compiled = jax.jit(lambda v, sweep=sweep: jax.lax.fori_loop(0, SWEEPS, sweep, v)).lower(v).compile()
        start = time.perf_counter()
        jax.block_until_ready(compiled(v))
        seconds = time.perf_counter() - start
        figures[f"gpairs_{dtype}"] = 2 * SWEEPS * POINTS**2 / seconds / 1e9
        figures[f"temp_mib_{dtype}"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return figures


def convergence() -> dict[str, float]:
    """Transport between 5,000 points: steps, the marginal error at the end, and the status (0: converged)."""
    import jaxnum

    x, y, _ = make({"n": 5000, "dtype": "float64"})
    a = jnp.full(5000, 1 / 5000)
    solved = jaxnum.transport(jaxnum.PointCloudCost(x, y), a, a, 0.05, rtol=1e-6)
    return {
        "converged_steps": int(solved.steps),
        "converged_error": float(solved.residual),
        "converged_status": int(solved.status),
    }


register(
    Row(
        name="softmin",
        covers=("softmin",),
        shapes={
            "n4000_float64": {"n": 4000, "dtype": "float64"},
            "n4000_float32": {"n": 4000, "dtype": "float32"},
        },
        make=make,
        run=run,
        reference=reference,
        modes=("fwd", "fwd_bwd"),
        tests=("tests/kernels_pallas/test_softmin.py",),
        peers={
            "blocks": Peer("jax", blocks),
            "torch": Peer("torch", torch_blocks, jit=False, modes=("fwd",)),
        },
        figures={"sweeps": sweeps, "convergence": convergence},
        x64=True,
        targets=tuple(
            target
            for dtype in ("float64", "float32")
            for target in (
                Target(
                    "figure",
                    0.8,
                    f"50,000 points in 3-D, {dtype}: at least 0.8 G pairs/s on two cores.",
                    figure=f"gpairs_{dtype}",
                    at_least=True,
                ),
                Target("figure", 64.0, f"Three sweeps in {dtype}: under 64 MiB of memory.", figure=f"temp_mib_{dtype}"),
            )
        )
        + (Target("figure", 1e-6, "Transport of 5,000 points converges.", figure="converged_error"),),
    )
)
