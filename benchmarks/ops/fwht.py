"""The Walsh-Hadamard transform beside a Fourier transform of the same numbers."""

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, Target, register


def make(params: Params) -> tuple:
    return (jax.random.normal(jax.random.key(0), (params["lines"], params["size"])),)


def run(params: Params):
    from jaxnum.training import fwht

    return fwht


def reference(params: Params):
    """By H_ab = H_a x H_b for the size a b, since the whole matrix need not fit."""
    from scipy.linalg import hadamard

    low = hadamard(min(params["size"], 1024)).astype(float)
    high = hadamard(params["size"] // len(low)).astype(float)
    return lambda x: jnp.einsum("ij,bjk,kl->bil", high, x.reshape(-1, len(high), len(low)), low).reshape(x.shape)


def fourier(params: Params):
    import scipy.fft

    return scipy.fft.rfft


register(
    Row(
        name="fwht",
        covers=("fwht",),
        shapes={"64_of_1k": {"lines": 64, "size": 1024}, "1_of_1m": {"lines": 1, "size": 1 << 20}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd", "fwd_bwd"),
        tests=("tests/training/test_fwht.py",),
        peers={
            "scipy.fft.rfft": Peer("scipy", fourier, jit=False, modes=("fwd",), same_answer=False),
            "jnp.fft.rfft": Peer("jax", lambda params: jnp.fft.rfft, modes=("fwd",), same_answer=False),
        },
        targets=(
            Target("error", 1e-5, "Equals scipy.linalg.hadamard(L) @ x."),
            Target("ratio", 1.0, "No slower than SciPy's real Fourier transform of as many.", peer="scipy.fft.rfft"),
        ),
    )
)
