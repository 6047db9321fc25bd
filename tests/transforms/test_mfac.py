"""M-FAC: every step against a dense solve in float64, the window's bookkeeping, and what float32 can and cannot do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.curvature import fisher_inverse_product
from jaxnum.transforms import mfac, scale_by_mfac
from kernels_pallas.checks import DtypeError, TreeError
from tests.tolerances import tolerance
from tests.transforms.trajectories import copied, donated, follow

M, D, DAMPING = 8, 40, 1e-3
EPS = float(jnp.finfo("float32").eps)


def dense_steps(gradients, window=M, damping=DAMPING, warm=False):
    """F^-1 g_t for every t, F assembled from the last gradients [T, d]."""
    steps = []
    for t, g in enumerate(gradients):
        rows = gradients[max(0, t + 1 - window) : t + 1]
        F = damping * np.eye(g.size) + rows.T @ rows / (len(rows) if warm else window)
        steps.append(np.linalg.solve(F, g))
    return np.array(steps)


def gradients(steps, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, D))


def as_tree(rows):
    """Flat vectors [..., 40] as a tree of three leaves."""
    lead = rows.shape[:-1]
    return {"a": rows[..., :6].reshape(*lead, 2, 3), "b": rows[..., 6], "c": rows[..., 7:]}


def as_rows(tree):
    lead = tree["b"].shape
    return np.concatenate([tree["a"].reshape(*lead, 6), tree["b"][..., None], tree["c"]], axis=-1)


@pytest.mark.parametrize("warm", [False, True])
def test_every_step_is_the_dense_solve_with_the_last_gradients(warm, x64):
    rows = gradients(3 * M)
    start = as_tree(jnp.zeros(D))
    tx = scale_by_mfac(window=M, damping=DAMPING, warm_window=warm)
    (_, state), steps = follow(tx, as_tree(jnp.asarray(rows)), start)
    np.testing.assert_allclose(as_rows(steps), dense_steps(rows, warm=warm), rtol=1e-11, atol=1e-11)
    assert (int(state.count), int(state.slot)) == (3 * M, 0)
    one_shot = fisher_inverse_product(jnp.asarray(rows[-M:]), jnp.asarray(rows[-1]), DAMPING)
    np.testing.assert_allclose(as_rows(steps)[-1], one_shot, rtol=1e-11, atol=1e-11)
    window = as_rows(state.window)
    np.testing.assert_allclose(state.gram, window @ window.T, rtol=1e-13, atol=1e-13)


def test_decay_is_preconditioned_and_momentum_averages(x64):
    g, x = gradients(2), np.linspace(-1.0, 1.0, D)
    tx = mfac(0.1, window=M, damping=DAMPING, momentum=0.9, weight_decay=0.3)
    _, updates = follow(tx, jnp.asarray(g), jnp.asarray(x))
    first = g[0] + 0.3 * x
    second = g[1] + 0.3 * (x + np.asarray(updates[0]))
    u = dense_steps(np.array([first, second]))
    want = [-0.1 * 0.1 * u[0], -0.1 * (0.9 * 0.1 * u[0] + 0.1 * u[1])]
    np.testing.assert_allclose(updates, want, rtol=1e-11, atol=1e-12)


def test_float32_keeps_its_digits_where_woodbury_s_difference_loses_them():
    rows = gradients(M).astype("float32")
    want = dense_steps(rows.astype("float64"), damping=1e-5)[-1]
    error = lambda got: np.linalg.norm(got - want) / np.linalg.norm(want)  # noqa: E731
    _, steps = follow(scale_by_mfac(window=M, damping=1e-5), jnp.asarray(rows), jnp.zeros(D))
    spread = np.linalg.cond(rows.astype("float64") @ rows.T.astype("float64"))
    assert error(steps[-1]) < tolerance("float32", D, condition=spread)
    assert error(fisher_inverse_product(jnp.asarray(rows), jnp.asarray(rows[-1]), 1e-5)) > 1e-3


def test_alike_gradients_raise_the_damping_and_not_an_error():
    # One direction only: F^-1 g = g / (λ + |g|²) however many times g was seen; K alone is singular in float32.
    g = jnp.array([300.0, -400.0])
    _, steps = follow(scale_by_mfac(window=M, damping=1e-8), jnp.tile(g, (2 * M, 1)), jnp.zeros(2))
    # The raised damping, 512 eps of |g|², conditions K by 1 / (512 eps): an error of 1/64 at most.
    np.testing.assert_allclose(steps[-1], g / jnp.sum(g**2), rtol=tolerance("float32", condition=1 / (512 * EPS)))


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_a_bad_gradient_shows_and_is_forgotten(bad):
    rows = gradients(2 * M).astype("float32")
    spoilt = np.insert(rows, 5, rows[0], axis=0)
    spoilt[5, 3] = bad
    tx = scale_by_mfac(window=M, damping=DAMPING, momentum=0.5)
    # The parameters go through NaN here; the transform does not read them.
    (_, state), steps = follow(tx, jnp.asarray(spoilt), jnp.zeros(D))
    (_, clean_state), clean = follow(tx, jnp.asarray(rows), jnp.zeros(D))
    assert bool(jnp.isnan(steps[5]).all())
    np.testing.assert_array_equal(np.delete(steps, 5, axis=0), clean)
    jax.tree.map(np.testing.assert_array_equal, state, clean_state)


def test_bfloat16_windows_are_exact_for_rounded_gradients():
    rows = jnp.asarray(gradients(2 * M).astype("float32"))
    tx = scale_by_mfac(window=M, damping=DAMPING, window_dtype="bfloat16")
    (_, state), steps = follow(tx, rows, jnp.zeros(D))
    assert (state.window.dtype, state.gram.dtype, steps.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    rounded = np.asarray(rows.astype(jnp.bfloat16)).astype("float64")
    want = dense_steps(rounded)
    np.testing.assert_allclose(steps, want, rtol=0, atol=tolerance("float32", D) * np.abs(want).max())
    kept = scale_by_mfac(window=M).init(jnp.zeros(D, jnp.bfloat16))
    assert (kept.window.dtype, kept.gram.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_the_window_is_sharded_as_the_parameters_are(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    spec = jax.sharding.PartitionSpec
    rows = jnp.asarray(gradients(3).astype("float32"))
    tx = scale_by_mfac(window=M, damping=DAMPING)
    _, want = follow(tx, rows, jnp.zeros(D))
    x, g = (jax.device_put(a, jax.sharding.NamedSharding(mesh, spec("x"))) for a in (jnp.zeros(D), rows[0]))
    state = tx.init(x)
    step = jax.jit(tx.update)
    for t in range(3):
        got, state = step(jax.device_put(rows[t], g.sharding), state, x)
        np.testing.assert_allclose(got, want[t], rtol=0, atol=tolerance("float32", D) * float(jnp.abs(want).max()))
        assert state.window.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec(None, "x")), 2)
        assert got.sharding.is_equivalent_to(x.sharding, 1)


def test_bad_arguments_are_named():
    for wrong in ({"damping": 0.0}, {"momentum": 1.0}, {"weight_decay": -1.0}, {"window": 0}, {"window": 2.0}):
        with pytest.raises(ValueError, match=f"^mfac: `{next(iter(wrong))}` must be "):
            mfac(0.1, **wrong)
    with pytest.raises(DtypeError, match="^mfac: `params` must have a floating-point"):
        mfac(0.1).init(jnp.arange(3))
    with pytest.raises(TreeError, match="^mfac: `updates` must"):
        mfac(0.1).update((jnp.ones(2),), mfac(0.1, window=2).init(jnp.ones(2)), jnp.ones(2))
    large = {"w": jax.ShapeDtypeStruct((10_000, 1000), jnp.float32)}
    with pytest.raises(
        ValueError, match=r"need at most max_bytes = 17,179,869,184 bytes; got 1024, whose gradients of "
    ):
        scale_by_mfac().init(large)
    needed = r"10,000,000 numbers and their inner products need 20,484,194,304 bytes\. Keep fewer gradients"
    with pytest.raises(ValueError, match=needed):
        scale_by_mfac(window_dtype="bfloat16").init(large)


def test_the_bytes_of_the_inner_products_count():
    with pytest.raises(ValueError, match=r"inner products need 160,008,000,000 bytes"):
        jax.eval_shape(scale_by_mfac(window=200_000).init, jnp.ones(10))


def test_a_donated_window_is_written_in_place():
    program = donated(mfac(0.1, window=4, momentum=0.5), jnp.ones((64, 64)))
    assert copied(program, "(?:4,)?64,64") == 0
    assert program.memory_analysis().temp_size_in_bytes < 4 * 4 * 64 * 64  # less than another window
