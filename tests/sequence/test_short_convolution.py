import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.sequence import short_convolution, short_convolution_step
from tests.tolerances import tolerance

D, W = 5, 4


def parts(key, T, dtype, batch=2):
    shapes = ((batch, T, D), (W, D), (D,), (batch, W - 1, D))
    return [jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 4), shapes, strict=True)]


def oracle(x, kernel, bias, state):
    out = jax.lax.conv_general_dilated(
        jnp.concatenate([state, x], 1),
        kernel[:, None],
        (1,),
        "VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=D,
    )
    return jax.nn.silu(out + bias)


def test_equals_the_convolution_of_jax_and_its_gradients(key, float_dtype):
    args = parts(key, 9, float_dtype)

    def ours(x, kernel, bias, state):
        return short_convolution(x, kernel, bias, activation="silu", initial_state=state)[0]

    @jax.jit
    def both(*args):
        losses = [lambda *a, f=f: jnp.sum(jnp.sin(f(*a))) for f in (ours, oracle)]
        return [jax.value_and_grad(loss, (0, 1, 2, 3))(*args) for loss in losses]

    got, want = both(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance(float_dtype, 20, condition=4))


def test_a_step_is_a_token_and_a_state_continues(key):
    x, kernel, bias, start = parts(key, 7, "float32")
    y, state = short_convolution(x, kernel, bias, activation="silu", initial_state=start)
    first, middle = short_convolution(x[:, :2], kernel, bias, activation="silu", initial_state=start)
    second, end = short_convolution(x[:, 2:], kernel, bias, activation="silu", initial_state=middle)
    np.testing.assert_array_equal(jnp.concatenate([first, second], 1), y)
    np.testing.assert_array_equal(end, state)
    at, out = start, []
    for t in range(7):
        o, at = short_convolution_step(at, x[:, t], kernel, bias, activation="silu")
        out.append(o)
    np.testing.assert_allclose(jnp.stack(out, 1), y, rtol=0, atol=tolerance("float32", W))
    np.testing.assert_array_equal(at, state)
    empty, same = short_convolution(x[:, :0], kernel, initial_state=start)
    assert empty.shape == (2, 0, D)
    np.testing.assert_array_equal(same, start)


def test_packed_is_separate_and_padding_is_nothing(key):
    x, kernel, bias, start = parts(key, 12, "float32", batch=1)
    # An id may return: it is a new segment all the same.
    ids = jnp.array([[-1, 3, 3, -1, 3, 7, -1, -1, 7, 3, 3, -1]])
    x = jnp.where(ids[..., None] < 0, jnp.nan, x)

    def packed(x, kernel, bias, start):
        return short_convolution(x, kernel, bias, initial_state=start, segment_ids=ids)

    def separate(x, kernel, bias, start):
        out, state = jnp.zeros_like(x), start
        for i, places in enumerate(([1, 2, 4], [5, 8], [9, 10])):
            own = x[:, jnp.array(places)]
            y, state = short_convolution(own, kernel, bias, initial_state=start if i == 0 else None)
            out = out.at[:, jnp.array(places)].set(y)
        return out, state

    def with_gradients(f, args):
        def loss(*args):
            y, state = f(*args)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state)), (y, state)

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*args)

    both = jax.jit(lambda *args: [with_gradients(f, args) for f in (packed, separate)])
    args = (x, kernel, bias, start)
    got, want = both(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance("float32", 12, condition=2))
    # Nothing of one segment, bit for bit, depends on another.
    ((_, (other, _)), _), _ = both(x.at[:, 5:9].multiply(100), *args[1:])
    np.testing.assert_array_equal(np.delete(other, [5, 8], 1), np.delete(got[0][1][0], [5, 8], 1))
    # Padding alone leaves the state as it was.
    _, state = short_convolution(x[:, :3], kernel, initial_state=start, segment_ids=jnp.full((1, 3), -1))
    np.testing.assert_array_equal(state, start)


def test_bad_input():
    x, kernel = jnp.ones((2, 6, D)), jnp.ones((W, D))
    for call, error, sentence in (
        (lambda: short_convolution(x, kernel[:, :2]), ValueError, r"`kernel` must have shape \(W, 5\); got \(4, 2\)"),
        (lambda: short_convolution(x, kernel, activation="relu"), ValueError, "`activation` must be one of"),
        (lambda: short_convolution(x, kernel, initial_state=x), ValueError, "one fewer than the kernel has taps"),
        (lambda: short_convolution(x.astype(int), kernel), TypeError, "`x` must have a floating-point dtype"),
        (
            lambda: short_convolution(x, kernel, segment_ids=jnp.ones((2, 4), int)),
            ValueError,
            "`segment_ids` must have",
        ),
    ):
        with pytest.raises(error, match=f"short_convolution: .*{sentence}"):
            call()
