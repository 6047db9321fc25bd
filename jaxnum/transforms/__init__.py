"""Gradient transformations: optax-compatible methods that optax lacks or states otherwise than their paper.

Every factory returns an `optax.GradientTransformationExtraArgs` and goes wherever optax's own do.
`scale_by_<method>` is the mathematics, `<method>(learning_rate, ...)` the ready optimiser. `strict` gives any
optax transformation the argument checks that these have built in.
"""

from jaxnum.transforms._adan import AdanState, adan, adan_restart, scale_by_adan
from jaxnum.transforms._record_norms import NormsState, record_norms
from jaxnum.transforms._sophia import SophiaState, scale_by_sophia, sophia
from jaxnum.transforms._strict import strict

__all__ = [
    "AdanState",
    "NormsState",
    "SophiaState",
    "adan",
    "adan_restart",
    "record_norms",
    "scale_by_adan",
    "scale_by_sophia",
    "sophia",
    "strict",
]
