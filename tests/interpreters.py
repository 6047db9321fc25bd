"""Run and compile kernels for chips that are not here. The one file of the tests that may touch private JAX modules."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
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
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail('this test needs the TPU compiler: pip install "jaxnum[tpu-aot]"')
    from jax.experimental import topologies

    chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(chip)
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in specs]
    return jax.jit(function).lower(*inputs).compile()
