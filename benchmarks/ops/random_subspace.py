"""Random projections of 199,210 parameters, the paper's network for MNIST, and what they measure.

The toy: of a thousand numbers ten sums shall be 1 to 10, which takes ten dimensions. The mixture: ten Gaussians in 64
dimensions, told apart by networks with two hidden layers of 32, 64 and 128 units.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.registry import Params, Peer, Row, Target, register
from benchmarks.training import mean_loss, mixture, network

CANDIDATES = (32, 64, 96, 112, 128, 144, 160, 192, 224, 256, 320, 384)
STEPS, SEEDS = 600, 3


def make(params: Params) -> tuple:
    from jaxnum.training import random_subspace_projection

    P = random_subspace_projection(jax.random.key(0), params["d"], params["D"], kind=params["kind"])
    return (jax.random.normal(jax.random.key(1), (params["d"],)), P)


def run(params: Params):
    return lambda theta, P: P.apply(theta)


def reference(params: Params):
    """Fastfood by the matrix of SciPy, H_ab = H_a x H_b; sparse by SciPy's sparse matrix."""
    from scipy.linalg import hadamard
    from scipy.sparse import csr_matrix

    D, d = params["D"], params["d"]

    def sparse(theta, P):
        places, signs = (np.asarray(part) for part in P.held)
        columns = np.broadcast_to(np.arange(d)[:, None], places.shape)
        entries = signs / signs.shape[1] ** 0.5
        return csr_matrix((entries.ravel(), (places.ravel(), columns.ravel())), (D, d)) @ np.asarray(theta)

    def fastfood(theta, P):
        signs, order, normal = (np.asarray(part) for part in P.held)
        low = hadamard(512).astype(float)
        high = hadamard(order.size // 512).astype(float)
        transform = lambda x: (high @ x.reshape(len(high), 512) @ low).ravel()  # noqa: E731
        padded = np.zeros(order.size)
        padded[:d] = np.asarray(theta) * signs
        scale = (order.size * (normal.astype(float) ** 2).sum() * D / order.size) ** 0.5
        return transform(normal * transform(padded)[order])[:D] / scale

    # On the host: the harness would trace it.
    chosen = sparse if params["kind"] == "sparse" else fastfood
    shape = jax.ShapeDtypeStruct((D,), jnp.float64)
    return lambda theta, P: jax.pure_callback(chosen, shape, theta, P)


def dense(params: Params):
    """The matrix product that the other kinds stand in for; its matrix is drawn when it is compiled."""
    matrix = jax.random.normal(jax.random.key(2), (params["d"], params["D"]))
    return lambda theta, P: theta @ matrix


def toy() -> dict[str, float]:
    from jaxnum.training import intrinsic_dimension, random_subspace_projection

    wanted = np.arange(1.0, 11.0)
    figures: dict[str, float] = {}
    with jax.enable_x64(True):
        for kind in ("dense", "sparse", "fastfood"):
            P = random_subspace_projection(jax.random.key(0), 20, 1000, kind=kind)
            sums = np.asarray(jax.vmap(P.adjoint)(jnp.kron(jnp.eye(10), jnp.ones(100))))

            def score(d, sums=sums):
                best = np.linalg.lstsq(sums[:, :d], wanted)[0]
                return np.exp(-np.mean((sums[:, :d] @ best - wanted) ** 2))

            found = intrinsic_dimension(score, range(1, 21), 1.0)
            figures[f"toy_dimension_{kind}"] = found.dimension or np.inf
            figures[f"toy_score_9_{kind}"] = float(found.scores[9][0])
            figures[f"toy_miss_10_{kind}"] = abs(float(found.scores[10][0]) - 1)
    return figures


def accuracies(key: jax.Array, d: jax.Array, hidden: int, kind: str | None) -> jax.Array:
    """Accuracy on new data after training in d dimensions, or in all where kind is None."""
    from jaxnum.training import random_subspace

    inputs, labels = mixture(0, width=64, size=4000)
    start = network(jax.random.bits(key, dtype=jnp.uint32), 64, hidden)
    theta, params_of = start, lambda layers: layers
    if kind is not None:
        most = max(CANDIDATES)
        theta, subspace = random_subspace(start, key, most, kind=kind)
        params_of = lambda theta: subspace.params(jnp.where(jnp.arange(most) < d, theta, 0))  # noqa: E731
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3 if kind is None else 0.1, STEPS))

    def step(carry, key):
        theta, state = carry
        chosen = jax.random.randint(key, (128,), 0, 2000)
        slope = jax.grad(lambda theta: mean_loss(params_of(theta), inputs[chosen], labels[chosen]))(theta)
        updates, state = optimiser.update(slope, state)
        return (optax.apply_updates(theta, updates), state), None

    carry, _ = jax.lax.scan(step, (theta, optimiser.init(theta)), jax.random.split(key, STEPS))
    *hidden_layers, last = params_of(carry[0])
    x = inputs[2000:]
    for layer in hidden_layers:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.mean((x @ last["w"] + last["b"]).argmax(axis=1) == labels[2000:])


def widths() -> dict[str, float]:
    from jaxnum.training import intrinsic_dimension

    figures: dict[str, float] = {}
    keys = jax.random.split(jax.random.key(0), SEEDS)
    dimensions = []
    for hidden in (32, 64, 128):
        of = lambda kind, hidden=hidden: jax.jit(  # noqa: E731
            lambda d: jax.lax.map(lambda key: accuracies(key, d, hidden, kind), keys)
        )
        baseline = float(of(None)(0).mean())
        found = intrinsic_dimension(of("sparse"), CANDIDATES, baseline, search="all")
        dimensions.append(found.dimension or np.inf)
        figures[f"parameters_{hidden}"] = 64 * hidden + hidden + hidden**2 + hidden + 10 * hidden + 10
        figures[f"accuracy_full_{hidden}"] = baseline
        figures[f"dimension_{hidden}"] = dimensions[-1]
        figures[f"none_reach_{hidden}"], figures[f"all_reach_{hidden}"] = found.interval[0], found.interval[1] or np.inf
    figures["parameters_spread"] = figures["parameters_128"] / figures["parameters_32"]
    return figures | {"dimension_spread": max(dimensions) / min(dimensions)}


register(
    Row(
        name="random_subspace",
        covers=("random_subspace", "random_subspace_projection", "intrinsic_dimension"),
        shapes={kind: {"kind": kind, "d": 64, "D": 199_210} for kind in ("fastfood", "sparse")},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd",),
        tests=("tests/training/test_random_subspace.py", "tests/training/test_intrinsic_dimension.py"),
        peers={"a dense matrix": Peer("jax", dense, same_answer=False)},
        targets=(
            Target("error", 1e-5, "The products of matrices that define them."),
            *(
                Target("figure", limit, text, at_least=least, figure=f"{name}_{kind}")
                for kind in ("dense", "sparse", "fastfood")
                for name, limit, text, least in (
                    ("toy_dimension", 10, "The toy has at most ten dimensions.", False),
                    ("toy_dimension", 10, "The toy has at least ten dimensions.", True),
                    ("toy_score_9", 0.5, "exp(-mean squared error) < 0.5 in nine.", False),
                    ("toy_miss_10", 1e-6, "exp(-mean squared error) = 1 in ten.", False),
                )
            ),
            Target("figure", 2.0, "d_int90 varies by < 2x over the widths ...", figure="dimension_spread"),
            Target("figure", 4.0, "... while D varies > 4x.", at_least=True, figure="parameters_spread"),
        ),
        figures={"toy": toy, "widths": widths},
    )
)
