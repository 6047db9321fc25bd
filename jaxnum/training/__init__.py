"""What stands around a gradient transform in a training run: losses, subspaces, surrogates, codes and measurements.

None of these is a transform: those are in `jaxnum.transforms`. Pure functions on pytrees, as everywhere.
"""

from typing import TYPE_CHECKING

from kernels_pallas import lazy

if TYPE_CHECKING:
    from jaxnum.training._cross_entropy_with_log_z import LossWithLogZ as LossWithLogZ
    from jaxnum.training._cross_entropy_with_log_z import cross_entropy_with_log_z as cross_entropy_with_log_z
    from jaxnum.training._extrapolate_power_law import PowerLaw as PowerLaw
    from jaxnum.training._extrapolate_power_law import extrapolate_power_law as extrapolate_power_law
    from jaxnum.training._lr_sensitivity import LrSweep as LrSweep
    from jaxnum.training._lr_sensitivity import lr_sensitivity as lr_sensitivity
    from jaxnum.training._lr_sensitivity import lr_sensitivity_sweep as lr_sensitivity_sweep
    from jaxnum.training._max_attention_logit import max_attention_logit as max_attention_logit
    from jaxnum.training._opposing_signals import OpposingEvent as OpposingEvent
    from jaxnum.training._opposing_signals import OpposingGroups as OpposingGroups
    from jaxnum.training._opposing_signals import OpposingScore as OpposingScore
    from jaxnum.training._opposing_signals import opposing_signals as opposing_signals
    from jaxnum.training._opposing_signals import opposing_signals_feature as opposing_signals_feature
    from jaxnum.training._opposing_signals import opposing_signals_groups as opposing_signals_groups
    from jaxnum.training._opposing_signals import opposing_signals_score as opposing_signals_score
    from jaxnum.training._per_example_losses import per_example_losses as per_example_losses
    from jaxnum.training._qk_layernorm import qk_layernorm as qk_layernorm
    from jaxnum.training._rms import GradRms as GradRms
    from jaxnum.training._rms import grad_rms as grad_rms
    from jaxnum.training._rms import rms as rms
    from jaxnum.training._rms import update_rms as update_rms

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "._cross_entropy_with_log_z": (
            "LossWithLogZ",
            "cross_entropy_with_log_z",
        ),
        "._extrapolate_power_law": (
            "PowerLaw",
            "extrapolate_power_law",
        ),
        "._lr_sensitivity": (
            "LrSweep",
            "lr_sensitivity",
            "lr_sensitivity_sweep",
        ),
        "._max_attention_logit": ("max_attention_logit",),
        "._opposing_signals": (
            "OpposingEvent",
            "OpposingGroups",
            "OpposingScore",
            "opposing_signals",
            "opposing_signals_feature",
            "opposing_signals_groups",
            "opposing_signals_score",
        ),
        "._per_example_losses": ("per_example_losses",),
        "._qk_layernorm": ("qk_layernorm",),
        "._rms": (
            "GradRms",
            "grad_rms",
            "rms",
            "update_rms",
        ),
    },
)
