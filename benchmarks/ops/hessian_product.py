"""A Hessian-vector product beside a gradient of the same loss on the same batch: a two-layer tanh network."""

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, Target, register


def make(params: Params) -> tuple:
    width, batch = params["width"], params["batch"]
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.float64)  # noqa: E731
    weights = {"in": draw(keys[0], 64, width) / 8, "out": draw(keys[1], width, 10) / width**0.5}
    direction = jax.tree.map(jnp.ones_like, weights)
    return weights, direction, draw(keys[2], batch, 64), draw(keys[3], batch, 10)


def loss(weights, x, y):
    return 0.5 * jnp.mean((jnp.tanh(x @ weights["in"]) @ weights["out"] - y) ** 2)


def run(params: Params):
    from jaxnum.curvature import hessian_product

    return lambda weights, v, x, y: hessian_product(lambda w: loss(w, x, y), weights)(v)


def difference(params: Params):
    """Central differences of the gradient, good to about 1e-8: an oracle without a second derivative."""
    step = 1e-6

    def product(weights, v, x, y):
        ahead, behind = (
            jax.grad(loss)(jax.tree.map(lambda w, d, s=s: w + s * d, weights, v), x, y) for s in (step, -step)
        )
        return jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)

    return product


def gradient(params: Params):
    return lambda weights, v, x, y: jax.grad(loss)(weights, x, y)


register(
    Row(
        name="hessian_product",
        covers=("hessian_product",),
        shapes={"mlp_256": {"width": 256, "batch": 1024}},
        make=make,
        run=run,
        reference=difference,
        modes=("fwd",),
        tests=("tests/curvature/test_hessian_product.py",),
        peers={"one gradient": Peer("jax", gradient, same_answer=False)},
        targets=(
            Target("ratio", 3.0, "HVP wall time at most ~3x a gradient evaluation on the same batch."),
            Target("error", 1e-6, "Hessian products equal central differences of the gradient."),
        ),
        x64=True,
    )
)
