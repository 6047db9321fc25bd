"""Go on from a checkpoint in a process of its own: `python -m tests.transforms.resumed FOLDER` prints every curve."""

import json
import sys
from pathlib import Path

import jax
import optax
import orbax.checkpoint

from benchmarks.training import mean_loss, mixture, network
from jaxnum.curvature import gauss_newton_bartlett
from jaxnum.schedules import wsd
from jaxnum.transforms import (
    adamw_independent,
    adan,
    harp,
    lion,
    mfac,
    mkor,
    mkor_layers,
    mkor_stats,
    n_igt,
    record_norms,
    sophia,
)

STEPS, HALF = 12, 6
RATE = wsd(0.01, STEPS, 2, 5)
SOPHIA = sophia(RATE, gauss_newton_bartlett(jax.random.key(0)), update_interval=4)
OPTIMISERS = {
    "adamw_independent": adamw_independent(0.01, wsd(1.0, STEPS, 2, 5)),
    "adan": optax.chain(record_norms(STEPS), optax.clip_by_global_norm(1.0), adan(RATE, moment_dtype="bfloat16")),
    "harp": harp(RATE, jax.random.key(1)),
    "lion": optax.inject_hyperparams(lion)(RATE),
    "mfac": mfac(RATE, window=4, damping=0.1, momentum=0.9, warm_window=True, window_dtype="bfloat16"),
    "mkor": mkor(RATE, lambda params: mkor_layers(params, "w", "b"), inner=optax.scale_by_adam(), stats_every=4),
    "n_igt": n_igt(RATE),
    "sophia": optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), SOPHIA), 2),
}
INPUTS, LABELS = mixture(0, classes=3, width=4, size=64)


@jax.jit
def start():
    """Parameters and state of every run, and the key that the batches are drawn from."""
    params = network(0, width=4, hidden=6, classes=3)
    return {name: (params, optimiser.init(params)) for name, optimiser in OPTIMISERS.items()}, jax.random.key(2)


def scores(params, inputs, tap=lambda name, x, s: s):
    """What Sophia's estimator draws labels from, and MKOR's statistics are tapped in."""
    for index, layer in enumerate(params[:-1]):
        inputs = jax.numpy.tanh(tap(str(index), inputs, inputs @ layer["w"] + layer["b"]))
    return tap(str(len(params) - 1), inputs, inputs @ params[-1]["w"] + params[-1]["b"])


def tapped(params, inputs, labels, tap):
    """The loss with taps."""
    return optax.softmax_cross_entropy_with_integer_labels(scores(params, inputs, tap), labels).mean()


@jax.jit
def step(carry):
    """Every run one step further, on the same batch, and the loss of each before it: one program, to compile once."""
    runs, key = carry
    key, draw = jax.random.split(key)
    chosen = jax.random.randint(draw, (16,), 0, LABELS.size)
    loss = lambda params: mean_loss(params, INPUTS[chosen], LABELS[chosen])  # noqa: E731
    extra = {"obj_fn": loss, "logits_fn": lambda params: scores(params, INPUTS[chosen])}
    moved, losses = {}, {}
    for name, (params, state) in runs.items():
        losses[name], gradient = jax.value_and_grad(loss)(params)
        if name == "mkor":
            layers = mkor_layers(params, "w", "b")
            extra["stats"] = mkor_stats(tapped, params, INPUTS[chosen], LABELS[chosen], layers=layers)[2]
        updates, state = OPTIMISERS[name].update(gradient, state, params, **extra)
        moved[name] = optax.apply_updates(params, updates), state
    return (moved, key), losses


def curves(carry, steps):
    """The carry after some steps, and the losses of each run in hexadecimal digits, which are exact."""
    lines = {name: [] for name in OPTIMISERS}
    for _ in range(steps):
        carry, losses = step(carry)
        for name, value in losses.items():
            lines[name].append(float(value).hex())
    return carry, lines


def main(folder):
    """The curves of every run from the checkpoint on."""
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        carry = checkpointer.restore(folder, jax.eval_shape(start))
    print(json.dumps(curves(carry, STEPS - HALF)[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
