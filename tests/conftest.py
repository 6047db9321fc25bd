import os

# Eight virtual devices for the sharding tests; no accelerator is asked for. Set before jax starts a backend.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

# The oracles of single methods: numbers, which do not change with the version of jax. What a version may break is
# compiled and run by the contracts, the doctests and the tests marked `every_jax`.
ORACLES = {"curvature", "kernels_pallas", "sequence", "solvers", "transforms"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the oracles of methods `once`; .ci/run leaves them to one of the two versions of jax."""
    for item in items:
        folder = item.path.relative_to(item.config.rootpath).parts
        if folder[0] == "tests" and folder[1] in ORACLES and not item.get_closest_marker("every_jax"):
            item.add_marker("once")


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
