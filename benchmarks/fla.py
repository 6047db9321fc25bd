"""The plain PyTorch forms that flash-linear-attention ships beside its GPU kernels: what its users run on a CPU."""

import importlib.metadata
import importlib.util
import os
from types import ModuleType


def naive(operation: str) -> ModuleType:
    """The file `fla/ops/<operation>/naive.py`, alone: the package around it imports Triton."""
    path = importlib.metadata.distribution("fla-core").locate_file(f"fla/ops/{operation}/naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{operation}", os.fspath(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(function, *, backward: bool):
    """`function(*tensors) -> o` on NumPy arrays, on all cores; with the cotangents that `measure.in_mode` takes."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def run(*arrays):
        tensors = [torch.from_numpy(x.copy()).requires_grad_(backward) for x in arrays]
        o = function(*tensors)
        if not backward:
            return o.numpy()
        # The loss of `measure.in_mode`: the sum of the outputs' squares over two, whose cotangent is the output.
        gradients = torch.autograd.grad(o, tensors, o.detach())
        return o.detach().numpy(), tuple(x.numpy() for x in gradients)

    return run
