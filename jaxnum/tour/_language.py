"""Stop: two byte-level language models of Python's own source files, one of attention, one of gated delta nets."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kernels_pallas
from jaxnum import sequence
from jaxnum.tour.stop import BLUE, GREY, ORANGE, Picture, Stop, curves, figure, image

PyTree = Any

_PROMPT = b"\n    def __init__(self, "
_TEMPERATURE = 0.7
_COLOURS = {"attention": BLUE, "gated delta net": ORANGE}


class Text(NamedTuple):
    """Bytes [n] to learn from and bytes [m] of other files to be judged by, and how many files there are."""

    train: np.ndarray
    held_out: np.ndarray
    files: int


class Mixer(NamedTuple):
    """What lets the bytes of a sequence meet: weights from a key, and x [B, T, width] to the same shape.

    `step`, for a mixer with a state, maps (params, x [B, width], state) to (y, state); `start` is the state of a batch
    before the first byte.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array], jax.Array]
    step: Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, PyTree]] | None = None
    start: Callable[[int], PyTree] | None = None


class Trained(NamedTuple):
    """Bits a byte: (step, bits) on the files held out, and [length] by place in sequences of them."""

    params: PyTree
    judged: list[tuple[int, float]]
    by_place: np.ndarray
    seconds: float


def language(
    *,
    steps: int = 500,
    length: int = 128,
    longer: int = 8,
    written: int = 240,
    batch: int = 8,
    width: int = 128,
    heads: int = 4,
    layers: int = 2,
    seed: int = 0,
) -> Stop:
    """Two byte-level language models of Python's own source files: softmax attention, and a gated delta net.

    Args:
      steps: of training, a multiple of 20 or less than 20.
      length: bytes of a training sequence, and how far back a sample of the model of attention looks.
      longer: how many times `length` the sequences have on which the trained models are compared.
      written: bytes of each sample, the prompt included.
      batch: sequences a step.
      width: of the residual stream.
      heads: of both mixers; width / heads is even.
      layers: blocks.
      seed: of weights, batches and samples.
    """
    text = library_sources()
    mixers = {"attention": softmax(width, heads), "gated delta net": delta(width, heads)}
    found, sizes, samples = {}, {}, {}
    for name, mixer in mixers.items():
        start = model(jax.random.key(seed), mixer, width, layers)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(start))
        found[name] = train(start, mixer, text, steps, length, longer, batch, seed)
        samples[name] = continue_text(
            found[name].params, mixer, jax.random.key(seed + 1), _PROMPT, written, length, samples=2
        )
    packed = 8 * len(zlib.compress(text.held_out.tobytes(), 9)) / text.held_out.size
    last = {name: trained.judged[-1][1] for name, trained in found.items()}
    far = {name: trained.by_place[length:].mean() for name, trained in found.items()}
    both = " and ".join(f"{value:.2f} ({name})" for name, value in last.items())
    return Stop(
        title="Two language models of Python's own sources",
        text=(
            f"Two models of {layers} blocks read the source files of Python's standard library ({text.files} files, "
            f"{text.train.size / 1e6:.1f} MB), {length} bytes at a time, and learn to predict the next one with "
            "optax's AdamW. They differ in what lets the bytes meet: kernels_pallas.attention with rotary positions, "
            "or jaxnum.sequence.gated_delta_net on kernels_pallas.delta_rule, whose memory has a fixed size.",
            f"On files they never saw they end at {both} bits a byte; zlib at its highest level needs {packed:.2f} for "
            f"the same bytes. Behind the {length} bytes of training, up to {longer * length}, the model of attention "
            f"needs {far['attention']:.2f} and the gated delta net {far['gated delta net']:.2f}. The samples continue "
            f"the prompt {_PROMPT.decode().strip()!r} at temperature {_TEMPERATURE}: attention reads its window again "
            "for every byte, the gated delta net takes one step.",
        ),
        finding=f"{both} bits a byte on unseen files after {steps} steps (zlib: {packed:.2f}).",
        rows=(
            ("steps", f"{steps} of {batch} x {length} bytes"),
            ("bits a byte, zlib level 9, same files", f"{packed:.3f}"),
            *(row for name in mixers for row in _rows(name, sizes[name], found[name], length, longer)),
            *(
                (
                    f"{name}: bytes learned from a second, compilation included",
                    f"{steps * batch * length / t.seconds:,.0f}",
                )
                for name, t in found.items()
            ),
        ),
        pictures=(_picture(found, packed, samples, length),),
    )


