"""What stability says of a run: gradient descent keeps the sharpness, SGD the trace; and the exact operator's cost.

A network with 100 hidden ReLU units and 20 points of a sine, trained from the same start to a loss of 1e-8, or for a
million steps, by gradient descent and by SGD with one example a step. The largest of three rates is beyond 2 / trace of
the Hessian at which gradient descent ends.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Peer, Row, Target, register

WIDTH, POINTS, STEPS = 100, 20, 1_000_000
RATES = (0.01, 0.02, 0.05)


def output(params: dict, x: jax.Array) -> jax.Array:
    return jax.nn.relu(params["w"] * x + params["b"]) @ params["v"]


def train(rate: jax.Array, stochastic: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The last loss, and the rate times the largest eigenvalue and times the trace."""
    from jaxnum.training import sgd_stability_exact

    x = jnp.linspace(-1, 1, POINTS)
    y = jnp.sin(3 * x)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": 2**0.5 * jax.random.normal(keys[0], (WIDTH,)),
        "b": jax.random.normal(keys[1], (WIDTH,)),
        "v": 1.5 * WIDTH**-0.5 * jax.random.normal(keys[2], (WIDTH,)),
    }

    def one(params, x, y):
        return 0.5 * (output(params, x) - y) ** 2

    def loss(params):
        return jnp.mean(jax.vmap(one, (None, 0, 0))(params, x, y))

    def step(count, params):
        if stochastic:
            drawn = jax.random.randint(jax.random.fold_in(jax.random.key(50), count), (), 0, POINTS)
            gradient = jax.grad(one)(params, x[drawn], y[drawn])
        else:
            gradient = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient)

    def going(carry):
        params, count = carry
        return (loss(params) > 1e-8) & (count < STEPS)

    def some(carry):
        params, count = carry
        return jax.lax.fori_loop(count, count + 1000, step, params), count + 1000

    params, _ = jax.lax.while_loop(going, some, (params, jnp.int32(0)))
    report = sgd_stability_exact(jax.vmap(jax.grad(output), (None, 0))(params, x), learning_rate=rate, batch_size=1)
    return loss(params), report.rate_largest, report.rate_trace


def regularisation() -> dict[str, float]:
    ends = {s: jax.jit(jax.vmap(lambda rate, s=s: train(rate, s)))(jnp.array(RATES)) for s in (False, True)}
    figures: dict[str, float] = {}
    worst: dict[str, float] = {"gd_rate_largest": 0.0, "sgd_rate_trace": 0.0, "trace_sgd_over_gd": 0.0}
    for i, rate in enumerate(RATES):
        for stochastic, name in ((False, "gd"), (True, "sgd")):
            for figure, values in zip(("loss", "rate_largest", "rate_trace"), ends[stochastic], strict=True):
                figures[f"{name}_{figure}_{rate}"] = float(values[i])
        figures[f"trace_sgd_over_gd_{rate}"] = figures[f"sgd_rate_trace_{rate}"] / figures[f"gd_rate_trace_{rate}"]
        worst = {name: max(value, figures[f"{name}_{rate}"]) for name, value in worst.items()}
    return figures | worst


def make(params: Params) -> tuple:
    return (jax.random.normal(jax.random.key(0), (params["examples"], params["width"])),)


def run(params: Params):
    from jaxnum.training import mean_square_stability_rate

    return lambda x: mean_square_stability_rate(x, 4)


def dense(params: Params):
    """The operators as matrices on p² unknowns."""
    from scipy.linalg import eigh

    def rate(x):
        x = np.asarray(x, np.float64)
        H, eye = x.T @ x / len(x), np.eye(x.shape[1])
        both = np.kron(H, H)
        pairs = np.einsum("ni,nj->nij", x, x).reshape(len(x), -1)
        second = both + (pairs.T @ pairs / len(x) - both) / 4
        last = len(both) - 1
        return 1 / eigh(second, np.kron(H, eye) + np.kron(eye, H), eigvals_only=True, subset_by_index=[last, last])[0]

    return rate


register(
    Row(
        name="sgd_stability",
        covers=("sgd_stability", "sgd_stability_exact", "sgd_stability_monitor", "mean_square_stability_rate"),
        shapes={"100x20": {"examples": 100, "width": 20}},
        make=make,
        run=run,
        reference=dense,
        modes=("fwd",),
        tests=("tests/training/test_sgd_stability.py", "tests/training/test_mean_square_stability.py"),
        peers={"scipy.eigh": Peer("scipy", dense, jit=False)},
        targets=(
            Target("figure", 2.05, "Final eta lambda_max <= 2.05 for GD.", figure="gd_rate_largest"),
            Target("figure", 2.1, "Final eta tr <= 2.1 for SGD.", figure="sgd_rate_trace"),
            Target("figure", 1.0, "trace(SGD) < trace(GD) at the same rate.", figure="trace_sgd_over_gd"),
            Target("error", 1e-4, "Lanczos in float32 against a dense generalised eigenproblem in float64."),
        ),
        figures={"regularisation": regularisation},
    )
)
