"""MKOR: one step of a layer, what it adds to a model's gradient, and a student network beside SGD with momentum.

The student learns a tanh network 32-32-8 whose weights are standard normal numbers, from 2,048 inputs whose components
shrink from 1 to 0.03, in 400 steps of batches of 128, with statistics at every step; its mean squared error on all data
is measured at the last step. The ratio depends on the teacher, which the paper does not give: others are shown too,
whose weights are smaller by a factor, down to those of the student's own first ones.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.registry import Params, Row, Target, register

STEPS, SEEDS, BATCH, SIZE = 400, 5, 128, 2048
WIDTHS = (32, 32, 8)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
TEACHERS = {"": 1.0, "_teacher_of_0.7": 0.7, "_teacher_of_0.5": 0.5, "_easy_teacher": WIDTHS[0] ** -0.5}


def make(params: Params) -> tuple:
    """Gradient, mean input, mean output gradient of a layer without bias."""
    keys = jax.random.split(jax.random.key(0), 3)
    width = params["width"]
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, ((width, width), (width,), (width,)), strict=True))


def run(params: Params):
    from jaxnum.transforms import MkorLayer, scale_by_mkor

    optimiser = scale_by_mkor({"layer": MkorLayer("w")}, stats_every=1)

    def step(gradient, a, g):
        tree = {"w": gradient}
        updates, state = optimiser.update(tree, optimiser.init(tree), tree, stats={"layer": (a, g)})
        return updates["w"], state.left["layer"], state.right["layer"]

    return step


def reference(params: Params):
    def step(gradient, a, g):
        gradient, a, g = (np.asarray(x, np.float64) for x in (gradient, a, g))
        right, left = (np.linalg.inv(0.95 * np.eye(v.size) + 0.05 * np.outer(v, v)) for v in (a, g))
        direction = right @ gradient @ left
        return direction * np.linalg.norm(gradient) / np.linalg.norm(direction), left, right

    return step


def network(key: jax.Array, widths: tuple[int, ...], gain: float = 1.0) -> dict[str, dict[str, jax.Array]]:
    """Weights of standard deviation gain / sqrt(inputs)."""
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    keys = jax.random.split(key, len(pairs))
    return {
        str(i): {"w": gain * jax.random.normal(k, pair) / pair[0] ** 0.5, "b": jnp.zeros(pair[1])}
        for i, (k, pair) in enumerate(zip(keys, pairs, strict=True))
    }


def predicted(layers: dict, x: jax.Array, tap: Callable = lambda name, x, s: s) -> jax.Array:
    for name, layer in layers.items():
        s = tap(name, x, x @ layer["w"] + layer["b"])
        x = jnp.tanh(s) if int(name) < len(layers) - 1 else s
    return x


def squares(layers: dict, x: jax.Array, y: jax.Array, tap: Callable = lambda name, x, s: s) -> jax.Array:
    return jnp.mean((predicted(layers, x, tap) - y) ** 2)


def losses(optimiser_of: Callable[[Any, dict], Any], gain: float) -> list[float]:
    """Loss on all data after training, mean over seeds, at each of the rates."""
    from jaxnum.transforms import mkor_layers, mkor_stats

    layers = mkor_layers(jax.eval_shape(lambda: network(jax.random.key(0), WIDTHS)), "w", "b")

    def train(rate, seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        x = jax.random.normal(keys[0], (SIZE, WIDTHS[0])) * jnp.logspace(0, -1.5, WIDTHS[0])
        y = predicted(network(keys[1], WIDTHS, gain), x)
        student, optimiser = network(keys[2], WIDTHS), optimiser_of(rate, layers)

        def step(carry, key):
            student, state = carry
            chosen = jax.random.randint(key, (BATCH,), 0, SIZE)
            _, gradient, stats = mkor_stats(squares, student, x[chosen], y[chosen], layers=layers)
            updates, state = optimiser.update(gradient, state, student, stats=stats)
            return (optax.apply_updates(student, updates), state), None

        carry = (student, optimiser.init(student))
        (student, _), _ = jax.lax.scan(step, carry, jax.random.split(keys[3], STEPS))
        return squares(student, x, y)

    over_seeds = jax.vmap(train, in_axes=(None, 0))
    found = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))(jnp.array(RATES), jnp.arange(SEEDS))
    return found.mean(axis=1).tolist()


def student() -> dict[str, float]:
    from jaxnum.transforms import mkor

    methods = {
        "sgd": lambda rate, layers: optax.with_extra_args_support(optax.sgd(rate, momentum=0.9)),
        "reference": lambda rate, layers: mkor(rate, layers, stats_every=1, variant="reference"),
        "exact": lambda rate, layers: mkor(rate, layers, stats_every=1, norm_limit=50.0),
    }
    figures = {}
    for label, share in TEACHERS.items():
        found = {name: losses(make, WIDTHS[0] ** 0.5 * share) for name, make in methods.items()}
        at = RATES.index(0.1)
        for name, values in found.items():
            figures[f"loss_{name}{label}"] = values[at]
            figures[f"best_loss_{name}{label}"] = float(np.nanmin(values))
        for name in ("exact", "reference"):
            figures[f"{name}_over_sgd{label}"] = found[name][at] / found["sgd"][at]
            figures[f"best_{name}_over_sgd{label}"] = float(np.nanmin(found[name]) / np.nanmin(found["sgd"]))
    return figures


def overhead(positions: int, width: int = 512, depth: int = 4, rounds: int = 7) -> float:
    """Time that mkor adds to ten steps with momentum, over that of ten plain ones; one in ten updates the factors."""
    from jaxnum.transforms import mkor, mkor_layers, mkor_stats

    params = network(jax.random.key(0), (width,) * (depth + 1))
    layers = mkor_layers(params, "w", "b")
    x, y = jax.random.normal(jax.random.key(1), (2, positions, width))

    optimisers = {"mkor": mkor(1e-3, layers), "momentum": optax.sgd(1e-3, momentum=0.9), "plain": optax.sgd(1e-3)}

    def ten(method: str) -> Callable:
        optimiser = optax.with_extra_args_support(optimisers[method])

        def step(carry, _):
            params, state = carry
            extra = {}
            if method == "mkor":
                _, gradient, extra["stats"] = mkor_stats(squares, params, x, y, layers=layers)
            else:
                gradient = jax.grad(squares)(params, x, y)
            updates, state = optimiser.update(gradient, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=10)[0])
        carry = (params, optimiser.init(params))
        jax.block_until_ready(run(carry))
        return lambda: jax.block_until_ready(run(carry))

    calls = {method: ten(method) for method in optimisers}
    seconds: dict[str, list[float]] = {method: [] for method in calls}
    for _ in range(rounds):
        for method, call in calls.items():
            before = time.perf_counter()
            call()
            seconds[method].append(time.perf_counter() - before)
    median = {method: statistics.median(times) for method, times in seconds.items()}
    return (median["mkor"] - median["momentum"]) / median["plain"]


def added() -> dict[str, float]:
    return {f"overhead_{positions}_positions": overhead(positions) for positions in (512, 4096)}


register(
    Row(
        name="mkor",
        covers=("mkor", "scale_by_mkor", "mkor_stats"),
        shapes={"512": {"width": 512}},
        make=make,
        run=run,
        reference=reference,
        modes=("step",),
        tests=("tests/transforms/test_mkor.py", "tests/transforms/test_mkor_stats.py"),
        targets=(
            Target("figure", 0.6, "Exact MKOR at most 0.6x SGD's final loss at rate 0.1.", figure="exact_over_sgd"),
            Target("error", 1e-4, "Rank-1 updates and two products in float32."),
        ),
        figures={"student": student, "added": added},
    )
)
