"""Learning rates by fan-in: the factors, optax.partition with them as labels, and a decay that does not know them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.transforms import adamw_independent, mu_param, mu_param_multipliers
from tests.tolerances import tolerance
from tests.transforms.trajectories import follow


def params():
    return {"embedding": jnp.ones((3, 8)), "layers": [{"kernel": jnp.ones((8, 32)), "bias": jnp.ones(32)}]}


def fan_in(path, leaf):
    return leaf.shape[0] if path.endswith("kernel") else None


def test_multipliers_are_base_over_fan_in():
    want = {"embedding": 1.0, "layers": [{"kernel": 0.25, "bias": 1.0}]}
    assert mu_param_multipliers(params(), fan_in, base_fan_in=2) == want
    assert mu_param_multipliers(jax.eval_shape(params), fan_in, base_fan_in=2) == want
    seen = []
    mu_param_multipliers(params(), lambda path, leaf: seen.append(path))
    assert seen == ["embedding", "layers/0/bias", "layers/0/kernel"]


def test_a_chain_is_optax_partition_over_the_groups(key):
    x = params()
    leaves, tree = jax.tree.flatten(x)
    gradients = jax.tree.unflatten(tree, [jax.random.normal(key, (10, *leaf.shape)) for leaf in leaves])
    ours = optax.chain(optax.scale_by_adam(), mu_param(fan_in, base_fan_in=2), optax.scale_by_learning_rate(0.1))
    groups = mu_param_multipliers(x, fan_in, base_fan_in=2)
    theirs = optax.partition({factor: optax.adam(0.1 * factor) for factor in (0.25, 1.0)}, groups)
    got, want = (follow(optimiser, gradients, x)[0][0] for optimiser in (ours, theirs))
    limit = tolerance("float32", 10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=limit, atol=limit), got, want)


def test_independent_decay_does_not_know_the_fan_in():
    x = params()
    optimiser = optax.chain(
        adamw_independent(0.1, weight_decay=0.0), mu_param(fan_in, base_fan_in=2), optax.add_decayed_weights(-0.01)
    )
    (moved, _), _ = follow(optimiser, jax.tree.map(lambda leaf: jnp.zeros((5, *leaf.shape)), x), x)
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, 0.99**5, rtol=tolerance("float32", 5))


def test_first_steps_change_outputs_alike_at_every_width(key):
    """What the rule is for: the change of a wide layer's output by one step of Adam, for inputs of unit size."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def change(width, optimiser):
        kernel = jax.random.normal(key, (width, 4)) / width**0.5
        x = jax.random.normal(jax.random.fold_in(key, 1), (width,))
        gradient = jax.grad(lambda w: jnp.sum(x @ w))(kernel)
        updates, _ = optimiser.update({"kernel": gradient}, optimiser.init({"kernel": kernel}), {"kernel": kernel})
        return jnp.abs(x @ updates["kernel"]).mean()

    with_it, without = (
        [float(change(width, tx)) for width in (64, 1024)]
        for tx in (optax.chain(optax.adam(0.1), mu_param(fan_in, base_fan_in=64)), optax.adam(0.1))
    )
    assert with_it[1] / with_it[0] == pytest.approx(1, rel=0.25)
    assert without[1] / without[0] == pytest.approx(16, rel=0.25)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="^mu_param: `base_fan_in` must be greater than 0"):
        mu_param(fan_in, base_fan_in=0)
    x = params()
    transform = mu_param(lambda path, leaf: 0)
    with pytest.raises(ValueError, match="^mu_param: `fan_in` must be greater than 0 for 'embedding'; got 0"):
        transform.update(x, transform.init(x), x)
    with pytest.raises(ValueError, match="^mu_param_multipliers: `fan_in` must be"):
        mu_param_multipliers(x, lambda path, leaf: float("inf"))
