"""Train one transformer with each optimiser: `python -m benchmarks.train [--only NAME]`.

The same model, starts and batches for all. The rate of each is the best of four by the loss on files that no run
learned from; with it each optimiser runs from more seeds, and is judged on files that neither taught nor chose. A
record is written after each optimiser, so that an interrupted run loses one; three quarters of an hour for all.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import measure, records, transformer
from benchmarks.report import TRAINING

PyTree = Any
Rate = Callable[[jax.Array], jax.Array]
Carry = tuple[PyTree, PyTree]  # parameters and state
# From parameters, texts and the model's size to the loss, its gradient and the extra arguments of `update`.
Gradient = Callable[[PyTree, jax.Array, transformer.Size], tuple[jax.Array, PyTree, Mapping[str, Any]]]


def plain_gradient(params: PyTree, texts: jax.Array, size: transformer.Size) -> tuple[jax.Array, PyTree, Mapping]:
    """The loss and the gradient alone."""
    return *jax.value_and_grad(transformer.loss)(params, texts, size), {}


def with_logits(params: PyTree, texts: jax.Array, size: transformer.Size) -> tuple[jax.Array, PyTree, Mapping]:
    """Those, and the model from which Sophia-G draws labels of its own."""
    loss, gradient, _ = plain_gradient(params, texts, size)
    return loss, gradient, {"logits_fn": lambda params: transformer.logits(params, texts[:, :-1], size)}


def with_stats(params: PyTree, texts: jax.Array, size: transformer.Size) -> tuple[jax.Array, PyTree, Mapping]:
    """Loss and gradient, and the statistics of every linear layer."""
    from jaxnum.transforms import mkor_stats

    def loss(params: PyTree, tap: transformer.Tap) -> jax.Array:
        return transformer.loss(params, texts, size, tap)

    value, gradient, stats = mkor_stats(loss, params, layers=linear_layers)
    return value, gradient, {"stats": stats}


def linear_layers(params: PyTree) -> Mapping[str, Any]:
    """All matrices but the embeddings."""
    from jaxnum.transforms import mkor_layers

    return mkor_layers(params, "w", "b")


@dataclass(frozen=True)
class Contestant:
    """An optimiser in the table.

    Attributes:
      make: from the rate's schedule to the optimiser, its other settings those of its paper for language models.
      rates: the four peaks.
      gradient: what a step computes before its update.
    """

    make: Callable[[Rate], optax.GradientTransformation]
    rates: tuple[float, ...]
    gradient: Gradient = field(default=plain_gradient)


def matrices(params: PyTree) -> PyTree:
    """True where weights decay: neither biases nor the scales of norms."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def adamw(rate: Rate) -> optax.GradientTransformation:
    return optax.adamw(rate, b2=0.95, weight_decay=0.1, mask=matrices)


def adan(rate: Rate) -> optax.GradientTransformation:
    from jaxnum.transforms import adan

    return adan(rate, weight_decay=0.02, weight_decay_mask=matrices)


def lion(rate: Rate) -> optax.GradientTransformation:
    from jaxnum.transforms import lion

    return lion(rate, b1=0.95, b2=0.98, weight_decay=1.0, weight_decay_mask=matrices)


def sophia_g(rate: Rate) -> optax.GradientTransformation:
    from jaxnum.curvature import gauss_newton_bartlett
    from jaxnum.transforms import sophia

    estimator = gauss_newton_bartlett(jax.random.key(1))
    return sophia(rate, estimator, gamma=0.05, weight_decay=0.2, weight_decay_mask=matrices)


def mkor(rate: Rate) -> optax.GradientTransformation:
    from jaxnum.transforms import mkor

    inner = optax.chain(optax.scale_by_adam(b2=0.95), optax.add_decayed_weights(0.1, matrices))
    return mkor(rate, linear_layers, inner=inner)


def mfac(rate: Rate) -> optax.GradientTransformation:
    from jaxnum.transforms import mfac

    return mfac(rate, window=32, momentum=0.9, warm_window=True)


CONTESTANTS = {
    "adamw": Contestant(adamw, (3e-4, 1e-3, 3e-3, 1e-2)),
    "adan": Contestant(adan, (1e-3, 3e-3, 1e-2, 3e-2)),
    "lion": Contestant(lion, (1e-4, 3e-4, 1e-3, 3e-3)),
    "sophia_g": Contestant(sophia_g, (3e-5, 1e-4, 3e-4, 1e-3), with_logits),
    "mkor": Contestant(mkor, (3e-4, 1e-3, 3e-3, 1e-2), with_stats),
    "mfac": Contestant(mfac, (1e-3, 3e-3, 1e-2, 3e-2)),
}


