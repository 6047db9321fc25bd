"""What the TPU compiler scheduled, without a TPU: `python -m benchmarks.tpu_schedule [--search]`.

Compiles attention kernels for TPU v4, v5e, v5p and v6e and reads the VLIW bundles the compiler wrote down:
cost = sum over bundles of the trip counts of the loops around them, every predicated region counted as run;
floor = the bundles the matrix units alone need for the useful matmuls. Ours stands beside JAX's own kernels, each at
its best block sizes, on the same work. A bundle can hold a unit longer than one cycle (v5p's schedules have fewer
bundles than the floor), so the figure to compare is max(cost, floor). These are not wall times, and no wall time
follows from them.

The cost of a backward pass holds the sums over partial results in memory that some kernels leave to XLA. What else XLA
does around the kernels (delta, changes of layout and dtype) is the same work for all or depends on the neighbours; it
is recorded beside the cost, as `around`.

Every compile runs in a process of its own: the compiler reads its flags when it starts. Needs the extra `tpu-aot`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records

RESULTS = records.RESULTS / "tpu_schedule.json"
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# A matrix unit is this many columns wide and deep, and does width^2 multiply-adds a bundle; how many units a core has,
# the compiler writes in its own listing.
MXU_WIDTH = {"v4": 128, "v5e": 128, "v5p": 128, "v6e": 256}


class Work(NamedTuple):
    """Full attention: every kernel compared does exactly this."""

    batch: int = 1
    heads: int = 8
    length: int = 4096
    dim: int = 128
    dtype: str = "bfloat16"
    direction: str = "fwd"

    def __str__(self) -> str:
        sizes = f"B{self.batch} H{self.heads} T{self.length} D{self.dim} {self.dtype}"
        return f"attention {self.direction} full {sizes}"

    def macs(self) -> int:
        """Useful multiply-adds: q k^T and p v; backward five such products, if none is done twice."""
        return (2 if self.direction == "fwd" else 5) * self.batch * self.heads * self.length**2 * self.dim


# Best blocks (query, key, compute) of each kernel on `Work()`, found by --search with jax 0.10.2; for v5p, where all
# reach the floor, among key blocks of 2048 and 4096. Backward, splash's are the best of (1024, 1024 to 4096, 512 and
# 1024) on v6e and stand for the others, where it comes within the floor; flash has two kernels, and 40 % more to do.
BEST = {
    ("flash", "v4", "fwd"): (512, 4096, 1024),
    ("splash", "v4", "fwd"): (256, 4096, 1024),
    ("flash", "v5e", "fwd"): (512, 4096, 1024),
    ("splash", "v5e", "fwd"): (256, 4096, 512),
    ("flash", "v5p", "fwd"): (512, 4096, 1024),
    ("splash", "v5p", "fwd"): (512, 4096, 1024),
    ("flash", "v6e", "fwd"): (1024, 4096, 1024),
    ("splash", "v6e", "fwd"): (512, 4096, 512),
    **{("flash", chip, "bwd"): (1024, 1024, 1024) for chip in TOPOLOGIES},
    **{("splash", chip, "bwd"): (1024, 2048, 512) for chip in TOPOLOGIES},
}
EVEN = (1024, 1024, 1024)
# The schedules of backward kernels take the compiler a minute at the largest sizes.
SEARCH = {
    "fwd": ((256, 512, 1024, 2048), (512, 1024, 2048, 4096), (512, 1024)),
    "bwd": ((512, 1024, 2048), (1024, 2048, 4096), (512, 1024)),
}


# --- The command. -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 when a kernel did not compile."""
    options = _parser().parse_args(arguments)
    if options.one:
        print(json.dumps(compile_one(*json.loads(options.one))))
        return 0
    failed = False
    for generation, direction, kernel in itertools.product(options.chip, options.direction, options.kernel):
        best: dict[str, Any] | None = None
        work = Work(direction=direction)
        for blocks in _blocks(kernel, generation, direction, options.search):
            label = "own" if blocks is None else "/".join(map(str, blocks))
            print(f"{generation} {direction} {kernel} {label} ...", file=sys.stderr, flush=True)
            try:
                record = measure(f"benchmarks.tpu_schedule:{kernel}", generation, work, blocks)
            except CompileError as error:
                print(f"{generation} {direction} {kernel} {label}: {error}", flush=True)
                # A search walks into blocks that do not fit; a stored best must compile.
                failed = failed or not options.search
                continue
            record |= {"kernel": kernel, "blocks": label}
            print(summary(record), flush=True)
            if not options.search:
                records.append(options.results, [record])
            if best is None or _order(record) < _order(best):
                best = record
        if options.search and best is None:
            failed = True
        elif options.search:
            records.append(options.results, [best])
            print("best: " + summary(best), flush=True)
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_schedule", description=__doc__.splitlines()[0])
    parser.add_argument("--chip", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--direction", nargs="+", choices=("fwd", "bwd"), default=["fwd", "bwd"])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument(
        "--search", action="store_true", help="try all block sizes of SEARCH (an hour), not stored ones"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def _blocks(kernel: str, generation: str, direction: str, search: bool) -> list[tuple[int, int, int] | None]:
    """Block sizes to compile: all, or even ones and the stored best. Ours chooses its own."""
    if kernel == "ours":
        return [None]
    if search:
        return [(q, kv, compute) for q, kv, compute in itertools.product(*SEARCH[direction]) if compute <= kv]
    return list(dict.fromkeys([EVEN, BEST[kernel, generation, direction]]))


def _bundles(record: dict[str, Any]) -> float:
    return max(record["cost"], record["floor"])


def _order(record: dict[str, Any]) -> tuple[float, float]:
    """By bundles; kernels that all reach the floor, by what they leave free."""
    return _bundles(record), record["cost"]


def summary(record: dict[str, Any]) -> str:
    """One kernel's figures on one line."""
    return (
        f"{record['generation']} {record['work']}, {record['kernel']} {record['blocks']}: "
        f"{_bundles(record) / 1e6:.3f} M bundles, "
        f"floor {record['floor'] / 1e6:.3f} M, MXU share {record['share']:.2f}, loop body {record['body']}, "
        f"{record['fills']} fills, {record['spills']} spills, VMEM {record['vmem_bytes'] / 2**20:.2f} MiB, "
        f"HBM {record['hbm_bytes'] / 2**20:.1f} MiB"
    )


class CompileError(RuntimeError):
    """The compiler refused a kernel; the text is its reason."""


def measure(builder: str, generation: str, work: Any, blocks: Sequence[int] | None) -> dict[str, Any]:
    """Compile in a process of its own and return the record of what was scheduled.

    Args:
      builder: "module:function"; the function takes (work, blocks) and returns (callable, [(shape, dtype), ...],
        useful multiply-adds).
      generation: a key of TOPOLOGIES.
      work: passed to the builder as a list; a NamedTuple or other JSON value.
      blocks: passed to the builder.

    Raises:
      CompileError: with the compiler's last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            # Two processes that load the compiler at once would otherwise abort on its lock file.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        request = json.dumps([builder, generation, work, blocks])
        command = [sys.executable, "-m", "benchmarks.tpu_schedule", "--one", request]
        done = subprocess.run(command, cwd=records.ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(_reason(done.stderr))
        answer = json.loads(done.stdout.splitlines()[-1])
        figures = read_dump(Path(folder))
    floor = answer["macs"] / (figures.pop("units") * MXU_WIDTH[generation] ** 2)
    return {
        "generation": generation,
        "work": str(work),
        **figures,
        "floor": floor,
        "share": floor / max(figures["cost"], floor),
        "hbm_bytes": answer["hbm_bytes"],
        "temp_bytes": answer["temp_bytes"],
        "date": records.now(),
        "commit": records.commit(),
        "versions": {name: records.version(name) for name in ("jax", "jaxlib", "libtpu")},
    }


def _reason(stderr: str) -> str:
    """The line of a traceback that names the error."""
    lines = [line for line in stderr.splitlines() if re.match(r"^[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (lines or stderr.splitlines() or ["no message"])[-1][:500]


def compile_one(builder: str, generation: str, work: Any, blocks: Sequence[int] | None) -> dict[str, Any]:
    """Compile for a chip that is not here; runs in the child process, whose flags make the compiler write its dump."""
    import jax
    from jax.experimental import topologies

    module, name = builder.split(":")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    kind = topology.devices[0].device_kind
    chip = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    # Kernels that choose blocks by generation read it from the default device; beside a topology, from this mesh, which
    # a program keeps from where it is traced.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=chip)):
        function, specs, macs = getattr(importlib.import_module(module), name)(work, blocks)
        inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in specs]
        compiled = jax.jit(function).lower(*inputs).compile()
    memory = compiled.memory_analysis()
    stated = compiled.cost_analysis().get("bytes accessed", 0)
    return {
        "macs": macs,
        # A kernel that states no estimate counts as nothing; it reads and writes its operands at least once.
        "hbm_bytes": stated or memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


# --- The kernels that are compared: (work, blocks) -> callable, input specs, useful multiply-adds. --------------------


def flash(work: Sequence, blocks: Sequence[int]) -> tuple[Callable, list, int]:
    """JAX's flash_attention; scale 1, as splash has none."""
    from jax.experimental.pallas.ops.tpu import flash_attention as library

    work = Work(*work)
    q, kv, compute = blocks
    backward = {f"block_{axis}_{of}": size for of in ("dkv", "dq") for axis, size in (("k_major", kv), ("k", compute))}
    backward |= {"block_q_major_dkv": q, "block_q_dkv": q, "block_q_dq": q}
    sizes = library.BlockSizes(block_q=q, block_k_major=kv, block_k=compute, block_b=1, **backward)
    run = functools.partial(library.flash_attention, causal=False, sm_scale=1.0, block_sizes=sizes)
    return _directed(work, run, [((work.batch, work.heads, work.length, work.dim), work.dtype)] * 3)


def splash(work: Sequence, blocks: Sequence[int]) -> tuple[Callable, list, int]:
    """JAX's splash_attention with a full mask; its backward pass is the fused kernel."""
    import jax
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    work = Work(*work)
    q, kv, compute = blocks
    mask = library.MultiHeadMask([library.FullMask((work.length, work.length))] * work.heads)
    sizes = library.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    run = library.make_splash_mha_single_device(mask, block_sizes=sizes)
    shape = (work.heads, work.length, work.dim)
    if work.batch > 1:
        run, shape = jax.vmap(run), (work.batch, *shape)
    return _directed(work, run, [(shape, work.dtype)] * 3)


def ours(work: Sequence, blocks: Sequence[int] | None) -> tuple[Callable, list, int]:
    """kernels_pallas.attention, with the blocks it chooses itself if None."""
    import kernels_pallas

    work = Work(*work)
    sizes = None if blocks is None else kernels_pallas.BlockSizes(*blocks)
    run = functools.partial(kernels_pallas.attention, implementation="tpu", block_sizes=sizes)
    return _directed(work, run, [((work.batch, work.length, work.heads, work.dim), work.dtype)] * 3)


def _directed(work: Work, run: Callable, specs: list) -> tuple[Callable, list, int]:
    """The forward pass, or the backward pass alone: a function of what the forward pass saved."""
    import jax

    if work.direction == "fwd":
        return run, specs, work.macs()
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in specs]
    out = jax.eval_shape(run, *inputs)
    saved, tree = jax.tree.flatten(jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], *inputs))

    def backward(cotangent: Any, *saved: Any) -> Any:
        return jax.tree.unflatten(tree, saved)(cotangent)

    return backward, [(x.shape, x.dtype.name) for x in (out, *saved)], work.macs()


