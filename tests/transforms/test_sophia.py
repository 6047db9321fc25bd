"""Sophia: the paper's step, optax's variant, the paper's toy problem, and what must not happen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxnum.curvature import gauss_newton_bartlett, hutchinson
from jaxnum.transforms import scale_by_sophia, sophia
from kernels_pallas.checks import DtypeError
from tests.tolerances import tolerance


def fixed_curvature(values):
    """An estimator that returns the given tree."""
    return optax.GradientTransformation(lambda _: optax.EmptyState(), lambda u, s, p=None: (values, s))


def exact_curvature(loss):
    def update(updates, state, params=None):
        return jnp.diag(jax.hessian(loss)(params)), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def run(optimiser, loss, x, steps, **extra):
    @jax.jit
    def step(x, state):
        updates, state = optimiser.update(jax.grad(loss)(x), state, x, **extra)
        return optax.apply_updates(x, updates), state

    state = optimiser.init(x)
    for _ in range(steps):
        x, state = step(x, state)
    return x, state


def quartic(x):
    return jnp.sum(jnp.arange(1.0, 5.0, dtype=x.dtype) * x**4) + x[0] * x[1]


def toy(x):
    return 8 * (x[0] - 1) ** 2 * (1.3 * x[0] ** 2 + 2 * x[0] + 1) + 0.5 * (x[1] - 4) ** 2


def test_two_steps_by_hand(x64):
    x, g, h = jnp.array([1.0, -2.0]), jnp.array([0.5, -4.0]), jnp.array([10.0, 2.0])
    tx = sophia(0.1, fixed_curvature(h), b1=0.9, b2=0.5, gamma=0.05, weight_decay=0.2, update_interval=2)
    state = tx.init(x)
    first, state = tx.update(g, state, x)
    m, n = 0.1 * g, 0.5 * h
    np.testing.assert_allclose(first, -0.1 * (jnp.clip(m / (0.05 * n), -1, 1) + 0.2 * x), rtol=tolerance("float64", 9))
    second, state = tx.update(g, state, x)  # no refresh at the second step of two
    m = 0.9 * m + 0.1 * g
    np.testing.assert_allclose(second, -0.1 * (jnp.clip(m / (0.05 * n), -1, 1) + 0.2 * x), rtol=tolerance("float64", 9))
    assert float(state[0].win_rate) == 0.5


def test_parity_with_optax(key, x64):
    options = dict(b1=0.9, b2=0.95, gamma=0.3, eps=1e-8, weight_decay=0.1, update_interval=3)
    ours = sophia(0.05, hutchinson(key), order="after", bias_correct_mu=True, **options)
    peer = optax.contrib.sophia(0.05, hessian_diagonal_fn=hutchinson(key), **options)
    x = jnp.array([1.0, -0.5, 0.3, 2.0])
    got, _ = run(ours, quartic, x, 30, obj_fn=quartic)
    want, _ = run(peer, quartic, x, 30, obj_fn=quartic)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    paper, _ = run(sophia(0.05, hutchinson(key), **options), quartic, x, 30, obj_fn=quartic)
    assert float(jnp.abs(paper - got).max()) > 1e-3


def test_papers_toy_problem(x64):
    x = jnp.array([0.2, 0.0])
    tx = sophia(0.5, exact_curvature(toy), b1=0.0, b2=0.0, gamma=1.0, weight_decay=0.0, update_interval=1)
    assert toy(run(tx, toy, x, 20)[0]) < 1e-8
    assert toy(run(optax.sgd(0.03), toy, x, 50)[0]) > 0.1
    assert min(float(toy(run(optax.adam(rate), toy, x, 50)[0])) for rate in (0.01, 0.03, 0.1, 0.3)) > 1e-3


def test_negative_curvature_gives_the_sign_step(float_dtype):
    x = jnp.zeros(3, float_dtype)
    tx = scale_by_sophia(fixed_curvature(jnp.array([-5.0, 0.0, -1e-9], float_dtype)), clip=0.5)
    steps, _ = tx.update(jnp.array([0.3, -2.0, 7.0], float_dtype), tx.init(x), x)
    np.testing.assert_array_equal(steps, [0.5, -0.5, 0.5])


def test_bfloat16_parameters_keep_float32_moments(key):
    x = jnp.ones(4, jnp.bfloat16)
    tx = sophia(0.1, hutchinson(key))
    updates, state = tx.update(x, tx.init(x), x, obj_fn=lambda p: jnp.sum(p**2))
    assert updates.dtype == jnp.bfloat16
    assert state[0].mu.dtype == state[0].nu.dtype == jnp.float32


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_nothing_non_finite_becomes_a_plausible_step(bad):
    x, g = jnp.zeros(2), jnp.ones(2)
    for curvature, gradient in ((g, g.at[0].set(bad)), (g.at[0].set(bad), g)):
        tx = scale_by_sophia(fixed_curvature(curvature))
        steps, _ = tx.update(gradient, tx.init(x), x)
        assert bool(jnp.isnan(steps[0]))
        assert bool(jnp.isfinite(steps[1]))


def test_masked_and_multi_transform(key):
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}

    def loss(p):
        return jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)

    def filled(p):  # the estimator sees the masked tree; the objective fills in what it lacks
        return loss({k: params[k] if isinstance(p[k], optax.MaskedNode) else p[k] for k in params})

    tx = sophia(0.1, hutchinson(key), weight_decay=0.0)
    parts = optax.multi_transform({"s": tx, "g": optax.sgd(0.1)}, {"a": "s", "b": "g"})
    for wrapped in (optax.masked(tx, {"a": True, "b": False}), parts):
        updates, _ = wrapped.update(jax.grad(loss)(params), wrapped.init(params), params, obj_fn=filled)
        assert bool((updates["a"] < 0).all())


def test_vmapped_training_equals_separate_runs(key):
    starts = jnp.array([[1.0, -0.5, 0.3, 2.0], [0.1, 0.2, 0.3, 0.4]])
    tx = sophia(0.05, hutchinson(key), update_interval=2)

    def train(x):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(quartic)(x), state, x, obj_fn=quartic)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=5)[0][0]

    want = jnp.stack([train(x) for x in starts])
    np.testing.assert_allclose(jax.vmap(train)(starts), want, rtol=tolerance("float32", 50))


def test_bad_arguments(key):
    x = jnp.ones(2)
    with pytest.raises(ValueError, match=r"sophia: `b1` must be in \[0, 1\); got 1.0"):
        sophia(0.1, hutchinson(key), b1=1.0)
    with pytest.raises(ValueError, match="sophia: `learning_rate` must be at least 0; got -0.1"):
        sophia(-0.1, hutchinson(key))
    with pytest.raises(ValueError, match="scale_by_sophia: `clip` must be greater than 0; got 0"):
        scale_by_sophia(hutchinson(key), clip=0)
    with pytest.raises(ValueError, match="sophia: `update_interval` must be at least 1; got 0"):
        sophia(0.1, hutchinson(key), update_interval=0)
    with pytest.raises(ValueError, match="sophia: `order` must be one of 'before', 'after'; got 'now'"):
        sophia(0.1, hutchinson(key), order="now")
    with pytest.raises(TypeError, match="sophia: `hessian_fn` must be an optax gradient transformation; got function"):
        sophia(0.1, hutchinson)
    with pytest.raises(DtypeError, match="sophia: `params` must have a floating-point dtype; got complex64"):
        sophia(0.1, hutchinson(key)).init(x + 1j)
    for estimator, missing in ((hutchinson(key), "obj_fn"), (gauss_newton_bartlett(key), "logits_fn")):
        tx = sophia(0.1, estimator)
        with pytest.raises(ValueError, match=f"`{missing}` must be given"):
            tx.update(x, tx.init(x), x)


@pytest.mark.parametrize("estimator", [gauss_newton_bartlett, hutchinson])
def test_eight_devices_equal_one(key, estimator):
    keys = jax.random.split(key, 3)
    batch = jax.random.normal(keys[0], (64, 6)), jax.random.randint(keys[1], (64,), 0, 8)
    params = {"w": jax.random.normal(keys[2], (6, 8)), "b": jnp.zeros(8)}
    tx = sophia(0.1, estimator(key), update_interval=2)

    def step(params, state, x, labels):
        def logits(p):
            return jnp.tanh(x @ p["w"]) + p["b"]

        def loss(p):
            return optax.softmax_cross_entropy_with_integer_labels(logits(p), labels).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss, logits_fn=logits)
        return optax.apply_updates(params, updates), state

    def train(params, batch):
        compiled, state = jax.jit(step), tx.init(params)
        for _ in range(4):
            params, state = compiled(params, state, *batch)
        return params, state[0].mu, state[0].nu

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    split, last = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("d",), (None, "d")))
    want = train(params, batch)
    got = train({"w": jax.device_put(params["w"], last), "b": params["b"]}, jax.device_put(batch, split))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), got, want)
    assert all(tree["w"].sharding.is_equivalent_to(last, 2) for tree in got)
