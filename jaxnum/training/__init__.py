"""What stands around a gradient transform in a training run: losses, subspaces, surrogates, codes and measurements.

None of these is a transform: those are in `jaxnum.transforms`. Pure functions on pytrees, as everywhere.
"""

from typing import TYPE_CHECKING

from kernels_pallas import lazy

if TYPE_CHECKING:
    from jaxnum.training._batch_eigenvalue import BatchEigenvalue as BatchEigenvalue
    from jaxnum.training._batch_eigenvalue import batch_eigenvalue as batch_eigenvalue
    from jaxnum.training._batch_learning_rate import batch_learning_rate as batch_learning_rate
    from jaxnum.training._batch_learning_rate import rescale_batch_learning_rate as rescale_batch_learning_rate
    from jaxnum.training._cross_entropy_with_log_z import LossWithLogZ as LossWithLogZ
    from jaxnum.training._cross_entropy_with_log_z import cross_entropy_with_log_z as cross_entropy_with_log_z
    from jaxnum.training._extrapolate_power_law import PowerLaw as PowerLaw
    from jaxnum.training._extrapolate_power_law import extrapolate_power_law as extrapolate_power_law
    from jaxnum.training._factored_output import FactoredOutput as FactoredOutput
    from jaxnum.training._factored_output import factored_output as factored_output
    from jaxnum.training._factored_output import factored_output_stabilise as factored_output_stabilise
    from jaxnum.training._factored_output import factored_output_step as factored_output_step
    from jaxnum.training._factored_output import factored_output_weights as factored_output_weights
    from jaxnum.training._fwht import fwht as fwht
    from jaxnum.training._gbnn import Gbnn as Gbnn
    from jaxnum.training._gbnn import GbnnLoss as GbnnLoss
    from jaxnum.training._gbnn import gbnn as gbnn
    from jaxnum.training._gbnn import gbnn_layer as gbnn_layer
    from jaxnum.training._gbnn import gbnn_predict as gbnn_predict
    from jaxnum.training._gradient_coding import GradientCode as GradientCode
    from jaxnum.training._gradient_coding import gradient_coding as gradient_coding
    from jaxnum.training._gradient_coding import gradient_coding_decode as gradient_coding_decode
    from jaxnum.training._gradient_coding import gradient_coding_encode as gradient_coding_encode
    from jaxnum.training._gradient_coding import gradient_coding_scheme as gradient_coding_scheme
    from jaxnum.training._gradient_coding import gradient_coding_vector as gradient_coding_vector
    from jaxnum.training._hessian_noise import hessian_noise as hessian_noise
    from jaxnum.training._intrinsic_dimension import IntrinsicDimension as IntrinsicDimension
    from jaxnum.training._intrinsic_dimension import intrinsic_dimension as intrinsic_dimension
    from jaxnum.training._lr_sensitivity import LrSweep as LrSweep
    from jaxnum.training._lr_sensitivity import lr_sensitivity as lr_sensitivity
    from jaxnum.training._lr_sensitivity import lr_sensitivity_sweep as lr_sensitivity_sweep
    from jaxnum.training._m_sgc import m_sgc as m_sgc
    from jaxnum.training._max_attention_logit import max_attention_logit as max_attention_logit
    from jaxnum.training._mean_square_stability import mean_square_stability as mean_square_stability
    from jaxnum.training._mean_square_stability import mean_square_stability_rate as mean_square_stability_rate
    from jaxnum.training._obs_prune import Pruned as Pruned
    from jaxnum.training._obs_prune import obs_prune as obs_prune
    from jaxnum.training._opposing_signals import OpposingEvent as OpposingEvent
    from jaxnum.training._opposing_signals import OpposingGroups as OpposingGroups
    from jaxnum.training._opposing_signals import OpposingScore as OpposingScore
    from jaxnum.training._opposing_signals import opposing_signals as opposing_signals
    from jaxnum.training._opposing_signals import opposing_signals_feature as opposing_signals_feature
    from jaxnum.training._opposing_signals import opposing_signals_groups as opposing_signals_groups
    from jaxnum.training._opposing_signals import opposing_signals_score as opposing_signals_score
    from jaxnum.training._per_example_losses import per_example_losses as per_example_losses
    from jaxnum.training._qk_layernorm import qk_layernorm as qk_layernorm
    from jaxnum.training._random_subspace import Projection as Projection
    from jaxnum.training._random_subspace import Subspace as Subspace
    from jaxnum.training._random_subspace import random_subspace as random_subspace
    from jaxnum.training._random_subspace import random_subspace_projection as random_subspace_projection
    from jaxnum.training._rms import GradRms as GradRms
    from jaxnum.training._rms import grad_rms as grad_rms
    from jaxnum.training._rms import rms as rms
    from jaxnum.training._rms import update_rms as update_rms
    from jaxnum.training._separate import Separation as Separation
    from jaxnum.training._separate import separate as separate
    from jaxnum.training._sgd_stability import SgdStability as SgdStability
    from jaxnum.training._sgd_stability import SgdStabilityState as SgdStabilityState
    from jaxnum.training._sgd_stability import sgd_stability as sgd_stability
    from jaxnum.training._sgd_stability import sgd_stability_exact as sgd_stability_exact
    from jaxnum.training._sgd_stability import sgd_stability_monitor as sgd_stability_monitor
    from jaxnum.training._slq_learning_rate import HeavyBall as HeavyBall
    from jaxnum.training._slq_learning_rate import slq_learning_rate as slq_learning_rate
    from jaxnum.training._spherical_z_loss import spherical_z_loss as spherical_z_loss
    from jaxnum.training._spherical_z_loss import spherical_z_loss_from_statistics as spherical_z_loss_from_statistics
    from jaxnum.training._sr_sgc import sr_sgc as sr_sgc
    from jaxnum.training._sso import SsoInfo as SsoInfo
    from jaxnum.training._sso import SsoState as SsoState
    from jaxnum.training._sso import sso as sso
    from jaxnum.training._sso import sso_surrogate as sso_surrogate
    from jaxnum.training._straggler_simulation import StragglerRun as StragglerRun
    from jaxnum.training._straggler_simulation import straggler_simulation as straggler_simulation
    from jaxnum.training._straggler_simulation import straggler_simulation_times as straggler_simulation_times
    from jaxnum.training.coding import CodingScheme as CodingScheme
    from jaxnum.training.coding import CodingState as CodingState

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "._batch_eigenvalue": ("BatchEigenvalue", "batch_eigenvalue"),
        "._batch_learning_rate": ("batch_learning_rate", "rescale_batch_learning_rate"),
        "._cross_entropy_with_log_z": ("LossWithLogZ", "cross_entropy_with_log_z"),
        "._extrapolate_power_law": ("PowerLaw", "extrapolate_power_law"),
        "._factored_output": (
            "FactoredOutput",
            "factored_output",
            "factored_output_stabilise",
            "factored_output_step",
            "factored_output_weights",
        ),
        "._fwht": ("fwht",),
        "._gbnn": ("Gbnn", "GbnnLoss", "gbnn", "gbnn_layer", "gbnn_predict"),
        "._gradient_coding": (
            "GradientCode",
            "gradient_coding",
            "gradient_coding_decode",
            "gradient_coding_encode",
            "gradient_coding_scheme",
            "gradient_coding_vector",
        ),
        "._hessian_noise": ("hessian_noise",),
        "._intrinsic_dimension": ("IntrinsicDimension", "intrinsic_dimension"),
        "._lr_sensitivity": ("LrSweep", "lr_sensitivity", "lr_sensitivity_sweep"),
        "._m_sgc": ("m_sgc",),
        "._max_attention_logit": ("max_attention_logit",),
        "._mean_square_stability": ("mean_square_stability", "mean_square_stability_rate"),
        "._obs_prune": ("Pruned", "obs_prune"),
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
        "._random_subspace": ("Projection", "Subspace", "random_subspace", "random_subspace_projection"),
        "._rms": ("GradRms", "grad_rms", "rms", "update_rms"),
        "._separate": ("Separation", "separate"),
        "._sgd_stability": (
            "SgdStability",
            "SgdStabilityState",
            "sgd_stability",
            "sgd_stability_exact",
            "sgd_stability_monitor",
        ),
        "._slq_learning_rate": ("HeavyBall", "slq_learning_rate"),
        "._spherical_z_loss": ("spherical_z_loss", "spherical_z_loss_from_statistics"),
        "._sr_sgc": ("sr_sgc",),
        "._sso": ("SsoInfo", "SsoState", "sso", "sso_surrogate"),
        "._straggler_simulation": ("StragglerRun", "straggler_simulation", "straggler_simulation_times"),
        ".coding": ("CodingScheme", "CodingState"),
    },
)
