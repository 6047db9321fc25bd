"""Reports of stability: dense matrices, interpolation, and the monitor inside a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxnum
from jaxnum import Status
from jaxnum.curvature import hessian_product
from jaxnum.training import sgd_stability, sgd_stability_exact, sgd_stability_monitor
from kernels_pallas.checks import DtypeError, ShapeError
from tests.curvature.test_lanczos import with_spectrum

PARAMS = {"w": jnp.array([[0.7, -0.4, 1.1]]), "v": jnp.array([0.5, -1.0, 0.3])}
INPUTS = jnp.linspace(-1, 1, 8)[:, None]
PLAIN = {"learning_rate": 0.2, "batch_size": 4}


def output(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def loss(params):
    """Half the mean square against labels that the parameters of `PARAMS` fit."""
    return 0.5 * jnp.mean((output(params, INPUTS) - output(PARAMS, INPUTS)) ** 2)


def test_a_known_spectrum_within_three_errors(key):
    values = np.linspace(0.2, 5, 30)
    H = jnp.asarray(with_spectrum(values), jnp.float32)
    report = sgd_stability(H, jnp.zeros(30), key, num_probes=40, **PLAIN)
    np.testing.assert_allclose(report.largest, 5, rtol=1e-4)
    for got, error, want in (
        (report.trace, report.trace_error, values.sum()),
        (report.frobenius, report.frobenius_error, np.sum(values**2) ** 0.5),
    ):
        assert 0 < float(error) < 0.05 * want
        assert abs(float(got) - want) < 3 * float(error)
    rates = (0.2 * report.largest, 0.2 * report.trace, 0.1 * report.frobenius)
    np.testing.assert_allclose(report[5:8], rates, rtol=1e-6)
    assert int(report.status) == Status.converged


def test_the_exact_report_is_the_dense_hessian_where_every_example_is_fitted(x64):
    params, inputs = jax.tree.map(lambda x: x.astype("float64"), (PARAMS, INPUTS))
    flat, restore = jax.flatten_util.ravel_pytree(params)
    half = lambda p: 0.5 * jnp.mean((output(restore(p), inputs) - output(params, inputs)) ** 2)  # noqa: E731
    H = jax.jit(jax.hessian(half))(flat)
    jacobian = jax.vmap(jax.grad(output), (None, 0))(params, inputs)
    for x in (jacobian, jax.tree.map(lambda leaf: leaf[:4], jacobian)):  # more rows than columns, and fewer
        report = sgd_stability_exact(x, **PLAIN)
        if x is not jacobian:
            rows = jnp.concatenate([leaf.reshape(4, -1) for leaf in jax.tree.leaves(x)], axis=1)
            H = rows.T @ rows / 4
        np.testing.assert_allclose(report.trace, jnp.trace(H), rtol=1e-10)
        np.testing.assert_allclose(report.largest, jnp.linalg.eigvalsh(H)[-1], rtol=1e-10)
        np.testing.assert_allclose(report.frobenius, jnp.linalg.norm(H), rtol=1e-10)
        assert int(report.status) == Status.converged


def test_the_monitor_reports_what_the_function_does_and_changes_no_update(key):
    def factory(learning_rate):
        watch = sgd_stability_monitor(2, key, learning_rate, 4, num_probes=4)
        return optax.chain(watch, optax.sgd(learning_rate, momentum=0.9))

    tx, plain = optax.inject_hyperparams(factory)(learning_rate=0.2), optax.sgd(0.2, momentum=0.9)
    params = jax.tree.map(lambda x: x + 0.1, PARAMS)

    def run(tx, params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)
            return (optax.apply_updates(params, updates), state), params

        return jax.lax.scan(step, (params, tx.init(params)), length=4)

    (last, state), passed = jax.jit(lambda p: run(tx, p))(params)
    want, _ = jax.jit(lambda p: run(optax.with_extra_args_support(plain), p))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), last, want[0])
    seen = state.inner_state[0]
    assert (int(seen.count), int(seen.measured)) == (4, 2)
    there = jax.tree.map(lambda x: x[2], passed)
    options = {"num_probes": 4, **PLAIN}
    report = sgd_stability(hessian_product(loss, there), there, jax.random.fold_in(key, 2), **options)
    np.testing.assert_allclose(seen.report[:8], report[:8], rtol=1e-4)
    before = tx.init(params).inner_state[0]
    assert np.isnan(before.report.trace)
    assert int(before.measured) == -1


def test_bad_input(key):
    nan = jnp.full((3, 3), jnp.nan)
    with pytest.raises(jaxnum.SolverError, match="^sgd_stability: nonfinite"):
        sgd_stability(nan, jnp.zeros(3), key, **PLAIN)
    report = sgd_stability(nan, jnp.zeros(3), key, on_failure="return", **PLAIN)
    assert np.isnan(report.trace)
    assert int(report.status) == int(sgd_stability_exact(nan, **PLAIN).status) == Status.nonfinite
    with pytest.raises(ValueError, match="^sgd_stability: `num_probes` must be a Python int >= 2; got 1"):
        sgd_stability(jnp.eye(3), jnp.zeros(3), key, num_probes=1, **PLAIN)
    for size in (0, np.int64(0)):
        with pytest.raises(ValueError, match="^sgd_stability: `batch_size` must be at least 1; got 0"):
            sgd_stability(jnp.eye(3), jnp.zeros(3), key, learning_rate=0.1, batch_size=size)
    with pytest.raises(
        ShapeError, match="^sgd_stability_exact: `jacobian` must have a first axis of examples; got sha"
    ):
        sgd_stability_exact(jnp.float32(1), **PLAIN)
    with pytest.raises(ValueError, match="^sgd_stability_monitor: `every` must be at least 1; got 0"):
        sgd_stability_monitor(0, key, 0.1, 1)
    watch, p = sgd_stability_monitor(1, key, 0.1, 1), jnp.zeros(3)
    with pytest.raises(ValueError, match="^sgd_stability_monitor: `params` must have at least one entry; got 0"):
        sgd_stability_monitor(1, key, 0.1, 1).init({})
    with pytest.raises(ValueError, match="^sgd_stability_monitor: `obj_fn` must be given"):
        watch.update(p, watch.init(p), p)
    with pytest.raises(ShapeError, match="^sgd_stability_monitor: `updates` must have shape"):
        watch.update(jnp.zeros(1), watch.init(p), p, obj_fn=jnp.sum)
    with pytest.raises(DtypeError, match="^sgd_stability_monitor: `params` must have a floating"):
        watch.init(jnp.arange(3))


def test_a_first_state_can_be_donated(key):
    monitor = sgd_stability_monitor(2, key, 0.1, 1)
    x = jnp.ones(2)
    update = jax.jit(lambda x, state: monitor.update(x, state, x, obj_fn=lambda x: jnp.sum(x**2)), donate_argnums=1)
    assert update(x, monitor.init(x))[1].count == 1


def test_a_jacobian_without_parameters_is_named():
    with pytest.raises(ShapeError, match="sgd_stability_exact: `jacobian` must have at least one parameter"):
        sgd_stability_exact(jnp.zeros((3, 0)), learning_rate=0.1, batch_size=1)
