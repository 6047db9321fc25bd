"""What every layer must do, checked in one compiled function a layer."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.tolerances import tolerance

T, CUT = 9, 4
# A document that goes on from before the call, then another, with padding before, in, between and after them.
IDS = np.array([-1, 3, -1, 3, -1, 9, -1, 9, -1])
DOCUMENTS = ([1, 3], [5, 7])


def check_layer(layer, width, *, size, condition=1.0):
    """Steps, cuts, packing and padding give what one call gives, with its gradients; `size` sums an output takes."""
    with jax.enable_x64(True):
        params = layer.init(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (2, T, width))
        # Not the cache of an empty past, which would hide what is done with it.
        _, cache = jax.jit(layer.apply)(params, x[:, :3])
        results = jax.jit(lambda *args: run(layer, *args))(params, x, cache)
        tol = tolerance("float64", size, condition=condition)

        for name, (got, want) in results.items():
            assert jax.tree.structure(got) == jax.tree.structure(want)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=tol, atol=tol, err_msg=name)
        whole = results["steps"][1][0]
        assert np.abs(np.asarray(whole)).max() > 1e-3
    float32(layer, width)


def float32(layer, width):
    """Parameters and inputs of 32 and 16 bits: dtypes stay, and numbers come close."""
    params = jax.tree.map(lambda p: p.astype(jnp.float32), layer.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (2, 3, width))
    for dtype in (jnp.float32, jnp.bfloat16):
        shapes = jax.eval_shape(layer.apply, params, x.astype(dtype))
        assert shapes[0].dtype == dtype
        cache = jax.eval_shape(lambda dtype=dtype: layer.init_cache(2, dtype))
        assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes[1]) == jax.tree.map(
            lambda s: (s.shape, s.dtype), cache
        )
        stepped = jax.eval_shape(layer.step, params, x[:, 0].astype(dtype), cache)
        assert jax.tree.leaves(stepped)[0].dtype == dtype


def run(layer, params, x, cache):
    """Pairs (got, wanted) of outputs, caches and gradients."""
    weight = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    def loss(of):
        def value(params, x, cache):
            y, after = of(params, x, cache)
            inexact = [a for a in jax.tree.leaves(after) if jnp.issubdtype(a.dtype, jnp.inexact)]
            return jnp.sum(y * weight) + sum(jnp.sum(jnp.sin(a)) for a in inexact), (y, after)

        return value

    def with_gradients(of):
        (_, (y, after)), gradients = jax.value_and_grad(loss(of), (0, 1, 2), has_aux=True, allow_int=True)(
            params, x, cache
        )
        gradients = [g for g in jax.tree.leaves(gradients) if g.dtype != jax.dtypes.float0]
        return y, after, gradients

    def whole(params, x, cache):
        return layer.apply(params, x, cache=cache)

    def steps(params, x, cache):
        def step(cache, token):
            y, cache = layer.step(params, token, cache)
            return cache, y

        cache, y = jax.lax.scan(step, cache, jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(y, 0, 1), cache

    ids = jnp.broadcast_to(IDS, x.shape[:2]).astype(jnp.int32)
    hidden = (ids < 0)[..., None]

    def packed(params, x, cache):
        return layer.apply(params, jnp.where(hidden, jnp.nan, x), segment_ids=ids, cache=cache)

    def separate(params, x, cache):
        y = jnp.zeros_like(x)
        for i, places in enumerate(DOCUMENTS):
            own, cache = layer.apply(params, x[:, np.array(places)], cache=cache if i == 0 else None)
            y = y.at[:, np.array(places)].set(own)
        return y, cache

    first, middle = layer.apply(params, x[:, :CUT], cache=cache)
    second, end = layer.apply(params, x[:, CUT:], cache=middle)
    one = with_gradients(whole)
    lanes = jax.vmap(lambda x: layer.apply(params, x))(x)
    return {
        "steps": (with_gradients(steps), one),
        "cut": ((jnp.concatenate([first, second], 1), end), one[:2]),
        "packed": (with_gradients(packed), with_gradients(separate)),
        "vmap, and no cache is an empty one": (lanes, layer.apply(params, x, cache=layer.init_cache(2))),
    }
