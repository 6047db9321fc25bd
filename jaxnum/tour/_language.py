"""Stop: a byte-level language model with `kernels_pallas.attention` on Python's own source files."""

from __future__ import annotations

import os
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kernels_pallas
from jaxnum.tour.stop import BLUE, GREY, ORANGE, Picture, Stop, curves, figure, image

PyTree = Any

_PROMPT = b"\n    def __init__(self, "
_TEMPERATURE = 0.7


class Text(NamedTuple):
    """Bytes [n] to learn from and bytes [m] of other files to be judged by, and how many files there are."""

    train: np.ndarray
    held_out: np.ndarray
    files: int


class Trained(NamedTuple):
    """Bits a byte: at every step on its own batch, and (step, bits) on the files held out."""

    params: PyTree
    bits: np.ndarray
    judged: list[tuple[int, float]]
    seconds: float


def language(
    *,
    steps: int = 1000,
    length: int = 128,
    written: int = 240,
    batch: int = 8,
    width: int = 128,
    heads: int = 4,
    layers: int = 2,
    seed: int = 0,
) -> Stop:
    """A byte-level language model with `kernels_pallas.attention`, trained on Python's own source files.

    Args:
      steps: of training, a multiple of 20 or less than 20.
      length: bytes of a training sequence, and how far back a sample looks.
      written: bytes of each sample, the prompt included.
      batch: sequences a step.
      width: of the residual stream.
      heads: of the attention; width / heads is even.
      layers: transformer blocks.
      seed: of weights, batches and samples.
    """
    text = library_sources()
    start = transformer(jax.random.key(seed), width, layers)
    trained = train(start, text, steps, length, batch, heads, seed)
    samples = continue_text(trained.params, jax.random.key(seed + 1), _PROMPT, written, length, heads)
    packed = 8 * len(zlib.compress(text.held_out.tobytes(), 9)) / text.held_out.size
    parameters = sum(leaf.size for leaf in jax.tree.leaves(start))
    (_, first), (_, last) = trained.judged[0], trained.judged[-1]
    return Stop(
        title="A language model of Python's own sources",
        text=(
            f"A transformer of {layers} blocks and {parameters:,} parameters reads the source files of Python's "
            f"standard library ({text.files} files, {text.train.size / 1e6:.1f} MB), {length} bytes at a time, and "
            "learns to predict the next one with optax's AdamW. Its attention is kernels_pallas.attention, causal, "
            "forward and backward.",
            f"On files it never saw the model starts at {first:.2f} bits a byte and ends at {last:.2f}; zlib at its "
            f"highest level needs {packed:.2f} for the same bytes. The samples continue the prompt "
            f"{_PROMPT.decode().strip()!r}, one byte at a time, at temperature {_TEMPERATURE}.",
        ),
        finding=f"{last:.2f} bits a byte on unseen files after {steps} steps (zlib: {packed:.2f}).",
        rows=(
            ("parameters", f"{parameters:,}"),
            ("steps", f"{steps} of {batch} x {length} bytes"),
            ("bits a byte on unseen files, before", f"{first:.3f}"),
            ("bits a byte on unseen files, after", f"{last:.3f}"),
            ("bits a byte, zlib level 9, same files", f"{packed:.3f}"),
            ("bytes learned from a second, compilation included", f"{steps * batch * length / trained.seconds:,.0f}"),
        ),
        pictures=(_picture(trained, packed, samples),),
    )


