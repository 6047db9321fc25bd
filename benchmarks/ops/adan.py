"""One update of Adan on ten million parameters, and the steps it needs on a small task beside AdamW and NAdamW.

`optax.adan` has another coefficient (see the docstring of `adan`): the same buffers and the same work, another answer.
"""

import jax
import jax.numpy as jnp
import optax

from benchmarks.registry import Params, Peer, Row, Target, register
from benchmarks.training import donated, steps_to_loss, tree

RATE = 1e-3


def make(params: Params) -> tuple:
    """Parameters, gradient, the three moments, the previous gradient."""
    parameters, gradient, m, v, n, previous = (tree(seed) for seed in range(6))
    return parameters, gradient, m, v, jax.tree.map(jnp.abs, n), previous


def stepping(optimiser, last: str):
    """A fourth step from the state given, whose previous gradient is called `last`."""

    def step(parameters, gradient, m, v, n, previous):
        state = optimiser.init(parameters)
        fields = {"m": m, "v": v, "n": n, last: previous}
        state = optax.tree_utils.tree_set(state, **fields)
        state = optax.tree_utils.tree_set(state, **{("count" if last == "previous" else "t"): jnp.int32(3)})
        updates, state = optimiser.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), *(optax.tree_utils.tree_get(state, name) for name in "mvn")

    return step


def run(params: Params):
    from jaxnum.transforms import adan

    return stepping(adan(RATE), "previous")


def optax_adan(params: Params):
    return stepping(optax.adan(RATE, eps_root=0.0), "g")


def reference(params: Params):
    def step(parameters, gradient, m, v, n, previous):
        change = jax.tree.map(jnp.subtract, gradient, previous)
        m = jax.tree.map(lambda m, g: 0.98 * m + 0.02 * g, m, gradient)
        v = jax.tree.map(lambda v, d: 0.92 * v + 0.08 * d, v, change)
        n = jax.tree.map(lambda n, g, d: 0.99 * n + 0.01 * (g + 0.92 * d) ** 2, n, gradient, change)
        moved = jax.tree.map(
            lambda p, m, v, n: (
                p - RATE * (m / (1 - 0.98**4) + 0.92 * v / (1 - 0.92**4)) / (jnp.sqrt(n / (1 - 0.99**4)) + 1e-8)
            ),
            parameters,
            m,
            v,
            n,
        )
        return moved, m, v, n

    return step


def donated_steps() -> dict[str, float]:
    from jaxnum.transforms import adan

    return donated(adan(RATE), {"optax.adan": optax.adan(RATE), "optax.adamw": optax.adamw(RATE)})


def training() -> dict[str, float]:
    """Steps to a loss of 0.1 at the best of four rates, medians of five seeds, as ratios."""
    from jaxnum.transforms import adan

    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    ours, finite = steps_to_loss(adan, rates, 5, 0.1)
    figures = {"steps": ours, "finite_at_largest_rate": finite}
    for name, peer in (("adamw", optax.adamw), ("nadamw", optax.nadamw), ("optax.adan", optax.adan)):
        figures[f"steps_over_{name}"] = ours / steps_to_loss(peer, rates, 5, 0.1)[0]
    return figures


register(
    Row(
        name="adan",
        covers=("adan", "scale_by_adan", "adan_restart"),
        shapes={"10m": {}},
        make=make,
        run=run,
        reference=reference,
        modes=("step",),
        tests=("tests/transforms/test_adan.py",),
        peers={"optax.adan": Peer("optax", optax_adan, same_answer=False)},
        targets=(
            Target(
                "figure",
                1.05,
                "Donated step of 10 million parameters: at most 1.05x optax.adan's.",
                figure="donated_time_over_optax.adan",
            ),
            Target("figure", 1.0, "Adan's median steps <= 1.0x AdamW's.", figure="steps_over_adamw"),
        ),
        figures={"donated": donated_steps, "training": training},
    )
)
