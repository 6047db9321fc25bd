"""One update of Lion on ten million parameters, beside optax's own and Adam's."""

import jax
import jax.numpy as jnp
import optax

from benchmarks.registry import Params, Peer, Row, Target, register
from benchmarks.training import donated, tree

RATE, DECAY = 1e-4, 0.1


def make(params: Params) -> tuple:
    """Parameters, gradient, momentum."""
    return tuple(tree(seed) for seed in range(3))


def stepping(optimiser):
    def step(parameters, gradient, mu):
        state = optax.tree_utils.tree_set(optimiser.init(parameters), mu=mu)
        updates, state = optimiser.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), optax.tree_utils.tree_get(state, "mu")

    return step


def run(params: Params):
    from jaxnum.transforms import lion

    return stepping(lion(RATE, weight_decay=DECAY))


def optax_lion(params: Params):
    return stepping(optax.lion(RATE, weight_decay=DECAY))


def reference(params: Params):
    def step(parameters, gradient, mu):
        signs = jax.tree.map(lambda g, m: jnp.sign(0.9 * m + 0.1 * g), gradient, mu)
        moved = jax.tree.map(lambda p, s: p - RATE * (s + DECAY * p), parameters, signs)
        return moved, jax.tree.map(lambda g, m: 0.99 * m + 0.01 * g, gradient, mu)

    return step


def donated_steps() -> dict[str, float]:
    from jaxnum.transforms import lion

    return donated(lion(RATE), {"optax.adam": optax.adam(RATE), "optax.lion": optax.lion(RATE)})


register(
    Row(
        name="lion",
        covers=("lion",),
        shapes={"10m": {}},
        make=make,
        run=run,
        reference=reference,
        modes=("step",),
        tests=("tests/transforms/test_lion.py",),
        peers={"optax.lion": Peer("optax", optax_lion)},
        targets=(
            Target("figure", 0.8, "The step at most 0.8x Adam's.", figure="donated_time_over_optax.adam"),
            Target("error", 1e-6, "Sums in float32."),
        ),
        figures={"donated": donated_steps},
    )
)
