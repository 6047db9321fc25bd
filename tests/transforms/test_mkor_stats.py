"""Statistics against per-example gradients, wherever a tap stands."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.transforms import MkorLayer, mkor_layers, mkor_stats
from kernels_pallas.checks import ShapeError
from tests.tolerances import tolerance

LAYERS = {"up": MkorLayer("up", "b"), "down": MkorLayer("down")}


def untapped(name, x, s):
    return s


def model(p, x, tap=untapped):
    h = jnp.tanh(tap("up", x, x @ p["up"] + p["b"]))
    return tap("down", h, h @ p["down"])


def loss(p, x, y, tap=untapped):
    return jnp.mean(jnp.sum((model(p, x, tap) - y) ** 2, axis=-1))


def problem(key, *lead):
    keys = jax.random.split(key, 4)
    params = {"up": jax.random.normal(keys[0], (3, 5)), "b": jnp.zeros(5), "down": jax.random.normal(keys[1], (5, 2))}
    return params, jax.random.normal(keys[2], (*lead, 3)), jax.random.normal(keys[3], (*lead, 2))


def per_example(p, x, y):
    """Mean inputs and mean gradients of the examples' own losses with respect to the two layers' outputs."""

    def one(x, y, up, down):
        h = jnp.tanh(x @ p["up"] + p["b"] + up)
        return jnp.sum((h @ p["down"] + down - y) ** 2), h

    def grads(x, y):
        return jax.grad(one, (2, 3), has_aux=True)(x, y, jnp.zeros(5), jnp.zeros(2))

    x, y = x.reshape(-1, 3), y.reshape(-1, 2)
    (up, down), h = jax.vmap(grads)(x, y)
    return {"up": (jnp.append(x.mean(axis=0), 1), up.mean(axis=0)), "down": (h.mean(axis=0), down.mean(axis=0))}


def close(got, want, dtype="float64", size=100):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance(dtype, size), atol=tolerance(dtype, size)),
        got,
        want,
    )


@pytest.mark.parametrize("lead", [(7,), (4, 6)])  # examples; examples of sequences
def test_statistics_equal_means_over_examples(key, x64, lead):
    p, x, y = problem(key, *lead)
    value, grads, stats = jax.jit(lambda p: mkor_stats(loss, p, x, y, layers=LAYERS))(p)
    close(stats, jax.jit(per_example)(p, x, y))
    close((value, grads), jax.jit(jax.value_and_grad(loss))(p, x, y))


def test_taps_inside_vmap_checkpoint_and_loops(key, x64):
    p, x, y = problem(key, 4, 6)
    want = jax.jit(lambda p: mkor_stats(loss, p, x, y, layers=LAYERS))(p)

    def by_example(p, x, y, tap):
        return jnp.mean(jax.vmap(jax.checkpoint(lambda x, y: loss(p, x, y, tap)))(x, y))

    def by_loop(p, x, y, tap):
        return jnp.mean(jax.lax.map(lambda pair: loss(p, *pair, tap), (x, y)))

    def by_parts(p, x, y, tap):
        return 0.5 * (loss(p, x[:2], y[:2], tap) + loss(p, x[2:], y[2:], tap))

    for same in (by_example, by_loop, by_parts):
        close(jax.jit(lambda p, same=same: mkor_stats(same, p, x, y, layers=LAYERS))(p), want)


def test_auxiliary_output_and_bfloat16(key):
    p, x, y = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), problem(key, 512))

    def both(p, x, y, tap):
        return loss(p, x, y, tap), 2 * y

    (value, twice), grads, stats = jax.jit(lambda p: mkor_stats(both, p, x, y, layers=LAYERS, has_aux=True))(p)
    assert value.dtype == grads["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(twice, 2 * y)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(stats))
    exact = np.asarray(x, float).mean(axis=0)
    np.testing.assert_allclose(stats["up"][0][:3], exact, rtol=0, atol=tolerance("float32", 512))


def test_flax_by_interception(key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, use_bias=False, name="down")(jnp.tanh(nn.Dense(5, name="up")(x)))

    p, x, y = problem(key, 7)
    params = {"up": {"kernel": p["up"], "bias": p["b"]}, "down": {"kernel": p["down"]}}

    def flax_loss(params, x, y, tap):
        def spy(call, args, kwargs, context):
            out = call(*args, **kwargs)
            ours = isinstance(context.module, nn.Dense) and context.method_name == "__call__"
            return tap("/".join(context.module.path), args[0], out) if ours else out

        with nn.intercept_methods(spy):
            out = Model().apply({"params": params}, x)
        return jnp.mean(jnp.sum((out - y) ** 2, axis=-1))

    layers = mkor_layers(params, "kernel", "bias")
    got = jax.jit(lambda params: mkor_stats(flax_loss, params, x, y, layers=layers).stats)(params)
    close(got, jax.jit(per_example)(p, x, y), "float32")


def test_equinox_inside_vmap(key):
    p, x, y = problem(key, 7)
    first, second = eqx.nn.Linear(3, 5, key=key), eqx.nn.Linear(5, 2, use_bias=False, key=key)
    first = eqx.tree_at(lambda m: (m.weight, m.bias), first, (p["up"].T, p["b"]))
    second = eqx.tree_at(lambda m: m.weight, second, p["down"].T)
    params, static = eqx.partition([first, second], eqx.is_inexact_array)

    def eqx_loss(params, x, y, tap):
        first, second = eqx.combine(params, static)

        def one(x):
            h = jnp.tanh(tap("0", x, first(x)))
            return tap("1", h, second(h))

        return jnp.mean(jnp.sum((jax.vmap(one)(x) - y) ** 2, axis=-1))

    layers = mkor_layers(params, "weight", "bias", order="out_in")
    got = jax.jit(lambda params: mkor_stats(eqx_loss, params, x, y, layers=layers).stats)(params)
    want = jax.jit(per_example)(p, x, y)
    close((got["0"], got["1"]), (want["up"], want["down"]), "float32")


def test_a_layer_that_the_loss_does_not_reach_is_nan(key):
    p, x, y = problem(key, 7)

    def cut(p, x, y, tap):
        model(p, x, tap)
        return jnp.mean(y) + 0 * jnp.sum(p["up"])

    stats = mkor_stats(cut, p, x, y, layers=LAYERS).stats
    assert bool(jnp.isnan(stats["down"][0]).all())


def test_bad_taps(key):
    p, x, y = problem(key, 7)
    with pytest.raises(ValueError, match=r"mkor_stats: `tap` must name one of the layers 'up'; got 'down'"):
        mkor_stats(loss, p, x, y, layers={"up": LAYERS["up"]})
    with pytest.raises(
        ValueError, match=r"`layers\['down'\]` must be tapped by `loss_fn`; got no tap. Call tap\('down'"
    ):
        mkor_stats(lambda p, x, y, tap: jnp.mean(tap("up", x, x @ p["up"])), p, x, y, layers=LAYERS)
    with pytest.raises(ShapeError, match=r"`tap\('up', x\)` must have 3 inputs in its last axis; got shape \(7, 2\)"):
        mkor_stats(lambda p, x, y, tap: jnp.mean(tap("up", y, x @ p["up"])), p, x, y, layers=LAYERS)
    with pytest.raises(ShapeError, match=r"`tap\('up', s\)` must have shape \(7, 5\); got \(5,\)"):
        mkor_stats(lambda p, x, y, tap: jnp.mean(tap("up", x, p["b"])), p, x, y, layers=LAYERS)
