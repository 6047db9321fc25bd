"""Inputs that the kernel contract is tried on: one case an operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from kernels_pallas import BlockSizes
from kernels_pallas._attention import api, tpu, xla
from tests import interpreters

# Two or three blocks along each axis at the lengths below.
BLOCKS = BlockSizes(128, 256, 128)


def attention(*arrays: jax.Array, implementation: str | None, **flags: Any) -> tuple[jax.Array, jax.Array]:
    """Both outputs, in small blocks."""
    return kernels_pallas.attention(
        *arrays, implementation=implementation, return_lse=True, block_sizes=BLOCKS, **flags
    )


def _canonical(arrays: tuple, flags: dict) -> tuple:
    return api.prepare(*arrays, block_sizes=BLOCKS, **flags)


def _run(forward: Callable, arrays: tuple, flags: dict) -> tuple[jax.Array, jax.Array]:
    config, operands, batch = _canonical(arrays, flags)
    o, lse = forward(config, operands)
    return o.reshape(*batch, *o.shape[1:]), lse.reshape(*batch, *lse.shape[1:])


class AttentionCase:
    """Grouped heads, lengths that no block divides, values of another width."""

    terms = 300
    B, T, S, H, K, D, V = 2, 200, 300, 4, 2, 24, 40
    api = staticmethod(attention)

    @staticmethod
    def implementations() -> dict[str, Callable]:
        return {
            "reference": lambda arrays, flags: attention(*arrays, implementation="reference", **flags),
            "xla": lambda arrays, flags: attention(*arrays, implementation="xla", **flags),
            # What an accelerator without a kernel of its own runs.
            "xla, all heads at once": partial(_run, partial(xla.forward, sequential=False)),
            "tpu, interpreted": lambda arrays, flags: AttentionCase().interpreted(arrays, flags, 0),
        }

    @staticmethod
    def backward() -> dict[str, Callable]:
        def all_heads_at_once(arrays: tuple, flags: dict, cotangents: tuple) -> tuple[jax.Array, ...]:
            config, operands, _ = _canonical(arrays, flags)
            o, lse = xla.forward(config, operands, sequential=False)
            return xla.backward(config, operands, o, lse, *cotangents, sequential=False)

        return {"xla, all heads at once": all_heads_at_once}

    def interpreted(self, arrays: tuple, flags: dict, seed: int) -> tuple[jax.Array, jax.Array]:
        return _run(partial(tpu.forward, interpret=interpreters.tpu_parameters(seed)), arrays, flags)

    def arrays(self, dtype: str, seed: int = 0, **sizes: int) -> tuple[jax.Array, ...]:
        B, T, S, H, K, D, V = (sizes.get(n, getattr(self, n)) for n in "BTSHKDV")
        rng = np.random.default_rng(seed)
        return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, V)))

    def cases(self, dtype: str) -> dict[str, tuple[tuple, dict]]:
        rng = np.random.default_rng(1)
        B, T, S, H = self.B, self.T, self.S, self.H
        ids = lambda n: jnp.asarray(np.sort(rng.integers(-1, 3, (B, n)), axis=1), jnp.int32)  # noqa: E731
        flags: dict[str, dict] = {
            "plain": {},
            "causal": {"causal": True},
            "window": {"window": (40, 3)},
            "soft cap, scale": {"soft_cap": 1.5, "scale": 0.4, "causal": True},
            "bias of heads": {"bias": jnp.asarray(rng.normal(size=(1, H, T, S)), "float32")},
            "bias that hides": {
                "bias": jnp.asarray(rng.choice([0.0, -np.inf, np.finfo("float32").min], (1, 1, T, S)), "float32")
            },
            "bias of keys": {"bias": jnp.asarray(rng.normal(size=(B, 1, 1, S)), "float32"), "soft_cap": 2.0},
            "mask": {"mask": jnp.asarray(rng.random((B, 1, T, S)) < 0.3)},
            "mask of queries": {"mask": jnp.asarray(rng.random((1, H, T, 1)) < 0.5)},
            "segments": {"segment_ids": (ids(T), ids(S)), "causal": True},
            "positions": {
                "q_positions": jnp.arange(T, dtype=jnp.int32) + 60,
                "kv_positions": jnp.asarray(rng.permutation(S), jnp.int32),
                "causal": True,
                "window": (90, None),
            },
            "dropout, offset": {"dropout_rate": 0.3, "dropout_seed": 7, "causal": True, "q_offset": 40},
        }
        return {name: (self.arrays(dtype), f) for name, f in flags.items()}

    def widened(self, flags: dict) -> dict:
        """Flags that mean the same to a float64 run."""
        return flags

    def small(self, dtype: str, seed: int = 0) -> tuple[tuple, dict]:
        return self.arrays(dtype, seed, B=1, T=140, S=140, H=2, K=1, D=8, V=8), {"causal": True}

    def mapped_flags(self) -> dict[str, jax.Array]:
        """Flags that vmap may map on their own, for the inputs of `small`."""
        rng = np.random.default_rng(2)
        return {
            "bias": jnp.asarray(rng.normal(size=(3, 1, 2, 140, 140)), "float32"),
            "mask": jnp.asarray(rng.random((3, 1, 1, 140, 140)) < 0.5),
            "segment_ids": jnp.asarray(np.sort(rng.integers(0, 3, (3, 1, 140)), axis=2), jnp.int32),
            "q_positions": jnp.asarray(rng.integers(0, 140, (3, 140)), jnp.int32),
            "kv_positions": jnp.asarray(rng.integers(0, 140, (3, 140)), jnp.int32),
        }

    def sees_nothing(self) -> tuple[tuple, dict, np.ndarray]:
        mask = np.ones((1, 1, self.T, self.S), bool)
        rows = np.array([0, 7, self.T - 1])
        mask[:, :, rows] = False
        return self.arrays("float32"), {"mask": jnp.asarray(mask)}, rows

    def assert_nothing(self, outputs: tuple, rows: np.ndarray) -> None:
        o, lse = (np.asarray(x) for x in outputs)
        np.testing.assert_array_equal(o[:, rows], 0)
        np.testing.assert_array_equal(lse[:, :, rows], -np.inf)
        assert np.all(np.isfinite(np.delete(lse, rows, axis=2)))

    def nan_from_nothing(self, outputs: tuple) -> jax.Array:
        """A scalar whose cotangents are NaN in the rows that see nothing, and 0 elsewhere."""
        o, lse = outputs
        return jnp.sum(0 * jnp.exp(-lse).swapaxes(1, 2)[..., None] * o)

    def assert_no_gradient(self, gradients: tuple, rows: np.ndarray) -> None:
        for g in gradients:
            assert np.all(np.isfinite(g))
        np.testing.assert_array_equal(np.asarray(gradients[0])[:, rows], 0)

    def padded(self) -> tuple[tuple, tuple, dict, Callable]:
        clean = self.arrays("float32")
        q_ids, kv_ids = np.zeros((self.B, self.T), np.int32), np.zeros((self.B, self.S), np.int32)
        q_ids[:, 150:], kv_ids[:, 290:] = -1, -1
        q, k, v = clean
        dirty = (q.at[:, 150:].set(jnp.nan), k.at[:, 290:].set(jnp.nan), v.at[:, 290:].set(jnp.inf))
        flags = {"segment_ids": (jnp.asarray(q_ids), jnp.asarray(kv_ids))}
        return clean, dirty, flags, lambda outputs: (outputs[0][:, :150], outputs[1][:, :, :150])

    def packed(self) -> tuple[tuple, dict, list]:
        cuts = (0, 60, 75, 200)
        together = self.arrays("float32", S=self.T)
        ids = np.repeat(np.arange(3), np.diff(cuts))[None].repeat(self.B, axis=0)
        pieces = [
            (
                tuple(x[:, a:b] for x in together),
                {"causal": True},
                lambda outputs, a=a, b=b: (outputs[0][:, a:b], outputs[1][:, :, a:b]),
            )
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        return together, {"segment_ids": jnp.asarray(ids, jnp.int32), "causal": True}, pieces

    def compiled(self) -> list[tuple[list, dict]]:
        real = [((2, 4096, 8, 128), jnp.bfloat16), *[((2, 4096, 2, 128), jnp.bfloat16)] * 2]
        odd = [((1, 1000, 4, 80), jnp.bfloat16), ((1, 777, 2, 80), jnp.bfloat16), ((1, 777, 2, 96), jnp.bfloat16)]
        ids = (np.zeros((1, 1000), np.int32), np.zeros((1, 777), np.int32))
        everything = {
            "segment_ids": ids,
            "window": (300, None),
            "soft_cap": 30.0,
            "bias": np.zeros((1, 4, 1, 777), np.float16),
            "mask": np.ones((1, 1, 1000, 777), bool),
            "q_positions": np.arange(1000, dtype=np.int32),
        }
        return [(real, {"causal": True}), (odd, everything)]