KERNELS = ("flash", "splash", "ours")

# --- Reading what the compiler wrote: pure functions on text. ---------------------------------------------------------

_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +(L[HBE]|P[BF]|CT)? *: *((?:> *)*)\{(.*)$")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder (%\w+), ([^ ]+) /\* loop exit test")
# The program that calls the kernel mentions it too, but not as its own entry.
_KERNEL = re.compile(r"entry bundle: %\S+ = custom-call\(")
# XLA's sum over an axis of partial results; "multiply_reduce_fusion" is delta.
_PARTS = re.compile(r"-(convert_)?reduce(_fusion)?(\.\d+)?$")
_VMEM = re.compile(r"#allocation(\d+) \[[^\n]*space=vmem, size = (0x[0-9a-f]+)")


class Bundle(NamedTuple):
    """One VLIW bundle: its label (LB starts a loop's body), its loop depth, and what it holds."""

    label: str
    depth: int
    text: str


def parse_bundles(text: str) -> list[Bundle]:
    """The bundles of a `final_bundles` listing. An empty bundle carries no mark: it sits where the one before does."""
    bundles: list[Bundle] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            label, marks, content = match.groups()
            empty = content.strip().startswith("}")
            depth = bundles[-1].depth if empty and bundles else marks.count(">")
            bundles.append(Bundle(label or "", depth, content))
        elif bundles:
            # A long comment goes on over several lines.
            bundles[-1] = bundles[-1]._replace(text=bundles[-1].text + "\n" + line)
    return bundles


