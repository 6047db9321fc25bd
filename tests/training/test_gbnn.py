"""Boosted units: the merged network is the sum of its blocks, residuals by autodiff, and sklearn's view of a layer."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor

from jaxnum.training import gbnn, gbnn_layer, gbnn_predict
from jaxnum.training._gbnn import LOSSES
from kernels_pallas.checks import DtypeError, ShapeError


def features(key, X, r, units, activation):
    """A layer of random features and exact outputs: an inner fit that compiles in no time."""
    W = jax.random.normal(key, (X.shape[1], units), X.dtype)
    b = jnp.ones(units, X.dtype)
    f = jnp.tanh if activation == "tanh" else jax.nn.sigmoid
    hidden = jnp.column_stack([f(X @ W + b), jnp.ones(len(X), X.dtype)])
    out = jnp.linalg.solve(hidden.T @ hidden, hidden.T @ r)
    return W, b, out[:-1], out[-1]


def table(n=120, d=3):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, d))
    return jnp.asarray(X), jnp.asarray(np.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2] + 0.1 * rng.normal(size=n))


def targets(loss, y):
    """Scores as labels of each loss."""
    if loss == "softmax":
        return jax.nn.one_hot(jnp.digitize(y, jnp.array([-0.5, 0.5])), 3, dtype=y.dtype)
    return jnp.sign(y) if loss == "binary" else y


@pytest.mark.parametrize("loss", ["squared", "binary", "softmax"])
def test_the_merged_network_is_the_sum_of_its_blocks(loss, key, x64):
    X, scores = table()
    y = targets(loss, scores)
    rules, eta, J = LOSSES[loss], 0.7, 2
    model = jax.jit(lambda key: gbnn(X, y, key, 8, units_per_step=J, loss=loss, fit=features, eta=eta))(key)
    wide = y.reshape(len(X), -1)

    @jax.jit
    def block(F, key):
        drawing, fitting = jax.random.split(key)
        rows = jax.random.choice(drawing, len(X), (60,), replace=False)
        r = -jax.grad(lambda F: rules.value(wide, F).sum())(F)
        W, b, v, c = features(fitting, X[rows], r[rows], J, "tanh")
        h = jnp.tanh(X @ W + b) @ v + c
        along = lambda rho: rules.value(wide, F + rho * h).sum()  # noqa: E731
        newton = 1.0 if loss == "squared" else -jax.grad(along)(0.0) / jax.hessian(along)(0.0)
        return F + eta * newton * h

    F = jnp.broadcast_to(rules.constant(wide), wide.shape)
    start = rules.value(wide, F).mean()
    for number, one in enumerate(jax.random.split(key, 4)):
        F = block(F, one)
        got = gbnn_predict(model, X, (number + 1) * J)
        np.testing.assert_allclose(got.reshape(F.shape), F, rtol=1e-5, atol=1e-7)
    assert got.shape == y.shape
    np.testing.assert_array_equal(gbnn_predict(model, X), got)
    assert rules.value(wide, F).mean() < start


def test_squared_loss_never_rises_on_the_full_sample(key):
    X, y = (part.astype("float32") for part in table())
    model_of = jax.jit(lambda eta: gbnn(X, y, key, 6, fit=features, eta=eta, subsample=1.0))
    for eta in (1.0, 0.3):
        model = model_of(eta)
        errors = [float(jnp.mean((gbnn_predict(model, X, k) - y) ** 2)) for k in range(7)]
        assert (np.diff(errors) <= 1e-6 * errors[0]).all()
        assert errors[-1] < errors[0]


def test_one_block_is_one_network(key, x64):
    X, y = table()
    model = gbnn(X, y, key, 4, units_per_step=4, fit=features, subsample=1.0, activation="logistic")
    fitting = jax.random.split(jax.random.split(key, 1)[0])[1]
    W, b, v, c = features(fitting, X, (y - y.mean())[:, None], 4, "logistic")
    want = (jax.nn.sigmoid(X @ W + b) @ v + c)[:, 0] + y.mean()
    np.testing.assert_allclose(gbnn_predict(model, X), want, rtol=1e-8)


def test_sklearn_finds_nothing_to_improve_in_a_layer(key, x64):
    X, y = table()
    r = (y - y.mean()) / y.std()
    W, b, v, c = (
        np.asarray(part) for part in jax.jit(lambda key: gbnn_layer(key, X, r[:, None], 2, iterations=1000))(key)
    )
    peer = MLPRegressor(
        hidden_layer_sizes=(2,), activation="tanh", solver="lbfgs", alpha=1e-4, warm_start=True, max_iter=1, tol=1e-10
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        peer.fit(X, r)
        peer.coefs_, peer.intercepts_, peer.max_iter = [W, v], [b, c], 1000
        peer.fit(X, r)
    ours = (np.sum((r - (np.tanh(X @ W + b) @ v + c)[:, 0]) ** 2) + 1e-4 * (np.sum(W**2) + np.sum(v**2))) / (2 * len(X))
    assert ours < 0.5 * 0.9
    np.testing.assert_allclose(peer.loss_, ours, rtol=1e-5)


def test_two_classes_step_as_binary_does(key, x64):
    _, scores = table()
    y = jnp.sign(scores)[:, None]
    F, h = 0.3 * scores[:, None], jnp.sin(scores)[:, None]
    rows = jnp.concatenate([y == 1, y == -1], axis=1).astype(float)
    two = LOSSES["softmax"].newton(rows, jnp.concatenate([F, -F], 1), jnp.concatenate([h, -h], 1))
    np.testing.assert_allclose(two, LOSSES["binary"].newton(y, F, h), rtol=1e-10)


def test_nan_shows_and_a_vanished_step_is_zero(key):
    X, y = (part.astype("float32") for part in table(40))
    for bad in ((X.at[3, 1].set(jnp.nan), y), (X, y.at[3].set(jnp.nan))):
        model = gbnn(*bad, key, 2, fit=features, subsample=1.0)
        assert np.isnan(gbnn_predict(model, X)).all()
    ones = jnp.ones((4, 1))
    assert float(LOSSES["binary"].newton(ones, 200 * ones, ones)) == 0
    assert np.isnan(LOSSES["binary"].newton(ones, 200 * ones, ones * jnp.nan))


def test_bad_input_is_named(key):
    X, y = table(20)
    with pytest.raises(ShapeError, match=r"^gbnn: `y` must have shape \(20,\) to match `X`"):
        gbnn(X, y[:10], key, 2)
    with pytest.raises(ValueError, match="^gbnn: `y` must be of -1 and 1; got others. From 0 and 1"):
        gbnn(X, y, key, 2, loss="binary")
    with pytest.raises(ShapeError, match="^gbnn: `y` must have shape"):
        gbnn(X, jnp.sign(y), key, 2, loss="softmax")
    # Labels come as integers: first what they must become.
    whole = jnp.arange(20) % 3
    with pytest.raises(ShapeError, match="^gbnn: `y` must have shape .* Labels become rows by jax.nn.one_hot"):
        gbnn(X, whole, key, 2, loss="softmax")
    with pytest.raises(ValueError, match="^gbnn: `y` must be of -1 and 1; got others. From 0 and 1"):
        gbnn(X, whole % 2, key, 2, loss="binary")
    with pytest.raises(DtypeError, match=r"^gbnn: `y` must have a floating.* Pass y.astype\(X.dtype\)"):
        gbnn(X, 2 * (whole % 2) - 1, key, 2, loss="binary")
    for rows in (3 * jax.nn.one_hot(whole, 3), 2 * jax.nn.one_hot(whole, 3) - 1 / 3):
        with pytest.raises(ValueError, match="^gbnn: `y` must have rows of probabilities, which sum to 1; got others"):
            gbnn(X, rows, key, 2, loss="softmax")
    with pytest.raises(ValueError, match="^gbnn: `units` must be a multiple of `units_per_step` = 3; got 4"):
        gbnn(X, y, key, 4, units_per_step=3)
    with pytest.raises(DtypeError, match="^gbnn: `X` must have a floating-point dtype"):
        gbnn(X.astype(int), y, key, 2)
    model = gbnn(X, y, key, 4, units_per_step=2, fit=features)
    with pytest.raises(ValueError, match="^gbnn_predict: `num_units` must be a multiple of 2 from 0 to 4; got 3"):
        gbnn_predict(model, X, 3)


def test_nothing_to_fit_is_named(key):
    with pytest.raises(ShapeError, match="gbnn: `X` must have a row and a column"):
        gbnn(jnp.zeros((0, 3)), jnp.zeros(0), key, 2)
    with pytest.raises(ShapeError, match="gbnn: `X` must have a row and a column"):
        gbnn(jnp.zeros((3, 0)), jnp.zeros(3), key, 2)
    with pytest.raises(ValueError, match="gbnn_layer: `units` must be at least 1"):
        gbnn_layer(key, jnp.zeros((3, 1)), jnp.zeros((3, 1)), 0)
    with pytest.raises(DtypeError, match="gbnn_layer: `X` must have a floating-point dtype"):
        gbnn_layer(key, jnp.ones((3, 1), int), jnp.zeros((3, 1)), 1)
