"""Cross-entropy with the log Z penalty against autodiff of the literal formula, optax, and shifts of the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.training import cross_entropy_with_log_z
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance


def literal(logits, labels, coefficient):
    log_z = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), coefficient * log_z**2, log_z


def problem(key, dtype, shape=(2, 3), classes=5):
    logits = 3 * jax.random.normal(key, (*shape, classes), dtype)
    return logits, jax.random.randint(jax.random.fold_in(key, 1), shape, 0, classes)


def test_values_and_gradients_are_those_of_the_formula(key, float_dtype):
    logits, labels = problem(key, float_dtype)
    weights = jax.random.normal(key, (3, *labels.shape), float_dtype)  # on all three results, so that every path counts

    def ours(x):
        result = cross_entropy_with_log_z(x, labels, coefficient=0.03)
        return jnp.sum(weights * jnp.stack(result[1:]))

    def theirs(x):
        return jnp.sum(weights * jnp.stack(literal(x, labels, 0.03)))

    def every(total, parts):
        return jax.jit(lambda x: (parts(x), jax.grad(total)(x), jax.jacrev(jax.grad(total))(x)))(logits)

    got = every(ours, lambda x: cross_entropy_with_log_z(x, labels, coefficient=0.03))
    want = every(theirs, lambda x: literal(x, labels, 0.03))
    limit = tolerance(float_dtype, logits.size)
    np.testing.assert_allclose(got[0][1:], want[0], rtol=limit, atol=limit)
    np.testing.assert_allclose(got[0].loss, want[0][0] + want[0][1], rtol=limit)
    for gradients in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(*gradients, rtol=limit, atol=limit)


def test_a_shift_moves_the_penalty_alone(key, x64):
    logits, labels = problem(key, "float64")
    shifted = jax.jit(lambda c: cross_entropy_with_log_z(logits + c, labels, coefficient=0.5))
    near, far = shifted(0.0), shifted(4.0)
    np.testing.assert_allclose(far.cross_entropy, near.cross_entropy, rtol=1e-12)
    np.testing.assert_allclose(far.penalty, 0.5 * (near.log_z + 4) ** 2, rtol=1e-12)


def test_shorter_logits_are_summed_in_float32(key):
    logits, labels = problem(key, "bfloat16", (4,), 2000)
    labels = (labels % 128).astype("int8")
    loss = jax.jit(jax.value_and_grad(lambda x: cross_entropy_with_log_z(x, labels).loss.sum()))
    (result, gradient), (want, expected) = loss(logits), loss(logits.astype("float32"))
    assert result.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(result, want, rtol=tolerance("float32", 2000))
    np.testing.assert_allclose(gradient.astype("float32"), expected, rtol=tolerance("bfloat16"), atol=1e-6)


def test_weights_count_in_both_terms_and_zeros_hide_anything(key):
    logits, labels = problem(key, "float32", (4,))
    where = jnp.array([1.0, 0.0, 0.25, 0.0])

    @jax.jit
    @jax.value_and_grad
    def total(x, labels, where):
        return cross_entropy_with_log_z(x, labels, coefficient=0.1, where=where).loss.sum()

    spoilt, strange = logits.at[jnp.array([1, 3])].set(jnp.nan), jnp.where(where == 0, -100, labels)
    value, gradient = total(spoilt, strange, where)
    kept, parts = jnp.array([0, 2]), jnp.array([1.0, 0.25])
    plain, clean = total(logits[kept], labels[kept], parts)
    bare, once = total(logits[kept[:1]], labels[kept[:1]], jnp.ones(1, bool))
    limit = tolerance("float32", 4)
    np.testing.assert_allclose(value, plain, rtol=limit)
    np.testing.assert_allclose(gradient[kept], clean, rtol=limit, atol=limit)
    np.testing.assert_array_equal(gradient[jnp.array([1, 3])], 0)
    np.testing.assert_allclose(clean[:1], once, rtol=limit, atol=limit)
    literally = literal(logits[2], labels[2], 0.1)
    np.testing.assert_allclose(plain - bare, 0.25 * (literally[0] + literally[1]), rtol=10 * limit)


def test_axis_and_batches(key):
    logits, labels = problem(key, "float32")
    moved, rows, want = jax.jit(
        lambda x: (
            cross_entropy_with_log_z(jnp.moveaxis(x, -1, 0), labels, axis=0),
            jax.vmap(cross_entropy_with_log_z)(x, labels),
            cross_entropy_with_log_z(x, labels),
        )
    )(logits)
    for got in (moved, rows):
        np.testing.assert_allclose(got, want, rtol=tolerance("float32", 5))


def test_what_is_wrong_shows():
    logits = jnp.zeros((3, 4)).at[2, 0].set(jnp.nan)
    labels = jnp.array([4, -1, 1])
    pull = jax.jit(lambda x: jax.vjp(lambda x: cross_entropy_with_log_z(x, labels).loss, x)[1](jnp.ones(3)))
    assert np.isnan(pull(logits)[0]).all()
    losses = jax.jit(cross_entropy_with_log_z)(logits, labels).loss
    assert np.isnan(losses).all()
    hidden = jax.jit(cross_entropy_with_log_z)(jnp.full((3, 4), -jnp.inf).at[:2, 0].set(0.0), jnp.zeros(3, int)).loss
    assert hidden.tolist()[:2] == [0.0, 0.0]
    assert np.isnan(hidden[2])
    with pytest.raises(ShapeError, match="^cross_entropy_with_log_z: `labels` must have shape"):
        cross_entropy_with_log_z(logits, logits.astype(int))
    with pytest.raises(DtypeError, match="^cross_entropy_with_log_z: `labels` must have"):
        cross_entropy_with_log_z(logits, jnp.ones(3))
    with pytest.raises(ValueError, match="^cross_entropy_with_log_z: `axis` must be"):
        cross_entropy_with_log_z(logits, labels, axis=2)
    for coefficient in (-1.0, np.int64(-1)):
        with pytest.raises(ValueError, match="^cross_entropy_with_log_z: `coefficient` must be at least 0"):
            cross_entropy_with_log_z(logits, labels, coefficient=coefficient)


def test_no_classes_are_named():
    with pytest.raises(ValueError, match="cross_entropy_with_log_z: `logits` must have at least one class"):
        cross_entropy_with_log_z(jnp.zeros((2, 0)), jnp.zeros(2, int))
