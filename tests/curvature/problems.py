"""A small network whose curvature matrices are formed densely by somebody else's code: jax.hessian and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

LABELS = jnp.array([0, 2, 1, 2, 0])


def network(dtype="float64"):
    """(params, logits_fn): tanh, 3 inputs, 4 hidden, 3 classes, 5 examples; 31 parameters."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    params = {"in": draw(3, 4), "bias": draw(4), "out": draw(4, 3) / 2, "shift": draw(3)}
    x = draw(5, 3)
    return params, lambda p: jnp.tanh(x @ p["in"] + p["bias"]) @ p["out"] + p["shift"]


def losses(logits):
    """Cross-entropy of every example."""
    return -jax.nn.log_softmax(logits)[jnp.arange(5), LABELS]


def flat(fn, params):
    """The flat parameters, fn of them, and what makes a tree of them."""
    vector, unravel = ravel_pytree(params)
    return vector, lambda v: fn(unravel(v)), unravel


def dense(product, params):
    """The matrix of a product, column by column."""
    vector, unravel = ravel_pytree(params)
    return jax.jit(jax.vmap(lambda e: ravel_pytree(product(unravel(e)))[0], out_axes=1))(jnp.eye(vector.size))
