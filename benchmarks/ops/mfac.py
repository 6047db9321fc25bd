"""One step of M-FAC with a full window of 64 gradients, and what its Fisher matrix is worth for pruning.

The step is set against the two passes over the window that it cannot do without, and against forward and backward of
a network of as many parameters on a batch of 64.

Networks are pruned for two sets: a mixture with the same noise in every direction, where 64 gradients say little about
25,000 weights and OBS loses as much accuracy as pruning by magnitude, and scanned digits, where inputs differ and are
correlated, and it loses less.
"""

import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from benchmarks.registry import Params, Row, Target, register

DAMPING = 1e-5
NOISE, SEEDS, SPARSITY = 10.0, 5, 0.8


def make(params: Params) -> tuple:
    """Full window, its Gram matrix, gradient, parameters."""
    keys = jax.random.split(jax.random.key(0), 3)
    window = jax.random.normal(keys[0], (params["window"], params["size"])) / params["size"] ** 0.5
    gradient, x = (jax.random.normal(key, (params["size"],)) for key in keys[1:])
    gram = jnp.matmul(window, window.T, precision="highest")
    return window, gram, gradient / params["size"] ** 0.5, x


def run(params: Params):
    from jaxnum.transforms import scale_by_mfac

    tx = scale_by_mfac(window=params["window"], damping=DAMPING)

    def step(window, gram, gradient, x):
        state = tx.init(x)._replace(window=window, gram=gram, count=jnp.int32(params["window"]))
        updates, state = tx.update(gradient, state, x)
        return updates, state.gram

    return step


def reference(params: Params):
    def step(window, gram, gradient, x):
        window = window.at[0].set(gradient)
        gram = window @ window.T
        kernel = gram + params["window"] * DAMPING * jnp.eye(params["window"], dtype=gram.dtype)
        return params["window"] * jnp.linalg.solve(kernel, jnp.eye(params["window"])[0]) @ window, gram

    return step


def layers(key, hidden, inputs=784):
    """Weights inputs-hidden-10."""
    keys = jax.random.split(key, 2)
    sizes = ((inputs, hidden), (hidden, 10))
    return [
        {"w": jax.random.normal(k, s) / s[0] ** 0.5, "b": jnp.zeros(s[1])} for k, s in zip(keys, sizes, strict=True)
    ]


def logits(weights, inputs):
    hidden = jax.nn.relu(inputs @ weights[0]["w"] + weights[0]["b"])
    return hidden @ weights[1]["w"] + weights[1]["b"]


def loss(weights, inputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits(weights, inputs), labels).mean()


def data(key, centres, size):
    """Ten classes in 784 dimensions, noise of ten times the centres' own scale, brought to unit size."""
    keys = jax.random.split(key)
    labels = jax.random.randint(keys[0], (size,), 0, 10)
    return (centres[labels] + NOISE * jax.random.normal(keys[1], (size, 784))) / NOISE, labels


def step_times() -> dict[str, float]:
    """Medians of interleaved, donated steps at 100,000 parameters and a window of 64, as ratios."""
    from jaxnum.transforms import scale_by_mfac

    weights = layers(jax.random.key(0), 128)
    tx = scale_by_mfac(window=64, damping=DAMPING)
    window = jax.random.normal(jax.random.key(1), (64, sum(p.size for p in jax.tree.leaves(weights))))
    inputs, labels = data(jax.random.key(2), jax.random.normal(jax.random.key(3), (10, 784)), 64)
    update = jax.jit(lambda g, s: tx.update(g, s, weights), donate_argnums=1)
    pair = jax.jit(lambda rows, v: (rows @ v) @ rows)
    gradient = jax.jit(jax.grad(loss))
    g, state = gradient(weights, inputs, labels), tx.init(weights)
    seconds: dict[str, list[float]] = {"mfac": [], "pair": [], "gradient": []}

    def timed(name, work):
        before = time.perf_counter()
        out = jax.block_until_ready(work())
        seconds[name].append(time.perf_counter() - before)
        return out

    for _ in range(60):
        state = timed("mfac", lambda state=state: update(g, state))[1]
        timed("pair", lambda: pair(window, window[0]))
        timed("gradient", lambda: gradient(weights, inputs, labels))
    median = {name: statistics.median(times[5:]) for name, times in seconds.items()}
    return {
        "over_matvec_pair": median["mfac"] / median["pair"],
        "over_forward_backward": median["mfac"] / median["gradient"],
        "window_bytes": float(sum(p.nbytes for p in jax.tree.leaves(state.window))),
    }


def mixture(key):
    """4,000 examples to train on and as many to test."""
    keys = jax.random.split(key, 3)
    centres = jax.random.normal(keys[0], (10, 784))
    return data(keys[1], centres, 4000), data(keys[2], centres, 4000)


def digits(key):
    """Scanned digits of 8 x 8 pixels in [0, 1], three quarters to train on, the same for every key."""
    from sklearn import datasets

    del key
    scans = datasets.load_digits()
    order = np.random.default_rng(0).permutation(scans.target.size)
    inputs, labels = jnp.asarray(scans.data[order] / 16, jnp.float32), jnp.asarray(scans.target[order])
    split = 3 * scans.target.size // 4
    return (inputs[:split], labels[:split]), (inputs[split:], labels[split:])


