"""Every difference between the JAX releases that jaxnum supports, and nothing else."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def gpu_load(ref: Any, *, layout: Any, optimized: bool = True) -> Any:
    """`plgpu.load` of a whole ref; jax 0.10 wants an index beside it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def gpu_any_lane(x: Any, bound: float) -> Any:
    """Whether any entry that a warp holds of float32 x [64], one entry a row of a wgmma, is above `bound`: a vote.

    The scalar may differ from warp to warp: nothing that a whole warpgroup does together may depend on it.
    """
    import jax.numpy as jnp
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, nvvm, vector

    splat = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA.reduce(1),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.bool_, layout=splat),
    )
    def vote(_: Any, rows: Any) -> Any:
        i1, i32 = (ir.IntegerType.get_signless(bits) for bits in (1, 32))
        above = [vector.reduction(i1, vector.CombiningKind.OR, x) for x in (rows > bound).registers.flat]
        everyone = arith.constant(i32, ir.IntegerAttr.get(i32, -1))
        found = nvvm.vote_sync(everyone, functools.reduce(arith.ori, above), "any")
        return mgpu.FragmentedArray.splat(found, (), splat.to_mgpu(), is_signed=False)

    # The decorator gives the first argument, which is what the kernel is launched in.
    return vote(x)  # pyright: ignore[reportCallIssue]
