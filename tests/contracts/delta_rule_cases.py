"""Inputs that the kernel contract is tried on for the delta rule.

The arrays are q, k, v, beta, the initial state and, where there are any, the log decays. Keys have length 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from kernels_pallas._delta_rule import arguments, xla
from tests import interpreters

CHUNK = 16


def _named(arrays: tuple, flags: dict) -> dict[str, Any]:
    names = ("q", "k", "v", "beta", "initial_state", "log_decay")
    return {"chunk_size": CHUNK} | dict(zip(names, arrays, strict=False)) | flags


def delta_rule(*arrays: jax.Array, implementation: str | None, **flags: Any) -> tuple[jax.Array, jax.Array]:
    """Both outputs, in small chunks."""
    return kernels_pallas.delta_rule(**_named(arrays, flags), implementation=implementation)


def _run(forward: Callable, arrays: tuple, flags: dict) -> tuple[jax.Array, jax.Array]:
    config, operands, finish = arguments.prepare(**_named(arrays, flags))
    return finish(*forward(config, operands))


def _pulled(backward: Callable, arrays: tuple, flags: dict, cotangents: tuple) -> tuple[jax.Array, ...]:
    """Cotangents of the arrays by a backward pass, under what is done to arguments and results around it."""

    def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        config, operands, finish = arguments.prepare(**_named(arrays, flags))

        @jax.custom_vjp
        def recurrence(operands: Any) -> tuple[jax.Array, jax.Array]:
            return xla.forward(config, operands, sequential=True)

        def pull(operands: Any, given: tuple) -> tuple:
            found = backward(config, operands, *given)
            return (type(operands)(*found[:5], log_decay=found[5] if len(found) == 6 else None),)

        recurrence.defvjp(lambda operands: (recurrence(operands), operands), pull)
        return finish(*recurrence(operands))

    return jax.vjp(run, *arrays)[1](cotangents)


class DeltaRuleCase:
    """Lengths that no chunk divides, sizes that are no multiples of 8, grouped heads, decays of every shape."""

    terms = 50
    B, T, H, K, V = 2, 41, 2, 10, 7
    api = staticmethod(delta_rule)

    @staticmethod
    def implementations() -> dict[str, Callable]:
        return {
            "reference": lambda arrays, flags: delta_rule(*arrays, implementation="reference", **flags),
            "xla": lambda arrays, flags: delta_rule(*arrays, implementation="xla", **flags),
            # What an accelerator without a kernel of its own runs.
            "xla, all heads at once": partial(_run, partial(xla.forward, sequential=False)),
            "tpu, interpreted": lambda arrays, flags: DeltaRuleCase().interpreted(arrays, flags, 0),
        }

    @staticmethod
    def backward() -> dict[str, Callable]:
        def interpreted(*inputs: Any) -> tuple[jax.Array, ...]:
            from kernels_pallas._delta_rule import tpu_backward

            return tpu_backward.backward(*inputs, interpret=interpreters.tpu_parameters())

        return {
            "xla, all heads at once": partial(_pulled, partial(xla.backward, sequential=False)),
            "tpu, interpreted": partial(_pulled, interpreted),
        }

    def interpreted(self, arrays: tuple, flags: dict, seed: int) -> tuple[jax.Array, jax.Array]:
        from kernels_pallas._delta_rule import tpu

        return _run(partial(tpu.forward, interpret=interpreters.tpu_parameters(seed)), arrays, flags)

    def arrays(self, dtype: str, seed: int = 0, gates: str = "none", **sizes: int) -> tuple[jax.Array, ...]:
        B, T, H, K, V, HV, n = (
            sizes.get(name, getattr(self, name, None)) for name in ("B", "T", "H", "K", "V", "HV", "n")
        )
        HV, n = HV or H, n or 1
        rng = np.random.default_rng(seed)
        wide = jnp.promote_types(dtype, "float32")
        q, k, v = (rng.normal(size=s) for s in ((B, T, H, K), (B, T * n, H, K), (B, T * n, HV, V)))
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        beta, state = rng.uniform(0, 2, size=(B, T * n, HV)), rng.normal(size=(B, HV, K, V))
        found = (*(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(beta, wide), jnp.asarray(state, wide))
        if gates == "none":
            return found
        shape = {"token": (B, T, HV), "channel": (B, T, HV, K)}[gates]
        strong = rng.choice([0.0, -0.1, -1.0, -30.0, -1e4], size=shape, p=[0.1, 0.5, 0.3, 0.05, 0.05])
        return (*found, jnp.asarray(rng.uniform(0.5, 1.0, size=shape) * strong, wide))

    def cases(self, dtype: str) -> dict[str, tuple[tuple, dict]]:
        ids = jnp.asarray(np.repeat([[4, -1, 4, 7, 5]], [9, 3, 8, 13, 8], axis=1).repeat(self.B, 0), jnp.int32)
        segments = {"segment_ids": ids}
        return {
            "none, grouped heads": (self.arrays(dtype, H=1, HV=2), {}),
            "token, scale": (self.arrays(dtype, gates="token"), {"scale": 0.7}),
            "channel, segments": (self.arrays(dtype, gates="channel"), segments),
            "token, segments, two updates, l2norm": (
                self.arrays(dtype, gates="token", n=2),
                segments | {"updates_per_token": 2, "l2norm": True},
            ),
        }

    def widened(self, flags: dict) -> dict:
        """Flags that mean the same to a float64 run."""
        return flags

    def small(self, dtype: str, seed: int = 0) -> tuple[tuple, dict]:
        return self.arrays(dtype, seed, "token", B=1, T=20, H=1, K=5, V=3), {}

    def mapped_flags(self) -> dict[str, jax.Array]:
        """Flags that vmap may map on their own, for the inputs of `small`."""
        rng = np.random.default_rng(2)
        return {"segment_ids": jnp.asarray(np.sort(rng.integers(-1, 3, (3, 1, 20)), axis=2), jnp.int32)}

    def sees_nothing(self) -> tuple[tuple, dict, np.ndarray]:
        rows = np.array([0, 7, self.T - 1])
        ids = np.zeros((self.B, self.T), np.int32)
        ids[:, rows] = -1
        return self.arrays("float32", gates="token"), {"segment_ids": jnp.asarray(ids)}, rows

    def assert_nothing(self, outputs: tuple, rows: np.ndarray) -> None:
        o, state = (np.asarray(x) for x in outputs)
        np.testing.assert_array_equal(o[:, rows], 0)
        assert np.all(np.delete(o, rows, axis=1) != 0)
        assert np.all(np.isfinite(state))

    def nan_from_nothing(self, outputs: tuple) -> jax.Array:
        """A scalar whose cotangents are NaN in the rows that see nothing, and 0 elsewhere."""
        hidden = outputs[0] == 0
        return jnp.sum(jnp.where(hidden, jnp.nan, 0) * outputs[0])

    def assert_no_gradient(self, gradients: tuple, rows: np.ndarray) -> None:
        for g in gradients:
            assert np.all(np.isfinite(g))
        for g in (*gradients[:4], gradients[5]):
            np.testing.assert_array_equal(np.asarray(g)[:, rows], 0)

    def padded(self) -> tuple[tuple, tuple, dict, Callable]:
        clean = self.arrays("float32", gates="channel")
        hidden = np.zeros((self.B, self.T), bool)
        hidden[:, 5:9] = hidden[:, 35:] = True
        ids = jnp.asarray(np.where(hidden, -1, 3), jnp.int32)
        q, k, v, beta, state, log_decay = clean
        dirty = (*(jnp.where(hidden[..., None, None], jnp.nan, x) for x in (q, k, v)),)
        # Positive decays would be refused where their value is known.
        dirty = (*dirty, jnp.where(hidden[..., None], jnp.nan, beta), state)
        dirty = (*dirty, jnp.where(hidden[..., None, None], -jnp.inf, log_decay))
        return clean, dirty, {"segment_ids": ids}, lambda outputs: outputs

    def packed(self) -> tuple[tuple, dict, list]:
        cuts = (0, 13, 20, 41)
        together = self.arrays("float32", gates="token")
        ids = np.repeat(np.arange(3), np.diff(cuts))[None].repeat(self.B, axis=0)
        pieces = []
        for a, b in zip(cuts, cuts[1:], strict=False):
            q, k, v, beta, state, log_decay = together
            start = state if a == 0 else jnp.zeros_like(state)
            pieces.append(
                (
                    (*(x[:, a:b] for x in (q, k, v, beta)), start, log_decay[:, a:b]),
                    {},
                    # The state of a document that ends inside the row is not among the outputs.
                    lambda outputs, a=a, b=b: (outputs[0][:, a:b], *outputs[1:][: b == self.T]),
                )
            )
        return together, {"segment_ids": jnp.asarray(ids, jnp.int32)}, pieces

    def compiled(self) -> list[tuple[list, dict]]:
        bf16, f32 = jnp.bfloat16, jnp.float32
        gates = [((1, 2048, 4), f32), ((1, 4, 128, 128), f32), ((1, 2048, 4), f32)]
        real = [*[((1, 2048, 4, 128), bf16)] * 3, *gates]
        ids = np.zeros((1, 777), np.int32)
        odd = [*[((1, 777, 2, 80), bf16)] * 2, ((1, 777, 2, 96), bf16), ((1, 777, 2), f32), ((1, 2, 80, 96), f32)]
        odd.append(((1, 777, 2, 80), f32))
        return [(real, {"chunk_size": None}), (odd, {"segment_ids": ids, "chunk_size": None})]
