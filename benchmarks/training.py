"""What rows of gradient transforms share: a tree of ten million parameters, donated steps, a small training task."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

SHAPES = {"embedding": (1024, 512), "up": (3, 512, 3072), "down": (3, 3072, 512), "scale": (3, 512)}


def tree(seed: int) -> dict[str, jax.Array]:
    """Ten million normal numbers, float32."""
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}


def donated_step(optimiser: optax.GradientTransformationExtraArgs, **extra: Any) -> tuple[Callable, Callable]:
    """A compiled step whose parameters and state are donated, and what makes its first arguments."""

    def step(parameters, state, gradient):
        updates, state = optimiser.update(gradient, state, parameters, **extra)
        return optax.apply_updates(parameters, updates), state

    def start():
        parameters = tree(0)
        return parameters, optimiser.init(parameters), tree(1)

    return jax.jit(step, donate_argnums=(0, 1)).lower(*jax.eval_shape(start)).compile(), start


def donated(ours: optax.GradientTransformationExtraArgs, peers: dict[str, Any], rounds: int = 25) -> dict[str, float]:
    """Median time of a donated step as a ratio to each peer's, interleaved; and the bytes that XLA counts."""
    compiled = {name: donated_step(optimiser) for name, optimiser in {"ours": ours, **peers}.items()}
    carried = {name: start() for name, (_, start) in compiled.items()}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, (step, _) in compiled.items():
            parameters, state, gradient = carried[name]
            before = time.perf_counter()
            parameters, state = jax.block_until_ready(step(parameters, state, gradient))
            seconds[name].append(time.perf_counter() - before)
            carried[name] = (parameters, state, gradient)
    median = {name: statistics.median(times[3:]) for name, times in seconds.items()}
    size = {name: step.cost_analysis()["bytes accessed"] for name, (step, _) in compiled.items()}
    figures = {}
    for name in peers:
        figures[f"donated_time_over_{name}"] = median["ours"] / median[name]
        figures[f"bytes_over_{name}"] = size["ours"] / size[name]
    return figures


def mixture(seed: int, classes: int = 10, width: int = 20, size: int = 2000) -> tuple[jax.Array, jax.Array]:
    """A mixture of Gaussians to be told apart: inputs [size, width] and labels [size]."""
    keys = jax.random.split(jax.random.key(seed), 3)
    labels = jax.random.randint(keys[0], (size,), 0, classes)
    centres = jax.random.normal(keys[1], (classes, width))
    return centres[labels] + 1.2 * jax.random.normal(keys[2], (size, width)), labels


def network(seed: jax.Array, width: int = 20, hidden: int = 64, classes: int = 10) -> list[dict[str, jax.Array]]:
    """Weights of a network with two hidden layers of tanh."""
    sizes = [width, hidden, hidden, classes]
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return [
        {"w": jax.random.normal(key, (i, o)) / i**0.5, "b": jnp.zeros(o)}
        for key, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def mean_loss(layers: list[dict[str, jax.Array]], inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of that network."""
    x = inputs
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    logits = x @ layers[-1]["w"] + layers[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def steps_to_loss(
    make: Callable[[Any], Any], rates: tuple[float, ...], seeds: int, wanted: float, steps: int = 1500, batch: int = 64
) -> tuple[float, float]:
    """Median over seeds of the steps until the loss on all data is below `wanted`, at the best of the rates.

    Looks every 10 steps; a run that never arrives counts as `steps`. Also the share of runs at the largest rate whose
    loss stayed finite.
    """

    def train(rate, seed):
        inputs, labels = mixture(seed)
        optimiser, layers = make(rate), network(seed + 100)

        def chunk(carry, key):
            def step(carry, key):
                layers, state = carry
                chosen = jax.random.randint(key, (batch,), 0, labels.size)
                gradient = jax.grad(mean_loss)(layers, inputs[chosen], labels[chosen])
                updates, state = optimiser.update(gradient, state, layers)
                return (optax.apply_updates(layers, updates), state), None

            carry, _ = jax.lax.scan(step, carry, jax.random.split(key, 10))
            return carry, mean_loss(carry[0], inputs, labels)

        keys = jax.random.split(jax.random.fold_in(jax.random.key(7), seed), steps // 10)
        losses = jax.lax.scan(chunk, (layers, optimiser.init(layers)), keys)[1]
        there = losses < wanted
        return jnp.where(there.any(), 10 * (jnp.argmax(there) + 1), steps), jnp.isfinite(losses).all()

    over_seeds = jax.vmap(train, in_axes=(None, 0))
    counts, finite = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))(jnp.array(rates), jnp.arange(seeds))
    return float(jnp.median(counts, axis=1).min()), float(finite[-1].mean())
