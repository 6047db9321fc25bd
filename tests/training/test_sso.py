"""SSO: gradient descent at one inner step, projection at many, majorisation, line searches, early exit, counters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.training import sso, sso_surrogate
from kernels_pallas.checks import DtypeError, ShapeError, TreeError
from tests.tolerances import tolerance

ARMIJO = optax.chain(
    optax.scale(-10.0), optax.scale_by_backtracking_linesearch(60, slope_rtol=0.5, decrease_factor=0.9)
)


def logistic(seed=0, n=200, d=50):
    """Features of many scales, labels ±1, and the mean loss of n outputs."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)) * np.logspace(0, -1.5, d)
    labels = np.sign(features @ rng.normal(size=d))
    return jnp.asarray(features), jnp.asarray(labels), lambda z: jnp.mean(jnp.logaddexp(0, -labels * z))


def follow(optimiser, params, model_fn, loss, steps):
    """Parameters after some outer steps under one scan, the state, and infos with a leading axis."""
    init, step = optimiser

    def one(carry, _):
        params, state, info = step(*carry, model_fn, jax.value_and_grad(loss))
        return (params, state), info

    (params, state), infos = jax.jit(lambda p: jax.lax.scan(one, (p, init(p)), None, length=steps))(params)
    return params, state, infos


def network(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


def test_one_inner_step_is_gradient_descent_to_the_last_bit(key):
    keys = jax.random.split(key, 3)
    params = {"w": jax.random.normal(keys[0], (3, 5)), "v": jax.random.normal(keys[1], (5,))}
    inputs = jax.random.normal(keys[2], (20, 3))
    loss = lambda z: jnp.mean((z - 1) ** 2)  # noqa: E731
    got, state, _ = follow(sso(optax.sgd(0.1), 1, 7.0), params, lambda p: network(p, inputs), loss, 5)

    @jax.jit
    def descend(params):
        slope = jax.grad(lambda p: loss(network(p, inputs)))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)

    for _ in range(5):
        params = descend(params)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    assert (int(state.count), int(state.inner_steps)) == (5, 5)


def test_many_inner_steps_of_a_linear_model_are_a_projected_step(x64):
    features, _, loss = logistic(n=30, d=6)
    start = jnp.linspace(-1, 1, 6)
    z = features @ start
    wanted = start - 40.0 * np.linalg.pinv(features) @ jax.grad(loss)(z)
    got, _, infos = follow(sso(optax.lbfgs(), 100, 40.0, tolerance=1e-13), start, lambda p: features @ p, loss, 1)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-8)
    assert int(infos.inner_steps[0]) < 100
    assert float(infos.grad_norm[0]) <= 1e-13


def test_the_surrogate_is_above_the_loss(x64):
    features, _, loss = logistic()
    rng = np.random.default_rng(1)
    start = rng.normal(size=50)
    z = features @ start
    value, dz = jax.value_and_grad(loss)(z)
    points = start + rng.normal(size=(1000, 50)) * rng.uniform(0.01, 5, size=(1000, 1))
    outputs = jnp.asarray(points) @ features.T
    above = value + jax.vmap(lambda o: sso_surrogate(o, z, dz, 800.0))(outputs)
    assert (jax.vmap(loss)(outputs) <= above + tolerance("float64", 200, condition=float(above.max()))).all()
    outputs, slope = outputs[0], jax.grad(sso_surrogate, argnums=(0, 1, 2))(outputs[0], z, dz, 800.0)
    np.testing.assert_allclose(slope[0], dz + (outputs - z) / 800, rtol=1e-12)
    assert not slope[1].any()
    assert not slope[2].any()


def test_noisy_batches_follow_a_loop_in_numpy(x64):
    features, labels, _ = logistic(n=40, d=7)
    batches = np.random.default_rng(2).integers(40, size=(6, 8))
    init, step = sso(optax.sgd(0.3), 4, lambda t: 20.0 / jnp.sqrt(t + 1.0))
    got = jnp.zeros(7)
    state = init(got)

    @jax.jit
    def outer(params, state, x, y):
        mean = lambda z: jnp.mean(jnp.logaddexp(0, -y * z))  # noqa: E731
        return step(params, state, lambda p: x @ p, jax.value_and_grad(mean))

    want = np.zeros(7)
    for t, batch in enumerate(batches):
        got, state, info = outer(got, state, features[batch], labels[batch])
        x, y = np.asarray(features)[batch], np.asarray(labels)[batch]
        z = x @ want
        d = -y / (1 + np.exp(y * z)) / 8
        for _ in range(4):
            want = want - 0.3 * x.T @ (d + (x @ want - z) / (20 / np.sqrt(t + 1)))
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance("float64", 40 * 24))
        value = d @ (x @ want - z) + np.sum((x @ want - z) ** 2) * np.sqrt(t + 1) / 40
        np.testing.assert_allclose(info.surrogate, value, rtol=1e-10)


@pytest.mark.parametrize("inner", [ARMIJO, optax.lbfgs(), optax.adam(0.01)], ids=["armijo", "lbfgs", "adam"])
def test_what_lowers_the_surrogate_lowers_the_loss(inner):
    features, labels, loss = logistic(n=60, d=4)
    rng = np.random.default_rng(3)
    start = {"w": jnp.asarray(rng.normal(size=(4, 6))), "v": jnp.asarray(rng.normal(size=6))}
    _, state, infos = follow(sso(inner, 5, 4.0 * 60), start, lambda p: network(p, features), loss, 10)
    losses = np.asarray(infos.loss)
    assert np.asarray(infos.decreased).all()
    assert (np.diff(losses) <= np.asarray(infos.surrogate)[:-1] + tolerance("float32", 60)).all()
    assert losses[-1] < 0.8 * losses[0]
    assert (int(state.count), int(state.inner_steps)) == (10, 50)


