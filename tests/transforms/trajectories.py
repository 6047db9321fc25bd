"""A transformation followed along given gradients."""

import re

import jax
import optax


def follow(optimiser, gradients, x):
    """((last parameters, state), updates of every step), under jit and scan."""

    def step(carry, g):
        x, state = carry
        updates, state = optimiser.update(g, state, x)
        return (optax.apply_updates(x, updates), state), updates

    return jax.jit(lambda x, g: jax.lax.scan(step, (x, optimiser.init(x)), g))(x, gradients)


def donated(optimiser, x):
    """A compiled step from x whose parameters and state are donated."""

    def step(x, state, g):
        updates, state = optimiser.update(g, state, x)
        return optax.apply_updates(x, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(x, optimiser.init(x), x).compile()


def copied(program, shape):
    """How many float32 buffers of a shape, such as "64,64", a program copies."""
    return len(re.findall(rf"f32\[{shape}\]\S* copy\(", program.as_text()))
