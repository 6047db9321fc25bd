"""What every gradient transformation must pass. Each check takes a member, so that a wrong twin can be fed to it.

optax 0.2.8 holds its own optimisers to 18 bodies of tests: 7 in `_src/alias_test.py`, 7 in `contrib/_common_test.py`,
4 in `_src/sharding_test.py`. `OPTAX_BODIES` says what became of each: 17 are checks here, which every member passes as
one row, 289 rows in all, and 1 does not apply. Where a row passes otherwise than optax's own, `OPTAX_EXCEPTIONS` says
so. Targets, starts and tolerances are optax's, and 10,000 steps, where contrib takes 30,000; its four targets are
trained side by side, which is harder for methods that take the norm of the whole tree. Members that take no complex
parameters must refuse them in a sentence, where optax leaves such rows out.
"""

import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
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
    """A factory and how to call it; `extra(loss, residuals)` gives the extra arguments of `update`.

    `optax_hyper` replaces some of `hyper` where optax's targets must be reached to 3 %. Without `array_rates` the last
    step is optax's own, which widens updates.
    """

    name: str
    factory: Callable[..., Any]
    hyper: dict[str, float]
    other: dict[str, Any] = field(default_factory=dict)
    extra: Callable[[Callable, Callable], dict] = lambda loss, residuals: {}
    optax_hyper: dict[str, Any] = field(default_factory=dict)
    array_rates: bool = True

    def make(self, **hyper):
        return self.factory(**(self.hyper | hyper), **self.other)


def residuals(p):
    """Residuals of a parabola, as one row of logits."""
    return jnp.concatenate([(p["w"] - 1).ravel(), p["b"] + 2])[None]


def loss(p):
    return 0.5 * jnp.sum(residuals(p) ** 2)


def rosenbrock_residuals(p):
    return jnp.sqrt(2.0).astype(p.dtype) * jnp.stack([1 - p[0], 10 * (p[1] - p[0] ** 2)])[None]


def rosenbrock(p):
    return 0.5 * jnp.sum(rosenbrock_residuals(p) ** 2)


def optax_targets(dtype):
    """Start, goal and residuals of optax's parabola, Rosenbrock, matrix parabola and mixed target, in one tree."""
    unit = 1 + 1j if jnp.issubdtype(dtype, jnp.complexfloating) else 1
    goal = {
        "parabola": jnp.array([1, -1, 1]) * unit,
        "rosenbrock": jnp.array([unit, unit**2]),
        "matrix": jnp.array([[3, -2], [1, 4]]),
        "mixed": (jnp.array([1, -1, 2]), jnp.array([[1, 0], [-1, 1]])),
    }
    goal = jax.tree.map(lambda x: x.astype(dtype), goal)
    begin = jax.tree.map(jnp.zeros_like, goal) | {"parabola": jnp.array([-1, 10, 1], dtype)}

    def rows(p):
        x, y = p["rosenbrock"]
        off = jax.tree.map(jnp.subtract, p, goal) | {"rosenbrock": jnp.stack([unit - x, 10 * (y - x**2)])}
        return 2**0.5 * jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(off)])[None]

    return begin, goal, rows


def start(dtype="float32"):
    return {"w": jnp.full((2, 8), 0.5, dtype), "b": jnp.zeros(8, dtype)}


def stepper(member, tx, objective=loss, rows=residuals):
    extra = member.extra(objective, rows)

    def step(params, state):
        gradient = jax.tree.map(jnp.conj, jax.grad(objective)(params))  # downhill where it is complex
        updates, state = tx.update(gradient, state, params, **extra)
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


def reaches_optax_targets(member, dtype="float32"):
    begin, goal, rows = optax_targets(dtype)
    tx = member.make(**member.optax_hyper)
    step = stepper(member, tx, lambda p: 0.5 * jnp.sum(jnp.real(rows(p) * jnp.conj(rows(p)))), rows)

    def train(p):
        state = optax.tree.map_params(tx, lambda x: x, tx.init(p))
        return jax.lax.scan(lambda c, _: (step(*c), None), (p, state), length=10_000)[0][0]

    equal(jax.jit(train)(begin), goal, 3e-2)


def complex_or_refused(member):
    try:
        member.make().init(start("complex64"))
    except DtypeError as error:
        assert "must have a floating-point dtype; got complex64" in str(error)  # noqa: PT017  # or no error at all
    else:
        reaches_optax_targets(member, "complex64")


def steps_under_cond(member):
    """A step that may be taken or not: states before and after must agree in types."""
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            tx, p = member.make(), start(dtype)
            carry = (p, tx.init(p))
            step = partial(jax.lax.cond, True, stepper(member, tx), lambda *same: same)
            assert types(jax.eval_shape(step, *carry)) == types(carry)


def keeps_types(member):
    """With rates that are numbers and, where factories take them, float32 arrays."""
    rates = {name: jnp.float32(value) for name, value in member.hyper.items() if name in ("learning_rate", "peak")}
    for dtype in ("bfloat16", "float32"):
        for hyper in ({}, rates if member.array_rates else {}):
            params, tx = start(dtype), member.make(**hyper)
            updates, state = tx.update(params, tx.init(params), params, **member.extra(loss, residuals))
            assert types(updates) == types(params)
            assert types(state) == types(tx.init(params))


