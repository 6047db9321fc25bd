"""Gradient transformations: optax-compatible methods that optax lacks or states otherwise than their paper.

Every factory returns an `optax.GradientTransformationExtraArgs` and goes wherever optax's own do.
`scale_by_<method>` is the mathematics, `<method>(learning_rate, ...)` the ready optimiser. `strict` gives any
optax transformation the argument checks that these have built in.
"""

from typing import TYPE_CHECKING

from kernels_pallas import lazy

if TYPE_CHECKING:
    from jaxnum.transforms._adamw_independent import adamw_independent as adamw_independent
    from jaxnum.transforms._adan import AdanState as AdanState
    from jaxnum.transforms._adan import adan as adan
    from jaxnum.transforms._adan import adan_restart as adan_restart
    from jaxnum.transforms._adan import scale_by_adan as scale_by_adan
    from jaxnum.transforms._geometric_median import geometric_median as geometric_median
    from jaxnum.transforms._harp import HarpState as HarpState
    from jaxnum.transforms._harp import harp as harp
    from jaxnum.transforms._harp import scale_by_harp as scale_by_harp
    from jaxnum.transforms._lion import lion as lion
    from jaxnum.transforms._lion import lion_from_adamw as lion_from_adamw
    from jaxnum.transforms._m_coherence import CoherenceState as CoherenceState
    from jaxnum.transforms._m_coherence import m_coherence as m_coherence
    from jaxnum.transforms._m_coherence import m_coherence_from_loss as m_coherence_from_loss
    from jaxnum.transforms._m_coherence import m_coherence_stream as m_coherence_stream
    from jaxnum.transforms._median_of_means import median_of_means as median_of_means
    from jaxnum.transforms._mfac import MfacState as MfacState
    from jaxnum.transforms._mfac import mfac as mfac
    from jaxnum.transforms._mfac import scale_by_mfac as scale_by_mfac
    from jaxnum.transforms._mkor import MkorState as MkorState
    from jaxnum.transforms._mkor import mkor as mkor
    from jaxnum.transforms._mkor import scale_by_mkor as scale_by_mkor
    from jaxnum.transforms._mkor_hybrid import MkorHybridState as MkorHybridState
    from jaxnum.transforms._mkor_hybrid import mkor_hybrid as mkor_hybrid
    from jaxnum.transforms._mkor_layers import MkorLayer as MkorLayer
    from jaxnum.transforms._mkor_layers import mkor_layers as mkor_layers
    from jaxnum.transforms._mkor_stats import MkorStats as MkorStats
    from jaxnum.transforms._mkor_stats import mkor_stats as mkor_stats
    from jaxnum.transforms._mu_param import mu_param as mu_param
    from jaxnum.transforms._mu_param import mu_param_multipliers as mu_param_multipliers
    from jaxnum.transforms._n_igt import NIgtState as NIgtState
    from jaxnum.transforms._n_igt import n_igt as n_igt
    from jaxnum.transforms._n_igt import n_igt_params as n_igt_params
    from jaxnum.transforms._normalized_gd import normalized_gd as normalized_gd
    from jaxnum.transforms._normalized_gd import scale_by_normalized_gd as scale_by_normalized_gd
    from jaxnum.transforms._record_norms import NormsState as NormsState
    from jaxnum.transforms._record_norms import record_norms as record_norms
    from jaxnum.transforms._scale_by_last_iterate import LastIterateState as LastIterateState
    from jaxnum.transforms._scale_by_last_iterate import scale_by_last_iterate as scale_by_last_iterate
    from jaxnum.transforms._sophia import SophiaState as SophiaState
    from jaxnum.transforms._sophia import scale_by_sophia as scale_by_sophia
    from jaxnum.transforms._sophia import sophia as sophia
    from jaxnum.transforms._strict import strict as strict
    from jaxnum.transforms._trimmed_mean import trimmed_mean as trimmed_mean
    from jaxnum.transforms._winsorized_mean import winsorized_mean as winsorized_mean
    from jaxnum.transforms._winsorized_value_and_grad import winsorized_value_and_grad as winsorized_value_and_grad

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "._adamw_independent": ("adamw_independent",),
        "._adan": ("AdanState", "adan", "adan_restart", "scale_by_adan"),
        "._geometric_median": ("geometric_median",),
        "._harp": ("HarpState", "harp", "scale_by_harp"),
        "._lion": ("lion", "lion_from_adamw"),
        "._m_coherence": ("CoherenceState", "m_coherence", "m_coherence_from_loss", "m_coherence_stream"),
        "._median_of_means": ("median_of_means",),
        "._mfac": ("MfacState", "mfac", "scale_by_mfac"),
        "._mkor": ("MkorState", "mkor", "scale_by_mkor"),
        "._mkor_hybrid": ("MkorHybridState", "mkor_hybrid"),
        "._mkor_layers": ("MkorLayer", "mkor_layers"),
        "._mkor_stats": ("MkorStats", "mkor_stats"),
        "._mu_param": ("mu_param", "mu_param_multipliers"),
        "._n_igt": ("NIgtState", "n_igt", "n_igt_params"),
        "._normalized_gd": ("normalized_gd", "scale_by_normalized_gd"),
        "._record_norms": ("NormsState", "record_norms"),
        "._scale_by_last_iterate": ("LastIterateState", "scale_by_last_iterate"),
        "._sophia": ("SophiaState", "scale_by_sophia", "sophia"),
        "._strict": ("strict",),
        "._trimmed_mean": ("trimmed_mean",),
        "._winsorized_mean": ("winsorized_mean",),
        "._winsorized_value_and_grad": ("winsorized_value_and_grad",),
    },
)
