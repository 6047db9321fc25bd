"""What stands around a gradient transform in a training run: losses, subspaces, surrogates, codes and measurements.

None of these is a transform: those are in `jaxnum.transforms`. Pure functions on pytrees, as everywhere.
"""

from typing import TYPE_CHECKING

from kernels_pallas import lazy

if TYPE_CHECKING:
    from jaxnum.training._fwht import fwht as fwht
    from jaxnum.training._gbnn import Gbnn as Gbnn
    from jaxnum.training._gbnn import GbnnLoss as GbnnLoss
    from jaxnum.training._gbnn import gbnn as gbnn
    from jaxnum.training._gbnn import gbnn_layer as gbnn_layer
    from jaxnum.training._gbnn import gbnn_predict as gbnn_predict
    from jaxnum.training._intrinsic_dimension import IntrinsicDimension as IntrinsicDimension
    from jaxnum.training._intrinsic_dimension import intrinsic_dimension as intrinsic_dimension
    from jaxnum.training._random_subspace import Projection as Projection
    from jaxnum.training._random_subspace import Subspace as Subspace
    from jaxnum.training._random_subspace import random_subspace as random_subspace
    from jaxnum.training._random_subspace import random_subspace_projection as random_subspace_projection

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "._fwht": ("fwht",),
        "._gbnn": ("Gbnn", "GbnnLoss", "gbnn", "gbnn_layer", "gbnn_predict"),
        "._intrinsic_dimension": ("IntrinsicDimension", "intrinsic_dimension"),
        "._random_subspace": ("Projection", "Subspace", "random_subspace", "random_subspace_projection"),
    },
)
