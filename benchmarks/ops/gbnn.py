"""Boosted hidden units: the merged network's predictions, and test errors beside a network trained jointly.

Three tables of 500 examples, 100 hidden units, blocks of one or five, eta 0.5; errors on 2,000 others, means of two
seeds of the boosting, over the mean of three seeds of scikit-learn's network of the same size trained by L-BFGS. Mean
squared errors for "squared", misread labels for the others.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.registry import Params, Row, Target, register

UNITS, BLOCKS, ETA = 100, (1, 5), 0.5
TRAIN, TEST = 500, 2000
TASKS = ("squared", "binary", "softmax")


def make(params: Params) -> tuple:
    keys = jax.random.split(jax.random.key(0), 4)
    d, units = params["width"], params["units"]
    weights = jax.random.normal(keys[1], (d, units)), jnp.zeros(units), jax.random.normal(keys[2], (units, 3)) / units
    return jax.random.normal(keys[0], (params["examples"], d)), *weights, jax.random.normal(keys[3], (units + 1, 3))


def run(params: Params):
    from jaxnum.training import Gbnn, gbnn_predict

    return lambda X, W, b, v, c: gbnn_predict(Gbnn(W, b, v, c, 1, "tanh", False), X)


def reference(params: Params):
    def scores(X, W, b, v, c):
        X, W, b, v, c = (np.asarray(part, np.float64) for part in (X, W, b, v, c))
        return np.tanh(X @ W + b) @ v + c[-1]

    return scores


def table(task: str) -> tuple:
    """Standardised inputs and targets as scikit-learn has them, for training and testing."""
    from sklearn import datasets

    size = TRAIN + TEST
    if task == "squared":
        X, y = datasets.make_friedman1(size, noise=0.5, random_state=0)
        y = (y - y.mean()) / y.std()
    else:
        classes = 2 if task == "binary" else 4
        options = {"n_informative": 8, "n_clusters_per_class": 2, "flip_y": 0.02, "random_state": 0}
        X, y = datasets.make_classification(size, 12, n_classes=classes, **options)
    X = (X - X[:TRAIN].mean(axis=0)) / X[:TRAIN].std(axis=0)
    return X[:TRAIN], y[:TRAIN], X[TRAIN:], y[TRAIN:]


def joint_error(task: str) -> float:
    from sklearn import neural_network

    X, y, test, truth = table(task)
    kind = neural_network.MLPRegressor if task == "squared" else neural_network.MLPClassifier
    errors = []
    for seed in range(3):
        model = kind(hidden_layer_sizes=(UNITS,), activation="tanh", solver="lbfgs", max_iter=1000, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that L-BFGS stopped at its limit
            found = model.fit(X, y).predict(test)
        errors.append(np.mean((found - truth) ** 2) if task == "squared" else np.mean(found != truth))
    return float(np.mean(errors))


def boosted_errors(task: str, block: int) -> tuple[float, float]:
    """Test error with all units and with the first half."""
    from jaxnum.training import gbnn, gbnn_predict

    X, y, test, truth = table(task)
    targets = {"squared": y, "binary": 2.0 * y - 1, "softmax": np.eye(4)[y] if task == "softmax" else None}[task]
    errors = []
    for seed in range(2):
        model = gbnn(
            jnp.asarray(X, jnp.float32),
            jnp.asarray(targets, jnp.float32),
            jax.random.key(seed),
            UNITS,
            units_per_step=block,
            loss=task,
            eta=ETA,
        )
        row = []
        for units in (UNITS, UNITS // 2):
            scores = np.asarray(gbnn_predict(model, jnp.asarray(test, jnp.float32), units))
            if task == "squared":
                row.append(np.mean((scores - truth) ** 2))
            else:
                row.append(np.mean((scores.argmax(-1) if task == "softmax" else scores > 0) != truth))
        errors.append(row)
    return tuple(np.mean(errors, axis=0))


def accuracy() -> dict[str, float]:
    figures = {}
    for task in TASKS:
        joint = joint_error(task)
        figures[f"error_{task}_joint"] = joint
        for block in BLOCKS:
            whole, half = boosted_errors(task, block)
            figures[f"error_over_joint_{task}_{block}"] = whole / joint
            figures[f"half_over_all_{task}_{block}"] = half / whole
    return figures


register(
    Row(
        name="gbnn",
        covers=("gbnn", "gbnn_predict"),
        shapes={"4096x32_100_units": {"examples": 4096, "width": 32, "units": UNITS}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd",),
        tests=("tests/training/test_gbnn.py",),
        targets=(
            Target("error", 1e-5, "Two products in float32."),
            *(
                Target("figure", limit, source, figure=f"{name}_{task}_{block}")
                for name, limit, source in (
                    ("error_over_joint", 1.1, "Test error within 1.1 of a network trained jointly by L-BFGS."),
                    ("half_over_all", 1.15, "With half of the units at most 1.15 of its own full error."),
                )
                for task in TASKS
                for block in BLOCKS
            ),
        ),
        figures={"accuracy": accuracy},
    )
)
