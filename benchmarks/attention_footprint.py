"""What attention's TPU kernel occupies in VMEM, by the compiler: `python -m benchmarks.attention_footprint`.

`kernels_pallas.choose_attention_blocks` predicts the VMEM of a choice of blocks. Its windows and scratch follow from
the kernel; what the compiler adds, and how many tiles of scores it keeps in VMEM for want of registers, does not. Here
both are read from compiles for TPU v4, v5e, v5p and v6e, with the room that the compiler grants a kernel and the
bundles a step costs beside its products, and written to `kernels_pallas/_attention_io/tpu.json`, which the model reads.

Every compile runs in a process of its own. Needs the extra `tpu-aot`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records, tpu_schedule
from kernels_pallas import BlockSizes
from kernels_pallas._choose_attention_blocks import score_bytes, tpu_windows

RESULTS = records.ROOT / "kernels_pallas" / "_attention_io" / "tpu.json"


class Work(NamedTuple):
    """A call whose operands are too large for VMEM, so that the compiler leaves them outside and moves windows."""

    batch: int = 2
    heads: int = 16
    length: int = 16384
    dim: int = 128
    v_dim: int = 128
    dtype: str = "bfloat16"
    causal: bool = False


# What the constants are fitted to: blocks of all proportions, both widths of a number, masked tiles, wide heads.
FIT = (
    (Work(), (512, 4096, 1024)),
    (Work(), (1024, 1024, 1024)),
    (Work(), (128, 128, 128)),
    (Work(causal=True), (1024, 1024, 1024)),
    (Work(causal=True), (1024, 1024, 512)),
    (Work(dtype="float32"), (512, 512, 512)),
    (Work(dim=256, v_dim=256), (512, 1024, 512)),
)
# The step whose bundles beside its products are the price of a step.
STEP = (Work(), (128, 128, 128))

_ALLOCATION = re.compile(r"(#allocation\d+(?:_spill)?) \[[^\n]*space=vmem, size = (0x[0-9a-f]+), scoped")
# What the compiler says of a kernel that fits the memory of the chip but not its limit, and of one that fits neither.
_LIMIT = re.compile(r"limit (\d+(?:\.\d+)?)M")
_CAPACITY = re.compile(r"would exceed memory \(size=(\d+)\)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_footprint", description="See the module.")
    parser.add_argument("--chip", nargs="+", choices=tpu_schedule.TOPOLOGIES, default=list(tpu_schedule.TOPOLOGIES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    table = json.loads(options.results.read_text()) if options.results.exists() else {}
    for generation in options.chip:
        room = limit(generation)
        compiles = [figures(generation, work, blocks) for work, blocks in FIT]
        table[generation] = fit(compiles) | {
            "limit_bytes": room,
            "compiles": compiles,
            "date": records.now(),
            "versions": {name: records.version(name) for name in ("jax", "libtpu")},
        }
        summary = {name: table[generation][name] for name in ("score_tiles", "internal_bytes", "limit_bytes")}
        print(generation, summary | {"step_bundles": table[generation]["step_bundles"]}, flush=True)
        options.results.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
    return 0


def figures(generation: str, work: Work, blocks: Sequence[int]) -> dict[str, Any]:
    """Compile once; bytes of windows and scratch, bytes of spilled registers, bundles, and those the products need.

    Raises:
      tpu_schedule.CompileError: the compiler refused the kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        macs = _compile("attention", generation, work, blocks, folder)["macs"]
        [listing] = Path(folder).glob("*attention_forward*-[0-9][0-9]-post-ra.txt")
        held, spilled = read_allocations(listing.read_text())
        scheduled = tpu_schedule.read_dump(Path(folder))
    return {
        "work": work._asdict(),
        "blocks": list(blocks),
        "held_bytes": held,
        "spilled_bytes": spilled,
        "bundles": scheduled["cost"],
        "floor": macs / (scheduled["units"] * tpu_schedule.MXU_WIDTH[generation] ** 2),
    }