def takes_the_dtype_of_momentum(member):
    """Where it has the option."""
    if "mu_dtype" in inspect.signature(member.factory).parameters:
        for dtype in ("bfloat16", "float32"):
            for wanted in (None, "bfloat16", "float32"):
                state = jax.eval_shape(member.make(mu_dtype=wanted).init, start(dtype))
                assert all(leaf.dtype == (wanted or dtype) for leaf in jax.tree.leaves(optax.tree.get(state, "mu")))


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


def keeps_sharding_types(member):
    """On a mesh whose axes are part of the types; traced, as all that is asked is a type."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        shapes = {"w": ((2, 8), jax.P(None, "x")), "b": ((8,), jax.P("x"))}
        params = {k: jnp.zeros(s, "float16", out_sharding=jax.NamedSharding(mesh, p)) for k, (s, p) in shapes.items()}
        extra = member.extra(lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["b"] ** 2), lambda p: p["w"].sum(1)[None])
        tx = member.make()
        state = tx.init(params)
        after = jax.make_jaxpr(lambda p, s: tx.update(p, s, p, **extra))(params, state).out_avals
        assert [str(x) for x in after] == [str(jax.typeof(x)) for x in jax.tree.leaves((params, state))]


def takes_schedules(member):
    """Where the factory says so, as optax asks."""
    rate = inspect.signature(member.factory).parameters.get("learning_rate")
    if rate is not None and rate.annotation in ("optax.ScalarOrSchedule", optax.ScalarOrSchedule):
        number = member.hyper["learning_rate"]
        both = [member.make(learning_rate=rate) for rate in (number, lambda count: number)]
        plain, scheduled = jax.jit(lambda p: [stepper(member, tx)(p, tx.init(p))[0] for tx in both])(start())
        equal(scheduled, plain, tolerance("float32", 4))


def abstract_init(member):
    tx = member.make()
    shapes = jax.eval_shape(start)
    inits = [partial(jax.eval_shape, tx.init)]
    if (member.name, "sharding_test.test_init_with_abstract_input") not in OPTAX_EXCEPTIONS:
        inits.append(tx.init)
    assert all(types(init(shapes)) == types(tx.init(start())) for init in inits)


def ignores_extra_arguments(member):
    tx, p = member.make(), start()
    extra = member.extra(loss, residuals)
    equal(tx.update(p, tx.init(p), p, unknown=1, **extra)[0], tx.update(p, tx.init(p), p, **extra)[0])


def injected_hyperparameters(member):
    injected = optax.inject_hyperparams(member.factory)(**member.hyper, **member.other)
    got, state = run(member, injected, start())
    want, plain = map(optax.tree.unwrap_random_key_data, run(member, member.make(), start()))
    equal(got, want, tolerance("float32", 25))
    equal(optax.tree.unwrap_random_key_data(state.inner_state), plain, tolerance("float32", 25))


def accumulates(member):
    tx, p = optax.MultiSteps(member.make(), 2), start()
    state, extra = tx.init(p), member.extra(loss, residuals)
    first, state = tx.update(jax.tree.map(lambda x: 0.5 * x, p), state, p, **extra)
    got, _ = tx.update(jax.tree.map(lambda x: 1.5 * x, p), state, p, **extra)
    equal(first, jax.tree.map(jnp.zeros_like, p))
    plain = member.make()
    equal(got, plain.update(p, plain.init(p), p, **extra)[0], tolerance("float32", 4))
    short = start("bfloat16")
    assert types(jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, **extra)[0], short)) == types(short)


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
    reaches_optax_targets,
    complex_or_refused,
    keeps_types,
    takes_the_dtype_of_momentum,
    steps_under_cond,
    keeps_sharding,
    keeps_sharding_types,
    takes_schedules,
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

# Every body of optax's tables: the checks that are its rows here, or why it has none.
OPTAX_BODIES = {
    "alias_test.test_optimization": (reaches_optax_targets, complex_or_refused, traces_once),
    "alias_test.test_optimizers_accept_extra_args": (ignores_extra_arguments,),
    "alias_test.test_optimizers_can_be_wrapped_in_inject_hyperparams": (injected_hyperparameters,),
    "alias_test.test_explicit_dtype": (takes_the_dtype_of_momentum,),
    "alias_test.test_preserve_dtype": (keeps_types,),
    "alias_test.test_state_shape_dtype_shard_stability": (steps_under_cond, complex_or_refused),
    "alias_test.test_gradient_accumulation": (accumulates,),
    "_common_test.test_optimizers_accept_extra_args": (ignores_extra_arguments, traces_once),
    "_common_test.test_optimizers": (reaches_optax_targets,),
    "_common_test.test_optimizers_can_be_wrapped_in_inject_hyperparams": (injected_hyperparameters,),
    "_common_test.test_preserve_dtype": (keeps_types,),
    "_common_test.test_gradient_accumulation": (accumulates,),
    "_common_test.test_state_shape_dtype_shard_stability": (steps_under_cond,),
    "_common_test.test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": (takes_schedules,),
    "sharding_test.test_init_with_abstract_input": (abstract_init,),
    "sharding_test.test_state_sharding_type_init_match_update": (keeps_sharding_types,),
    "sharding_test.test_state_sharding_type_preserved_with_jit": (keeps_sharding_types, keeps_sharding),
    "sharding_test.test_microbatch_with_explicit_sharding": "of a loss in pieces: no optimiser takes part",
}

_HOLDS = "its state holds the parameters, which must have values: jax.eval_shape(init, shapes) alone"
OPTAX_EXCEPTIONS = {
    ("n_igt", "sharding_test.test_init_with_abstract_input"): _HOLDS,
    ("harp", "sharding_test.test_init_with_abstract_input"): _HOLDS,
}
