"""Compile Mosaic GPU kernels to Hopper's machine code on a machine without a GPU, and read what came out.

A kernel is lowered under an abstract H100, taken out of its custom call, and given to the compiler that the CUDA plugin
of JAX holds, in a process of its own in which a stub stands for the driver. What comes back is what would run: SASS,
registers, spills, shared memory. These are not wall times, and no wall time follows from them.

Needs the extra `gpu-aot` (Python 3.12, jax 0.12), and a C compiler for the stub.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# What a block of an H100 may have, in bytes.
SHARED_MEMORY = 227 * 1024


class Kernel(NamedTuple):
    """One kernel as compiled.

    Attributes:
      name: of the entry function.
      registers: a thread, at launch.
      spill_bytes: stores and loads together.
      shared_bytes: dynamic shared memory of a block.
      sass: the instructions, with labels.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    sass: str


class CompileError(RuntimeError):
    """The compiler refused a kernel; the text is its reason."""


def lower(function: Callable, specs: Sequence[Any]) -> Any:
    """Lower for CUDA on a machine that has none.

    Args:
      function: of arrays.
      specs: jax.ShapeDtypeStruct of each.

    Returns:
      jax.stages.Lowered.
    """
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh

    chip = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)):
        return jax.jit(function).trace(*specs).lower(lowering_platforms=("cuda",))


def compile_function(function: Callable, specs: Sequence[Any]) -> list[Kernel]:
    """Every Mosaic GPU kernel of a function, in program order, compiled for sm_90a.

    Raises:
      CompileError: with the compiler's last words.
      ValueError: the function holds no such kernel.
    """
    modules = kernel_modules(lower(function, specs))
    if not modules:
        raise ValueError("the function holds no Mosaic GPU kernel")
    return [compile_module(module) for module in modules]


def kernel_modules(lowered: Any) -> list[bytes]:
    """The serialised kernels in a lowered function."""
    from jax.extend.mlir import ir

    found = []

    def visit(operation: Any) -> Any:
        name = "stablehlo.custom_call"
        if operation.name == name and "mosaic_gpu" in str(operation.attributes["call_target_name"]):
            module = ir.DictAttr(operation.attributes["mhlo.backend_config"])["module"]
            found.append(ir.StringAttr(module).value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    return found


def compile_module(module: bytes) -> Kernel:
    """Compile one serialised kernel for sm_90a."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dump = root / "dump"
        dump.mkdir()
        (root / "kernel").write_bytes(module)
        environment = os.environ | _tools(root) | {"MOSAIC_GPU_DUMP_TO": str(dump)}
        command = [sys.executable, "-c", _CHILD, str(_plugin("jax_plugins.xla_cuda12", "xla_cuda_plugin.so"))]
        done = subprocess.run(
            [*command, str(root / "kernel")], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        listings = {path.suffix: path.read_text() for path in dump.iterdir() if path.suffix in (".ptxas", ".sass_ctrl")}
    if done.returncode or len(listings) != 2:
        raise CompileError(done.stderr.strip()[-2000:] or f"exit status {done.returncode}")
    return read(listings[".ptxas"], listings[".sass_ctrl"], done.stderr)


def read(ptxas: str, sass: str, log: str) -> Kernel:
    """Make a record of what the assembler, the disassembler and the stub driver wrote."""
    entry = re.search(r"Compiling entry function '(\w+)' for 'sm_90a'", ptxas)
    registers = re.search(r"Used (\d+) registers", ptxas)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    shared = re.search(r"dynamic shared memory: (\d+)", log)
    if not (entry and registers and spills):
        raise CompileError(f"no figures in the assembler's output: {ptxas[-500:]}")
    return Kernel(
        name=entry[1].removesuffix("_mosaic_gpu_kernel"),
        registers=int(registers[1]),
        spill_bytes=int(spills[1]) + int(spills[2]),
        shared_bytes=int(shared[1]) if shared else 0,
        sass=sass,
    )


# Runs in the child: nothing but the compiler is loaded. A null handle is a refusal, whose reason is on stderr.
_CHILD = """
import ctypes, sys
compile = ctypes.CDLL(sys.argv[1]).MosaicGpuCompile
compile.restype, compile.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
module = open(sys.argv[2], "rb").read()
sys.exit(0 if compile(module, len(module)) else 1)
"""


def _tools(root: Path) -> dict[str, str]:
    """The stub driver and the CUDA tools in one folder, and the environment that makes the compiler find them."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("compiling for sm_90a needs a C compiler for the stub driver; found neither cc nor gcc")
    source = Path(__file__).with_name("libcuda_stub.c")
    name = "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{name}", "-o", str(root / name), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (root / "bin").mkdir()
    (root / "bin" / "nvdisasm").symlink_to(_plugin("nvidia", "cu13/bin/nvdisasm"))
    (root / "nvvm").symlink_to(_plugin("nvidia", "cuda_nvcc/nvvm"))
    return {
        "LD_LIBRARY_PATH": str(root),
        "MOSAIC_GPU_CUDA_ROOT": str(root),
        "MOSAIC_GPU_RUNTIME_LIB_PATH": str(_plugin("jax_cuda12_plugin", "libmosaic_gpu_runtime.so")),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_SASS_CTRL": "1",
    }


def _plugin(package: str, file: str) -> Path:
    """A file of an installed package, without importing it."""
    found = None
    if importlib.util.find_spec(package.split(".")[0]) is not None:
        found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    for folder in folders:
        if (path := Path(folder) / file).exists():
            return path
    raise RuntimeError(f'compiling for sm_90a needs {package}/{file}: pip install "jaxnum[gpu-aot]" on Python 3.12')


# --- Reading SASS: pure functions on text. ----------------------------------------------------------------------------

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?PT?\d*)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_TENSOR = "HGMMA"
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")


