"""What every aggregator of per-example gradients must do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

from kernels_pallas.checks import DtypeError, ShapeError, TreeError


def behaves(name, aggregator):
    """Composes with optax under jit, keeps dtypes, takes any axis and complex numbers, knows bad input."""
    key = jax.random.key(3)
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}
    grads = {k: jax.random.normal(key, (6, *p.shape)).astype(p.dtype) for k, p in params.items()}
    tx = aggregating.process(optax.identity(), aggregator(axis=0), optax.sgd(1.0))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(lambda p: (p.shape, p.dtype), params)
    plain, _ = aggregator(axis=0).update(grads, (), params)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -p, rtol=1e-6), updates, plain)
    last = aggregator(axis=-1).update(jax.tree.map(lambda g: jnp.moveaxis(g, 0, -1), grads), (), params)[0]
    jax.tree.map(np.testing.assert_array_equal, last, plain)
    alike = jax.tree.map(lambda p: jnp.broadcast_to(p + 0.5, (6, *p.shape)), params)
    got, _ = aggregator(axis=0).update(alike, (), params)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, jnp.full_like(g, 0.5)), got)
    poisoned = grads | {"w": grads["w"].at[2, 0, 0].set(jnp.nan)}
    assert not bool(jnp.isfinite(aggregator(axis=0).update(poisoned, (), params)[0]["w"][0, 0]))
    pairs = jax.random.normal(key, (7, 4, 2))
    whole, _ = aggregator(axis=0).update(jax.lax.complex(pairs[..., 0], pairs[..., 1]), (), jnp.zeros(4, complex))
    apart, _ = aggregator(axis=0).update(pairs, (), jnp.zeros((4, 2)))
    np.testing.assert_allclose(np.stack([whole.real, whole.imag], axis=-1), apart, rtol=1e-6)
    refuses(name, aggregator(axis=0), grads, params)


def refuses(name, aggregator, grads, params):
    for error, bad in (
        (ShapeError, grads | {"b": jnp.float32(1)}),
        (ShapeError, grads | {"b": grads["b"][:4]}),
        (ShapeError, params),
        (DtypeError, {"w": jnp.ones((6, 3, 2), jnp.int32), "b": grads["b"]}),
        (TreeError, {"w": grads["w"]}),
    ):
        with pytest.raises(error, match=f"^{name}: `updates.*` must .*; got "):
            aggregator.update(bad, (), params)
    # A forgotten vmap: the first axis of the parameters looks like one of examples.
    with pytest.raises(ValueError, match=f"^{name}: `params` must be given; got None"):
        aggregating.process(optax.identity(), aggregator, optax.sgd(1.0)).update(grads, ((), (), ()))


def counts(name, argument, least, make):
    """Takes integers of any library, and no bool, float or smaller integer."""
    make(np.int64(least)), make(jnp.int32(least))
    wanted = f"^{name}: `{argument}` must be an integer of at least {least}"
    for bad in (least - 1, True, np.True_, 1.5, np.float32(2), "2"):
        with pytest.raises(ValueError, match=f"{wanted}.*; got {bad}"):
            make(bad)
