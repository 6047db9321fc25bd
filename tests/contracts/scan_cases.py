"""Inputs that the kernel contract is tried on for the linear and the selective scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from kernels_pallas._parallel_scan._linear_scan import api as linear
from kernels_pallas._parallel_scan._linear_scan import tpu as linear_tpu
from kernels_pallas._parallel_scan._linear_scan import xla as linear_xla
from kernels_pallas._parallel_scan._selective_scan import api as selective
from kernels_pallas._parallel_scan._selective_scan import arguments, tpu, tpu_backward, xla
from tests import interpreters

# Two or three blocks of time at the lengths below.
TOKENS = 16


class ScanCase:
    """What the two scans have in common: a class gives `arrays`, of which the last is the initial state."""

    terms = 41
    B, T = 2, 41

    def arrays(self, dtype: str, seed: int = 0, **sizes: int) -> tuple[jax.Array, ...]:
        raise NotImplementedError

    def widened(self, flags: dict) -> dict:
        """Flags that mean the same to a float64 run."""
        return flags

    def small(self, dtype: str, seed: int = 0) -> tuple[tuple, dict]:
        return self.arrays(dtype, seed, B=1, T=20, D=3), {}

    def mapped_flags(self) -> dict[str, jax.Array]:
        """Flags that vmap may map on their own, for the inputs of `small`."""
        ids = np.sort(np.random.default_rng(2).integers(-1, 3, (3, 1, 20)), axis=2)
        return {"segment_ids": jnp.asarray(ids, jnp.int32)}

    def segments(self) -> jax.Array:
        """Padding inside a segment, at its end and at the end of the row; an id that returns."""
        ids = np.repeat([[4, -1, 4, 7, -1, 4, -1]], [9, 3, 8, 9, 2, 6, 4], axis=1)
        return jnp.asarray(ids.repeat(self.B, 0), jnp.int32)

    def sees_nothing(self) -> tuple[tuple, dict, np.ndarray]:
        rows = np.array([0, 7, self.T - 1])
        ids = np.zeros((self.B, self.T), np.int32)
        ids[:, rows] = -1
        return self.arrays("float32"), {"segment_ids": jnp.asarray(ids)}, rows

    def assert_nothing(self, outputs: tuple, rows: np.ndarray) -> None:
        out, state = (np.asarray(x) for x in outputs)
        np.testing.assert_array_equal(out[:, rows], 0)
        assert np.all(np.delete(out, rows, axis=1) != 0)
        assert np.all(np.isfinite(state))

    def nan_from_nothing(self, outputs: tuple) -> jax.Array:
        """A scalar whose cotangents are NaN in the padding, and 0 elsewhere."""
        return jnp.sum(jnp.where(outputs[0] == 0, jnp.nan, 0) * outputs[0])

    def assert_no_gradient(self, gradients: tuple, rows: np.ndarray) -> None:
        for g in gradients:
            assert np.all(np.isfinite(g))
            if g.shape[:2] == (self.B, self.T):
                np.testing.assert_array_equal(np.asarray(g)[:, rows], 0)

    def of_tokens(self, x: jax.Array, T: int) -> bool:
        return x.ndim == 3 and x.shape[1] == T

    def padded(self) -> tuple[tuple, tuple, dict, Callable]:
        clean = self.arrays("float32")
        ids = self.segments()
        hidden = (ids < 0)[:, :, None]
        dirty = tuple(jnp.where(hidden, jnp.nan, x) if self.of_tokens(x, self.T) else x for x in clean)
        return clean, dirty, {"segment_ids": ids}, lambda outputs: outputs

    def packed(self) -> tuple[tuple, dict, list]:
        cuts = (0, 13, 20, self.T)
        together = self.arrays("float32")
        ids = np.repeat(np.arange(3), np.diff(cuts))[None].repeat(self.B, axis=0)
        pieces = []
        for a, b in zip(cuts, cuts[1:], strict=False):
            arrays = tuple(x[:, a:b] if self.of_tokens(x, self.T) else x for x in together)
            start = together[-1] if a == 0 else jnp.zeros_like(together[-1])
            # The state of a document that ends inside the row is not among the outputs.
            cut = lambda outputs, a=a, b=b: (outputs[0][:, a:b], *outputs[1:][: b == self.T])  # noqa: E731
            pieces.append(((*arrays[:-1], start), {}, cut))
        return together, {"segment_ids": jnp.asarray(ids, jnp.int32)}, pieces


# --- The linear scan. -------------------------------------------------------------------------------------------------


class LinearScanCase(ScanCase):
    """a, b and the initial state: decays of both signs, and exact zeros."""

    D = 5

    @staticmethod
    def api(*arrays: jax.Array, implementation: str | None, **flags: Any) -> tuple[jax.Array, jax.Array]:
        return kernels_pallas.linear_scan(*arrays, implementation=implementation, **flags)

    @staticmethod
    def implementations() -> dict[str, Callable]:
        return {
            "reference": lambda arrays, flags: LinearScanCase.api(*arrays, implementation="reference", **flags),
            "xla": lambda arrays, flags: LinearScanCase.api(*arrays, implementation="xla", **flags),
            # What an accelerator without a kernel of its own runs.
            "xla, in steps that double": partial(_linear, partial(linear_xla.forward, sequential=False)),
            "tpu, interpreted": lambda arrays, flags: LinearScanCase().interpreted(arrays, flags, 0),
        }

    @staticmethod
    def backward() -> dict[str, Callable]:
        def interpreted(*inputs: Any) -> tuple[jax.Array, ...]:
            return linear_tpu.backward(*inputs, tokens=TOKENS, interpret=interpreters.tpu_parameters())

        return {
            "xla, in steps that double": partial(_linear_pulled, partial(linear_xla.backward, sequential=False)),
            "tpu, interpreted": partial(_linear_pulled, interpreted),
        }

    def interpreted(self, arrays: tuple, flags: dict, seed: int) -> tuple[jax.Array, jax.Array]:
        parameters = interpreters.tpu_parameters(seed)
        return _linear(partial(linear_tpu.forward, tokens=TOKENS, interpret=parameters), arrays, flags)

    def arrays(self, dtype: str, seed: int = 0, **sizes: int) -> tuple[jax.Array, ...]:
        B, T, D = (sizes.get(n, getattr(self, n)) for n in "BTD")
        rng = np.random.default_rng(seed)
        a = rng.uniform(-1, 1, size=(B, T, D)) * (rng.random((B, T, D)) < 0.9)
        state = jnp.asarray(rng.normal(size=(B, D)), jnp.promote_types(dtype, "float32"))
        return jnp.asarray(a, dtype), jnp.asarray(rng.normal(size=(B, T, D)), dtype), state

    def cases(self, dtype: str) -> dict[str, tuple[tuple, dict]]:
        a, *rest = self.arrays(dtype, D=130)
        return {
            "plain": (self.arrays(dtype), {}),
            "segments, wide decays": ((a.astype(rest[-1].dtype), *rest), {"segment_ids": self.segments()}),
            "segments, reverse": (self.arrays(dtype), {"segment_ids": self.segments(), "reverse": True}),
        }

    def compiled(self) -> list[tuple[list, dict]]:
        bf16, f32 = jnp.bfloat16, jnp.float32
        real = [((2, 4096, 1024), f32), ((2, 4096, 1024), bf16), ((2, 1024), f32)]
        odd = [*[((1, 777, 80), bf16)] * 2, ((1, 80), f32)]
        return [(real, {}), (odd, {"reverse": True, "segment_ids": np.zeros((1, 777), np.int32)})]


def _linear(forward: Callable, arrays: tuple, flags: dict) -> tuple[jax.Array, jax.Array]:
    config, operands, call = linear.prepare(*arrays, **flags)
    return call.finish(*forward(config, operands))


def _linear_pulled(backward: Callable, arrays: tuple, flags: dict, cotangents: tuple) -> tuple[jax.Array, ...]:
    """Cotangents of the arrays by a backward pass, under what is done to arguments and results around it."""

    def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        config, operands, call = linear.prepare(*arrays, **flags)

        @jax.custom_vjp
        def scan(operands: Any) -> tuple[jax.Array, jax.Array]:
            return linear_xla.forward(config, operands, sequential=True)

        def forward(operands: Any) -> tuple:
            h, final = scan(operands)
            return (h, final), (operands.a, h, operands.initial)

        scan.defvjp(forward, lambda saved, given: (type(operands)(*backward(config, *saved, *given)),))
        return call.finish(*scan(operands))

    return jax.vjp(run, *arrays)[1](cotangents)


# --- The selective scan. ----------------------------------------------------------------------------------------------


class SelectiveScanCase(ScanCase):
    """u, delta, A, B, C and the initial state."""

    D, N, G = 6, 3, 1

    @staticmethod
    def api(*arrays: jax.Array, implementation: str | None, **flags: Any) -> tuple[jax.Array, jax.Array]:
        return kernels_pallas.selective_scan(**_named(arrays, flags), implementation=implementation)

    @staticmethod
    def implementations() -> dict[str, Callable]:
        return {
            "reference": lambda arrays, flags: SelectiveScanCase.api(*arrays, implementation="reference", **flags),
            "xla": lambda arrays, flags: SelectiveScanCase.api(*arrays, implementation="xla", **flags),
            "xla, in steps that double": partial(_selective, partial(xla.forward, sequential=False)),
            "tpu, interpreted": lambda arrays, flags: SelectiveScanCase().interpreted(arrays, flags, 0),
        }

    @staticmethod
    def backward() -> dict[str, Callable]:
        interpreted = {"interpret": interpreters.tpu_parameters()}
        return {
            "xla, in steps that double": partial(
                _selective_pulled, partial(xla.forward, sequential=False), partial(xla.backward, sequential=False)
            ),
            "tpu, interpreted": partial(
                _selective_pulled, partial(tpu.forward, **interpreted), partial(tpu_backward.backward, **interpreted)
            ),
        }

    def interpreted(self, arrays: tuple, flags: dict, seed: int) -> tuple[jax.Array, jax.Array]:
        return _selective(partial(tpu.forward, interpret=interpreters.tpu_parameters(seed)), arrays, flags)

    def arrays(self, dtype: str, seed: int = 0, **sizes: int) -> tuple[jax.Array, ...]:
        B, T, D, N, G = (sizes.get(n, getattr(self, n)) for n in "BTDNG")
        rng = np.random.default_rng(seed)
        wide = jnp.promote_types(dtype, "float32")
        u, delta = (jnp.asarray(rng.normal(size=(B, T, D)), dtype) for _ in range(2))
        rates = jnp.asarray(-np.exp(rng.normal(size=(D, N))), wide)
        weights = (B, T, N) if G == 1 else (B, T, G, N)
        found = (u, delta, rates, *(jnp.asarray(rng.normal(size=weights), dtype) for _ in range(2)))
        return (*found, jnp.asarray(rng.normal(size=(B, D, N)), wide))

    def cases(self, dtype: str) -> dict[str, tuple[tuple, dict]]:
        rng = np.random.default_rng(1)
        wide = jnp.promote_types(dtype, "float32")
        # Rounded, so that all dtypes share one truth.
        rounded = lambda shape, of: jnp.asarray(rng.normal(size=shape), "bfloat16").astype(of)  # noqa: E731
        around = {
            "D": rounded(self.D, wide),
            "delta_bias": rounded(self.D, wide),
            "z": rounded((self.B, self.T, self.D), dtype),
        }
        segments = {"segment_ids": self.segments()}
        return {
            "plain": (self.arrays(dtype, D=130, B=1), {}),
            "segments, groups": (self.arrays(dtype, G=2), segments | around),
            "segments, reverse, symmetric": (
                self.arrays(dtype),
                segments | {"reverse": True, "eigenvalues": "symmetric"},
            ),
        }

    def widened(self, flags: dict) -> dict:
        """Flags that mean the same to a float64 run."""
        floats = {name: np.asarray(flags[name], np.float64) for name in ("D", "delta_bias", "z") if name in flags}
        return flags | floats

    def small(self, dtype: str, seed: int = 0) -> tuple[tuple, dict]:
        return self.arrays(dtype, seed, B=1, T=20, D=3, N=2), {}

    def compiled(self) -> list[tuple[list, dict]]:
        bf16, f32 = jnp.bfloat16, jnp.float32

        def shapes(B: int, T: int, D: int, N: int) -> list:
            rows, weights = ((B, T, D), bf16), ((B, T, N), bf16)
            return [rows, rows, ((D, N), f32), weights, weights, ((B, D, N), f32)]

        ids = np.zeros((1, 777), np.int32)
        return [(shapes(2, 4096, 2048, 16), {}), (shapes(1, 777, 200, 50), {"segment_ids": ids, "reverse": True})]


def _named(arrays: tuple, flags: dict) -> dict[str, Any]:
    names = ("u", "delta", "A", "B", "C", "initial_state")
    return {"chunk_size": TOKENS} | dict(zip(names, arrays, strict=True)) | flags


def _selective(forward: Callable, arrays: tuple, flags: dict) -> tuple[jax.Array, jax.Array]:
    config, operands, call = arguments.prepare(**_named(arrays, flags))
    return call.finish(*forward(config, operands))


def _selective_pulled(
    forward: Callable, backward: Callable, arrays: tuple, flags: dict, cotangents: tuple
) -> tuple[jax.Array, ...]:
    """Cotangents of the arrays by a pair of passes, under what is done to arguments and results around them."""

    def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        config, operands, call = arguments.prepare(**_named(arrays, flags))

        @jax.custom_vjp
        def scan(operands: Any) -> tuple[jax.Array, jax.Array]:
            return forward(config, operands)

        def keep(operands: Any) -> tuple:
            y, final, states = forward(replace(config, keeps=True), operands)
            return (y, final), (operands, states)

        scan.defvjp(keep, lambda saved, given: (selective.Operands(*backward(config, *saved, *given)),))
        return call.finish(*scan(operands))

    return jax.vjp(run, *arrays)[1](cotangents)
