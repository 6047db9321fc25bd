"""The factored output layer against the dense weights under plain gradient descent, which it must equal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.training import (
    factored_output,
    factored_output_stabilise,
    factored_output_step,
    factored_output_weights,
    spherical_z_loss,
)
from kernels_pallas.checks import DtypeError, ShapeError
from tests.tolerances import tolerance

D, WIDTH = 300, 7


def taylor(chosen, mean, variance):
    """The Taylor softmax, another spherical loss, which no shift leaves as it is."""
    return jnp.log(D * (1 + mean + (variance + mean**2) / 2)) - jnp.log(1 + chosen + chosen**2 / 2)


def dense_taylor(logits, labels):
    q = 1 + logits + logits**2 / 2
    return jnp.log(q.sum(-1)) - jnp.log(jnp.take_along_axis(q, labels[:, None], -1)[:, 0])


def several(chosen, mean, variance):
    """Squared distance to an output of ones at K labels and zeros elsewhere."""
    return D * (variance + mean**2) / 2 - chosen.sum(-1)


def dense_several(logits, labels):
    # Labels may repeat, and then count twice.
    return jnp.sum(logits**2, -1) / 2 - jnp.take_along_axis(logits, labels, -1).sum(-1)


LOSSES = {"z": (None, spherical_z_loss), "taylor": (taylor, dense_taylor), "several": (several, dense_several)}
RATES = {"z": 10.0, "taylor": 0.2, "several": 0.02}


def drawn(seed, m, steps, dtype, labels=()):
    """Weights, hidden layers and labels of a run; a class in five is drawn often, so that labels repeat."""
    rng = np.random.default_rng(seed)
    few = rng.integers(D, size=(steps, m, *labels))
    few = np.where(rng.random(few.shape) < 0.3, 11, few)
    return tuple(jnp.asarray(x, dtype) for x in (rng.normal(size=(D, WIDTH)), rng.normal(size=(steps, m, WIDTH)))) + (
        jnp.asarray(few),
    )


def run(name, weights, hidden, labels, decay=0.0, every=100):
    """Losses, gradients and the last state of the factored form, with U kept well conditioned now and then."""
    loss = {} if LOSSES[name][0] is None else {"loss": LOSSES[name][0]}
    step = partial(factored_output_step, learning_rate=RATES[name], weight_decay=decay, **loss)

    def one(state, inputs):
        count, h, c = inputs
        state = jax.lax.cond(count % every == 0, factored_output_stabilise, lambda s: s, state)
        state, value, grad_h = step(state, h, c)
        return state, (value, grad_h)

    counts = jnp.arange(len(hidden))
    return jax.jit(lambda *given: jax.lax.scan(one, factored_output(given[0]), (counts, *given[1:])))(
        weights, hidden, labels
    )


def dense(name, weights, hidden, labels, decay=0.0):
    """The same by autodiff and optax on D x d weights."""
    tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(RATES[name]))

    def one(w, inputs):
        h, c = inputs
        value, (grad_w, grad_h) = jax.value_and_grad(lambda w, h: LOSSES[name][1](h @ w.T, c).mean(), argnums=(0, 1))(
            w, h
        )
        updates, _ = tx.update(grad_w, tx.init(w), w)
        return optax.apply_updates(w, updates), (value, grad_h)

    return jax.jit(lambda w, *given: jax.lax.scan(one, w, given))(weights, hidden, labels)


def widened(x):
    return x.astype("float64") if x.dtype == "float32" else x


def worst(got, want):
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (got, want)), strict=True)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


@pytest.mark.parametrize(("name", "m", "labels"), [("z", 1, ()), ("taylor", 5, ()), ("several", 4, (3,))])
def test_two_hundred_steps_equal_those_of_dense_weights(x64, name, m, labels):
    given = drawn(0, m, 200, "float64", labels)
    state, seen = run(name, *given, decay=1e-3)
    weights, want = dense(name, *given, decay=1e-3)
    assert worst((seen, factored_output_weights(state)), (want, weights)) < 1e-10
    fresh = factored_output(weights)
    assert worst((state.scatter, state.mean), (fresh.scatter, fresh.mean)) < 1e-10
    np.testing.assert_allclose(state.u @ state.u_inverse, np.eye(WIDTH), atol=1e-10)
    assert not np.allclose(weights, given[0], rtol=0.01)


def test_a_thousand_steps_in_float32_stay_within_1e_4():
    given = drawn(1, 1, 1000, "float32")
    state, (losses, _) = run("z", *given)
    with jax.enable_x64(True):
        weights, (want, _) = dense("z", *map(widened, given))
        assert worst((losses, factored_output_weights(state)), (want, weights)) < 1e-4
        # What has drifted apart is made one again.
        fresh = factored_output(factored_output_weights(state))
        assert worst((state.scatter, state.mean), (fresh.scatter, fresh.mean)) < 1e-4


@pytest.mark.parametrize(
    ("classes", "width", "m", "rate", "decay", "offset", "steps"),
    [(100, 16, 32, 5.0, 0.0, 1.0, 2000), (10, 16, 32, 1.0, 1e-3, 0.0, 1500), (20, 5, 7, 1.0, 0.01, 0.0, 1000)],
)
def test_labels_at_random_in_float32(classes, width, m, rate, decay, offset, steps):
    """Where z < 0 errors grow with U: without a fresh start these end at 1e-2, 1e2 and 0.3 of the weights."""
    rng = np.random.default_rng(0)
    given = rng.normal(size=(classes, width)), rng.normal(size=(steps, m, width)) + offset
    labels = jnp.asarray(rng.integers(classes, size=(steps, m)))
    step = partial(factored_output_step, learning_rate=rate, weight_decay=decay)

    def one(state, inputs):
        count, h, c = inputs
        state = step(state, h, c)[0]
        return jax.lax.cond(count % 100 == 99, factored_output_stabilise, lambda s: s, state), None

    def plain(w, inputs):
        h, c = inputs
        gradient = jax.grad(lambda w: spherical_z_loss(h @ w.T, c).mean())(w)
        return (1 - rate * decay) * w - rate * gradient, None

    weights, hidden = (jnp.asarray(x, "float32") for x in given)
    state = jax.jit(lambda w, *xs: jax.lax.scan(one, factored_output(w), xs)[0])(
        weights, jnp.arange(steps), hidden, labels
    )
    with jax.enable_x64(True):
        want = jax.jit(lambda w, *xs: jax.lax.scan(plain, w, xs)[0])(widened(weights), widened(hidden), labels)
    assert worst(factored_output_weights(state), want) < 1e-4


def test_a_scatter_matrix_that_is_not_the_weights_is_seen(float_dtype, key):
    weights = jax.random.normal(key, (D, WIDTH)).astype(float_dtype)
    state = factored_output(weights)
    kept = jax.jit(factored_output_stabilise)(state)
    np.testing.assert_array_equal(kept.v, state.v)
    np.testing.assert_array_equal(kept.scatter, state.scatter)
    # The scale of rounding: 200 of them are too many.
    off = state._replace(scatter=state.scatter * (1 + 200 * jnp.finfo(float_dtype).eps), omega=state.omega + 1)
    fresh = jax.jit(factored_output_stabilise)(off)
    np.testing.assert_allclose(fresh.v, weights + 1, rtol=tolerance(float_dtype, 4), atol=jnp.finfo(float_dtype).eps)
    assert not fresh.omega.any()
    # A state that is NaN stays so.
    assert np.isnan(factored_output_stabilise(state._replace(u=state.u * jnp.nan)).u_inverse).all()


def test_stabilising_changes_factors_and_no_weight(x64, key):
    # Weight decay alone shrinks U; a long rate on one direction stretches it.
    hidden = jnp.zeros((2000, 1, WIDTH)).at[:, 0, 0].set(1.0)
    state = factored_output(jax.random.normal(key, (D, WIDTH)))
    label = jnp.array([3])
    step = lambda s, h: (factored_output_step(s, h, label, 0.1, weight_decay=0.03)[0], None)  # noqa: E731
    shrunk = jax.lax.scan(step, state, hidden)[0]
    assert float(jnp.linalg.norm(shrunk.u, 2)) < 1e-2
    kept = jax.jit(factored_output_stabilise)(shrunk)
    s = jnp.linalg.svd(kept.u, compute_uv=False)
    np.testing.assert_allclose(s, 1.0, rtol=1e-12)
    np.testing.assert_allclose(kept.u @ kept.u_inverse, jnp.eye(WIDTH), atol=1e-12)
    assert worst(factored_output_weights(kept), factored_output_weights(shrunk)) < 1e-12
    again = factored_output_stabilise(kept)
    np.testing.assert_array_equal(again.v, kept.v)


def test_logits_with_a_large_offset_keep_their_variance():
    given = drawn(2, 1, 1000, "float32")
    given = (given[0] + 1000.0, *given[1:])
    state, (losses, _) = run("z", *given)
    with jax.enable_x64(True):
        _, (want, _) = dense("z", *map(widened, given))
        np.testing.assert_allclose(state.mean, widened(given[0]).mean(0), rtol=1e-6)
    assert worst(losses, want) < tolerance("float32", 1000, condition=1000.0)


def test_vmap_and_donation_change_nothing():
    weights, hidden, labels = drawn(3, 4, 2, "float32")
    step = partial(factored_output_step, learning_rate=1.0)
    states = jax.vmap(factored_output)(jnp.stack([weights, weights]))
    together = jax.jit(jax.vmap(step))(states, hidden, labels)
    donated = jax.jit(step, donate_argnums=0)
    for lane in range(2):
        alone = donated(factored_output(weights), hidden[lane], labels[lane])
        assert worst(jax.tree.map(lambda x, i=lane: x[i], together), alone) < tolerance("float32", D)
    # What is not finite shows, and labels outside too.
    for h, c in ((hidden[0].at[0, 0].set(jnp.nan), labels[0]), (hidden[0], labels[0].at[1].set(-1))):
        after, value, _ = donated(factored_output(weights), h, c)
        assert np.isnan(value)
        assert np.isnan(after.scatter).all()


STATE, H, C = factored_output(jnp.eye(5, 3)), jnp.ones((2, 3)), jnp.array([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: factored_output(jnp.ones(3)), ShapeError, r"factored_output: `weights` must have shape \(D, d\); got"),
        (lambda: factored_output(jnp.ones((1, 3))), ShapeError, "factored_output: `weights` must have at least 2 rows"),
        (lambda: factored_output(jnp.eye(3, dtype=int)), DtypeError, "factored_output: `weights` must have a floating"),
        (
            lambda: factored_output_step(STATE, H[:, :2], C, 0.1),
            ShapeError,
            r"factored_output_step: `h` must have shape \(m, 3\) to match `state.mean`",
        ),
        (
            lambda: factored_output_step(STATE, H, C[:1], 0.1),
            ShapeError,
            "factored_output_step: `labels` must have shape",
        ),
        (
            lambda: factored_output_step(STATE, H, C * 1.0, 0.1),
            DtypeError,
            "factored_output_step: `labels` must have an",
        ),
        (
            lambda: factored_output_step(STATE, H, C, -0.1),
            ValueError,
            "factored_output_step: `learning_rate` must be at least 0; got -0.1",
        ),
        (
            lambda: factored_output_step(STATE, H, C, 0.5, weight_decay=2),
            ValueError,
            "factored_output_step: `weight_decay` must be less than 1 / learning_rate, learning_rate = 0.5; got 2",
        ),
        (
            lambda: factored_output_step(STATE, H, C, 0.5, weight_decay=np.float32(-1)),
            ValueError,
            "factored_output_step: `weight_decay` must be at least 0; got -1.0",
        ),
        (
            lambda: factored_output_step(STATE, H, jnp.stack([C, C], 1), 0.5),
            ValueError,
            "factored_output_step: `loss` must be one of several labels an example; got the Z-loss. Pass loss=",
        ),
        (
            lambda: factored_output_step(STATE, H, C, 0.1, loss=lambda c, m, v: c.sum()),
            ShapeError,
            r"factored_output_step: `loss\(...\)` must have shape \(2,\) to match `h`",
        ),
        (
            lambda: factored_output_stabilise(STATE, low=2.0, high=1.0),
            ValueError,
            r"factored_output_stabilise: `low` must be in \(0, high\), high = 1.0; got 2.0",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, sentence):
    with pytest.raises(error, match=f"^{sentence}"):
        call()


def test_labels_too_short_for_the_classes_keep_their_sign(key):
    state = factored_output(jax.random.normal(key, (300, 4)))
    labels = jnp.array([-1, 3], jnp.int8)
    assert np.isnan(jax.jit(factored_output_step)(state, jnp.ones((2, 4)), labels, 0.1)[1])


def test_no_examples_are_named(key):
    with pytest.raises(ShapeError, match="`h` must have at least one row"):
        factored_output_step(factored_output(jnp.eye(4)), jnp.ones((0, 4)), jnp.zeros(0, int), 0.1)
