"""The law of the learning rate on least squares, and rates by Lanczos quadrature beside ARPACK's.

Inputs of 200 dimensions, one direction of variance 5 among 199 of variance 1, labels that a linear model fits: at each
batch size the largest rate at which 300 steps of SGD do not grow, by bisection. The law is fitted by its one constant,
which stands beside what the noise of the Hessian gives for it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Peer, Row, Target, register

WIDTH, DATA, STEPS = 200, 4096, 300
SIZES = tuple(2**i for i in range(10))


def inputs() -> jax.Array:
    x = jax.random.normal(jax.random.key(0), (DATA, WIDTH))
    return x.at[:, 0].multiply(5**0.5)


def largest_rate(x: jax.Array, size: int) -> float:
    """Bisection, in logarithms, for the rate at which SGD from a random start grows in 300 steps."""

    def grows(rate):
        def step(w, key):
            batch = x[jax.random.randint(key, (size,), 0, DATA)]
            return w - rate / size * (batch.T @ (batch @ w)), None

        start = jax.random.normal(jax.random.key(1), (WIDTH,))
        end = jax.lax.scan(step, start, jax.random.split(jax.random.key(2), STEPS))[0]
        return ~(jnp.linalg.norm(end) <= jnp.linalg.norm(start))

    def halve(bounds, _):
        low, high = bounds
        middle = jnp.sqrt(low * high)
        above = grows(middle)
        return (jnp.where(above, low, middle), jnp.where(above, middle, high)), None

    bounds = (jnp.float32(1e-4), jnp.float32(2.0))
    return float(jax.jit(lambda: jax.lax.scan(halve, bounds, length=14)[0][0])())


def law() -> dict[str, float]:
    """How well 2 / (λ + c / B) describes the rates, c fitted, λ known."""
    from scipy.optimize import minimize_scalar

    from jaxnum.training import batch_learning_rate, hessian_noise

    x = inputs()
    rates = np.array([largest_rate(x, size) for size in SIZES])
    top = float(jnp.linalg.eigvalsh(x.T @ x / DATA)[-1])
    sizes = jnp.array(SIZES, jnp.float32)

    def misfit(log_c):
        return np.log(np.asarray(batch_learning_rate(top, np.exp(log_c) * top, sizes)) / rates)

    found = minimize_scalar(lambda c: np.sum(misfit(c) ** 2), bounds=(0, 12), method="bounded")
    fitted = np.exp(found["x"])
    pairs = x[jax.random.randint(jax.random.key(3), (400, 1), 0, DATA)]
    noise, _ = hessian_noise(lambda w, x: 0.5 * jnp.mean((x @ w) ** 2), jnp.zeros(WIDTH), pairs, jax.random.key(4))
    return {
        "r_squared": float(1 - np.mean(misfit(np.log(fitted)) ** 2) / np.var(np.log(rates))),
        "slope_1_to_16": float(np.log(rates[4] / rates[0]) / np.log(16)),
        "largest_rate_over_2_by_eigenvalue": float(rates[-1] * top / 2),
        "fitted_over_trace": float(fitted) / float(jnp.sum(x**2) / DATA),
        "fitted_over_hessian_noise": float(fitted) * top / float(noise),
    }


def spikes() -> dict[str, float]:
    """Outliers of drawn matrices over those predicted; s = 6, P = 600."""
    from jaxnum.training import batch_eigenvalue

    entries = 0.1 * jax.random.normal(jax.random.key(0), (600, 600))
    noise = jnp.tril(entries, -1) + jnp.tril(entries, -1).T + jnp.diag(2**0.5 * jnp.diag(entries))
    u = jnp.full(600, 600**-0.5)
    return {
        f"spike_{spike}_over_predicted": float(
            jnp.linalg.eigvalsh(noise + spike * jnp.outer(u, u))[-1] / batch_eigenvalue(float(spike), 6.0, 1).value
        )
        for spike in (6, 1)
    }


def make(params: Params) -> tuple:
    """A matrix with a known spectrum."""
    size = params["size"]
    q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (size, size)))
    return ((q * jnp.linspace(0.5, 8, size)) @ q.T,)


def run(params: Params):
    from jaxnum.curvature import spectral_density
    from jaxnum.training import slq_learning_rate

    def rates(H):
        rule = spectral_density(H, jnp.zeros(len(H), H.dtype), jax.random.key(0), num_probes=2, num_steps=60)
        return jnp.stack(slq_learning_rate(rule, safety=1.0)[:2])

    return rates


def heavy_ball(ends: np.ndarray) -> np.ndarray:
    """Rate and momentum from the smallest and the largest eigenvalue."""
    bottom, top = np.sqrt(ends)
    return np.array([(2 / (top + bottom)) ** 2, ((top - bottom) / (top + bottom)) ** 2])


def reference(params: Params):
    return lambda H: heavy_ball(np.linalg.eigvalsh(np.asarray(H, np.float64))[[0, -1]])


def arpack(params: Params):
    from scipy.sparse.linalg import eigsh

    # Its tolerance is a whole number to those who typed it.
    return lambda H: heavy_ball(eigsh(H, 2, which="BE", return_eigenvectors=False, tol=1e-3))  # pyright: ignore


register(
    Row(
        name="batch_learning_rate",
        covers=("batch_learning_rate", "rescale_batch_learning_rate", "slq_learning_rate"),
        shapes={"1000": {"size": 1000}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd",),
        tests=("tests/training/test_batch_learning_rate.py", "tests/training/test_slq_learning_rate.py"),
        peers={"scipy.eigsh": Peer("scipy", arpack, jit=False)},
        targets=(
            Target("figure", 0.95, "R^2 >= 0.95 in log-log.", at_least=True, figure="r_squared"),
            Target("figure", 0.8, "A slope of 0.8 at least from B = 1 to 16.", at_least=True, figure="slope_1_to_16"),
            Target("figure", 1.05, "And of 1.05 at most.", figure="slope_1_to_16"),
            Target("error", 0.02, "60 Lanczos steps without a safety factor."),
        ),
        figures={"law": law, "spikes": spikes},
    )
)
