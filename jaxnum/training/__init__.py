"""What stands around a gradient transform in a training run: losses, subspaces, surrogates, codes and measurements.

None of these is a transform: those are in `jaxnum.transforms`. Pure functions on pytrees, as everywhere.
"""

from typing import TYPE_CHECKING

from kernels_pallas import lazy

if TYPE_CHECKING:
    from jaxnum.training._obs_prune import Pruned as Pruned
    from jaxnum.training._obs_prune import obs_prune as obs_prune
    from jaxnum.training._separate import Separation as Separation
    from jaxnum.training._separate import separate as separate

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "._obs_prune": ("Pruned", "obs_prune"),
        "._separate": ("Separation", "separate"),
    },
)
