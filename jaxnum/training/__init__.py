"""What stands around a gradient transform in a training run: losses, subspaces, surrogates, codes and measurements.

None of these is a transform: those are in `jaxnum.transforms`. Pure functions on pytrees, as everywhere.
"""

from kernels_pallas import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {},
)
