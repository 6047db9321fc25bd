"""Gradient transformations: optax-compatible methods that optax lacks or states otherwise than their paper.

Every factory returns an `optax.GradientTransformationExtraArgs` and goes wherever optax's own do.
`scale_by_<method>` is the mathematics, `<method>(learning_rate, ...)` the ready optimiser. `strict` gives any
optax transformation the argument checks that these have built in.
"""

from jaxnum.transforms._adamw_independent import adamw_independent
from jaxnum.transforms._adan import AdanState, adan, adan_restart, scale_by_adan
from jaxnum.transforms._geometric_median import geometric_median
from jaxnum.transforms._harp import HarpState, harp, scale_by_harp
from jaxnum.transforms._lion import lion, lion_from_adamw
from jaxnum.transforms._m_coherence import CoherenceState, m_coherence, m_coherence_stream
from jaxnum.transforms._median_of_means import median_of_means
from jaxnum.transforms._n_igt import NIgtState, n_igt, n_igt_params
from jaxnum.transforms._record_norms import NormsState, record_norms
from jaxnum.transforms._sophia import SophiaState, scale_by_sophia, sophia
from jaxnum.transforms._strict import strict
from jaxnum.transforms._trimmed_mean import trimmed_mean
from jaxnum.transforms._winsorized_mean import winsorized_mean

__all__ = [
    "HarpState",
    "harp",
    "scale_by_harp",
    "NIgtState",
    "n_igt",
    "n_igt_params",
    "adamw_independent",
    "lion",
    "lion_from_adamw",
    "CoherenceState",
    "geometric_median",
    "m_coherence",
    "m_coherence_stream",
    "median_of_means",
    "trimmed_mean",
    "winsorized_mean",
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
