"""A step of an output layer in factors, for a thousand to a hundred thousand classes, beside steps on dense weights.

The dense steps are a softmax with cross-entropy and the same Z-loss, by autodiff; all states are donated, and what a
step returns is the loss and the gradient for the hidden layer.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax

from benchmarks.registry import Params, Row, Target, register

WIDTH, RATE = 128, 0.1
CLASSES = (1_000, 10_000, 100_000)


def inputs(classes: int, batch: int) -> tuple[jax.Array, ...]:
    """Weights, hidden layer, labels."""
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (classes, WIDTH)) / WIDTH**0.5
    return weights, jax.random.normal(keys[1], (batch, WIDTH)), jax.random.randint(keys[2], (batch,), 0, classes)


def make(params: Params) -> tuple:
    """The arrays of a state after some steps, hidden layer, labels."""
    from jaxnum.training import factored_output, factored_output_step

    weights, h, labels = inputs(params["classes"], params["batch"])
    state = factored_output(weights)
    step = jax.jit(factored_output_step)
    for _ in range(3):
        state, _, _ = step(state, h, labels, 10.0)
    return *state, h, labels


def run(params: Params):
    from jaxnum.training import FactoredOutput, factored_output_step

    def step(*arrays):
        *state, h, labels = arrays
        after, loss, grad_h = factored_output_step(FactoredOutput(*state), h, labels, RATE)
        return loss, grad_h, after.scatter, after.mean

    return step


def dense_z(weights: jax.Array, h: jax.Array, labels: jax.Array) -> jax.Array:
    from jaxnum.training import spherical_z_loss

    return spherical_z_loss(h @ weights.T, labels).mean()


def softmax(weights: jax.Array, h: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(h @ weights.T, labels).mean()


def dense_step(loss):
    """Gradient descent on D x d weights."""

    def step(weights, h, labels):
        value, (gradient, grad_h) = jax.value_and_grad(loss, argnums=(0, 1))(weights, h, labels)
        return weights - RATE * gradient, value, grad_h

    return step


def reference(params: Params):
    def step(*arrays):
        v, u, _, omega, _, _, h, labels = arrays
        weights, loss, grad_h = dense_step(dense_z)(v @ u + omega, h, labels)
        mean = weights.mean(axis=0)
        return loss, grad_h, (weights - mean).T @ (weights - mean), mean

    return step


def donated(batch: int, rounds: int = 15, repeats: int = 20) -> dict[str, float]:
    """Median seconds of each donated step at each number of classes, sampled in turn."""
    from jaxnum.training import factored_output, factored_output_step

    factored = lambda state, h, labels: factored_output_step(state, h, labels, RATE)  # noqa: E731
    steps = {"factored": factored, "softmax": dense_step(softmax), "dense_z": dense_step(dense_z)}
    calls, carried, seconds = {}, {}, {}
    for classes in CLASSES:
        weights, *given = inputs(classes, batch)
        for name, step in steps.items():
            state = factored_output(weights) if name == "factored" else jnp.copy(weights)
            calls[name, classes] = jax.jit(step, donate_argnums=0).lower(state, *given).compile()
            carried[name, classes], seconds[name, classes] = (state, given), []
    for _ in range(rounds):
        for case, step in calls.items():
            state, given = carried[case]
            # What the call before it leaves behind, as 50 MB in the caches, is charged to nobody.
            state, *rest = jax.block_until_ready(step(state, *given))
            times = repeats if case[0] == "factored" else 1
            before = time.perf_counter()
            for _ in range(times):
                state, *rest = step(state, *given)
            jax.block_until_ready((state, rest))
            seconds[case].append((time.perf_counter() - before) / times)
            carried[case] = state, given
    return {case: statistics.median(times[2:]) for case, times in seconds.items()}


def steps() -> dict[str, float]:
    """Times of one example and of 32, as ratios."""
    figures = {}
    for batch in (1, 32):
        seconds = donated(batch)
        for classes in CLASSES:
            figures[f"ms_factored_{classes}_batch_{batch}"] = 1e3 * seconds["factored", classes]
            for name in ("softmax", "dense_z"):
                ratio = seconds[name, classes] / seconds["factored", classes]
                figures[f"{name}_over_factored_{classes}_batch_{batch}"] = ratio
        ours = [seconds["factored", classes] for classes in CLASSES]
        figures[f"slowest_over_fastest_batch_{batch}"] = max(ours) / min(ours)
        dense = [seconds["softmax", classes] for classes in CLASSES]
        figures[f"softmax_slowest_over_fastest_batch_{batch}"] = max(dense) / min(dense)
    return figures


SAME = "Factored step within 2x across D."
FASTER = "Dense softmax step at least 20x the factored step at D = 1e5."
register(
    Row(
        name="factored_output",
        covers=(
            "factored_output",
            "factored_output_step",
            "factored_output_stabilise",
            "factored_output_weights",
            "spherical_z_loss",
            "spherical_z_loss_from_statistics",
        ),
        shapes={"10k_classes_batch_32": {"classes": 10_000, "batch": 32}},
        make=make,
        run=run,
        reference=reference,
        modes=("step",),
        tests=("tests/training/test_factored_output.py", "tests/training/test_spherical_z_loss.py"),
        targets=(
            Target("error", 1e-5, "float32 against dense weights in float64."),
            *(Target("figure", 2.0, SAME, figure=f"slowest_over_fastest_batch_{batch}") for batch in (1, 32)),
            *(
                Target("figure", 20.0, FASTER, at_least=True, figure=f"softmax_over_factored_100000_batch_{batch}")
                for batch in (1, 32)
            ),
        ),
        figures={"steps": steps},
    )
)
