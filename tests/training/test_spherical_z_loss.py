"""The Z-loss against its formula in NumPy, what it is invariant to, and its floor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.training import spherical_z_loss, spherical_z_loss_from_statistics
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance


def test_the_formula_in_numpy(float_dtype):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 3, 50)), rng.integers(50, size=(2, 3))
    z = (np.take_along_axis(logits, labels[..., None], -1)[..., 0] - logits.mean(-1)) / logits.std(-1)
    want = np.log1p(np.exp(2.0 * (0.5 - z))) / 2.0
    given = jnp.asarray(logits, float_dtype)
    got = jax.jit(lambda o: spherical_z_loss(o, jnp.asarray(labels), a=2.0, b=0.5))(given)
    assert got.dtype == float_dtype
    np.testing.assert_allclose(got, want, rtol=tolerance(float_dtype, 50))
    chosen = jnp.take_along_axis(given, jnp.asarray(labels)[..., None], -1)[..., 0]
    same = spherical_z_loss_from_statistics(chosen, given.mean(-1), given.var(-1), a=2.0, b=0.5)
    np.testing.assert_allclose(same, want, rtol=tolerance(float_dtype, 50))


def test_shifts_and_scales_change_nothing_and_the_gradient_knows(x64, key):
    o = jax.random.normal(key, (40,))
    value, gradient = jax.jit(jax.value_and_grad(spherical_z_loss))(o, jnp.array(7))
    np.testing.assert_allclose(spherical_z_loss(3.7 * o - 2.0, jnp.array(7)), value, rtol=1e-13)
    assert float(jnp.linalg.norm(gradient)) > 0.01
    np.testing.assert_allclose([gradient.sum(), gradient @ (o - o.mean())], 0.0, atol=1e-14)
    # An offset a thousand times the spread costs float32 its three digits, not six.
    offset = spherical_z_loss((o + 1000.0).astype("float32"), jnp.array(7))
    np.testing.assert_allclose(offset, value, rtol=tolerance("float32", condition=1000.0))


def test_one_logit_above_all_others_reaches_the_floor(x64):
    for classes in (2, 5, 1000):
        o = jax.nn.one_hot(1, classes)
        floor = np.log1p(np.exp(2.0 * (0.3 - np.sqrt(classes - 1)))) / 2.0
        np.testing.assert_allclose(spherical_z_loss(o, jnp.array(1), a=2.0, b=0.3), floor, rtol=1e-13)


def test_equal_logits_have_no_gradient_and_what_is_not_finite_shows():
    value, gradient = jax.jit(jax.value_and_grad(spherical_z_loss))(jnp.full(1000, 0.1), jnp.array(3))
    np.testing.assert_allclose(value, np.log(2.0), rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0.0)
    for bad in (jnp.nan, jnp.inf):
        assert jnp.isnan(spherical_z_loss(jnp.arange(5.0).at[0].set(bad), jnp.array(3)))
    assert jnp.isnan(spherical_z_loss(jnp.ones((2, 5)) * jnp.arange(5.0), jnp.array([-1, 5]))).all()


def test_labels_outside_show_on_equal_logits_too():
    for label in (-1, 4):
        value, gradient = jax.value_and_grad(spherical_z_loss)(jnp.ones(4), jnp.array(label))
        assert np.isnan(value)
        assert np.isnan(gradient).all()


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e-20, 1e19, 1e25, 1e33])
def test_logits_whose_squares_leave_the_range_have_their_loss_and_gradient(scale):
    o, label = jnp.array([1.0, 2.0, 5.0, -3.0]), jnp.array(2)
    value, gradient = jax.value_and_grad(spherical_z_loss)(o, label)
    far, slope = jax.jit(jax.value_and_grad(spherical_z_loss))(o * scale, label)
    np.testing.assert_allclose(far, value, rtol=tolerance("float32", 4))
    np.testing.assert_allclose(slope * scale, gradient, rtol=tolerance("float32", 4, condition=10.0))


def test_a_variance_that_has_overflowed_shows():
    one = jnp.ones(1)
    assert np.isnan(spherical_z_loss_from_statistics(one, one, one * jnp.inf)).all()


def test_short_floats_are_widened():
    o = jnp.arange(8.0, dtype=jnp.bfloat16)
    got = spherical_z_loss(o, jnp.array(7))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, spherical_z_loss(o.astype("float32"), jnp.array(7)))


O, C = jnp.ones((2, 3)), jnp.array([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: spherical_z_loss(O, jnp.array([0])), ShapeError, r"`labels` must have shape \(2,\) to match `logits`"),
        (lambda: spherical_z_loss(O, C * 1.0), DtypeError, "`labels` must have an integer dtype; got float32"),
        (
            lambda: spherical_z_loss(O.astype(int), C),
            DtypeError,
            "`logits` must have a floating-point dtype; got int32",
        ),
        (lambda: spherical_z_loss(O[:, :1], C), ShapeError, "`logits` must have at least 2 classes; got 1"),
        (lambda: spherical_z_loss(O, C, a=0.0), ValueError, "`a` must be greater than 0; got 0.0"),
        (lambda: spherical_z_loss(O, C, a=np.float32(-1)), ValueError, "`a` must be greater than 0; got -1.0"),
        (lambda: spherical_z_loss([[1.0, 2.0]], C), TypeError, "`logits` must be an array; got list"),
    ],
)
def test_bad_arguments_are_named(call, error, sentence):
    with pytest.raises(error, match=f"^spherical_z_loss: {sentence}"):
        call()
    with pytest.raises(ShapeError, match=r"^spherical_z_loss_from_statistics: `mean` must have shape \(3,\)"):
        spherical_z_loss_from_statistics(O[0], O[0, :1], O[0])


def test_labels_too_short_for_the_classes_keep_their_sign():
    assert np.isnan(jax.jit(spherical_z_loss)(jnp.arange(300.0), jnp.int8(-1)))
