"""Schedules on a convex problem with noise and on a river valley: what each leaves of the loss, at its best rate.

Softmax regression with features of many scales and labels drawn from a teacher, the last iterate: once from a teacher
that leaves half of the loss to chance, once from one three times as strong, under which norms fall; and the valley
f(x, y) = -0.02 x + 20 y^2 with noisy gradients in y, where the stable phase travels and the decay lands. There is no
peer for refinement: optax's schedules stand beside it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.registry import Params, Row, Target, register

STEPS, SEEDS = 2000, 5
RATES = 2.0 ** np.arange(6)
TEACHERS = {"": 2.0, "strong_teacher_": 6.0}


def regression(seed: jax.Array, strength: float) -> tuple[jax.Array, jax.Array]:
    """Features [4000, 40] and labels of 10 classes."""
    keys = jax.random.split(jax.random.key(seed), 3)
    features = jax.random.normal(keys[0], (4000, 40)) * jnp.logspace(0, -1.2, 40)
    teacher = strength * jax.random.normal(keys[1], (40, 10))
    return features, jax.random.categorical(keys[2], features @ teacher)


def loss(weights: jax.Array, features: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(features @ weights, labels).mean()


def train(strength: float, shape: jax.Array, rate: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss of the last iterate of SGD with batches of 16, and the norms of its gradients."""
    features, labels = regression(seed, strength)

    def step(weights, inputs):
        key, share = inputs
        chosen = jax.random.randint(key, (16,), 0, labels.size)
        gradient = jax.grad(loss)(weights, features[chosen], labels[chosen])
        return weights - rate * share * gradient, jnp.linalg.norm(gradient)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), seed), STEPS)
    weights, norms = jax.lax.scan(step, jnp.zeros((40, 10)), (keys, shape))
    return loss(weights, features, labels), norms


def convex() -> dict[str, float]:
    figures = {}
    for label, strength in TEACHERS.items():
        figures |= {label + name: value for name, value in compared(strength).items()}
    return figures


def compared(strength: float) -> dict[str, float]:
    """Mean over seeds of the last loss at the best of six rates, as a share of the constant rate's."""
    from jaxnum.schedules import refine_schedule_values

    over_seeds = jax.vmap(partial(train, strength), in_axes=(None, None, 0))
    runs = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0, None)))
    steps = jnp.arange(STEPS)
    best, recorded = {}, None
    shapes = {
        "constant": jnp.ones(STEPS),
        "inverse_sqrt": 1 / jnp.sqrt(1.0 + steps),
        "linear": jax.vmap(optax.linear_schedule(1.0, 0.0, STEPS))(steps),
        "cosine": jax.vmap(optax.cosine_decay_schedule(1.0, STEPS))(steps),
    }
    for name, shape in shapes.items():
        losses, norms = runs(shape, jnp.asarray(RATES), jnp.arange(SEEDS))
        chosen = int(jnp.argmin(losses.mean(axis=1)))
        best[name] = float(losses[chosen].mean())
        recorded = norms[chosen, 0] if name == "linear" else recorded
    refined = refine_schedule_values(np.asarray(recorded))
    losses, _ = runs(jnp.asarray(refined, jnp.float32), jnp.asarray(RATES), jnp.arange(SEEDS))
    best["refined"] = float(losses.mean(axis=1).min())
    figures = {f"{name}_over_constant": value / best["constant"] for name, value in best.items() if name != "constant"}
    return figures | {
        "refined_over_linear": best["refined"] / best["linear"],
        "refined_peak_at": float(refined.argmax() / refined.size),
    }


def river() -> dict[str, float]:
    """Mean of f over the last 200 steps of 20 runs in the valley."""
    from jaxnum.schedules import wsd

    steps, rate = 20_000, 0.04

    def final(schedule):
        def one(key):
            def step(y, inputs):
                count, noise = inputs
                return y - schedule(count) * (40 * y + 3 * noise), y

            counts = jnp.arange(steps)
            _, y = jax.lax.scan(step, jnp.array(0.0), (counts, jax.random.normal(key, (steps,))))
            x = jnp.cumsum(0.02 * jax.vmap(schedule)(counts))
            return -0.02 * x + 20 * y**2

        return jax.vmap(one)(jax.random.split(jax.random.key(0), 20)).mean(axis=0)

    decay = steps // 10
    inverse = final(wsd(rate, steps, 0, decay))
    ends = {
        "constant": final(optax.constant_schedule(rate)),
        "cosine": final(optax.cosine_decay_schedule(rate, steps, alpha=0.1)),
        "wsd_inverse": inverse,
        "wsd_linear": final(wsd(rate, steps, 0, decay, decay="linear")),
    }
    figures = {f"valley_{name}": float(values[-200:].mean()) for name, values in ends.items()}
    before = float(inverse[steps - decay - 200 : steps - decay].mean())
    return figures | {
        "valley_cosine_minus_wsd": figures["valley_cosine"] - figures["valley_wsd_inverse"],
        "valley_drop_in_decay": before - figures["valley_wsd_inverse"],
    }


def make(params: Params) -> tuple:
    return (jnp.arange(STEPS, dtype=jnp.int32),)


def run(params: Params):
    from jaxnum.schedules import refine_schedule

    return jax.vmap(refine_schedule(np.ones(STEPS)))


register(
    Row(
        name="refine_schedule",
        covers=("refine_schedule", "refine_schedule_values"),
        shapes={"2000_steps": {}},
        make=make,
        run=run,
        reference=lambda params: lambda counts: 1 - counts / (STEPS - 1),
        modes=("fwd",),
        tests=("tests/schedules/test_refine_schedule.py", "tests/schedules/test_wsd.py"),
        targets=(
            Target(
                "figure", 0.95, "Linear decay at most 0.95x the constant rate's loss.", figure="linear_over_constant"
            ),
            Target("figure", 1.01, "Refined within 1% of linear.", figure="refined_over_linear"),
            Target(
                "figure",
                0.08,
                "WSD at least 0.08 below cosine in the river valley.",
                at_least=True,
                figure="valley_cosine_minus_wsd",
            ),
            Target(
                "figure", 0.35, "A drop of at least 0.35 in the decay.", at_least=True, figure="valley_drop_in_decay"
            ),
            Target("error", 1e-6, "Constant norms give the linear decay.", shape="2000_steps"),
        ),
        figures={"convex": convex, "river": river},
    )
)
