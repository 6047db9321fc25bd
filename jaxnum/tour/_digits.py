"""Stop: handwritten digits by a small network, trained by AdamW, Adan, Sophia and MKOR."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnum.curvature import gauss_newton_bartlett
from jaxnum.tour.stop import BLUE, GREEN, ORANGE, PURPLE, Picture, Stop, curves, figure, image
from jaxnum.transforms import adan, mkor, mkor_layers, mkor_stats, sophia

PyTree = Any

COLOURS = {"AdamW": ORANGE, "adan": GREEN, "sophia": BLUE, "mkor": PURPLE}


class Data(NamedTuple):
    """Images [n, 64] in [0, 1] and their labels [n], for training, choosing the learning rate, and testing."""

    train: tuple[jax.Array, jax.Array]
    choose: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


class Method(NamedTuple):
    """An optimiser by its learning rate, the rates it is tried with, and what `update` needs beside the gradient.

    `gradient(params, x, y)` gives the loss, its gradient and the extra arguments.
    """

    make: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]
    gradient: Callable[[PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree, dict[str, Any]]]


class Run(NamedTuple):
    """One method at its chosen learning rate."""

    rate: float
    losses: np.ndarray
    chosen_loss: float
    accuracy: float
    params: PyTree


def digits(*, epochs: int = 25, width: int = 64, batch: int = 64, seed: int = 0) -> Stop:
    """Handwritten digits by a small network, trained by AdamW, `adan`, `sophia` and `mkor` from the same start.

    Args:
      epochs: passes over the training images.
      width: units of both hidden layers.
      batch: images a step.
      seed: of the split, the start and the batches.
    """
    data = load(seed)
    start = network(jax.random.key(seed), (64, width, width, 10))
    batches = _batches(seed, data.train[0].shape[0], epochs, batch)
    tried = methods(jax.random.key(seed + 1), mkor_layers(start, "w", "b"))
    runs = {name: train(method, start, data, batches) for name, method in tried.items()}
    parameters = sum(leaf.size for leaf in jax.tree.leaves(start))
    return Stop(
        title="Handwritten digits, by four methods",
        text=(
            f"A network with two hidden layers of {width} units learns {data.train[0].shape[0]} of scikit-learn's "
            "8 x 8 handwritten digits. All methods start from the same weights and see the same batches; each is "
            f"trained with {len(tried['AdamW'].rates)} learning rates at once under vmap, and keeps the one of least "
            f"loss on {data.choose[0].shape[0]} digits set aside. {data.test[0].shape[0]} others test it.",
            "adan extrapolates by the change of the gradient. sophia divides the momentum by an estimate of the "
            "curvature, the Gauss-Newton-Bartlett one, taken afresh every tenth step from labels drawn from the "
            "model's own prediction. mkor multiplies the gradient of each layer by the inverses of two covariances, "
            "kept up to date by updates of rank one. All are optax transformations: the training loop is the same.",
        ),
        finding="Test accuracy " + ", ".join(f"{run.accuracy:.1%} by {name}" for name, run in runs.items()) + ".",
        rows=(
            ("parameters", f"{parameters:,}"),
            ("steps", f"{batches.shape[0]} of {batch} digits"),
            *((f"learning rate chosen, {name}", f"{run.rate:g}") for name, run in runs.items()),
            *(
                (f"training loss over the last epoch, {name}", f"{_last(run, epochs):.2e}")
                for name, run in runs.items()
            ),
            *((f"loss on the digits set aside, {name}", f"{run.chosen_loss:.4f}") for name, run in runs.items()),
            *((f"test accuracy, {name}", f"{run.accuracy:.2%}") for name, run in runs.items()),
        ),
        pictures=(_picture(runs, data),),
    )


def methods(key: jax.Array, layers: dict[str, Any]) -> dict[str, Method]:
    """The methods that are compared, each with the rates that suit it."""
    rates = (0.0003, 0.001, 0.003, 0.01, 0.03)

    def plain(params: PyTree, x: jax.Array, y: jax.Array) -> tuple[jax.Array, PyTree, dict[str, Any]]:
        return *jax.value_and_grad(loss)(params, x, y), {}

    def with_logits(params: PyTree, x: jax.Array, y: jax.Array) -> tuple[jax.Array, PyTree, dict[str, Any]]:
        return *jax.value_and_grad(loss)(params, x, y), {"logits_fn": partial(logits, x=x)}

    def with_stats(params: PyTree, x: jax.Array, y: jax.Array) -> tuple[jax.Array, PyTree, dict[str, Any]]:
        value, gradient, stats = mkor_stats(loss, params, x, y, layers=layers)
        return value, gradient, {"stats": stats}

    def by_sophia(rate: Any) -> optax.GradientTransformation:
        return sophia(rate, gauss_newton_bartlett(key), gamma=0.05, b1=0.9, weight_decay=0.1)

    return {
        "AdamW": Method(lambda rate: optax.adamw(rate, weight_decay=0.01), rates, plain),
        "adan": Method(lambda rate: adan(rate, weight_decay=0.01), rates, plain),
        "sophia": Method(by_sophia, rates, with_logits),
        "mkor": Method(lambda rate: mkor(rate, layers, weight_decay=0.01), (0.01, 0.03, 0.1, 0.3, 1.0), with_stats),
    }


def load(seed: int) -> Data:
    """scikit-learn's digits, shuffled and split 60 : 15 : 25."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(bunch.target.size)
    x = jnp.asarray(bunch.data[order] / 16, jnp.float32)
    y = jnp.asarray(bunch.target[order], jnp.int32)
    cuts = [round(share * order.size) for share in (0, 0.6, 0.75, 1)]
    return Data(*((x[a:b], y[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)))


def network(key: jax.Array, sizes: tuple[int, ...]) -> PyTree:
    """Weights of a fully connected network, scaled by the square root of 2 / inputs."""
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [{"w": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)} for k, m, n in shapes]


