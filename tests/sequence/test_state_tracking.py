"""A gated delta net learns parity with transitions that may reflect, and not without, far beyond its training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.sequence import gated_delta_net

WIDTH, SEEDS, BATCH, STEPS = 32, 5, 64, 4000
TRAINED, TESTED = 24, 192


def model(eigenvalues, implementation):
    layer = gated_delta_net(
        WIDTH,
        heads=2,
        key_dim=8,
        value_dim=8,
        decay=None,
        conv_width=1,
        gate=False,
        eigenvalues=eigenvalues,
        implementation=implementation,
    )

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def init(key):
        keys = jax.random.split(key, 4)
        return {
            "embed": jax.random.normal(keys[0], (2, WIDTH)),
            "layer": layer.init(keys[1]),
            "up": jax.random.normal(keys[2], (WIDTH, 64)) * WIDTH**-0.5,
            "down": jax.random.normal(keys[3], (64, 2)) / 8,
        }

    def logits(params, bits):
        x = params["embed"][bits]
        x = x + layer.apply(params["layer"], norm(x))[0]
        return jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]

    return init, logits


def accuracies(eigenvalues):
    """Share of right parities behind the training length, of one model a seed."""
    init, logits = model(eigenvalues, "reference")
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, 100, STEPS)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def trained(key):
        def step(carry, key):
            params, state = carry
            bits = jax.random.bernoulli(key, shape=(BATCH, TRAINED)).astype(jnp.int32)

            def loss(params):
                found = logits(params, bits)
                return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, jnp.cumsum(bits, 1) % 2))

            updates, state = optimiser.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = init(key)
        return jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(key, STEPS))[0][0]

    params = jax.jit(jax.vmap(trained))(jax.random.split(jax.random.key(0), SEEDS))
    bits = jax.random.bernoulli(jax.random.key(1), shape=(128, TESTED)).astype(jnp.int32)
    # Tested by the chunked form, whose chunks are longer than anything seen.
    found = jax.jit(jax.vmap(lambda p: jnp.argmax(model(eigenvalues, "xla")[1](p, bits), -1)))(params)
    right = np.asarray(found) == np.asarray(jnp.cumsum(bits, 1) % 2)
    return right[:, :, TRAINED:].mean((1, 2))


@pytest.mark.slow
def test_parity_is_learned_by_reflections_and_not_without():
    symmetric, positive = accuracies("symmetric"), accuracies("positive")
    assert np.sum(symmetric >= 0.99) >= 4, (symmetric, positive)
    assert np.all(positive <= 0.6), (symmetric, positive)
