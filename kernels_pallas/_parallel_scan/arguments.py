"""Checks that the recurrences share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import checks, dispatch

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
    dispatch.check_implementation(name, implementation, unsupported, config, operands, "batch and channels")


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