def loop_cost(bundles: Sequence[Bundle]) -> tuple[int, int]:
    """Sum over bundles of the product of the trip counts around them, and the bundles of the largest loop body.

    A bundle at depth d belongs to the latest loop begun at each depth up to d: the branch of a loop is printed outside
    it, but its delay slots carry the loop's mark again.

    Raises:
      ValueError: a loop without a constant exit test; its cost is not known at compile time.
    """
    trips: list[int | None] = []  # of each loop, in order of appearance
    current: dict[int, int] = {}  # depth -> loop
    members: list[tuple[int, ...]] = []  # of each bundle, the loops around it
    for bundle in bundles:
        if bundle.label == "LB":
            current[bundle.depth] = len(trips)
            trips.append(None)
        around = tuple(current[depth] for depth in range(1, bundle.depth + 1) if depth in current)
        if len(around) < bundle.depth:
            raise ValueError(f"a bundle at depth {bundle.depth} comes before the body of its loop")
        members.append(around)
        test = _EXIT.search(bundle.text)
        if test and around:
            trips[around[-1]] = _trips(test, bundles)
    if None in trips:
        raise ValueError(f"loop {trips.index(None)} of the listing has no exit test with a constant bound")
    cost = sum(math.prod(trips[loop] for loop in around) for around in members)
    sizes = [sum(loop in around for around in members) for loop in range(len(trips))]
    return cost, max(sizes, default=0)