@dataclass(frozen=True)
class Plan:
    """How long and on what a run trains, and how much is repeated from the checkpoint at half its steps."""

    steps: int = 500
    seeds: int = 3
    rows: int = 8
    judged: int = 256
    repeated: int = 50
    size: transformer.Size = transformer.Size()

    @property
    def half(self) -> int:
        """The step before which the checkpoint is taken."""
        return self.steps // 2

    @property
    def again(self) -> range:
        """The steps that the new process repeats."""
        return range(self.half, min(self.half + self.repeated, self.steps))


PLAN = Plan()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CONTESTANTS, help="one optimiser; default all")
    parser.add_argument("--steps", type=int, default=PLAN.steps, help=f"steps of a run (default {PLAN.steps})")
    parser.add_argument("--rounds", type=int, default=3, help="turns of ten steps timed beside adamw's (default 3)")
    parser.add_argument("--results", type=Path, default=records.RESULTS / TRAINING, help="file to append to")
    parser.add_argument("--go-on", metavar="FOLDER", type=Path, help="print the losses of a run saved in a folder")
    options = parser.parse_args(arguments)
    if options.go_on:
        go_on(options.go_on)
        return 0
    plan, text = replace(PLAN, steps=options.steps), transformer.corpus()
    say = partial(print, file=sys.stderr, flush=True)
    for name in [options.only] if options.only else CONTESTANTS:
        record = contest(name, plan, text, options.rounds, say)
        records.append(options.results, [record])
        print(summary(record), flush=True)
    return 0


def contest(name: str, plan: Plan, text: transformer.Corpus, rounds: int, say: Callable) -> dict[str, Any]:
    """The record of one optimiser: its loss at each rate, and at the best from every seed; a step's time; bytes."""
    step = make_step(name, plan)
    bits: dict[float, float] = {}
    kept = None
    for rate in CONTESTANTS[name].rates:
        before = time.perf_counter()
        half, _ = train(step, start(name, plan), range(plan.half), rate, plan, text.training)
        saved = jax.device_get(half)
        (params, _), losses = train(step, half, range(plan.half, plan.steps), rate, plan, text.training)
        bits[rate] = bits_per_byte(params, plan, text.validation)
        if rate == best_rate(bits):
            kept = saved, losses[: len(plan.again)]
            judged = [bits_per_byte(params, plan, text.test)]
        say(f"{name}: {bits[rate]:.4f} bits a byte at rate {rate:g} ({time.perf_counter() - before:.0f} s)")
    rate = best_rate(bits)
    for seed in range(1, plan.seeds):
        (params, _), _ = train(step, start(name, plan, seed), range(plan.steps), rate, plan, text.training, seed)
        judged.append(bits_per_byte(params, plan, text.test))
        say(f"{name}: {judged[-1]:.4f} bits a byte of the test from seed {seed}")
    params, state = jax.eval_shape(lambda: start(name, plan))
    circumstances = records.circumstances(["optax", "orbax-checkpoint"])
    circumstances["versions"]["python"] = platform.python_version()
    return {
        **circumstances,
        "optimiser": name,
        "rate": rate,
        "bits": float(np.mean(judged)),
        "bits_of_seeds": judged,
        "bits_at": [[rate, value] for rate, value in bits.items()],
        **step_times(name, step, plan, text.training, rounds),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "state_bytes": state_bytes(state),
        "repeated": restored_losses(name, rate, plan, kept[0]) == kept[1],
        "steps": plan.steps,
        "bytes_a_step": plan.rows * plan.size.context,
        "corpus": {"files": text.files, "digest": text.digest},
    }


def best_rate(bits: Mapping[float, float]) -> float:
    """The rate of the least loss; a loss that is not a number is the largest."""
    return min(bits, key=lambda rate: np.nan_to_num(bits[rate], nan=np.inf))


