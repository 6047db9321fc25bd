"""Checks that the recurrences share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import checks

IMPLEMENTATIONS = (None, "reference", "xla", "tpu", "gpu")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


def check_implementation(
    name: str, implementation: str | None, unsupported: dict[str, Callable], config: Any, operands: Any
) -> None:
    """Raise with the reason when a named implementation cannot do a call.

    Args:
      name: of the public function.
      implementation: as given.
      unsupported: by implementation, `unsupported(config, operands)` gives the reason, or None.
      config: static part of the call.
      operands: arrays of the call.
    """
    checks.choice(name, "implementation", implementation, IMPLEMENTATIONS)
    if implementation != "reference" and any(map(_explicitly_sharded, jax.tree.leaves(operands))):
        raise NotImplementedError(
            f"{name}: explicitly sharded arrays are served by implementation='reference' only. "
            "Call it inside jax.shard_map over batch and channels, or use a mesh of automatic axes."
        )
    reason = unsupported[implementation](config, operands) if implementation in unsupported else None
    if reason:
        raise NotImplementedError(
            f"{name}: implementation {implementation!r} cannot do this call: {reason}. "
            "Use implementation=None, which falls back to 'xla'."
        )


def not_on_tpu(config: Any, operands: Any) -> str | None:
    """Why a TPU kernel cannot do a call, or None."""
    leaves = jax.tree.leaves(operands)
    for x in leaves:
        if x.dtype in (jnp.float64, jnp.float16):
            return f"TPUs have no {x.dtype.name}; cast to float32 or bfloat16"
    if not all(isinstance(size, int) for x in leaves for size in x.shape):
        return "its blocks need sizes that are known, not symbolic ones"
    return None


def not_on_gpu(config: Any, operands: Any) -> str | None:
    """Why a GPU kernel cannot do a call: there is none."""
    return "it has no kernel for GPUs, where 'xla' runs it in steps that double"


def _explicitly_sharded(x: jax.Array) -> bool:
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding is not None and any(axis is not None for axis in sharding.spec)
