"""What the CUDA compiler made of the attention kernels, without a GPU: `python -m benchmarks.gpu_code`.

Compiles ours and JAX's own Mosaic GPU attention to Hopper's machine code (sm_90a), on the same work, and reads it:
registers, spills, shared memory, and the instructions of each inner loop beside those of the tensor cores, per score
and thread. JAX's runs at the blocks that ours has by itself: 64 queries a warpgroup, 128 keys, two blocks in flight.
These are not wall times, and no wall time follows from them. Needs the extra `gpu-aot`.
"""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from benchmarks import gpu_compiler, records

RESULTS = records.RESULTS / "gpu_code.json"
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "nvidia-cuda-nvdisasm")
_WARPGROUP = 128


class Work(NamedTuple):
    """One call: forward alone, or with its backward pass."""

    mode: str = "forward"
    causal: bool = False
    segments: bool = False
    soft_cap: float | None = None
    batch: int = 1
    heads: int = 8
    length: int = 4096
    dim: int = 128
    dtype: str = "float16"

    def __str__(self) -> str:
        flags = [name for name in ("causal", "segments") if getattr(self, name)]
        flags += ["soft cap"] if self.soft_cap else []
        kind = " ".join(flags) or "full"
        shape = f"B{self.batch} H{self.heads} T{self.length} D{self.dim}"
        return f"attention {self.mode} {kind} {shape} {self.dtype}"


FULL = Work()
WORKS = {
    "full": FULL,
    "causal": Work(causal=True),
    "segments": Work(causal=True, segments=True),
    "soft_cap": Work(causal=True, soft_cap=30.0),
    "dim_64": Work(dim=64),
    "dim_256": Work(dim=256),
    "gradient": Work("gradient"),
    "causal_gradient": Work("gradient", causal=True),
}
# Multiply-adds of a score over `dim`: q k^T, p v; q k^T, do v^T, ds k; q k^T, do v^T, p^T do, ds^T q.
_PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print and record; returns 1 when a kernel did not compile."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_code", description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    failed = False
    for name in options.work:
        for kernel in options.kernel:
            if not KERNELS[kernel].serves(WORKS[name]):
                continue
            try:
                found = measure(kernel, WORKS[name])
            except gpu_compiler.CompileError as error:
                print(f"{WORKS[name]} {kernel}: {error}", flush=True)
                failed = True
                continue
            print("\n".join(map(summary, found)), flush=True)
            records.append(options.results, found)
    return int(failed)


def summary(record: dict[str, Any]) -> str:
    """One kernel's figures on one line."""
    loops = ", ".join(f"{loop['per_score']:.2f} ({loop['other']} beside {loop['tensor']})" for loop in record["loops"])
    return (
        f"{record['work']}, {record['kernel']} {record['part']}: {loops} instructions a score, "
        f"{record['registers']} registers, {record['spill_bytes']} spill bytes, {record['shared_bytes']} shared bytes"
    )


def measure(kernel: str, work: Work) -> list[dict[str, Any]]:
    """Compile one kernel's call; a record for each of its parts.

    Raises:
      CompileError: with the compiler's last words.
    """
    import jax

    shape = (work.batch, work.length, work.heads, work.dim)
    arrays = [jax.ShapeDtypeStruct(shape, work.dtype)] * (3 if work.mode == "forward" else 4)
    if work.segments:
        arrays.append(jax.ShapeDtypeStruct(shape[:2], "int32"))
    build = KERNELS[kernel].build(work)

    def call(q: Any, k: Any, v: Any, *more: Any) -> Any:
        if work.mode == "forward":
            return build(q, k, v, *more)
        return jax.vjp(lambda *qkv: build(*qkv, *more[1:]), q, k, v)[1](more[0])

    with mock.patch.multiple(**_TOLD):
        compiled = gpu_compiler.compile_function(call, arrays)
    parts = ("forward",) if work.mode == "forward" else ("forward", "dq", "dkv")
    if len(compiled) != len(parts):
        raise gpu_compiler.CompileError(f"{kernel} has {len(compiled)} kernels, expected {len(parts)}")
    origin = {
        "date": records.now(),
        "commit": records.commit(),
        "versions": {package: records.version(package) for package in PACKAGES},
    }
    named = {"work": str(work), "kernel": kernel}
    return [
        named | {"part": part} | figures(one, part, work) | origin for one, part in zip(compiled, parts, strict=True)
    ]


def figures(compiled: gpu_compiler.Kernel, part: str, work: Work) -> dict[str, Any]:
    """What is written down of one kernel; its loops in program order, those that build masks last."""
    loops = []
    for loop in gpu_compiler.tensor_loops(compiled.sass):
        scores = loop.macs() / (_PRODUCTS[part] * work.dim)
        names = collections.Counter(step.name.split(".")[0] for step in loop.trip)
        loops.append(
            {
                "tensor": loop.tensor(),
                "other": loop.other(),
                "per_score": loop.other() * _WARPGROUP / scores,
                "instructions": dict(names.most_common()),
            }
        )
    return {
        "loops": loops,
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "shared_bytes": compiled.shared_bytes,
    }


# --- The kernels that are compared. -----------------------------------------------------------------------------------


class Contestant(NamedTuple):
    """A kernel: whether it can do a work, and the call of (q, k, v[, segments])."""

    serves: Callable[[Work], bool]
    build: Callable[[Work], Callable]


def ours(work: Work) -> Callable:
    """kernels_pallas.attention with the blocks it chooses itself."""
    import kernels_pallas

    def run(q: Any, k: Any, v: Any, segments: Any = None) -> Any:
        return kernels_pallas.attention(
            q,
            k,
            v,
            causal=work.causal,
            segment_ids=segments,
            soft_cap=work.soft_cap,
            return_lse=False,
            implementation="gpu",
        )

    return run


def library(work: Work) -> Callable:
    """JAX's attention_mgpu; its scores have no scale."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    narrow = {name: 64 for name in ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")}
    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=64 if work.dim > 128 else 128,
        max_concurrent_steps=2,
        causal=work.causal,
        compute_wgs_bwd=2,
        **narrow,
    )
    return lambda q, k, v: attention_mgpu.attention(q, k, v, config)


def _library_serves(work: Work) -> bool:
    return not work.segments and work.soft_cap is None and not (work.causal and work.mode == "gradient")


# JAX's kernel asks the driver for its version before it lowers anything; any after the miscompiling ones will do.
_TOLD = {
    "target": "jax.experimental.pallas.ops.gpu.attention_mgpu",
    "cuda_versions": SimpleNamespace(cuda_runtime_get_version=lambda: 12091),
}
KERNELS = {"jax": Contestant(_library_serves, library), "ours": Contestant(lambda work: True, ours)}

if __name__ == "__main__":
    sys.exit(main())
