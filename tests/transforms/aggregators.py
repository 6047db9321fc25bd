"""What every aggregator of per-example gradients must do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

from kernels_pallas.checks import DtypeError, ShapeError, TreeError


def behaves(name, aggregator):
    """Composes with optax under jit, keeps dtypes, takes any axis, knows bad input."""
    key = jax.random.key(3)
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}
    grads = {k: jax.random.normal(key, (6, *p.shape)).astype(p.dtype) for k, p in params.items()}
    tx = aggregating.process(optax.identity(), aggregator(axis=0), optax.sgd(1.0))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(lambda p: (p.shape, p.dtype), params)
    plain, _ = aggregator(axis=0).update(grads, ())
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -p, rtol=1e-6), updates, plain)
    last = aggregator(axis=-1).update(jax.tree.map(lambda g: jnp.moveaxis(g, 0, -1), grads), ())[0]
    jax.tree.map(np.testing.assert_array_equal, last, plain)
    alike = jax.tree.map(lambda p: jnp.broadcast_to(p + 0.5, (6, *p.shape)), params)
    got, _ = aggregator(axis=0).update(alike, ())
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, jnp.full_like(g, 0.5)), got)
    poisoned = grads | {"w": grads["w"].at[2, 0, 0].set(jnp.nan)}
    assert not bool(jnp.isfinite(aggregator(axis=0).update(poisoned, ())[0]["w"][0, 0]))
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
