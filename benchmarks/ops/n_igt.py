"""Implicit gradient transport and Hessian-aided momentum on a noisy quadratic, beside momentum; and a step's time.

The momentum beside them is the same normalised one with gradients at the iterate and its own best-known schedule of
averaging, (2 / (t + 2))^(2/3), in place of 4/5. Where steps are ten times as long all are limited by the noise, and the
order can change: that is shown too.
"""

import jax
import jax.numpy as jnp
import optax

from benchmarks.registry import Params, Row, Target, register
from benchmarks.training import donated, tree

STEPS, SEEDS = 2000, 5


def noisy(optimiser_of, rate: float) -> float:
    """Norm of the gradient at the last iterate, mean over seeds."""
    from jaxnum.transforms import n_igt_params

    curvature = jnp.logspace(-2, 0.5, 20)

    def one(key):
        optimiser, transported = optimiser_of(lambda t: rate / (t + 10))
        start = jnp.ones(20)

        def step(carry, noise):
            x, state = carry
            loss = lambda x: 0.5 * jnp.sum(curvature * x**2)  # noqa: E731
            gradient = curvature * x + 3 * noise
            updates, state = optimiser.update(gradient, state, x, obj_fn=loss)
            return (optax.apply_updates(x, updates), state), None

        (x, state), _ = jax.lax.scan(step, (start, optimiser.init(start)), jax.random.normal(key, (STEPS, 20)))
        return jnp.linalg.norm(curvature * (n_igt_params(state, x) if transported else x))

    return float(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), SEEDS)).mean())


def momentum(rate):
    """Normalised steps along an average of gradients at the iterate."""

    def update(gradient, state, params=None, **extra):
        count, d = state
        eta = (2 / (count + 2)) ** (2 / 3)
        d = (1 - eta) * d + eta * gradient
        return -rate(count) * d / jnp.linalg.norm(d), (count + 1, d)

    start = lambda params: (jnp.int32(0), jnp.zeros_like(params))  # noqa: E731
    return optax.GradientTransformationExtraArgs(start, update), False


def quadratic() -> dict[str, float]:
    from jaxnum.transforms import harp, n_igt

    figures = {}
    for label, rate in (("", 1.0), ("_long_steps", 10.0)):
        ours = noisy(lambda rate: (n_igt(rate), True), rate)
        aided = noisy(lambda rate: (harp(rate, jax.random.key(1)), False), rate)
        plain = noisy(momentum, rate)
        figures[f"igt_over_momentum{label}"] = ours / plain
        figures[f"harp_over_igt{label}"] = aided / ours
        figures[f"gradient_momentum{label}"] = plain
    return figures


def donated_steps() -> dict[str, float]:
    from jaxnum.transforms import n_igt

    return donated(n_igt(1e-3), {"optax.adamw": optax.adamw(1e-3)})


def make(params: Params) -> tuple:
    """Iterate, gradient, momentum."""
    return tuple(tree(seed) for seed in range(3))


def run(params: Params):
    from jaxnum.transforms import n_igt

    optimiser = n_igt(1e-3)

    def step(x, gradient, d):
        state = optimiser.init(x)._replace(count=jnp.int32(3), d=d)
        updates, state = optimiser.update(gradient, state, x)
        return optax.apply_updates(x, updates), state.d

    return step


def reference(params: Params):
    def step(x, gradient, d):
        eta, following = (0.4**0.8, (1 / 3) ** 0.8)
        d = jax.tree.map(lambda d, g: (1 - eta) * d + eta * g, d, gradient)
        scale = 1e-3 / optax.tree.norm(d)
        return jax.tree.map(lambda x, d: x - scale * d / following, x, d), d

    return step


register(
    Row(
        name="n_igt",
        covers=("n_igt", "n_igt_params", "harp", "scale_by_harp"),
        shapes={"10m": {}},
        make=make,
        run=run,
        reference=reference,
        modes=("step",),
        tests=("tests/transforms/test_n_igt.py", "tests/transforms/test_harp.py"),
        targets=(
            Target("figure", 0.85, "N-IGT <= 0.85x momentum.", figure="igt_over_momentum"),
            Target("figure", 0.85, "HARP <= 0.85x N-IGT.", figure="harp_over_igt"),
        ),
        figures={"quadratic": quadratic, "donated": donated_steps},
    )
)
