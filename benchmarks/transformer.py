"""A byte-level transformer of a million parameters, and the Python standard library's source for it to learn.

Parameters are plain trees. Every product of weights and its input pass through `tap`, for methods that want to know
the layers' inputs and the gradients at their outputs (`jaxnum.transforms.mkor_stats`).
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kernels_pallas

PyTree = Any
# From the path of a layer, its input [..., d_in] and its output [..., d_out] to that output.
Tap = Callable[[str, jax.Array, jax.Array], jax.Array]

EVERY = 10
# Which of so many files, in the order of names, choose the rates and which judge what was chosen.
VALIDATION, TEST = 9, 4
_LEFT_OUT = {"__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests"}


class Size(NamedTuple):
    """What a model is made of."""

    width: int = 160
    layers: int = 3
    heads: int = 4
    context: int = 128
    vocabulary: int = 256


class Corpus(NamedTuple):
    """Bytes to learn, to choose and to judge by, from different files."""

    training: np.ndarray  # [n] uint8
    validation: np.ndarray  # [m] uint8
    test: np.ndarray  # [k] uint8
    files: int
    digest: str  # of all, so that two records say whether they read the same


def corpus(folder: Path | None = None) -> Corpus:
    """The source of the standard library, without its tests: of every ten files one chooses and one judges.

    The digest changes with the version of Python, and bits a byte of different digests must not be compared.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    kept = [name for name in names if not _LEFT_OUT & set(name.split("/"))]
    texts = [(folder / name).read_bytes() for name in kept]
    learned = [text for index, text in enumerate(texts) if index % EVERY not in (VALIDATION, TEST)]
    parts = learned, texts[VALIDATION::EVERY], texts[TEST::EVERY]
    joined = [np.frombuffer(b"\n".join(part), np.uint8) for part in parts]
    digest = hashlib.sha256(b"".join(part.tobytes() for part in joined)).hexdigest()[:12]
    return Corpus(*joined, files=len(kept), digest=digest)


def batch(text: np.ndarray, seed: int, step: int, rows: int, context: int) -> np.ndarray:
    """Windows [rows, context + 1] of a text at random places that depend on seed and step alone."""
    starts = np.random.default_rng((seed, step)).integers(0, text.size - context, rows)
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def windows(text: np.ndarray, rows: int, context: int) -> np.ndarray:
    """The first windows [rows, context + 1] of equal distances over a text."""
    starts = np.linspace(0, text.size - context - 1, rows).astype(np.int64)
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def init(key: jax.Array, size: Size) -> PyTree:
    """Parameters, float32: matrices normal with variance 1 / d_in, those that add to the stream smaller with depth.

    Bytes are of the size of what the first block adds to them: with the customary 0.02 they drown in it, and a hundred
    steps of adamw end 0.2 bits higher.
    """
    keys = iter(jax.random.split(key, 3 + 4 * size.layers))
    d = size.width

    def layer(d_in: int, d_out: int, scale: float = 1.0) -> dict[str, jax.Array]:
        weights = jax.random.normal(next(keys), (d_in, d_out)) * scale / d_in**0.5
        return {"w": weights, "b": jnp.zeros(d_out)}

    residual = (2 * size.layers) ** -0.5
    blocks = [
        {
            "norm_1": jnp.ones(d),
            "qkv": layer(d, 3 * d),
            "out": layer(d, d, residual),
            "norm_2": jnp.ones(d),
            "up": layer(d, 4 * d),
            "down": layer(4 * d, d, residual),
        }
        for _ in range(size.layers)
    ]
    return {
        "bytes": jax.random.normal(next(keys), (size.vocabulary, d)),
        "positions": 0.1 * jax.random.normal(next(keys), (size.context, d)),
        "blocks": blocks,
        "norm": jnp.ones(d),
        "logits": layer(d, size.vocabulary),
    }


def untapped(name: str, x: jax.Array, s: jax.Array) -> jax.Array:
    """The output as it is."""
    del name, x
    return s


def logits(params: PyTree, tokens: jax.Array, size: Size, tap: Tap = untapped) -> jax.Array:
    """Scores [B, T, vocabulary] of the byte after each of tokens [B, T]."""

    def linear(name: str, layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return tap(name, x, x @ layer["w"] + layer["b"])

    rows, length = tokens.shape
    x = params["bytes"][tokens] + params["positions"][:length]
    for index, block in enumerate(params["blocks"]):
        y = linear(f"blocks/{index}/qkv", block["qkv"], _norm(x, block["norm_1"]))
        q, k, v = jnp.moveaxis(y.reshape(rows, length, 3, size.heads, -1), 2, 0)
        seen = kernels_pallas.attention(q, k, v, causal=True).reshape(rows, length, -1)
        x = x + linear(f"blocks/{index}/out", block["out"], seen)
        y = jax.nn.gelu(linear(f"blocks/{index}/up", block["up"], _norm(x, block["norm_2"])))
        x = x + linear(f"blocks/{index}/down", block["down"], y)
    return linear("logits", params["logits"], _norm(x, params["norm"]))


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def loss(params: PyTree, texts: jax.Array, size: Size, tap: Tap = untapped) -> jax.Array:
    """Mean cross-entropy, in nats a byte, of texts [B, T + 1]."""
    scores = logits(params, texts[:, :-1], size, tap)
    return optax.softmax_cross_entropy_with_integer_labels(scores, texts[:, 1:]).mean()
