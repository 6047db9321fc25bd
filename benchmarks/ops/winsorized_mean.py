"""Aggregators of per-example gradients: time beside a sort, and what they learn when half of the labels are wrong.

A mixture of ten Gaussians, 1,000 examples of which half have a random label, a network of 256 hidden units, SGD with
batches of 32, 1,000 steps: accuracy on clean test data, which memorising the wrong labels ruins.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.experimental import aggregating

from benchmarks.registry import Params, Peer, Row, Target, register

SEEDS = 5
WIDTH, HIDDEN, CLASSES = 20, 256, 10


def make(params: Params) -> tuple:
    return (jax.random.normal(jax.random.key(0), (params["examples"], params["size"])),)


def run(params: Params):
    from jaxnum.transforms import winsorized_mean

    return lambda gradients: winsorized_mean(params["c"]).update(gradients, (), gradients[0])[0]


def by_sorting(params: Params):
    def mean(gradients):
        ordered = jnp.sort(gradients, axis=0)
        return jnp.clip(gradients, ordered[params["c"]], ordered[-params["c"] - 1]).mean(axis=0)

    return mean


def reference(params: Params):
    def mean(gradients):
        ordered = np.sort(np.asarray(gradients, np.float64), axis=0)
        return np.clip(gradients, ordered[params["c"]], ordered[-params["c"] - 1]).mean(axis=0)

    return mean


def data(seed: jax.Array) -> tuple[jax.Array, ...]:
    """Training inputs, labels of which half were drawn again, test inputs, true test labels."""
    keys = jax.random.split(jax.random.key(seed), 6)
    centres = 0.9 * jax.random.normal(keys[0], (CLASSES, WIDTH))
    labels = jax.random.randint(keys[1], (3000,), 0, CLASSES)
    inputs = centres[labels] + jax.random.normal(keys[2], (3000, WIDTH))
    redrawn = jax.random.randint(keys[3], (1000,), 0, CLASSES)
    noisy = jnp.where(jax.random.uniform(keys[4], (1000,)) < 0.5, redrawn, labels[:1000])
    return inputs[:1000], noisy, inputs[1000:], labels[1000:]


def logits(params: dict, inputs: jax.Array) -> jax.Array:
    return jax.nn.relu(inputs @ params["w"] + params["b"]) @ params["v"] + params["c"]


def clean_accuracy(aggregator: aggregating.Aggregator, steps: int) -> float:
    """Accuracy on clean data after training on half wrong labels, mean over seeds."""
    optimiser = aggregating.process(optax.identity(), aggregator, optax.sgd(0.1))

    def loss(params, x, label):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), label)

    def train(seed):
        inputs, noisy, test, labels = data(seed)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), seed), 3)
        params = {
            "w": jax.random.normal(keys[0], (WIDTH, HIDDEN)) * (2 / WIDTH) ** 0.5,
            "b": jnp.zeros(HIDDEN),
            "v": jax.random.normal(keys[1], (HIDDEN, CLASSES)) * (1 / HIDDEN) ** 0.5,
            "c": jnp.zeros(CLASSES),
        }

        def step(carry, key):
            params, state = carry
            chosen = jax.random.randint(key, (32,), 0, noisy.size)
            gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, inputs[chosen], noisy[chosen])
            updates, state = optimiser.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, optimiser.init(params))
        (params, _), _ = jax.lax.scan(step, carry, jax.random.split(keys[2], steps))
        return jnp.mean(logits(params, test).argmax(axis=1) == labels)

    return float(jnp.mean(jax.jit(lambda seeds: jax.lax.map(train, seeds))(jnp.arange(SEEDS))))


def label_noise() -> dict[str, float]:
    from jaxnum.transforms import geometric_median, median_of_means, trimmed_mean, winsorized_mean

    figures = {"clean_accuracy_mean": clean_accuracy(aggregating.average_per_element_updates(), 1000)}
    for name, aggregator in (
        ("winsorized_1", winsorized_mean(1)),
        ("winsorized_4", winsorized_mean(4)),
        ("trimmed_4", trimmed_mean(4)),
        ("median_of_3_means", median_of_means(3)),
        ("geometric_median", geometric_median(iterations=8)),
    ):
        figures[f"clean_accuracy_{name}"] = clean_accuracy(aggregator, 1000)
    return figures | {"gain_winsorized_4": figures["clean_accuracy_winsorized_4"] - figures["clean_accuracy_mean"]}


register(
    Row(
        name="winsorized_mean",
        covers=("winsorized_mean", "trimmed_mean", "median_of_means", "geometric_median"),
        shapes={"32_examples_c4": {"examples": 32, "size": 50_000, "c": 4}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd",),
        tests=("tests/transforms/test_winsorized_mean.py", "tests/transforms/test_median_of_means.py"),
        peers={"jnp.sort": Peer("jax", by_sorting)},
        targets=(
            Target(
                "figure",
                0.2,
                "Winsorized gradients at least 0.2 better clean accuracy at 50 % label noise.",
                at_least=True,
                figure="gain_winsorized_4",
            ),
            Target("error", 1e-5, "A clip and a mean in float32."),
        ),
        figures={"label_noise": label_noise},
    )
)
