"""Hutchinson's diagonal: exact where it must be, unbiased elsewhere, in either mode of differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matfree import stochtrace

from jaxnum.curvature import hutchinson
from kernels_pallas import attention
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance


def diagonal_quadratic(params):
    return sum(jnp.sum((i + 1.5) * p**2) for i, p in enumerate(jax.tree.leaves(params)))


def coupled(x):
    """A function of three variables with a full Hessian."""
    return jnp.sum(jnp.sin(x)) + x[0] * x[1] ** 2 + jnp.exp(x[1] * x[2])


def estimates(key, count, x, obj_fn, **options):
    """`count` independent estimates, stacked."""

    def one(k):
        estimator = hutchinson(k, **options)
        return estimator.update(x, estimator.init(x), x, obj_fn=obj_fn)[0]

    return jax.jit(jax.vmap(one))(jax.random.split(key, count))


def backward_refuses_forward_mode():
    """sum(x^4 / 12) with custom_vjps all the way down, as an attention kernel has them; Hessian diag(x^2)."""

    @jax.custom_vjp
    def value(x):
        return jnp.sum(x**4) / 12

    @jax.custom_vjp
    def backward(x):
        return x**3 / 3

    value.defvjp(lambda x: (value(x), x), lambda x, cotangent: (cotangent * backward(x),))
    backward.defvjp(lambda x: (backward(x), x), lambda x, cotangent: (cotangent * x**2,))
    return value


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_one_sign_probe_is_exact_on_a_diagonal_quadratic(key, float_dtype, mode):
    params = {"w": jnp.ones((2, 3), float_dtype), "b": jnp.zeros(4, float_dtype)}
    estimator = hutchinson(key, mode=mode)
    got, state = estimator.update(params, estimator.init(params), params, obj_fn=diagonal_quadratic)
    np.testing.assert_array_equal(got["b"], jnp.full(4, 3.0))
    np.testing.assert_array_equal(got["w"], jnp.full((2, 3), 5.0))
    assert got["w"].dtype == jnp.dtype(float_dtype)
    assert state.count == 1


@pytest.mark.parametrize("probe", ["rademacher", "normal"])
def test_mean_is_the_diagonal_and_variance_is_the_stated_one(key, x64, probe):
    x = jnp.array([0.3, 0.4, -0.2])
    hessian = jax.hessian(coupled)(x)
    got = estimates(key, 40_000, x, coupled, probe=probe)
    off = jnp.sum(hessian**2, axis=1) - jnp.diag(hessian) ** 2
    variance = off + (2 * jnp.diag(hessian) ** 2 if probe == "normal" else 0)
    error = jnp.abs(got.mean(0) - jnp.diag(hessian))
    assert bool((error < 5 * jnp.sqrt(variance / 40_000)).all())
    np.testing.assert_allclose(got.var(0), variance, rtol=0.1)


def test_probes_average(key, x64):
    x = jnp.array([0.3, 0.4, -0.2])
    single = estimates(key, 4_000, x, coupled)
    averaged = estimates(key, 4_000, x, coupled, num_probes=4)
    np.testing.assert_allclose(averaged.var(0), single.var(0) / 4, rtol=0.15)


def test_agrees_with_matfree(key, x64):
    x = jnp.array([0.3, 0.4, -0.2])
    ours = estimates(key, 20_000, x, coupled).mean(0)
    sampler = stochtrace.sampler_signs(x, num=20_000)
    peer = stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_diagonal(), sampler)

    def product(v):
        return jax.jvp(jax.grad(coupled), (x,), (v,))[1]

    hessian = jax.hessian(coupled)(x)
    spread = jnp.sqrt((jnp.sum(hessian**2, axis=1) - jnp.diag(hessian) ** 2) / 10_000)
    assert bool((jnp.abs(ours - peer(product, key)) < 5 * spread).all())


def test_auto_takes_reverse_mode_where_a_custom_vjp_refuses_forward_mode(key, float_dtype):
    loss = backward_refuses_forward_mode()
    x = jnp.array([1.0, -2.0, 3.0], float_dtype)
    estimator = hutchinson(key, mode="forward")
    with pytest.raises(TypeError, match="custom_vjp"):
        estimator.update(x, estimator.init(x), x, obj_fn=loss)
    for mode in ("auto", "reverse"):
        estimator = hutchinson(key, mode=mode)
        for update in (estimator.update, lambda *a, e=estimator, **k: jax.jit(lambda: e.update(*a, **k))()):
            got, _ = update(x, estimator.init(x), x, obj_fn=loss)
            np.testing.assert_allclose(got, x**2, rtol=tolerance(float_dtype, 3))


def test_auto_takes_forward_mode_where_only_that_works(key):
    def loss(x):  # reverse over reverse cannot pass a while loop; its own gradient is given by hand
        return jnp.sum(powered(x))

    @jax.custom_vjp
    def powered(x):
        return x**4 / 12

    def cube(x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x), (0, jnp.ones_like(x)))[1]

    powered.defvjp(lambda x: (x**4 / 12, x), lambda x, cotangent: (cotangent * cube(x) / 3,))
    x = jnp.array([1.0, -2.0, 3.0])
    estimator = hutchinson(key)
    got, _ = estimator.update(x, estimator.init(x), x, obj_fn=loss)
    np.testing.assert_allclose(got, x**2, rtol=tolerance(x.dtype, 3))


def test_no_mode_left_is_an_error_that_names_both_refusals(key):
    @jax.custom_vjp
    def once(x):
        return jnp.sum(x**2)

    def backward(x, cotangent):
        host = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (cotangent * jax.pure_callback(lambda y: 2 * np.asarray(y), host, x),)

    once.defvjp(lambda x: (once(x), x), backward)
    x = jnp.ones(3)
    estimator = hutchinson(key)
    with pytest.raises(NotImplementedError, match="hutchinson: `obj_fn` must be differentiable twice; got in forw"):
        estimator.update(x, estimator.init(x), x, obj_fn=once)


def test_an_error_of_the_objective_is_not_taken_for_a_refusal(key):
    def broken(x):
        raise TypeError("the batch is missing")

    x = jnp.ones(3)
    estimator = hutchinson(key)
    with pytest.raises(TypeError, match="the batch is missing"):
        estimator.update(x, estimator.init(x), x, obj_fn=broken)


def test_bfloat16_parameters_give_float32_estimates(key):
    x = jnp.ones(64, jnp.bfloat16)
    estimator = hutchinson(key, probe="normal", num_probes=3)
    got, _ = estimator.update(x, estimator.init(x), x, obj_fn=lambda p: 0.5 * jnp.sum(p**2))
    assert got.dtype == jnp.float32
    assert not bool((got == got.astype(jnp.bfloat16)).all())


def test_each_estimate_draws_new_probes_and_the_state_alone_decides_which(key):
    x = jnp.array([0.3, 0.4, -0.2])
    estimator = hutchinson(key, probe="normal")
    first, state = estimator.update(x, estimator.init(x), x, obj_fn=coupled)
    second, _ = estimator.update(x, state, x, obj_fn=coupled)
    again, _ = estimator.update(x, state, x, obj_fn=coupled)
    assert not bool((first == second).any())
    np.testing.assert_array_equal(second, again)


def test_serves_optax_sophia(key):
    loss = coupled
    x = jnp.array([0.3, 0.4, -0.2])
    optimiser = optax.contrib.sophia(0.01, hessian_diagonal_fn=hutchinson(key), update_interval=2)
    state = optimiser.init(x)
    step = jax.jit(lambda x, state: optimiser.update(jax.grad(loss)(x), state, x, obj_fn=loss))
    for _ in range(4):
        updates, state = step(x, state)
        x = optax.apply_updates(x, updates)
    assert state[0].hessian_fn_state.count == 2
    assert bool(jnp.isfinite(x).all())


def test_explicitly_sharded_parameters(key):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(16.0), jax.sharding.NamedSharding(mesh, jax.P("x")))
        for mode in ("forward", "reverse"):
            estimator = hutchinson(key, mode=mode)
            update = jax.jit(lambda x, e=estimator: e.update(x, e.init(x), x, obj_fn=lambda p: jnp.sum(p**3)))
            got, _ = update(x)
            np.testing.assert_allclose(got, 6 * np.arange(16.0), rtol=tolerance(x.dtype))


def test_bad_arguments(key):
    x = jnp.ones(3)
    estimator = hutchinson(key)
    state = estimator.init(x)
    with pytest.raises(DtypeError, match="hutchinson: `key` must be a typed random key; got uint32"):
        hutchinson(jax.random.PRNGKey(0))
    with pytest.raises(DtypeError, match="hutchinson: `key` must be a typed random key; got int"):
        hutchinson(0)
    with pytest.raises(ShapeError, match=r"hutchinson: `key` must have shape \(\); got \(2,\)"):
        hutchinson(jax.random.split(key))
    with pytest.raises(ValueError, match="hutchinson: `num_probes` must be at least 1; got 0"):
        hutchinson(key, num_probes=0)
    with pytest.raises(ValueError, match="hutchinson: `probe` must be one of 'rademacher', 'normal'; got 'signs'"):
        hutchinson(key, probe="signs")
    with pytest.raises(ValueError, match="hutchinson: `mode` must be one of"):
        hutchinson(key, mode="backward")
    with pytest.raises(ValueError, match="hutchinson: `params` must be given; got None"):
        estimator.update(x, state, obj_fn=coupled)
    with pytest.raises(ValueError, match="hutchinson: `obj_fn` must be given, a function of params; got None"):
        estimator.update(x, state, x)
    with pytest.raises(DtypeError, match=r"hutchinson: `params\['a'\]` must have a floating-point dtype; got int32"):
        estimator.init({"a": jnp.arange(3)})
    with pytest.raises(ShapeError, match=r"hutchinson: `obj_fn\(params\)` must be one real scalar; got \(3,\)"):
        estimator.update(x, state, x, obj_fn=lambda p: p)
    with pytest.raises(ShapeError, match=r"hutchinson: `obj_fn\(params\)` must be one real scalar; got tuple"):
        estimator.update(x, state, x, obj_fn=lambda p: (p.sum(), p))


@pytest.mark.parametrize("jitted", [False, True])
def test_auto_goes_through_attention(key, jitted):
    q, k, v = jax.random.normal(jax.random.key(3), (3, 1, 5, 1, 4))

    def loss(params, of=None):
        return jnp.sum(attention(q * params["w"], k, v, causal=True, implementation=of) ** 2)

    params, estimator = {"w": jnp.float32(1.3)}, hutchinson(key)
    estimate = lambda p: estimator.update(None, estimator.init(p), p, obj_fn=loss)[0]  # noqa: E731
    got = (jax.jit(estimate) if jitted else estimate)(params)
    want = jax.hessian(lambda w: loss({"w": w}, "reference"))(params["w"])
    # One parameter: any probe of +-1 gives the Hessian itself.
    np.testing.assert_allclose(got["w"], want, rtol=tolerance("float32", 100))