def fit(compiles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Constants that bound every one of the compiles.

    `internal_bytes`: what is held beyond the windows and scratch of the model; `score_tiles`: how many times the
    scores under way the spilled registers are, rounded up to two digits; `step_bundles`: bundles a step takes beside
    its products.
    """
    internal, tiles = 0, 0.0
    for compiled in compiles:
        work, blocks = Work(**compiled["work"]), BlockSizes(*compiled["blocks"])
        internal = max(internal, compiled["held_bytes"] - tpu_windows(blocks, work.dim, work.v_dim, work.dtype))
        tiles = max(tiles, compiled["spilled_bytes"] / score_bytes(blocks))
    work, blocks = STEP
    [step] = [c for c in compiles if c["work"] == work._asdict() and c["blocks"] == list(blocks)]
    steps = work.batch * work.heads * (work.length // blocks[0]) * (work.length // blocks[1])
    return {
        "internal_bytes": internal,
        "score_tiles": math.ceil(100 * tiles) / 100,
        "step_bundles": max(0, round((step["bundles"] - step["floor"]) / steps)),
    }


def read_allocations(text: str) -> tuple[int, int]:
    """Bytes of VMEM in a listing after register allocation: windows and scratch, and spilled registers."""
    sizes = {name: int(size, 16) for name, size in _ALLOCATION.findall(text)}
    spilled = sum(size for name, size in sizes.items() if name.endswith("_spill"))
    return sum(sizes.values()) - spilled, spilled


def limit(generation: str) -> int:
    """Bytes of VMEM that the compiler grants a kernel which asks for nothing, from its refusal of a larger one.

    Raises:
      RuntimeError: the compiler refused neither, or did not say what it grants.
    """
    words = []
    # Half of VMEM, then far more than there is: where the first compiles, the limit is the memory itself.
    for share in (0.5, 4):
        with tempfile.TemporaryDirectory() as folder:
            try:
                _compile("hoard", generation, [generation, share], [], folder)
            except tpu_schedule.CompileError as error:
                words.append(str(error)[-500:])
                if found := _LIMIT.search(str(error)):
                    return int(float(found[1]) * 2**20)
                if found := _CAPACITY.search(str(error)):
                    return int(found[1])
    raise RuntimeError(f"no limit in the compiler's words: {words}")


def _compile(builder: str, generation: str, work: Sequence, blocks: Sequence[int], folder: str) -> dict[str, Any]:
    """Compile in a process of its own, whose compiler writes its listings to a folder."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
    }
    request = json.dumps([f"benchmarks.attention_footprint:{builder}", generation, work, blocks])
    command = [sys.executable, "-m", "benchmarks.tpu_schedule", "--one", request]
    done = subprocess.run(command, cwd=records.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise tpu_schedule.CompileError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- What is compiled: (work, blocks) -> callable, input specs, useful multiply-adds. ---------------------------------


def attention(work: Sequence, blocks: Sequence[int]) -> tuple[Callable, list, int]:
    """kernels_pallas.attention, forward, with the blocks given."""
    import kernels_pallas

    work = Work(*work)
    run = functools.partial(
        kernels_pallas.attention, causal=work.causal, implementation="tpu", block_sizes=BlockSizes(*blocks)
    )
    lead = (work.batch, work.length, work.heads)
    specs = [((*lead, width), work.dtype) for width in (work.dim, work.dim, work.v_dim)]
    return run, specs, work.batch * work.heads * work.length**2 * (work.dim + work.v_dim)


def hoard(work: Sequence, blocks: Sequence[int]) -> tuple[Callable, list, int]:
    """A copy whose windows fill a share of VMEM; `work` is (generation, share)."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    generation, share = work
    info = pltpu.get_tpu_info_for_chip(getattr(pltpu.ChipVersion, f"TPU_{generation.upper()}"), 1)
    # Two windows of the input and two of the output; the arrays are too large for VMEM.
    rows = int(share * info.vmem_capacity_bytes) // (4 * 128 * 4) // 8 * 8
    shape = (16 * rows, 128)

    def kernel(x: Any, o: Any) -> None:
        o[:8] = x[:8]

    block = pl.BlockSpec((rows, 128), lambda i: (i, 0))
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    run = pl.pallas_call(kernel, grid=(16,), in_specs=[block], out_specs=block, out_shape=out)
    return run, [(shape, "float32")], 0


if __name__ == "__main__":
    sys.exit(main())