def test_the_expensive_call_may_be_on_the_host_and_is_made_once_a_step():
    calls = []

    def simulator(z):
        calls.append(z)
        return np.float32(np.sum(z**2) / 2), np.asarray(z, np.float32)

    def target_grad(z):
        return jax.pure_callback(
            simulator, (jax.ShapeDtypeStruct((), "float32"), jax.ShapeDtypeStruct((3,), z.dtype)), z
        )

    init, step = sso(optax.sgd(0.5), 8, 1.0)
    params = jnp.array([1.0, 2.0, -3.0])
    stepped = jax.jit(lambda p, s: step(p, s, lambda p: 1.0 * p, target_grad))
    state = init(params)
    for _ in range(3):
        params, state, _ = stepped(params, state)
    jax.block_until_ready(params)
    assert (len(calls), int(state.count), int(state.inner_steps)) == (3, 3, 24)


def test_an_early_exit_counts_its_steps_and_nan_is_no_exit():
    init, step = sso(optax.sgd(1.0), 50, 1.0, tolerance=1e-6)

    def outer(x, spoilt):
        target_grad_fn = lambda z: (jnp.sum(z**2) / 2, z + spoilt)  # noqa: E731
        return step(x, init(x), lambda p: p, target_grad_fn)

    starts = jnp.array([[1.0, -2.0], [0.0, 0.0], [1.0, -2.0]])
    spoilt = jnp.array([[0.0, 0.0], [0.0, 0.0], [jnp.nan, 0.0]])
    got, state, info = jax.jit(jax.vmap(outer))(starts, spoilt)
    assert info.inner_steps.tolist() == state.inner_steps.tolist() == [1, 0, 50]
    np.testing.assert_array_equal(got, [[0, 0], [0, 0], [np.nan, 0]])
    assert info.decreased.tolist() == [True, False, False]
    assert jnp.isnan(info.surrogate).tolist() == [False, False, True]


def test_trees_of_outputs_and_short_floats():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((), jnp.float32)}
    model = lambda p: {"first": p["a"] * 2, "second": p["b"]}  # noqa: E731
    loss = lambda z: jnp.sum(z["first"].astype("float32") ** 2) + z["second"] ** 2  # noqa: E731
    got, state, infos = follow(sso(optax.sgd(0.1), 3, 0.5), params, model, loss, 2)
    assert [leaf.dtype.name for leaf in jax.tree.leaves(got)] == ["bfloat16", "float32"]
    assert (infos.surrogate.dtype, state.count.dtype, state.inner_steps.dtype) == ("float32", "int32", "int32")
    assert infos.loss[1] < infos.loss[0]


def test_twenty_inner_steps_leave_half_the_loss_of_one(x64):
    features, _, loss = logistic()
    step = 4 * 200 / np.linalg.norm(features, 2) ** 2
    left = {}
    for m in (1, 20):
        params, _, _ = follow(sso(optax.sgd(step), m, 800.0), jnp.zeros(50), lambda p: features @ p, loss, 50)
        left[m] = float(loss(features @ params))
    assert left[20] <= 0.55 * left[1]


def test_bad_arguments_are_named():
    good = {"inner": optax.sgd(0.1), "num_inner": 2, "eta": 1.0}
    for wrong in (
        {"num_inner": 0},
        {"num_inner": 1.5},
        {"eta": 0.0},
        {"eta": np.float32(0)},
        {"tolerance": np.int64(-1)},
    ):
        with pytest.raises(ValueError, match=f"^sso: `{next(iter(wrong))}` must be "):
            sso(**good | wrong)
    with pytest.raises(TypeError, match="^sso: `inner` must be an optax gradient transformation; .* Call its factory"):
        sso(optax.sgd, 2, 1.0)
    init, step = sso(**good)
    x = jnp.ones(2)
    with pytest.raises(DtypeError, match=r"^sso: `params\['k'\]` must have a floating-point dtype"):
        init({"k": jnp.arange(3)})
    with pytest.raises(TypeError, match=r"^sso: `target_grad_fn\(...\)` must be a pair; got .* Return \(loss, grad"):
        step(x, init(x), lambda p: p, lambda z: jnp.sum(z))
    with pytest.raises(ShapeError, match=r"^sso: `target_grad_fn\(...\)\[1\]` must have shape \(2,\)"):
        step(x, init(x), lambda p: p, lambda z: (0.0, jnp.ones(1)))
    with pytest.raises(TreeError, match=r"^sso: `target_grad_fn"):
        step(x, init(x), lambda p: p, lambda z: (0.0, [z]))
    with pytest.raises(DtypeError, match=r"^sso: `model_fn\(...\)` must have"):
        step(x, init(x), lambda p: p > 0, lambda z: (0.0, z))
    with pytest.raises(ValueError, match="^sso_surrogate: `eta` must be greater than 0"):
        sso_surrogate(x, x, x, 0.0)
    with pytest.raises(ShapeError, match="^sso_surrogate: `dz` must have shape"):
        sso_surrogate(x, x, x[:1], 1.0)


def test_forward_derivatives_are_those_of_the_whole_step(x64):
    features, _, loss = logistic(n=20, d=3)
    init, step = sso(optax.sgd(0.1), 4, 10.0)

    @jax.jit
    def moved(t):
        params = jnp.full(3, t)
        return step(params, init(params), lambda w: features @ w, jax.value_and_grad(loss))[0]

    slope = jax.jvp(moved, (0.3,), (1.0,))[1]
    np.testing.assert_allclose(slope, (moved(0.3 + 1e-5) - moved(0.3 - 1e-5)) / 2e-5, rtol=1e-8)
