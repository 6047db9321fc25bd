"""Every difference between the JAX releases that jaxnum supports, and nothing else."""

from __future__ import annotations

import inspect
from typing import Any


def gpu_load(ref: Any, *, layout: Any, optimized: bool = True) -> Any:
    """`plgpu.load` of a whole ref; jax 0.10 wants an index beside it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)
