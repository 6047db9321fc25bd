import os
from pathlib import Path

# Eight virtual devices for the sharding tests; no accelerator is asked for. Set before jax starts a backend.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

# The oracles of single methods: numbers, which do not change with the version of jax. What a version may break is
# compiled and run by the contracts, the doctests and the tests marked `every_jax`.
ORACLES = {"curvature", "kernels_pallas", "schedules", "sequence", "solvers", "training", "transforms"}


def pytest_configure(config):
    """Compile tests unoptimised, which takes 0.6 of the time; slow ones run longer than they compile.

    Flags that stand in the environment win.
    """
    if not config.option.markexpr.startswith("slow"):
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ["XLA_FLAGS"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the oracles of methods `once`; .ci/run leaves them to one of the two versions of jax."""
    for item in items:
        folder = item.path.relative_to(item.config.rootpath).parts
        if folder[0] == "tests" and folder[1] in ORACLES and not item.get_closest_marker("every_jax"):
            item.add_marker("once")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Drop compiled programs before Linux refuses more memory maps, of which each program holds several.

    A process may hold 65,530; beyond them, compilation aborts the worker. The contracts alone come to more.
    """
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def key(request):
    """A typed key that depends on the test's name alone."""
    return jax.random.key(sum(request.node.name.encode()))


@pytest.fixture(params=["float32", "float64"])
def float_dtype(request):
    """Both working precisions; float64 switches x64 on for the test."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64():
    """Run the test with float64 on."""
    with jax.enable_x64(True):
        yield
