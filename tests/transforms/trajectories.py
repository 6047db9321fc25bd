"""A transformation followed along given gradients."""

import jax
import optax


def follow(optimiser, gradients, x):
    """((last parameters, state), updates of every step), under jit and scan."""

    def step(carry, g):
        x, state = carry
        updates, state = optimiser.update(g, state, x)
        return (optax.apply_updates(x, updates), state), updates

    return jax.jit(lambda x, g: jax.lax.scan(step, (x, optimiser.init(x)), g))(x, gradients)