def schedule(rate: Any, steps: int) -> Rate:
    """Warm up over a tenth of the run, decay over its last two fifths; the rate may be traced."""
    from jaxnum.schedules import wsd

    shape = wsd(1.0, steps, max(steps // 10, 1), max(2 * steps // 5, 1), decay="linear", end_ratio=0.0)
    return lambda count: rate * shape(count)


def optimiser(name: str, rate: Any, plan: Plan) -> optax.GradientTransformationExtraArgs:
    """Gradients clipped to norm 1, as papers on language models do, then the contestant."""
    return optax.chain(optax.clip_by_global_norm(1.0), CONTESTANTS[name].make(schedule(rate, plan.steps)))


def start(name: str, plan: Plan, seed: int = 0) -> Carry:
    """Parameters, of a seed the same for all, and the state."""
    params = transformer.init(jax.random.key(seed), plan.size)
    return params, optimiser(name, 0.0, plan).init(params)


def make_step(name: str, plan: Plan) -> Callable[[Carry, jax.Array, jax.Array], tuple[Carry, jax.Array]]:
    """The compiled step, which also gives the loss before it; one program serves all rates, its carry is donated."""

    def step(carry: Carry, texts: jax.Array, rate: jax.Array) -> tuple[Carry, jax.Array]:
        params, state = carry
        loss, gradient, extra = CONTESTANTS[name].gradient(params, texts, plan.size)
        updates, state = optimiser(name, rate, plan).update(gradient, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

    return jax.jit(step, donate_argnums=0)


def train(
    step: Callable, carry: Carry, steps: range, rate: float, plan: Plan, text: np.ndarray, seed: int = 0
) -> tuple[Carry, list[float]]:
    """Take the numbered steps, each on its own batch, whichever optimiser takes it; the carry and the losses."""
    losses = []
    for number in steps:
        texts = transformer.batch(text, seed, number, plan.rows, plan.size.context)
        carry, loss = step(carry, texts, jnp.float32(rate))
        losses.append(float(loss))
    return carry, losses


def bits_per_byte(params: PyTree, plan: Plan, text: np.ndarray) -> float:
    """Mean cross-entropy in bits on windows of a text, the same ones every time."""
    pieces = transformer.windows(text, plan.judged, plan.size.context).reshape(-1, plan.rows, plan.size.context + 1)
    return float(np.mean([_loss(params, texts, plan.size) for texts in pieces]) / np.log(2))


_loss = jax.jit(transformer.loss, static_argnums=2)


def step_times(name: str, step: Callable, plan: Plan, text: np.ndarray, rounds: int) -> dict[str, float]:
    """Seconds of a step, and their ratio to adamw's, in turns of ten steps: ten hold one refresh of curvature."""
    steps = {"adamw": make_step("adamw", plan), name: step}
    carries = {side: start(side, plan) for side in steps}

    def ten(side: str) -> None:
        rate = CONTESTANTS[side].rates[0]
        carries[side] = jax.block_until_ready(train(steps[side], carries[side], range(10), rate, plan, text)[0])

    seconds = measure.interleave({side: partial(ten, side) for side in steps}, rounds)
    ratio = measure.paired_ratio(seconds[name], seconds["adamw"])
    return {"step_s": measure.spread(seconds[name]).median / 10, "step_over_adamw": ratio}


def restored_losses(name: str, rate: float, plan: Plan, carry: Carry) -> list[float]:
    """The losses of a new process that restores a checkpoint of the carry and goes on."""
    import orbax.checkpoint

    with tempfile.TemporaryDirectory() as folder:
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder).resolve() / "half", carry)
        (Path(folder) / "plan.json").write_text(json.dumps([name, rate, asdict(plan)]))
        command = [sys.executable, "-m", "benchmarks.train", "--go-on", folder]
        done = subprocess.run(command, cwd=records.ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return [float.fromhex(line) for line in done.stdout.split()]


def go_on(folder: Path) -> None:
    """Restore what was saved in a folder and print the losses that follow, in hexadecimal digits, which are exact."""
    import orbax.checkpoint

    name, rate, fields = json.loads((folder / "plan.json").read_text())
    plan = Plan(**fields | {"size": transformer.Size(*fields["size"])})
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        carry = checkpointer.restore(folder.resolve() / "half", jax.eval_shape(lambda: start(name, plan)))
    text = transformer.corpus().training
    for loss in train(make_step(name, plan), carry, plan.again, rate, plan, text)[1]:
        print(loss.hex())


def state_bytes(state: PyTree) -> int:
    """Bytes of every leaf of a state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def summary(record: dict[str, Any]) -> str:
    """One record in a line."""
    return (
        f"{record['optimiser']}: {record['bits']:.4f} bits a byte of the test at rate {record['rate']:g}, step "
        f"{record['step_s'] * 1e3:.0f} ms, {record['step_over_adamw']:.3f} of adamw's, state "
        f"{record['state_bytes'] / 2**20:.2f} MiB, restored {'the same' if record['repeated'] else 'ANOTHER'} curve"
    )


if __name__ == "__main__":
    sys.exit(main())
