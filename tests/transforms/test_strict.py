"""strict: every mismatch that optax lets through becomes one sentence, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.transforms import strict
from kernels_pallas.checks import DtypeError, ShapeError, TreeError

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}


def test_results_and_state_are_those_of_the_inner_transformation():
    plain, safe = optax.adam(0.1), strict(optax.adam(0.1))
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    state = safe.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(PARAMS))
    got, _ = jax.jit(safe.update)(grads, state, PARAMS)
    want, _ = jax.jit(plain.update)(grads, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# optax's own optimisers that a learning rate makes ready, and what some need of `update` besides.
OPTAX = (
    *(
        "adabelief",
        "adadelta",
        "adafactor",
        "adagrad",
        "adam",
        "adamax",
        "adamaxw",
        "adamw",
        "adan",
        "amsgrad",
        "fromage",
    ),
    *("lamb", "lars", "lbfgs", "lion", "nadam", "nadamw", "novograd", "optimistic_adam_v2", "polyak_sgd", "radam"),
    *("rmsprop", "rprop", "sgd", "sign_sgd", "signum", "sm3", "yogi"),
)
MORE = {
    "polyak_sgd": {"value": 1.0},
    "lbfgs": {"value": 1.0, "grad": PARAMS, "value_fn": lambda p: 0.5 * optax.tree.norm(p) ** 2},
}


@pytest.mark.parametrize("name", OPTAX)
def test_around_optax_own_the_program_is_the_same_and_broadcasting_is_refused(name):
    """The same operations on the same constants: the same updates and state to the last bit, and no work added."""
    plain = optax.with_extra_args_support(getattr(optax, name)(0.1))
    safe = strict(plain, name=name)
    state, extra = plain.init(PARAMS), MORE.get(name, {})

    def programs(tx):
        update = jax.make_jaxpr(lambda g, s, p: tx.update(g, s, p, **extra))(PARAMS, state, PARAMS)
        return [
            (str(closed), list(map(np.asarray, closed.consts))) for closed in (jax.make_jaxpr(tx.init)(PARAMS), update)
        ]

    for (got, ours), (want, theirs) in zip(programs(safe), programs(plain), strict=True):
        assert got == want
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert jax.tree.structure(safe.init(PARAMS)) == jax.tree.structure(state)
    with pytest.raises(ShapeError, match=rf"^{name}: `updates\['b'\]` must have shape \(3,\) to match .*; got \(1,\)"):
        jax.eval_shape(lambda g, s, p: safe.update(g, s, p, **extra), PARAMS | {"b": jnp.ones(1)}, state, PARAMS)


def test_optax_alone_broadcasts_and_strict_does_not():
    params = jnp.zeros(3)
    plain, safe = optax.adam(0.1), strict(optax.adam(0.1), name="adam")
    assert plain.update(jnp.ones(1), plain.init(params), params)[0].shape == (3,)
    for update in (safe.update, jax.jit(safe.update)):
        with pytest.raises(ShapeError, match=r"^adam: `updates` must have shape \(3,\) to match `params`; got \(1,\)"):
            update(jnp.ones(1), safe.init(params), params)


def test_every_mismatch_has_its_sentence():
    safe = strict(optax.sgd(0.1))
    state = safe.init(PARAMS)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    with pytest.raises(TreeError, match="strict: `updates` must have the tree structure of `params`"):
        safe.update({"w": grads["w"]}, state, PARAMS)
    with pytest.raises(ShapeError, match=r"strict: `updates\['b'\]` must have shape \(3,\)"):
        safe.update(grads | {"b": jnp.ones(1)}, state, PARAMS)
    with pytest.raises(DtypeError, match=r"strict: `updates\['b'\]` must have dtype float32 to match `params`; got bf"):
        safe.update(grads | {"b": jnp.ones(3, jnp.bfloat16)}, state, PARAMS)
    with pytest.raises(
        DtypeError, match=r"strict: `params\['n'\]` must have a floating-point or complex dtype; got int"
    ):
        safe.init({"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="strict: `params` must be given; got None. Call update"):
        safe.update(grads, state)
    with pytest.raises(TypeError, match="strict: `inner` must be an optax gradient transformation; got function"):
        strict(optax.adam)


def test_in_a_chain_under_abstract_init_and_with_extra_arguments():
    chained = optax.chain(optax.clip(1.0), strict(optax.polyak_sgd(1.0)))
    state = jax.eval_shape(chained.init, PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(chained.init(PARAMS))
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = chained.update(grads, chained.init(PARAMS), PARAMS, value=1.0, unknown=2)
    assert bool((updates["b"] < 0).all())
    with pytest.raises(ShapeError):
        chained.update(grads | {"b": jnp.ones(1)}, chained.init(PARAMS), PARAMS, value=1.0)