class Instruction(NamedTuple):
    """One instruction: its predicate ("" for none), its name with suffixes, its operands."""

    predicate: str
    name: str
    operands: str


def parse_sass(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a listing, and where each label stands among them."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
    return instructions, labels


class Loop(NamedTuple):
    """The shortest trip through a loop: its instructions in order, from after one tensor-core instruction."""

    trip: list[Instruction]

    def tensor(self) -> int:
        """Tensor-core instructions of a trip."""
        return sum(step.name.startswith(_TENSOR) for step in self.trip)

    def other(self) -> int:
        """All other instructions of a trip."""
        return len(self.trip) - self.tensor()

    def macs(self) -> int:
        """Multiply-adds of a trip, of all 128 threads of a warpgroup together."""
        shapes = [_SHAPE.search(step.name) for step in self.trip if step.name.startswith(_TENSOR)]
        return sum(math.prod(map(int, shape.groups())) for shape in shapes)


def tensor_loops(text: str) -> list[Loop]:
    """The loops that hold tensor-core instructions, in program order.

    A loop is what an instruction can reach and be reached from. Its cost is the shortest trip that runs all its
    tensor-core instructions: retries of a wait and branches seldom taken (a rescale, a poll that failed) stand aside,
    in every kernel alike.

    Raises:
      ValueError: no trip runs them all in order, as when loops are nested.
    """
    instructions, after = _flow(text)
    before: list[list[int]] = [[] for _ in instructions]
    for at, targets in enumerate(after):
        for to in targets:
            before[to].append(at)
    tensor = [at for at, step in enumerate(instructions) if step.name.startswith(_TENSOR)]
    loops: list[Loop] = []
    counted: set[int] = set()
    for first in tensor:
        members = _reachable(after, first) & _reachable(before, first)
        if first in counted or not members:
            continue
        counted |= members
        stops = [at for at in tensor if at in members]
        legs = [_shortest(after, a, b, members) for a, b in zip(stops, [*stops[1:], first], strict=True)]
        loops.append(Loop([instructions[at] for leg in legs for at in leg]))
    return loops


def _reachable(edges: list[list[int]], source: int) -> set[int]:
    """All instructions at the ends of ways from `source`; itself only if it lies on a cycle."""
    found: set[int] = set()
    frontier = [source]
    while frontier:
        frontier = [to for at in frontier for to in edges[at] if to not in found and not found.add(to)]
    return found


def register_bounds(text: str) -> list[tuple[int, int]]:
    """Where a warpgroup gives registers back: how many the code from there on uses, and how many were kept."""
    instructions, after = _flow(text)
    bounds = []
    for at, step in enumerate(instructions):
        if step.name.startswith("USETMAXREG.DEALLOC"):
            operands = " ".join(instructions[to].operands for to in _reachable(after, at))
            used = 1 + max(map(int, re.findall(r"\bR(\d+)\b", operands)), default=-1)
            bounds.append((used, int(step.operands, 16)))
    return bounds


def _flow(text: str) -> tuple[list[Instruction], list[list[int]]]:
    """The instructions, and where control may go from each."""
    instructions, labels = parse_sass(text)
    # Padding after the last branch leads nowhere.
    count = len(instructions)
    after = [[to for to in _successors(at, instructions[at], labels) if to < count] for at in range(count)]
    return instructions, after


def _successors(at: int, step: Instruction, labels: dict[str, int]) -> list[int]:
    """Where control may go from an instruction."""
    target = _TARGET.search(step.operands)
    if step.name.split(".")[0] in ("BRA", "EXIT", "RET"):
        jumps = [labels[target[1]]] if target else []
        return jumps if not step.predicate else [*jumps, at + 1]
    return [at + 1]


def _shortest(after: list[list[int]], source: int, target: int, members: set[int]) -> list[int]:
    """The instructions after `source` up to `target` on the shortest way among `members`."""
    came: dict[int, int] = {}
    frontier = [source]
    while frontier and target not in came:
        reached = []
        for at in frontier:
            for to in after[at]:
                if to in members and to not in came:
                    came[to] = at
                    reached.append(to)
        frontier = reached
    if target not in came:
        raise ValueError(f"no way from instruction {source} to {target} inside their loop")
    way = [target]
    while came[way[-1]] != source:
        way.append(came[way[-1]])
    return way[::-1]
