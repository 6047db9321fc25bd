"""Opposing signals planted among 200 examples: whether the groups that a rise of the loss names are the planted ones.

Two linear layers under gradient descent, at the edge of stability with rate 0.15, below it with 0.1. How sharp the loss
is in the direction between the two groups' gradients, as a share of its sharpest, is a figure too.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Row, Target, register


def planted() -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """Examples, of which the first ten have a large feature, half of them with each target; and weights."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 20))
    targets = np.sign(features[:, 0] + 0.3 * rng.standard_normal(200))
    extra = np.zeros((200, 1))
    extra[:10] = 20
    targets[:5], targets[5:10] = 1, -1
    weights = (0.1 * rng.standard_normal((21, 10)), 0.1 * rng.standard_normal((10, 1)))
    return (jnp.asarray(np.hstack([features, extra])), jnp.asarray(targets)), tuple(map(jnp.asarray, weights))


def loss(params, example):
    x, y = example
    return 0.5 * ((x @ params[0] @ params[1])[0] - y) ** 2


def mean_loss(params, data):
    return jax.vmap(loss, (None, 0))(params, data).mean()


def descend(data, params, rate: float, steps: int = 1500):
    """Losses of every example before every step of gradient descent, and the parameters there."""

    def step(params, _):
        losses = jax.vmap(loss, (None, 0))(params, data)
        gradient = jax.grad(mean_loss)(params, data)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient), (losses, params)

    return jax.jit(lambda p: jax.lax.scan(step, p, length=steps)[1])(params)


def recovery() -> dict[str, float]:
    from jaxnum.curvature import hessian_product, top_eigenvalue
    from jaxnum.training import opposing_signals, opposing_signals_feature, opposing_signals_score

    with jax.enable_x64(True):
        data, params = planted()
        losses, path = descend(data, params, 0.15)
        events = [event for event in opposing_signals(losses, 5) if event.step > 5]
        planted_groups = set(range(5)), set(range(5, 10))
        found = []
        for event in events:
            up, down = (set(np.asarray(group).tolist()) for group in event.groups[:2])
            one, other = planted_groups
            found.append(max(min(len(up & a), len(down & b)) for a, b in ((one, other), (other, one))))
        # In the middle of the oscillation, where the two groups swap roles at every step.
        event = events[len(events) // 2]
        at = jax.tree.map(lambda leaf: leaf[event.step - 1], path)
        score = opposing_signals_score(loss, at, data, event.groups)
        gradients = [
            jax.grad(mean_loss)(at, jax.tree.map(lambda leaf, group=group: leaf[group], data))
            for group in event.groups[:2]
        ]
        between = jax.tree.map(jnp.subtract, *gradients)
        product = hessian_product(lambda p: mean_loss(p, data), at)
        along = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, between, product(between)))
        length = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, between, between))
        sharpest = top_eigenvalue(product, jax.tree.map(jnp.ones_like, at)).value
        below = [event for event in opposing_signals(descend(data, params, 0.1)[0], 5) if event.step > 5]
        return {
            "rising_steps": len(events),
            "rising_steps_below_the_edge": len(below),
            "mean_recovery_of_5": float(np.mean(found)),
            "cosine": float(score.cosine),
            "norm_ratio_up": float(score.up_ratio),
            "norm_ratio_down": float(score.down_ratio),
            "share_of_gradient_norms": float(score.share),
            "share_of_feature": float(opposing_signals_feature(data[0], event.groups)[0]),
            "sharpness_between_over_largest": float(along / length / sharpest),
        }


def make(params: Params) -> tuple:
    return tuple(jax.random.normal(jax.random.key(seed), (params["examples"],)) for seed in range(2))


def run(params: Params):
    from jaxnum.training import opposing_signals_groups

    def changes(before, after):
        groups = opposing_signals_groups(before, after, params["k"])
        return groups.up_change, groups.down_change

    return changes


def reference(params: Params):
    def changes(before, after):
        ordered = jnp.sort(after - before)
        return ordered[::-1][: params["k"]], ordered[: params["k"]]

    return changes


register(
    Row(
        name="opposing_signals",
        covers=(
            "opposing_signals",
            "opposing_signals_groups",
            "opposing_signals_score",
            "opposing_signals_feature",
        ),
        shapes={"50k_examples": {"examples": 50_000, "k": 32}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd",),
        tests=("tests/training/test_opposing_signals.py", "tests/training/test_per_example_losses.py"),
        targets=(
            Target("figure", 4.5, "Mean recovery of at least 4.5 of 5.", at_least=True, figure="mean_recovery_of_5"),
            Target("figure", 0, "No rising step below the edge.", figure="rising_steps_below_the_edge"),
            Target("figure", -0.9, "The groups' gradients oppose each other.", figure="cosine"),
            Target("error", 1e-5, "A difference in float32."),
        ),
        figures={"recovery": recovery},
    )
)
