"""What stands around a gradient transform in a training run: losses, subspaces, surrogates, codes and measurements.

None of these is a transform: those are in `jaxnum.transforms`. Pure functions on pytrees, as everywhere.
"""

from typing import TYPE_CHECKING

from kernels_pallas import lazy

if TYPE_CHECKING:
    from jaxnum.training._factored_output import FactoredOutput as FactoredOutput
    from jaxnum.training._factored_output import factored_output as factored_output
    from jaxnum.training._factored_output import factored_output_stabilise as factored_output_stabilise
    from jaxnum.training._factored_output import factored_output_step as factored_output_step
    from jaxnum.training._factored_output import factored_output_weights as factored_output_weights
    from jaxnum.training._spherical_z_loss import spherical_z_loss as spherical_z_loss
    from jaxnum.training._spherical_z_loss import spherical_z_loss_from_statistics as spherical_z_loss_from_statistics

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "._factored_output": (
            "FactoredOutput",
            "factored_output",
            "factored_output_stabilise",
            "factored_output_step",
            "factored_output_weights",
        ),
        "._spherical_z_loss": ("spherical_z_loss", "spherical_z_loss_from_statistics"),
    },
)
