"""m-coherence: time of the two sums, and what it says of digits with true and with shuffled labels.

A network with two hidden layers of 64 units learns 1,024 of scikit-learn's digits by SGD, once with their labels and
once with the labels shuffled. The coherence of the gradients of all 1,024 is taken after every eighth step of the first
two epochs, of 32 steps each; its mean over steps and seeds is compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.registry import Params, Row, Target, register
from benchmarks.training import mean_loss, network

SEEDS, SIZE, BATCH, LOOK, EPOCHS = 3, 1024, 32, 8, 2


def make(params: Params) -> tuple:
    return (jax.random.normal(jax.random.key(0), (params["examples"], params["size"])),)


def run(params: Params):
    from jaxnum.transforms import m_coherence

    return m_coherence


def reference(params: Params):
    def ratio(gradients):
        wide = np.asarray(gradients, np.float64)
        return (wide.sum(axis=0) ** 2).sum() / (wide**2).sum()

    return ratio


def coherences(inputs: jax.Array, labels: jax.Array, seed: jax.Array) -> jax.Array:
    """Of the gradients of all examples, every `LOOK` steps."""
    from jaxnum.transforms import m_coherence_from_loss

    def one(params, example):
        return mean_loss(params, example[0][None], example[1][None])

    def step(params, key):
        chosen = jax.random.randint(key, (BATCH,), 0, SIZE)
        gradient = jax.grad(mean_loss)(params, inputs[chosen], labels[chosen])
        return optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, gradient)), None

    def some_steps(params, keys):
        params, _ = jax.lax.scan(step, params, keys)
        return params, m_coherence_from_loss(one, params, (inputs, labels), batch_size=128)

    keys = jax.random.split(jax.random.key(seed), (EPOCHS * SIZE // BATCH // LOOK, LOOK))
    return jax.lax.scan(some_steps, network(seed, width=64, hidden=64, classes=10), keys)[1]


def labels_of_digits() -> dict[str, float]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))[:SIZE]
    inputs = jnp.asarray(digits.data[order] / 16 - 0.3, jnp.float32)
    true = jnp.asarray(digits.target[order], jnp.int32)
    shuffled = jnp.asarray(np.random.default_rng(1).permutation(true))
    over_seeds = jax.jit(lambda labels: jax.lax.map(lambda seed: coherences(inputs, labels, seed), jnp.arange(SEEDS)))
    real, random = (np.asarray(over_seeds(labels)) for labels in (true, shuffled))
    return {
        "coherence_true": float(real.mean()),
        "coherence_shuffled": float(random.mean()),
        "coherence_ratio": float(real.mean() / random.mean()),
    }


register(
    Row(
        name="m_coherence",
        covers=("m_coherence",),
        shapes={"256_examples": {"examples": 256, "size": 50_000}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd",),
        tests=("tests/transforms/test_m_coherence.py",),
        targets=(
            Target(
                "figure",
                3.0,
                "Early in training m-coherence is at least 3 times larger for true labels than for random ones.",
                at_least=True,
                figure="coherence_ratio",
            ),
            Target("figure", 1.5, "For random labels it is close to 1.", figure="coherence_shuffled"),
            Target("error", 1e-5, "Sums in float32."),
        ),
        figures={"labels_of_digits": labels_of_digits},
    )
)