def library_sources(limit: int = 6_000_000) -> Text:
    """The modules of Python's standard library, top folder only; every tenth file is held out."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    held_out = b"".join(p.read_bytes() for p in paths[::10])[: limit // 10]
    train = b"".join(p.read_bytes() for i, p in enumerate(paths) if i % 10)[:limit]
    return Text(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8), len(paths))


def transformer(key: jax.Array, width: int, layers: int) -> PyTree:
    """Weights of a byte-level transformer: embedding [256, width], shared with the output, and blocks."""

    def matrix(k: jax.Array, m: int, n: int, gain: float = 1.0) -> jax.Array:
        return jax.random.normal(k, (m, n)) * (gain * m**-0.5)

    def block(k: jax.Array) -> PyTree:
        a, b, c, d = jax.random.split(k, 4)
        quiet = (2 * layers) ** -0.5
        return {
            "qkv": matrix(a, width, 3 * width),
            "out": matrix(b, width, width, quiet),
            "up": matrix(c, width, 4 * width),
            "down": matrix(d, 4 * width, width, quiet),
        }

    first, *rest = jax.random.split(key, layers + 1)
    return {"bytes": 0.05 * jax.random.normal(first, (256, width)), "blocks": [block(k) for k in rest]}


def logits(params: PyTree, tokens: jax.Array, heads: int) -> jax.Array:
    """Scores [B, T, 256] of the byte after each of tokens [B, T]."""
    x = params["bytes"][tokens]
    for block in params["blocks"]:
        q, k, v = jnp.split(_normalised(x) @ block["qkv"], 3, -1)
        q, k, v = (t.reshape(*t.shape[:2], heads, -1) for t in (q, k, v))
        mixed = kernels_pallas.attention(_rotated(q), _rotated(k), v, causal=True)
        x = x + mixed.reshape(x.shape) @ block["out"]
        x = x + jax.nn.gelu(_normalised(x) @ block["up"]) @ block["down"]
    return _normalised(x) @ params["bytes"].T


def _normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary position encoding of x [B, T, H, D]: pairs (i, i + D/2) turn by t 10000^(-2 i / D)."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def bits(params: PyTree, tokens: jax.Array, heads: int) -> jax.Array:
    """Mean bits a byte over tokens [B, T + 1]."""
    scores = logits(params, tokens[:, :-1], heads)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])) / jnp.log(2.0)


def train(start: PyTree, text: Text, steps: int, length: int, batch: int, heads: int, seed: int) -> Trained:
    """Train with AdamW, warmed up and then decayed along a cosine, judging twenty times on the way."""
    chunk = max(1, steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, max(1, steps // 20), steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))

    def step(carry: tuple[PyTree, PyTree], tokens: jax.Array) -> tuple[tuple[PyTree, PyTree], jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(bits)(params, tokens, heads)
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    advance = jax.jit(lambda carry, tokens: jax.lax.scan(step, carry, tokens))
    judge = jax.jit(partial(bits, heads=heads))
    random = np.random.default_rng(seed)
    unseen = _sequences(text.held_out, np.linspace(0, text.held_out.size - length - 2, 4 * batch).astype(int), length)
    began = time.perf_counter()
    carry, values, judged = (start, optimiser.init(start)), [], [(0, float(judge(start, unseen)))]
    for done in range(0, steps, chunk):
        places = random.integers(0, text.train.size - length - 1, (chunk, batch))
        carry, value = advance(carry, _sequences(text.train, places, length))
        values.append(np.asarray(value))
        judged.append((done + chunk, float(judge(carry[0], unseen))))
    return Trained(carry[0], np.concatenate(values), judged, time.perf_counter() - began)


def _sequences(text: np.ndarray, places: np.ndarray, length: int) -> jax.Array:
    """The `length` + 1 bytes that follow each of places [...], as int32 [..., length + 1]."""
    return jnp.asarray(text[places[..., None] + np.arange(length + 1)], jnp.int32)


def continue_text(
    params: PyTree, key: jax.Array, prompt: bytes, written: int, length: int, heads: int, samples: int = 4
) -> list[str]:
    """What the model makes of the prompt, `samples` times, `written` bytes each, unprintable ones as dots."""
    start = np.zeros((samples, max(written, length)), np.int32)
    start[:, : len(prompt)] = list(prompt)

    def step(i: jax.Array, tokens: jax.Array) -> jax.Array:
        first = jnp.maximum(i - length, 0)
        window = jax.lax.dynamic_slice_in_dim(tokens, first, length, 1)
        scores = logits(params, window, heads)[:, i - 1 - first] / _TEMPERATURE
        return tokens.at[:, i].set(jax.random.categorical(jax.random.fold_in(key, i), scores))

    tokens = jax.jit(lambda tokens: jax.lax.fori_loop(len(prompt), written, step, tokens))(jnp.asarray(start))
    return ["".join(chr(t) if 32 <= t < 127 or t == 10 else "·" for t in row[:written]) for row in np.asarray(tokens)]


def _picture(trained: Trained, packed: float, samples: list[str]) -> Picture:
    canvas, (left, right) = figure(1, 2, size=(10.0, 4.2))
    left.plot(np.arange(1, trained.bits.size + 1), trained.bits, color=BLUE, alpha=0.35, label="batch", linewidth=0.9)
    left.plot(*zip(*trained.judged, strict=True), "o-", color=ORANGE, markersize=3.5, label="unseen files")
    left.axhline(packed, color=GREY, linestyle="--", linewidth=1.2, label="zlib, unseen files")
    left.set_ylim(bottom=0)
    curves(left, "bits a byte", "step", "bits a byte", log=False)
    image(right, f"{len(samples)} samples, blank lines left out")
    wrapped = [
        [line[i : i + 62] for line in sample.split("\n") if line.strip() for i in range(0, len(line), 62)]
        for sample in samples
    ]
    shown = "\n\n".join("\n".join(lines[:8]) for lines in wrapped)
    right.text(0, 0.98, shown, family="monospace", fontsize=7.6, va="top", parse_math=False)
    return Picture("language", canvas, "Left: loss on the way. Right: what the model writes, continuing the prompt.")
