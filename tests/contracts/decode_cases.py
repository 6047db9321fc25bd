"""Inputs that the kernel contract is tried on for decode attention: the arrays are q and the k and v of a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import KVCache, PagedKVCache, decode_attention
from kernels_pallas._decode_attention import api, tpu, xla
from kernels_pallas._decode_attention.tiles import Tiles
from tests import interpreters

PAGE = 16


def cached(arrays: tuple, flags: dict) -> tuple[tuple, dict]:
    """(q, cache), and the flags that are left; a `block_table` makes the arrays pages."""
    q, k, v = arrays
    flags = dict(flags)
    table = flags.pop("block_table", None)
    if table is not None:
        return (q, PagedKVCache(k, v, table, flags.pop("length"))), flags
    full = jnp.full(k.shape[:-3], k.shape[-3], jnp.int32)
    return (q, KVCache(k, v, flags.pop("length", full))), flags


def decode(*arrays: jax.Array, implementation: str | None, **flags: Any) -> tuple[jax.Array, jax.Array]:
    """Both outputs."""
    given, flags = cached(arrays, flags)
    return decode_attention(*given, implementation=implementation, return_lse=True, **flags)


def _run(forward: Callable, arrays: tuple, flags: dict) -> tuple[jax.Array, jax.Array]:
    given, flags = cached(arrays, flags)
    config, operands, batch = api.prepare(*given, **flags)
    o, lse = forward(config, operands)
    return o.reshape(*batch, *o.shape[1:]), lse.reshape(*batch, *lse.shape[1:])


class DecodeCase:
    """Grouped heads, rows of unequal lengths, a capacity that no block divides, values of another width."""

    terms = 600
    B, T, S, H, K, D, V = 3, 3, 600, 4, 2, 24, 40
    api = staticmethod(decode)

    @staticmethod
    def implementations() -> dict[str, Callable]:
        return {
            "reference": lambda arrays, flags: decode(*arrays, implementation="reference", **flags),
            "xla": lambda arrays, flags: decode(*arrays, implementation="xla", **flags),
            # What an accelerator without a kernel of its own runs.
            "xla, all rows at once": partial(_run, partial(xla.forward, sequential=False)),
            "tpu, interpreted": lambda arrays, flags: DecodeCase().interpreted(arrays, flags, 0),
        }

    @staticmethod
    def backward() -> dict[str, Callable]:
        return {}

    def interpreted(self, arrays: tuple, flags: dict, seed: int) -> tuple[jax.Array, jax.Array]:
        def forward(config: Any, operands: Any) -> tuple[jax.Array, jax.Array]:
            # Several steps a row, the last of them beyond the capacity.
            heads = operands.k.shape[-2]
            tiles = Tiles(PAGE, 5, 5 * PAGE * heads) if operands.table is not None else Tiles(128, 1, 128 * heads)
            return tpu.forward(config, operands, tiles=tiles, interpret=interpreters.tpu_parameters(seed))

        return _run(forward, arrays, flags)

    def arrays(self, dtype: str, seed: int = 0, **sizes: int) -> tuple[jax.Array, ...]:
        B, T, S, H, K, D, V = (sizes.get(n, getattr(self, n)) for n in "BTSHKDV")
        rng = np.random.default_rng(seed)
        return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, V)))

    def cases(self, dtype: str) -> dict[str, tuple[tuple, dict]]:
        rng = np.random.default_rng(1)
        q, k, v = self.arrays(dtype)
        pages = self.S // PAGE + 1
        table = rng.permutation(self.B * pages)[: self.B * (pages - 1)].reshape(self.B, -1)
        in_pages = tuple(
            jnp.asarray(rng.normal(size=(self.B * pages, PAGE, self.K, width)), dtype) for width in (self.D, self.V)
        )
        lengths = jnp.asarray([2, 333, 600], jnp.int32)
        paged = {"block_table": jnp.asarray(table, jnp.int32), "length": jnp.asarray([0, 500, 592], jnp.int32)}
        sinks = jnp.asarray(rng.normal(size=self.H), "float32")
        flags: dict[str, dict] = {
            "lengths": {"length": lengths},
            "beyond the capacity": {"length": jnp.asarray([601, 700, 3], jnp.int32)},
            "soft cap, scale": {"length": lengths, "soft_cap": 1.5, "scale": 0.4},
            "sinks": {"length": jnp.asarray([0, 1, 400], jnp.int32), "sinks": sinks},
            "window, splits": {"length": lengths, "num_splits": 3, "window": (400, None)},
        }
        found = {name: ((q, k, v), f) for name, f in flags.items()}
        found["pages"] = ((q, *in_pages), paged)
        found["window of pages"] = ((q, *in_pages), paged | {"window": (99, 0), "num_splits": 2, "sinks": sinks})
        found["one query, one key head"] = (self.arrays(dtype, T=1, K=1), {"length": lengths, "window": (200, 5)})
        return found

    def widened(self, flags: dict) -> dict:
        """Flags that mean the same to a float64 run."""
        return flags

    def small(self, dtype: str, seed: int = 0) -> tuple[tuple, dict]:
        return self.arrays(dtype, seed, B=1, T=2, S=140, H=2, K=1, D=8, V=8), {"window": (100, 0)}

    def mapped_flags(self) -> dict[str, jax.Array]:
        """Flags that vmap may map on their own, for the inputs of `small`."""
        rng = np.random.default_rng(2)
        return {
            "length": jnp.asarray([[0], [57], [140]], jnp.int32),
            "sinks": jnp.asarray(rng.normal(size=(3, 2)), "float32"),
        }

    def sees_nothing(self) -> tuple[tuple, dict, np.ndarray]:
        """Rows of no token, of fewer tokens than queries, and of enough; which queries of them see nothing [B, T]."""
        lengths = np.array([0, 1, 77])
        blind = lengths[:, None] - self.T + np.arange(self.T) < 0
        return self.arrays("float32"), {"length": jnp.asarray(lengths, jnp.int32)}, blind

    def assert_nothing(self, outputs: tuple, blind: np.ndarray) -> None:
        o, lse = np.asarray(outputs[0]), np.asarray(outputs[1]).swapaxes(1, 2)
        np.testing.assert_array_equal(o[blind], 0)
        np.testing.assert_array_equal(lse[blind], -np.inf)
        assert np.all(np.isfinite(lse[~blind]))

    def nan_from_nothing(self, outputs: tuple) -> jax.Array:
        """A scalar whose cotangents are NaN in the queries that see nothing, and 0 elsewhere."""
        o, lse = outputs
        return jnp.sum(0 * jnp.exp(-lse).swapaxes(1, 2)[..., None] * o)

    def assert_no_gradient(self, gradients: tuple, blind: np.ndarray) -> None:
        for g in gradients:
            assert np.all(np.isfinite(g))
        np.testing.assert_array_equal(np.asarray(gradients[0])[blind], 0)

    def padded(self) -> tuple[tuple, tuple, dict, Callable]:
        clean = self.arrays("float32")
        q, k, v = clean
        lengths, left = np.array([0, 130, 590]), 200
        # What lies past the length and what lies before the window of the first query.
        places = np.arange(self.S)
        low = np.maximum(lengths - self.T - left, 0)[:, None]
        hidden = ((places >= lengths[:, None]) | (places < low))[:, :, None, None]
        dirty = (q, jnp.where(hidden, jnp.nan, k), jnp.where(hidden, jnp.inf, v))
        flags = {"length": jnp.asarray(lengths, jnp.int32), "window": (left, 0)}
        return clean, dirty, flags, lambda outputs: outputs

    def packed(self) -> tuple[tuple, dict, list]:
        """Rows of unequal lengths in one batch, and each of them alone in a cache that it fills."""
        together, lengths = self.arrays("float32"), (5, 128, 517)
        pieces = [
            (
                (together[0][b : b + 1], *(x[b : b + 1, :n] for x in together[1:])),
                {},
                lambda outputs, b=b: tuple(x[b : b + 1] for x in outputs),
            )
            for b, n in enumerate(lengths)
        ]
        return together, {"length": jnp.asarray(lengths, jnp.int32)}, pieces

    def compiled(self) -> list[tuple[list, dict]]:
        bf16 = jnp.bfloat16
        real = [((2, 1, 8, 128), bf16), *[((2, 4096, 2, 128), bf16)] * 2]
        odd = [((2, 3, 6, 80), bf16), ((2, 777, 3, 80), bf16), ((2, 777, 3, 96), bf16)]
        pages = [((2, 1, 8, 128), bf16), *[((40, 16, 2, 128), bf16)] * 2]
        everything = {
            "length": np.array([5, 700], np.int32),
            "window": (300, None),
            "soft_cap": 30.0,
            "sinks": np.zeros(6, np.float32),
            "num_splits": 2,
        }
        paged = {"block_table": np.arange(40, dtype=np.int32).reshape(2, 20), "length": np.array([5, 300], np.int32)}
        return [(real, {}), (odd, everything), (pages, paged)]