def trained(key, sets=mixture):
    """A network with 32 hidden units trained by Adam, its data, a test set, and the key of what follows."""
    keys = jax.random.split(key, 4)
    train, test = sets(keys[0])
    optimiser, weights = optax.adam(1e-3), layers(keys[1], 32, train[0].shape[1])

    def step(carry, key):
        weights, state = carry
        chosen = jax.random.randint(key, (64,), 0, train[1].size)
        updates, state = optimiser.update(jax.grad(loss)(weights, train[0][chosen], train[1][chosen]), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (weights, optimiser.init(weights)), jax.random.split(keys[2], 1000))
    return weights, train, test, keys[3]


def averaged_gradients(weights, train, key):
    """64 gradients [64, d], each of 16 examples."""
    chosen = jax.random.permutation(key, train[1].size)[: 64 * 16].reshape(64, 16)
    return jax.lax.map(lambda c: ravel_pytree(jax.grad(loss)(weights, train[0][c], train[1][c]))[0], chosen)


def drops(sets, key) -> dict[str, jax.Array]:
    """Test accuracy of a trained network, and what it loses at 80 % sparsity."""
    from jaxnum.training import obs_prune

    weights, train, test, key = trained(key, sets)
    flat, back = ravel_pytree(weights)
    gradients = averaged_gradients(weights, train, key)
    accuracy = lambda vector: jnp.mean(logits(back(vector), test[0]).argmax(axis=1) == test[1])  # noqa: E731
    count = int(SPARSITY * flat.size)
    smallest = jnp.argsort(jnp.abs(flat))[:count]
    pruned = {"magnitude": flat.at[smallest].set(0)}
    for name in ("joint", "single", "none"):
        pruned[name] = obs_prune(flat, gradients, count, DAMPING, correction=name).weights
    full = accuracy(flat)
    return {"accuracy": full} | {f"drop_{name}": full - accuracy(vector) for name, vector in pruned.items()}


def pruning() -> dict[str, float]:
    """Medians over seeds of the accuracies and their drops, and of the drops' ratios to magnitude pruning's."""
    keys = jax.random.split(jax.random.key(5), SEEDS)
    figures = {}
    for sets in (mixture, digits):
        end = "" if sets is mixture else "_digits"
        found = jax.jit(lambda keys, sets=sets: jax.lax.map(partial(drops, sets), keys))(keys)
        figures |= {name + end: float(jnp.median(values)) for name, values in found.items()}
        for name in ("joint", "single", "none"):
            ratios = found[f"drop_{name}"] / found["drop_magnitude"]
            figures[f"drop_{name}_over_magnitude{end}"] = float(jnp.median(ratios))
            figures[f"drop_{name}_over_magnitude{end}_worst_seed"] = float(jnp.max(ratios))
    return figures


def training_gradients() -> dict[str, float]:
    """Float32's error of a step on the gradients of a trained network, against float64."""
    from jaxnum.transforms import scale_by_mfac

    weights, train, _, key = jax.jit(trained)(jax.random.key(6))
    rows = np.asarray(jax.jit(averaged_gradients)(weights, train, key))
    tx = scale_by_mfac(window=64, damping=DAMPING)

    def last(rows):
        start = jnp.zeros_like(rows[0])
        return jax.lax.scan(lambda s, g: tx.update(g, s, start)[::-1], tx.init(start), rows)[1][-1]

    got = np.asarray(jax.jit(last)(jnp.asarray(rows)), np.float64)
    wide = rows.astype(np.float64)
    kernel = wide @ wide.T + 64 * DAMPING * np.eye(64)
    want = 64 * np.linalg.solve(kernel, np.eye(64)[-1]) @ wide
    return {
        "float32_error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        "condition": float(np.linalg.cond(kernel)),
    }


register(
    Row(
        name="mfac",
        covers=("mfac", "scale_by_mfac", "fisher_inverse", "fisher_inverse_product", "obs_prune"),
        shapes={"64_of_100k": {"window": 64, "size": 100_000}},
        make=make,
        run=run,
        reference=reference,
        modes=("step",),
        tests=("tests/transforms/test_mfac.py", "tests/curvature/test_fisher_inverse.py"),
        targets=(
            Target("error", 1e-4, "M-FAC in float32 within 1e-4 of float64."),
            Target("figure", 1e-4, "The same on the gradients of a trained network.", figure="float32_error"),
            Target("figure", 3.0, "Step <= 3x a pair of products with the window.", figure="over_matvec_pair"),
            Target("figure", 0.7, "OBS at 80 % loses <= 0.7x of magnitude's drop.", figure="drop_joint_over_magnitude"),
            Target("figure", 0.7, "The same on scanned digits.", figure="drop_joint_over_magnitude_digits"),
        ),
        figures={"step_times": step_times, "pruning": pruning, "training_gradients": training_gradients},
    )
)
