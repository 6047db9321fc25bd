"""What holds for all recurrent operations alike: empty axes, padding, missing arguments, jit off, explicit meshes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import (
    delta_rule,
    delta_rule_step,
    linear_attention,
    linear_attention_step,
    linear_scan,
    selective_scan,
    selective_scan_step,
)

B, T, H, K, V = 2, 5, 2, 4, 3


def ones(*shape):
    return jnp.ones(shape, "float32")


def calls(B=B, T=T, H=H, K=K, V=V, G=2, D=4, N=3):
    """One call of each operation with all that it takes, by name."""
    k, v, gate, u, B_ = ones(B, T, H, K) / 2, ones(B, T, H, V), -ones(B, T, H), ones(B, T, D), ones(B, T, G, N)
    return {
        "linear_attention": (linear_attention, (k, k, v), {"log_decay": gate}),
        "linear_attention, prefix": (linear_attention, (k, k, v), {"log_decay": gate, "prefix_length": 0}),
        "delta_rule": (delta_rule, (k, k, v, -gate), {"log_decay": gate, "updates_per_token": 1}),
        "linear_scan": (linear_scan, (u, u), {}),
        "selective_scan": (selective_scan, (u, u, -ones(D, N), B_, B_), {}),
    }


@pytest.mark.parametrize("empty", ["B", "T", "K", "V", "N"])
@pytest.mark.parametrize("name", calls())
def test_empty_axes_give_empty_or_zero_results(name, empty):
    run, arrays, options = calls(**{empty: 0})[name]
    y, state = run(*arrays, **options)
    assert y.shape[:2] == (B if empty != "B" else 0, T if empty != "T" else 0)
    np.testing.assert_array_equal(state, np.zeros(state.shape)) if empty == "T" else None
    assert bool(jnp.all(jnp.isfinite(y)))


@pytest.mark.parametrize("name", ["linear_attention", "delta_rule"])
def test_padding_may_hold_gates_that_are_none(name):
    run, arrays, options = calls()[name]
    ids = jnp.array([[0, 0, -1, 1, 1], [-1, 0, 0, 0, 0]], jnp.int32)
    bad = {**options, "log_decay": jnp.where(ids[..., None] < 0, 3.0, options["log_decay"])}
    got, want = (run(*arrays, segment_ids=ids, **given) for given in (bad, options))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    # Elsewhere they raise, beside NaN too.
    bad["log_decay"] = bad["log_decay"].at[0, 0].set(2.0).at[0, 1].set(jnp.nan)
    with pytest.raises(ValueError, match=f"{name}: `log_decay` must be <= 0; got 2.0"):
        run(*arrays, segment_ids=ids, **bad)


@pytest.mark.parametrize("dtype", ["uint32", "int8", "int32"])
def test_ids_of_any_integer_dtype_mean_the_same(dtype):
    ids = jnp.asarray([[0, 0, 3, 3, 7], [1, 1, 1, 2, 2]], dtype)
    for run, arrays, options in calls().values():
        if "prefix_length" not in options:
            got, want = (run(*arrays, segment_ids=i, **options)[0] for i in (ids, ids.astype("int32")))
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", calls())
def test_with_jit_off(name):
    run, arrays, options = calls()[name]
    with jax.disable_jit():
        got = run(*arrays, **options)
    np.testing.assert_allclose(got[0], run(*arrays, **options)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", calls())
def test_reference_takes_explicitly_sharded_arrays(name):
    run, arrays, options = calls(G=1)[name]
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, PartitionSpec("rows")) if jnp.ndim(x) > 2 else x  # noqa: E731
        given = jax.tree.map(put, (arrays, options))
        with pytest.raises(NotImplementedError, match="explicitly sharded arrays are served by"):
            run(*given[0], **given[1])
        if "prefix_length" not in options:
            got = run(*given[0], **given[1], implementation="reference")[0]
            np.testing.assert_allclose(got, run(*arrays, **options)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", calls())
def test_what_is_missing_is_named(name):
    run, arrays, options = calls()[name]
    for given, found in ((None, "NoneType"), ([1.0], "list")):
        sentence = rf"{run.__name__}: `\w+` must be an array; got {found}. Lists become arrays by jnp.asarray."
        with pytest.raises(TypeError, match=sentence):
            run(*arrays[:-1], given, **options)


def test_what_is_missing_in_a_step_is_named():
    token = ones(B, H, K)
    for run, arguments in (
        (linear_attention_step, (None, token, token, token)),
        (delta_rule_step, (None, token, token, token, ones(B, H))),
        (selective_scan_step, (None, ones(B, 4), ones(B, 4), -ones(4, 3), ones(B, 3), ones(B, 3))),
    ):
        with pytest.raises(TypeError, match=f"{run.__name__}: `state` must be an array; got NoneType"):
            run(*arguments)
    with pytest.raises(ValueError, match="linear_attention_step: `normalize` must be a Python bool; got yes"):
        linear_attention_step(ones(B, H, K, K), token, token, token, normalize="yes")
    for scale in ("a", 1j):
        sentence = f"linear_attention_step: `scale` must be a real number; got {scale}."
        with pytest.raises(TypeError, match=re.escape(sentence)):
            linear_attention_step(ones(B, H, K, K), token, token, token, scale=scale)


def test_a_step_shares_heads_like_the_whole():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, 4)), "float32") for heads in (4, 2, 1))
    o, end = linear_attention(q, k, v)
    state = jnp.zeros_like(end)
    for t in range(T):
        got, state = linear_attention_step(state, q[:, t], k[:, t], v[:, t])
        np.testing.assert_allclose(got, o[:, t], rtol=1e-5, atol=1e-5)


def test_a_quotient_of_sums_beyond_float16():
    q = jnp.full((1, 64, 1, 64), 16.0, jnp.float16)
    o, state = linear_attention(q, q, jnp.ones((1, 64, 1, 1), jnp.float16), normalize=True)
    assert (o.dtype, state.dtype) == (jnp.float16, jnp.float32)
    np.testing.assert_array_equal(o, jnp.ones_like(o))


def test_step_sizes_below_0_and_rates_without_end():
    u, B_, A = ones(1, T, 2), ones(1, T, 3), -ones(2, 3)
    with pytest.raises(ValueError, match=r"selective_scan: `delta` must be >= 0 where .* is False; got -5.0"):
        selective_scan(u, -5 * u, A, B_, B_, delta_softplus=False)
    y = jax.jit(lambda d: selective_scan(u, d, A, B_, B_, delta_softplus=False)[0])(-5 * u)
    assert bool(jnp.all(jnp.isnan(y)))
    # A channel that forgets at once gives what each token writes, through padding too, with a gradient.
    ids = jnp.array([[0, -1, 0, 1, 1]], jnp.int32)
    run = lambda u: selective_scan(u, u, A.at[0].set(-jnp.inf), B_, B_, delta_softplus=False, segment_ids=ids)[0]  # noqa: E731
    np.testing.assert_array_equal(run(u)[0, :, 0], [3, 0, 3, 3, 3])
    slopes = jax.grad(lambda u: jnp.sum(run(u)))(u)
    np.testing.assert_array_equal(slopes[0, :, 0], [6, 0, 6, 6, 6])