def _untapped(name: str, x: jax.Array, s: jax.Array) -> jax.Array:
    return s


def logits(params: PyTree, x: jax.Array, tap: Callable = _untapped) -> jax.Array:
    """The network's logits [n, 10] at images [n, 64]; `tap` sees each layer's input and output, as mkor_stats asks."""
    *hidden, last = params
    for i, layer in enumerate(hidden):
        x = jax.nn.relu(tap(str(i), x, x @ layer["w"] + layer["b"]))
    return tap(str(len(hidden)), x, x @ last["w"] + last["b"])


def loss(params: PyTree, x: jax.Array, y: jax.Array, tap: Callable = _untapped) -> jax.Array:
    """Mean cross-entropy, in nats a digit."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, x, tap), y))


def train(method: Method, start: PyTree, data: Data, batches: jax.Array) -> Run:
    """Train with every learning rate, which falls to 0 along a cosine, and keep the best on `data.choose`."""

    @jax.jit
    @jax.vmap
    def run(rate: jax.Array) -> tuple[PyTree, jax.Array]:
        schedule = optax.cosine_decay_schedule(1.0, batches.shape[0])
        optimiser = optax.with_extra_args_support(method.make(lambda count: rate * schedule(count)))

        def step(carry: tuple[PyTree, PyTree], index: jax.Array) -> tuple[tuple[PyTree, PyTree], jax.Array]:
            params, state = carry
            value, gradient, extra = method.gradient(params, data.train[0][index], data.train[1][index])
            updates, state = optimiser.update(gradient, state, params, **extra)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (start, optimiser.init(start)), batches)
        return params, losses

    trained, losses = run(jnp.asarray(method.rates))
    chosen = np.asarray(jax.vmap(lambda p: loss(p, *data.choose))(trained))
    best = int(np.nanargmin(chosen))
    params = jax.tree.map(lambda leaf: leaf[best], trained)
    right = jnp.argmax(logits(params, data.test[0]), -1) == data.test[1]
    return Run(method.rates[best], np.asarray(losses[best]), float(chosen[best]), float(jnp.mean(right)), params)


def _batches(seed: int, n: int, epochs: int, batch: int) -> jax.Array:
    """Indices [steps, batch]: a fresh order every epoch, without its incomplete last batch."""
    random = np.random.default_rng(seed)
    orders = [random.permutation(n)[: n // batch * batch].reshape(-1, batch) for _ in range(epochs)]
    return jnp.asarray(np.concatenate(orders), jnp.int32)


def _last(run: Run, epochs: int) -> float:
    return float(run.losses[-(run.losses.size // epochs) :].mean())


def _picture(runs: dict[str, Run], data: Data) -> Picture:
    canvas, (left, right) = figure(1, 2, size=(9.5, 3.8))
    for name, run in runs.items():
        width = max(1, run.losses.size // 25)
        smooth = np.convolve(run.losses, np.ones(width) / width, "valid")
        steps = np.arange(smooth.size) + width / 2
        left.plot(steps, smooth, color=COLOURS[name], linewidth=1.8, label=f"{name}, learning rate {run.rate:g}")
    curves(left, "training loss, a running mean", "step", "cross-entropy, nats a digit")
    x, y = (np.asarray(part) for part in data.test)
    guesses = np.asarray(jnp.argmax(logits(runs["sophia"].params, data.test[0]), -1))
    # Wrong ones first, so that the picture shows what is hard.
    order = np.argsort(guesses == y, kind="stable")[:40]
    right.imshow(np.block([[_tile(x[i]) for i in row] for row in order.reshape(5, 8)]), cmap="gray_r")
    for place, i in enumerate(order):
        colour = "#3f9b6a" if guesses[i] == y[i] else "#c0392b"
        right.text(place % 8 * 10 + 9, place // 8 * 10 + 9.2, str(guesses[i]), color=colour, fontsize=9, ha="right")
    image(right, "test digits and sophia's reading, mistakes first in red")
    return Picture(
        "digits", canvas, "Left: loss of each method. Right: test digits as the network of sophia reads them."
    )


def _tile(digit: np.ndarray) -> np.ndarray:
    return np.pad(digit.reshape(8, 8), 1)