def _trips(test: re.Match, bundles: Iterable[Bundle]) -> int | None:
    """Trips of a loop that counts from zero to the bound in its exit test, by the step that its counter takes."""
    register, bound = test.groups()
    if not bound.isdigit():
        return None
    step = re.compile(rf"{re.escape(register)} = sadd\.s32 (\d+), ")
    steps = [int(found[1]) for bundle in bundles if (found := step.search(bundle.text))]
    return math.ceil(int(bound) / (steps[-1] if steps else 1))


def parse_utilization(text: str) -> tuple[dict[str, int], dict[str, int]]:
    """Capacity of each unit per bundle, and the slots used over all bundles, by the unit's column name."""
    lines = [line for line in text.splitlines() if line.strip()]
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
    table = [list(map(int, line.split())) for line in lines[4:]]
    used = {name: sum(row[column] for row in table) for column, name in enumerate(names)}
    return capacity, used


def vmem_bytes(text: str) -> int:
    """Bytes of VMEM of all allocations in an `allocations` listing: windows (all buffers of each) and scratch."""
    return sum({int(number): int(size, 16) for number, size in _VMEM.findall(text)}.values())


def read_dump(folder: Path) -> dict[str, int]:
    """Figures summed over the Pallas kernels of a dump, and over XLA's reductions of what they left in parts.

    `around` is the cost of XLA's other programs, as far as their loops have known lengths.

    Raises:
      ValueError: the dump has no Pallas kernel, or a loop whose length is not known.
    """
    total = {"cost": 0, "body": 0, "fills": 0, "spills": 0, "vmem_bytes": 0, "units": 0, "around": 0}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        text = path.read_text()
        stem = re.sub(r"-\d+-final_bundles\.txt$", "", path.name)
        if not _KERNEL.search(text):
            if not stem.endswith("-TLP"):
                total["cost" if _PARTS.search(stem) else "around"] += _cost_of_xla(text)
            continue
        capacity, used = parse_utilization(_sibling(folder, stem, "final_hlo-static-per-bundle-utilization"))
        cost, body = loop_cost(parse_bundles(text))
        total["cost"] += cost
        total["body"] = max(total["body"], body)
        total["fills"] += used["VLOAD:FILL"]
        total["spills"] += used["VSTORE:SPILL"]
        memory = vmem_bytes(_sibling(folder, stem, "pre-finalize-registers-and-allocations"))
        total["vmem_bytes"] = max(total["vmem_bytes"], memory)
        total["units"] = capacity["MXU"]
    if not total["units"]:
        raise ValueError(f"no Pallas kernel in the compiler's dump {folder}")
    return total


def _cost_of_xla(text: str) -> int:
    try:
        return loop_cost(parse_bundles(text))[0]
    except ValueError:
        return 0


def _sibling(folder: Path, stem: str, kind: str) -> str:
    """The listing of one kind for one kernel; names differ in a number alone."""
    names = [path for path in folder.iterdir() if re.fullmatch(rf"{re.escape(stem)}-\d+-{kind}\.txt", path.name)]
    if len(names) != 1:
        raise ValueError(f"expected one {kind} listing for {stem}; got {len(names)}")
    return names[0].read_text()


if __name__ == "__main__":
    sys.exit(main())
