"""Run and compile kernels for chips that are not here. The one file of the tests that may touch private JAX modules."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def tpu_parameters(seed: int = 0) -> Any:
    """Interpreter that simulates a TPU's memory: races are detected, memory not yet written holds NaN."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", random_seed=seed)


def tpu_races_found() -> bool:
    """Whether the last interpreted call had a race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


def compile_for_tpu(function: Callable, topology: str, specs: Sequence[tuple[tuple[int, ...], Any]]) -> Any:
    """Compile with the TPU's own compiler; it refuses what the chip would refuse."""
    sharding = jax.sharding.SingleDeviceSharding(_chips(topology)[0])
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in specs]
    return jax.jit(function).lower(*inputs).compile()


def tpu_mesh(topology: str, **axes: int) -> jax.sharding.Mesh:
    """A mesh over all chips of a topology, with these axes and sizes; programs for it can be compiled, not run."""
    chips = np.array(_chips(topology)).reshape(*axes.values())
    return jax.sharding.Mesh(chips, tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def _chips(topology: str) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail('this test needs the TPU compiler: pip install "jaxnum[tpu-aot]"')
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@contextlib.contextmanager
def gpu_parameters() -> Iterator[Any]:
    """Interpreter that simulates a GPU's shared memory, barriers and TMA: a race raises, unwritten memory holds NaN.

    JAX's interpreter does not look for races in what a wgmma reads; here it does, at the moment the wgmma is issued, in
    the clock of the asynchronous proxy, so that a missing wait for a copy and a missing fence after a store are found.
    A kernel that raises leaves the simulated memory behind; leaving the block clears it. A missing arrival is a hang:
    tests that use this need a timeout.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.fail("the GPU interpreter needs jax 0.12 (Python 3.12)")
    unwatched = gpu_callbacks.wgmma
    gpu_callbacks.wgmma = partial(_watched_wgmma, unwatched)
    try:
        yield plgpu.InterpretGPUParams(
            detect_races=True,
            uninitialized_memory="nan",
            # Copies take turns at so many clocks. A clock that two of them share can hide a race of the second.
            num_tma_threads_per_device=64,
        )
    finally:
        gpu_callbacks.wgmma = unwatched
        gpu_callbacks.reset_gpu_interpret_mode_state()


def _watched_wgmma(run: Callable, **arguments: Any) -> Any:
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    @gpu_callbacks.fail_on_exception
    def check(thread: Any, source_info: Any) -> None:
        memory = gpu_callbacks._get_shared_memory()
        with memory.lock:
            # A time of its own, in both clocks: what comes after is ordered against this read, what came before is not.
            memory.clocks[thread].inc(memory.thread_to_vc_position(thread))
            clock = memory.clocks[thread].copy().async_smem_clock
        for operand in "ab":
            key = gpu_callbacks.HostAllocationKey.from_array(arguments[f"{operand}_allocation_key_as_array"])
            transforms = gpu_callbacks._remove_noop_transforms(arguments[f"{operand}_transforms"])
            access = memory.access(key, jax.tree.map(int, transforms))
            gpu_callbacks.get_races().check_read(thread, clock, key, access, source_info=source_info)

    check(arguments["thread"], arguments["source_info"])
    return run(**arguments)
