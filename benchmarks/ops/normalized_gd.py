"""Separating a linearly separable set with large steps: the factor n that the normalised form does without.

The worst case is n - 1 copies of (1, 0) and one (-0.5, 0.1), all of one class. On easy data the plain form with a large
step wins; that is shown too.
"""

import jax
import jax.numpy as jnp
import optax

from benchmarks.registry import Params, Row, Target, register


def worst_case(n):
    features = jnp.tile(jnp.array([1.0, 0.0]), (n, 1)).at[-1].set(jnp.array([-0.5, 0.1]))
    return features, jnp.ones(n)


def easy():
    """1000 normal points in 50 dimensions, those within 0.02 of a hyperplane left out."""
    keys = jax.random.split(jax.random.key(0))
    points, normal = jax.random.normal(keys[0], (4000, 50)), jax.random.normal(keys[1], (50,))
    distance = points @ normal / jnp.linalg.norm(normal)
    kept = jnp.flatnonzero(jnp.abs(distance) > 0.02)[:1000]
    return points[kept], jnp.sign(distance[kept])


def steps() -> dict[str, float]:
    """Steps to separate, n = 1000 unless named."""
    from jaxnum.training import separate

    def count(data, rate, mode):
        result = separate(*data, rate, mode=mode, max_steps=200_000)
        return float(result.steps) if bool(result.solved) else float("nan")

    figures = {}
    hard = worst_case(1000)
    for rate in (10.0, 100.0, 1000.0, 1e6):
        figures[f"plain_{rate:g}"] = count(hard, rate, "plain")
        theta = separate(*hard, rate, mode="plain", max_steps=200_000).theta
        figures[f"plain_{rate:g}_last_loss"] = float(jnp.mean(jax.nn.softplus(-hard[1] * (hard[0] @ theta))))
    for n in (10, 100, 1000):
        figures[f"normalized_n{n}"] = count(worst_case(n), 1e6, "normalized")
    figures["plain_over_normalized"] = figures["plain_1e+06"] / figures["normalized_n1000"]
    simple = easy()
    for mode in ("plain", "normalized"):
        figures[f"easy_{mode}"] = count(simple, 1e6, mode)
    return figures


def make(params: Params) -> tuple:
    """Features, labels, parameters."""
    keys = jax.random.split(jax.random.key(0), 3)
    features = jax.random.normal(keys[0], (params["examples"], params["width"]))
    labels = jnp.sign(jax.random.normal(keys[1], (params["examples"],)))
    return features, labels, 0.1 * jax.random.normal(keys[2], (params["width"],))


def run(params: Params):
    from jaxnum.transforms import normalized_gd

    optimiser = normalized_gd(1.0)

    def step(features, labels, theta):
        def loss(theta):
            margins = labels * jnp.matmul(features, theta, precision="highest")
            return jnp.mean(jax.nn.softplus(-margins)), margins

        gradient, margins = jax.grad(loss, has_aux=True)(theta)
        updates, _ = optimiser.update(gradient, optimiser.init(theta), theta, margins=margins)
        return optax.apply_updates(theta, updates)

    return step


def reference(params: Params):
    def step(features, labels, theta):
        p = 1 / (1 + jnp.exp(labels * (features @ theta)))
        return theta + (p * labels) @ features / jnp.sum(p)

    return step


register(
    Row(
        name="normalized_gd",
        covers=("normalized_gd", "scale_by_normalized_gd", "separate"),
        shapes={"4096x256": {"examples": 4096, "width": 256}},
        make=make,
        run=run,
        reference=reference,
        modes=("step",),
        tests=("tests/transforms/test_normalized_gd.py", "tests/training/test_separate.py"),
        targets=(
            Target(
                "figure",
                20.0,
                "On the worst case with n = 1000, 962 / 38 = 25 times fewer steps: at least 20.",
                at_least=True,
                figure="plain_over_normalized",
            ),
            Target("error", 1e-5, "Sums over 4096 examples in float32."),
        ),
        figures={"steps": steps},
    )
)
