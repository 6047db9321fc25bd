"""Inputs that the kernel contract is tried on for softmin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from kernels_pallas._softmin import api, tpu
from tests import interpreters


class SoftminCase:
    """x, y, v and epsilon; a block of points y and a part of one, points without mass."""

    terms = 150
    n, m, d = 13, 150, 3

    @staticmethod
    def api(*arrays: jax.Array, implementation: str | None, **flags: Any) -> tuple[jax.Array]:
        return (kernels_pallas.softmin(*arrays, implementation=implementation, **flags),)

    @staticmethod
    def implementations() -> dict[str, Callable]:
        return {
            "reference": lambda arrays, flags: SoftminCase.api(*arrays, implementation="reference", **flags),
            "xla": lambda arrays, flags: SoftminCase.api(*arrays, implementation="xla", **flags),
            "tpu, interpreted": lambda arrays, flags: SoftminCase().interpreted(arrays, flags, 0),
        }

    @staticmethod
    def backward() -> dict[str, Callable]:
        return {}  # that of "xla" is the only one

    def interpreted(self, arrays: tuple, flags: dict, seed: int) -> tuple[jax.Array]:
        config, operands = api.prepare(*arrays, **flags)
        return (tpu.forward(config, operands, interpret=interpreters.tpu_parameters(seed))[0][0],)

    def arrays(self, dtype: str, seed: int = 0, **sizes: int) -> tuple[jax.Array, ...]:
        n, m, d = (sizes.get(name, getattr(self, name)) for name in ("n", "m", "d"))
        rng = np.random.default_rng(seed)
        wide = jnp.promote_types(dtype, "float32")
        x, y = (jnp.asarray(rng.uniform(-1, 1, (k, d)), dtype) for k in (n, m))
        v = np.where(rng.random(m) < 0.1, -np.inf, rng.normal(size=m))
        return x, y, jnp.asarray(v, wide), jnp.asarray(0.5, wide)

    def cases(self, dtype: str) -> dict[str, tuple[tuple, dict]]:
        return {
            "plain": (self.arrays(dtype), {}),
            "one point against one": (self.arrays(dtype, 2, n=1, m=1), {"kind": "euclidean"}),
            "euclidean": (self.arrays(dtype, d=2), {"kind": "euclidean"}),
            "cityblock, many coordinates": (self.arrays(dtype, d=35), {"kind": "cityblock"}),
        }

    def widened(self, flags: dict) -> dict:
        """Flags that mean the same to a float64 run."""
        return flags

    def small(self, dtype: str, seed: int = 0) -> tuple[tuple, dict]:
        return self.arrays(dtype, seed, n=3, m=5, d=2), {}

    def mapped_flags(self) -> dict[str, jax.Array]:
        """Flags that vmap may map on their own: there are none."""
        return {}

    def sees_nothing(self) -> tuple[tuple, dict, np.ndarray]:
        x, y, v, epsilon = self.arrays("float32")
        return (x, y, jnp.full_like(v, -jnp.inf), epsilon), {}, np.arange(self.n)

    def assert_nothing(self, outputs: tuple, rows: np.ndarray) -> None:
        np.testing.assert_array_equal(outputs[0][rows], -np.inf)

    def nan_from_nothing(self, outputs: tuple) -> jax.Array:
        """A scalar whose cotangents are NaN in rows of -inf."""
        return jnp.sum(jnp.where(outputs[0] == -jnp.inf, jnp.nan, 0) * outputs[0])

    def assert_no_gradient(self, gradients: tuple, rows: np.ndarray) -> None:
        for g in gradients:
            np.testing.assert_array_equal(g, 0)

    def padded(self) -> tuple[tuple, tuple, dict, Callable]:
        x, y, v, epsilon = self.arrays("float32")
        dirty = jnp.where((v == -jnp.inf)[:, None], jnp.nan, y)
        return (x, y, v, epsilon), (x, dirty, v, epsilon), {}, lambda outputs: outputs

    def packed(self) -> tuple[tuple, dict, list]:
        """Rows know nothing of each other."""
        x, *rest = self.arrays("float32")
        cuts = ((0, 5), (5, 6), (6, self.n))
        pieces = [((x[a:b], *rest), {}, lambda outputs, a=a, b=b: (outputs[0][a:b],)) for a, b in cuts]
        return (x, *rest), {}, pieces

    def compiled(self) -> list[tuple[list, dict]]:
        f32 = jnp.float32
        shapes = lambda n, m, d, of: [((n, d), of), ((m, d), of), ((m,), f32), ((), f32)]  # noqa: E731
        return [(shapes(8192, 8192, 3, f32), {}), (shapes(777, 1001, 11, jnp.bfloat16), {"kind": "euclidean"})]