def _rows(name: str, size: int, trained: Trained, length: int, longer: int) -> list[tuple[str, str]]:
    return [
        (f"{name}: parameters", f"{size:,}"),
        (f"{name}: bits a byte on unseen files, before", f"{trained.judged[0][1]:.3f}"),
        (f"{name}: bits a byte on unseen files, after", f"{trained.judged[-1][1]:.3f}"),
        (f"{name}: the same from byte {length} to byte {longer * length}", f"{trained.by_place[length:].mean():.3f}"),
    ]


def library_sources(limit: int = 6_000_000) -> Text:
    """The modules of Python's standard library, top folder only; every tenth file is held out."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    held_out = b"".join(p.read_bytes() for p in paths[::10])[: limit // 10]
    train = b"".join(p.read_bytes() for i, p in enumerate(paths) if i % 10)[:limit]
    return Text(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8), len(paths))


def softmax(width: int, heads: int) -> Mixer:
    """Causal softmax attention with rotary positions."""

    def init(key: jax.Array) -> PyTree:
        first, second = jax.random.split(key)
        return {"qkv": _matrix(first, width, 3 * width), "out": _matrix(second, width, width)}

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        q, k, v = (t.reshape(*t.shape[:2], heads, -1) for t in jnp.split(x @ params["qkv"], 3, -1))
        return kernels_pallas.attention(_rotated(q), _rotated(k), v, causal=True).reshape(x.shape) @ params["out"]

    return Mixer(init, apply)


def delta(width: int, heads: int) -> Mixer:
    """A gated delta net with as many matrices as `softmax` has, and no positions: its decays and convolution tell."""
    layer = sequence.gated_delta_net(width, heads, value_dim=width // heads, gate=False, eigenvalues="symmetric")
    return Mixer(layer.init, lambda params, x: layer.apply(params, x)[0], layer.step, layer.init_cache)


def _matrix(key: jax.Array, m: int, n: int) -> jax.Array:
    return jax.random.normal(key, (m, n)) * m**-0.5


def model(key: jax.Array, mixer: Mixer, width: int, layers: int) -> PyTree:
    """Weights of a byte-level model: embedding [256, width], shared with the output, and blocks."""
    first, *rest = jax.random.split(key, layers + 1)
    quiet = (2 * layers) ** -0.5

    def block(k: jax.Array) -> PyTree:
        a, b, c = jax.random.split(k, 3)
        mixed = mixer.init(a)
        return {
            "mixer": {**mixed, "out": quiet * mixed["out"]},
            "up": _matrix(b, width, 4 * width),
            "down": quiet * _matrix(c, 4 * width, width),
        }

    return {"bytes": 0.05 * jax.random.normal(first, (256, width)), "blocks": [block(k) for k in rest]}


def logits(params: PyTree, mixer: Mixer, tokens: jax.Array) -> jax.Array:
    """Scores [B, T, 256] of the byte after each of tokens [B, T]."""
    x = params["bytes"][tokens]
    for block in params["blocks"]:
        x = x + mixer.apply(block["mixer"], _normalised(x))
        x = x + _fed_forward(block, x)
    return _normalised(x) @ params["bytes"].T


def step_logits(params: PyTree, mixer: Mixer, token: jax.Array, states: list[PyTree]) -> tuple[jax.Array, list[PyTree]]:
    """Scores [B, 256] of the byte after token [B], and the states of all blocks behind it."""
    x, after = params["bytes"][token], []
    for block, state in zip(params["blocks"], states, strict=True):
        y, state = mixer.step(block["mixer"], _normalised(x), state)
        x = x + y
        x = x + _fed_forward(block, x)
        after.append(state)
    return _normalised(x) @ params["bytes"].T, after


def _fed_forward(block: PyTree, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(_normalised(x) @ block["up"]) @ block["down"]


def _normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary position encoding of x [B, T, H, D]: pairs (i, i + D/2) turn by t 10000^(-2 i / D)."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def bits(params: PyTree, tokens: jax.Array, mixer: Mixer) -> jax.Array:
    """Bits [B, T] of every byte of tokens [B, T + 1] but the first."""
    scores = logits(params, mixer, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]) / jnp.log(2.0)


def train(
    start: PyTree, mixer: Mixer, text: Text, steps: int, length: int, longer: int, batch: int, seed: int
) -> Trained:
    """Train with AdamW, warmed up and then decayed along a cosine, judging twenty times on the way."""
    chunk = max(1, steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, max(1, steps // 20), steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))

    def loss(params: PyTree, tokens: jax.Array) -> jax.Array:
        return jnp.mean(bits(params, tokens, mixer))

    def step(carry: tuple[PyTree, PyTree], tokens: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params, tokens), state, params)
        return (optax.apply_updates(params, updates), state), None

    advance = jax.jit(lambda carry, tokens: jax.lax.scan(step, carry, tokens)[0])
    judge = jax.jit(partial(bits, mixer=mixer))
    random = np.random.default_rng(seed)
    unseen = _sequences(text.held_out, _places(text.held_out, length, 4 * batch), length)
    began = time.perf_counter()
    carry, judged = (start, optimiser.init(start)), [(0, float(jnp.mean(judge(start, unseen))))]
    for done in range(0, steps, chunk):
        places = random.integers(0, text.train.size - length - 1, (chunk, batch))
        carry = advance(carry, _sequences(text.train, places, length))
        judged.append((done + chunk, float(jnp.mean(judge(carry[0], unseen)))))
    seconds = time.perf_counter() - began
    long = _sequences(text.held_out, _places(text.held_out, longer * length, 4 * batch), longer * length)
    return Trained(carry[0], judged, np.mean(judge(carry[0], long), 0), seconds)


def _places(text: np.ndarray, length: int, number: int) -> np.ndarray:
    """Where `number` sequences start that are spread over a text."""
    return np.linspace(0, text.size - length - 2, number).astype(int)


def _sequences(text: np.ndarray, places: np.ndarray, length: int) -> jax.Array:
    """The `length` + 1 bytes that follow each of places [...], as int32 [..., length + 1]."""
    return jnp.asarray(text[places[..., None] + np.arange(length + 1)], jnp.int32)


def continue_text(
    params: PyTree, mixer: Mixer, key: jax.Array, prompt: bytes, written: int, length: int, samples: int = 4
) -> list[str]:
    """What a model makes of the prompt, `samples` times, `written` bytes each, unprintable ones as dots.

    A mixer with a step goes on from its state; one without reads the last `length` bytes again for every byte.
    """
    start = np.zeros((samples, max(written, length)), np.int32)
    start[:, : len(prompt)] = list(prompt)

    def sampled(i: jax.Array, scores: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, i), scores / _TEMPERATURE)

    def reread(i: jax.Array, tokens: jax.Array) -> jax.Array:
        first = jnp.maximum(i - length, 0)
        window = jax.lax.dynamic_slice_in_dim(tokens, first, length, 1)
        return tokens.at[:, i].set(sampled(i, logits(params, mixer, window)[:, i - 1 - first]))

    def go_on(i: jax.Array, carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
        tokens, states = carry
        scores, states = step_logits(params, mixer, tokens[:, i - 1], states)
        # Bytes of the prompt are read, not written.
        return tokens.at[:, i].set(jnp.where(i < len(prompt), tokens[:, i], sampled(i, scores))), states

    if mixer.step is None:
        write = jax.jit(lambda tokens: jax.lax.fori_loop(len(prompt), written, reread, tokens))
    else:
        empty = [mixer.start(samples) for _ in params["blocks"]]
        write = jax.jit(lambda tokens: jax.lax.fori_loop(1, written, go_on, (tokens, empty))[0])
    rows = np.asarray(write(jnp.asarray(start)))
    return ["".join(chr(t) if 32 <= t < 127 or t == 10 else "·" for t in row[:written]) for row in rows]


def _picture(found: dict[str, Trained], packed: float, samples: dict[str, list[str]], length: int) -> Picture:
    canvas, (left, middle, right) = figure(1, 3, size=(13.0, 4.2))
    for name, trained in found.items():
        left.plot(*zip(*trained.judged, strict=True), "o-", color=_COLOURS[name], markersize=3.5, label=name)
        # Means of blocks of places: single ones are noise.
        block = max(1, length // 4)
        means = trained.by_place[: trained.by_place.size // block * block].reshape(-1, block).mean(1)
        middle.plot(block * (np.arange(means.size) + 0.5), means, "o-", color=_COLOURS[name], markersize=3, label=name)
    left.axhline(packed, color=GREY, linestyle="--", linewidth=1.2, label="zlib")
    left.set_ylim(bottom=0)
    curves(left, "unseen files, on the way", "step", "bits a byte", log=False)
    middle.axvline(length, color=GREY, linestyle="--", linewidth=1.2, label="length of training")
    middle.set_ylim(bottom=0)
    curves(middle, "unseen files, longer than in training", "place in the sequence", "bits a byte", log=False)
    image(right, "what they write, blank lines left out")
    shown = []
    for name, own in samples.items():
        for sample in own:
            cut = [line[i : i + 58] for line in sample.split("\n") if line.strip() for i in range(0, len(line), 58)]
            shown.append("\n".join([f"[{name}]", *cut[:7]]))
    right.text(0, 0.98, "\n\n".join(shown), family="monospace", fontsize=6.6, va="top", parse_math=False)
    return Picture(
        "language",
        canvas,
        "Left: loss on the way. Middle: loss by place, in sequences longer than those of training. Right: samples.",
    )
