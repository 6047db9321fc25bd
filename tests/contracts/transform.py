"""What every gradient transformation must pass. Each check takes a member, so that a wrong twin can be fed to it."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kernels_pallas.checks import DtypeError, ShapeError, TreeError
from tests.tolerances import tolerance


@dataclass(frozen=True)
class TransformMember:
    """A factory and how to call it; `extra(loss, residuals)` gives the extra arguments of `update`."""

    name: str
    factory: Callable[..., Any]
    hyper: dict[str, float]
    other: dict[str, Any] = field(default_factory=dict)
    extra: Callable[[Callable, Callable], dict] = lambda loss, residuals: {}

    def make(self):
        return self.factory(**self.hyper, **self.other)


def residuals(p):
    """Residuals of a parabola, as one row of logits."""
    return jnp.concatenate([(p["w"] - 1).ravel(), p["b"] + 2])[None]


def loss(p):
    return 0.5 * jnp.sum(residuals(p) ** 2)


def rosenbrock_residuals(p):
    return jnp.sqrt(2.0).astype(p.dtype) * jnp.stack([1 - p[0], 10 * (p[1] - p[0] ** 2)])[None]


def rosenbrock(p):
    return 0.5 * jnp.sum(rosenbrock_residuals(p) ** 2)


def start(dtype="float32"):
    return {"w": jnp.full((2, 8), 0.5, dtype), "b": jnp.zeros(8, dtype)}


def stepper(member, tx, objective=loss, rows=residuals):
    extra = member.extra(objective, rows)

    def step(params, state):
        updates, state = tx.update(jax.grad(objective)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def run(member, tx, params, steps=5, **problem):
    step, state = jax.jit(stepper(member, tx, **problem)), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def equal(got, want, rtol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), got, want)


def types(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def parabola(member):
    params, _ = run(member, member.make(), start(), 200)
    assert loss(params) < 0.05 * loss(start())


def descends_rosenbrock(member):
    x = jnp.array([-1.0, 1.5])
    params, _ = run(member, member.make(), x, 300, objective=rosenbrock, rows=rosenbrock_residuals)
    assert rosenbrock(params) < 0.5 * rosenbrock(x)


def keeps_types(member):
    for dtype in ("bfloat16", "float32"):
        params, tx = start(dtype), member.make()
        updates, state = tx.update(params, tx.init(params), params, **member.extra(loss, residuals))
        assert types(updates) == types(params)
        assert types(state) == types(tx.init(params))


def keeps_sharding(member):
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = jax.device_put({"w": jnp.ones((8, 2)), "b": jnp.ones(8)}, sharding)
    tx = member.make()
    before = tx.init(params)
    moved, after = run(member, tx, params, 1)
    pairs = zip(jax.tree.leaves((params, before)), jax.tree.leaves((moved, after)), strict=True)
    # What is not made like a parameter, as a record of steps, is nobody's to shard.
    made_like = [(a, b) for a, b in pairs if isinstance(a.sharding, jax.sharding.NamedSharding)]
    assert len(made_like) >= len(params)
    assert all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in made_like)


def abstract_init(member):
    tx = member.make()
    assert types(jax.eval_shape(tx.init, start())) == types(tx.init(start()))


def ignores_extra_arguments(member):
    tx, p = member.make(), start()
    extra = member.extra(loss, residuals)
    equal(tx.update(p, tx.init(p), p, unknown=1, **extra)[0], tx.update(p, tx.init(p), p, **extra)[0])


def injected_hyperparameters(member):
    injected = optax.inject_hyperparams(member.factory)(**member.hyper, **member.other)
    equal(run(member, injected, start())[0], run(member, member.make(), start())[0], tolerance("float32", 25))


def accumulates(member):
    tx, p = optax.MultiSteps(member.make(), 2), start()
    state, extra = tx.init(p), member.extra(loss, residuals)
    first, state = tx.update(jax.tree.map(lambda x: 0.5 * x, p), state, p, **extra)
    got, _ = tx.update(jax.tree.map(lambda x: 1.5 * x, p), state, p, **extra)
    equal(first, jax.tree.map(jnp.zeros_like, p))
    plain = member.make()
    equal(got, plain.update(p, plain.init(p), p, **extra)[0], tolerance("float32", 4))


def traces_once(member):
    tx, traces = member.make(), []
    inner = stepper(member, tx)
    step = jax.jit(lambda p, s: (traces.append(1), inner(p, s))[1])
    p = start()
    state = tx.init(p)
    for _ in range(3):
        p, state = step(p, state)
    assert len(traces) == 1


def donates(member):
    tx, p = member.make(), jax.tree.map(jnp.copy, start())
    step = jax.jit(stepper(member, tx), donate_argnums=(0, 1))
    state = tx.init(p)
    for _ in range(3):
        p, state = step(p, state)
    equal(p, run(member, tx, start(), 3)[0], tolerance("float32", 3))


def chains(member):
    halved = optax.chain(optax.identity(), member.make(), optax.scale(0.5))
    p, tx, extra = start(), member.make(), member.extra(loss, residuals)
    want = tx.update(p, tx.init(p), p, **extra)[0]
    equal(halved.update(p, halved.init(p), p, **extra)[0], jax.tree.map(lambda x: 0.5 * x, want))


def refuses_mismatches(member):
    tx, p = member.make(), start()
    state, extra = tx.init(p), member.extra(loss, residuals)
    for error, bad in (
        (TreeError, {"w": p["w"]}),
        (ShapeError, p | {"b": jnp.ones(1)}),
        (DtypeError, p | {"b": p["b"].astype(jnp.float16)}),
    ):
        with pytest.raises(error, match=r"^\w+: `updates.*` must .*; got "):
            tx.update(bad, state, p, **extra)
    with pytest.raises(ValueError, match=r"^\w+: `params` must be given; got None"):
        tx.update(p, state, **extra)
    with pytest.raises(DtypeError, match=r"^\w+: `params.*` must have a floating-point"):
        tx.init({"n": jnp.arange(3)})


def shows_nan(member):
    tx, p = member.make(), start()
    bad = p | {"b": p["b"].at[0].set(jnp.nan)}
    updates, _ = tx.update(bad, tx.init(p), p, **member.extra(loss, residuals))
    assert not bool(jnp.isfinite(updates["b"][0]))


def checkpoints(member):
    tx = member.make()
    p, state = run(member, tx, start(), 3)
    saved = pickle.dumps([np.asarray(x) for x in jax.tree.leaves(state)])
    restored = jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(x) for x in pickle.loads(saved)])
    fresh = member.make()
    equal(jax.jit(stepper(member, fresh))(p, restored), jax.jit(stepper(member, tx))(p, state))


def vmap_and_scan(member):
    tx = member.make()
    step = stepper(member, tx)

    def train(p):
        return jax.lax.scan(lambda c, _: (step(*c), None), (p, tx.init(p)), length=4)[0][0]

    starts = jax.tree.map(lambda x: jnp.stack([x, x + 0.3]), start())
    batched = jax.vmap(train)(starts)
    for lane in range(2):
        single = run(member, tx, jax.tree.map(lambda x, i=lane: x[i], starts), 4)[0]
        equal(jax.tree.map(lambda x, i=lane: x[i], batched), single, tolerance("float32", 16))


def precisions_agree(member):
    single = run(member, member.make(), start())[0]
    with jax.enable_x64(True):
        double = run(member, member.make(), start("float64"))[0]
        assert double["w"].dtype == jnp.float64
    equal(single, double, tolerance("float32", 25))


CHECKS = (
    parabola,
    descends_rosenbrock,
    keeps_types,
    keeps_sharding,
    abstract_init,
    ignores_extra_arguments,
    injected_hyperparameters,
    accumulates,
    traces_once,
    donates,
    chains,
    refuses_mismatches,
    shows_nan,
    checkpoints,
    vmap_and_scan,
    precisions_agree,
)
