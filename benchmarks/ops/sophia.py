"""One update of Sophia on ten million parameters, on a step that refreshes the curvature and on one that does not.

With buffers donated, as a training loop has them, a step between refreshes is a figure of its own: a step that keeps
its arguments must copy the curvature, which nothing has changed. Its bytes are counted by XLA, which adds those of the
refresh though it does not run.

The curvature estimate is handed in ready, so that the update alone is timed: what an estimate costs depends on the
model. The peers are different methods, or the same one with other defaults, so their answers are not compared.
"""

import jax
import jax.numpy as jnp
import optax

from benchmarks import training
from benchmarks.registry import Params, Peer, Row, Target, register

LEARNING_RATE, DECAY, GAMMA = 1e-3, 0.2, 0.01
SHAPES = training.SHAPES


def make(params: Params) -> tuple:
    """Parameters, gradient, momentum, curvature average, curvature estimate, and the count of steps taken."""
    keys = jax.random.split(jax.random.key(0), 5)
    parameters, gradient, momentum, average, estimate = (
        {name: jax.random.normal(jax.random.fold_in(key, i), shape) for i, (name, shape) in enumerate(SHAPES.items())}
        for key in keys
    )
    positive = lambda tree: jax.tree.map(jnp.abs, tree)  # noqa: E731
    return parameters, gradient, momentum, positive(average), positive(estimate), jnp.int32(params["count"])


def stepping(optimiser_of):
    """One step of an optimiser made from the estimate, started in the state given."""

    def step(parameters, gradient, momentum, average, estimate, count):
        optimiser = optimiser_of(estimate)
        state = optimiser.init(parameters)
        state = optax.tree_utils.tree_set(state, mu=momentum, nu=average, count=count)
        updates, state = optimiser.update(gradient, state, parameters)
        get = optax.tree_utils.tree_get
        return optax.apply_updates(parameters, updates), get(state, "mu"), get(state, "nu")

    return step


def constant(estimate):
    """A curvature estimator that returns what it is given."""
    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda updates, state, params=None, **extra: (estimate, state)
    )


def run(params: Params):
    from jaxnum.transforms import sophia

    return stepping(lambda estimate: sophia(LEARNING_RATE, constant(estimate), gamma=GAMMA, weight_decay=DECAY))


def contrib(params: Params):
    return stepping(
        lambda estimate: optax.contrib.sophia(
            LEARNING_RATE, hessian_diagonal_fn=constant(estimate), gamma=GAMMA, weight_decay=DECAY
        )
    )


def adamw(params: Params):
    return stepping(lambda estimate: optax.adamw(LEARNING_RATE, weight_decay=DECAY))


def reference(params: Params):
    """The method's three lines."""

    def step(parameters, gradient, momentum, average, estimate, count):
        decayed = lambda rate: lambda old, new: rate * old + (1 - rate) * new  # noqa: E731
        mu = jax.tree.map(decayed(0.965), momentum, gradient)
        nu = jax.tree.map(decayed(0.99), average, estimate) if count % 10 == 0 else average
        moved = jax.tree.map(
            lambda p, m, h: (
                (1 - LEARNING_RATE * DECAY) * p - LEARNING_RATE * jnp.clip(m / jnp.maximum(GAMMA * h, 1e-12), -1, 1)
            ),
            parameters,
            mu,
            nu,
        )
        return moved, mu, nu

    return step


def between_refreshes() -> dict[str, float]:
    """Donated steps that do not refresh, beside each peer alone: optax's own Sophia disturbs whoever comes after it."""
    from jaxnum.transforms import sophia

    curvature = training.tree(2)
    ours = sophia(LEARNING_RATE, constant(curvature), gamma=GAMMA, weight_decay=DECAY, update_interval=1000)
    contrib = optax.contrib.sophia(
        LEARNING_RATE, hessian_diagonal_fn=constant(curvature), gamma=GAMMA, weight_decay=DECAY, update_interval=1000
    )
    adamw = optax.adamw(LEARNING_RATE, weight_decay=DECAY)
    return training.donated(ours, {"optax.adamw": adamw}) | training.donated(ours, {"optax.contrib.sophia": contrib})


register(
    Row(
        name="sophia",
        covers=("sophia", "scale_by_sophia"),
        shapes={"10m_plain": {"count": 3}, "10m_refresh": {"count": 10}},
        make=make,
        run=run,
        reference=reference,
        modes=("step",),
        tests=("tests/transforms/test_sophia.py",),
        peers={
            "optax.adamw": Peer("optax", adamw, same_answer=False),
            "optax.contrib.sophia": Peer("optax", contrib, same_answer=False),
        },
        targets=(
            Target(
                "figure",
                0.9,
                "Sophia between refreshes at most 0.9 of optax.adamw's donated step.",
                figure="donated_time_over_optax.adamw",
            ),
        ),
        figures={"between_refreshes": between_refreshes},
    )
)
