"""The table of what is measured: one row a method, one small file a row under `benchmarks/ops/`.

A row says how to make inputs, what to run, what the truth is and whom to compare with; `benchmarks.run` does the
measuring. A new file in `benchmarks/ops/` that calls `register` is all a new method needs.
"""

from __future__ import annotations

import importlib
import pkgutil
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MODES = ("fwd", "fwd_bwd", "solve", "step")
# Packages whose public functions are methods.
ROOMS = (
    "jaxnum.transforms",
    "jaxnum.schedules",
    "jaxnum.training",
    "jaxnum.solvers",
    "jaxnum.curvature",
    "jaxnum.sequence",
    "kernels_pallas",
)
METRICS = ("ratio", "speedup", "compile_ratio", "error", "figure")

Params = Mapping[str, Any]
# Built once for a parameter set; called with the inputs. Imports of the package under test belong inside.
Build = Callable[[Params], Callable[..., Any]]


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation of the same work.

    Attributes:
      package: distribution to name in the record and in the error when it is missing; one of the extras `bench` and
        `bench-torch`.
      build: `(params) -> callable(*inputs)`; imports its package when called, not before.
      jit: False for code that is not JAX (scipy, POT): it is then called with NumPy arrays and never compiled.
      modes: modes it can run; None means all modes of the row.
      same_answer: False for a different method with the same job, whose error against our reference says nothing.
    """

    package: str
    build: Build
    jit: bool = True
    modes: tuple[str, ...] | None = None
    same_answer: bool = True


@dataclass(frozen=True)
class Target:
    """A figure that must hold: `metric` at most (or at least) `limit`.

    Attributes:
      metric: "ratio" (our time / peer's), "speedup" (its inverse), "compile_ratio", "error", or "figure".
      limit: the number.
      source: the sentence the number comes from.
      at_least: the figure must be at least the limit, else at most.
      shape: name of the parameter set; None means every one.
      mode: None means every mode.
      peer: None means every peer; ignored for "error" and "figure".
      figure: key in the row's figures, for "figure".
    """

    metric: str
    limit: float
    source: str
    at_least: bool = False
    shape: str | None = None
    mode: str | None = None
    peer: str | None = None
    figure: str | None = None

    def met(self, value: float) -> bool:
        """Whether a measured value meets the target; NaN never does."""
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Row:
    """One method's line in the table; see `register`."""

    name: str
    covers: tuple[str, ...]
    shapes: Mapping[str, Params]
    make: Callable[[Params], tuple]
    run: Build
    reference: Build
    modes: tuple[str, ...]
    tests: tuple[str, ...]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    figures: Mapping[str, Callable[[], Mapping[str, float]]] = field(default_factory=dict)
    error: Callable[[Any, Any], float] | None = None
    x64: bool = False


_ROWS: dict[str, Row] = {}

# Public names that need no row, and why.
EXEMPT = {
    "phase": "a combinator: it adds no arithmetic of its own",
    "then": "a combinator: it adds no arithmetic of its own",
    "restarted": "a combinator: it adds no arithmetic of its own",
    "warm_started": "a combinator: it adds no arithmetic of its own",
    "leverage_scores": "a QR and a small SVD of LAPACK's",
    "sample_rows": "one draw from a table",
    "sketch": "one matrix product, transform or scattered sum; the row of sketched_least_squares holds one",
    "skr": "a scan of gcro_dr, whose row measures it sorted and unsorted",
    "inexact_halpern": "figures in the row of vr_halpern, beside feg",
    "extragradient": "the peer in the row of feg, which measures both",
    "hutchinson": "one Hessian-vector product of the user's loss, which costs what the loss costs",
    "gauss_newton_bartlett": "one gradient of the user's model, which costs what the model costs",
    "spherical_z_loss": "figures in the row of factored_output",
    "trimmed_mean": "figures in the row of winsorized_mean",
    "median_of_means": "figures in the row of winsorized_mean",
    "geometric_median": "figures in the row of winsorized_mean",
    "winsorized_value_and_grad": "gradients of the user's loss, which cost what the loss costs, and comparisons",
    "m_coherence_from_loss": "figures in the row of m_coherence",
    "m_coherence_stream": "two sums over what per-example gradients cost",
    "harp": "figures in the row of n_igt",
    "mkor_hybrid": "a step of one of its two methods, and a few numbers",
    "mkor_layers": "a walk over the paths of a tree, on the host",
    "mkor_stats": "figures in the row of mkor",
    "lion_from_adamw": "two numbers",
    "gbnn_layer": "optax's L-BFGS on a small layer; the row of gbnn runs it",
    "intrinsic_dimension": "figures in the row of random_subspace",
    "adamw_independent": "optax's adamw with its last two steps changed",
    "scale_by_last_iterate": "one product, which XLA fuses",
    "record_norms": "one sum of squares, which XLA fuses",
    "qk_layernorm": "one pass over queries and keys, which XLA fuses; the row of lr_sensitivity trains with it",
    "max_attention_logit": "the products of attention, whose maximum XLA fuses",
    "rms": "one sum of squares, which XLA fuses",
    "grad_rms": "one sum of squares, which XLA fuses",
    "update_rms": "one sum of squares, which XLA fuses",
    "extrapolate_power_law": "a line through a few points",
    "per_example_losses": "the user's loss under jax.vmap or jax.lax.map, which costs what the loss costs",
    "newton_cg": "gradients and Hessian products of the user's f, which cost what f costs",
    "hutchinson_trace": "matfree's estimator on the user's operator, which costs what the operator costs",
    "hutchinson_diagonal": "matfree's estimator on the user's operator, which costs what the operator costs",
    "spectral_density": "one lanczos, which has a row, for each probe",
    "top_eigenvalue": "lanczos, which has a row, restarted",
    "gauss_newton_product": "derivatives of the user's model and loss, which cost what they cost",
    "fisher_product": "one push-forward and one pull-back of the user's model, which cost what the model costs",
    "empirical_fisher_product": "one push-forward and one pull-back of the user's losses, which cost what they cost",
    "attention_io": "a count of words on paper: nothing is traced or compiled",
    "newton": "the row of sns runs it",
    "dcdm_network": "the row of dcdm runs it",
    "train_dcdm": "the row of dcdm trains with it and says how long",
    "ritz_dataset": "one run of lanczos, once before a training",
    "strict": "a check at trace time: it leaves no trace in the compiled update",
    "lightning_attention": "one call of linear_attention, which has a row",
    "lightning_attention_slopes": "a few numbers a model",
    "retention": "one call of linear_attention, which has a row",
    "norm_attention": "calls of linear_attention, which has a row",
    "diag_attention": "attention, which has a row, on short blocks",
    "srmsnorm": "one pass over its input, which XLA fuses",
    "elu1": "one pass over its input, which XLA fuses",
    "t2r": "one matrix product",
    "taylor2": "one pass over its output, which XLA fuses",
    "hedgehog": "one matrix product and a softmax",
    "hedgehog_distillation_loss": "two score matrices a chunk, computed as they stand",
    "gated_delta_net": "delta_rule, which has a row, between matrix products",
    "mamba_block": "selective_scan, which has a row, between matrix products",
    "bidirectional": "two layers and three flips",
    "prefix_linear_attention": "linear_attention, which has a row, between matrix products",
    "lasp2": "linear_attention, which has a row, and one message that this machine's virtual devices do not time",
    "lasp2_hybrid_attention": "attention, which has a row, and one message likewise",
    "sinkhorn_barycenter": "picard, which has a row, on the log-sum-exps of sinkhorn, which has one",
    "sinkhorn_divergence": "three solves by sinkhorn, which has a row",
    "transnormer_block": "linear_attention, which has a row, between matrix products",
    "ssor": "two sweeps of sor, whose row counts its steps and those of cg with ssor_preconditioner",
    "cheb_cb": "a small fit a round; the row of learned_relaxation says how well it chooses",
    "bcd_partition": "one sort on the host",
    "bcd_partition_forests": "passes over a graph on the host; the row of bcd counts the steps on what it gives",
    "fisher_inverse": "figures in the row of mfac",
    "separate": "figures in the row of normalized_gd",
    "obs_prune": "figures in the row of mfac",
    "tsallis_inf": "a few numbers a round; the row of learned_relaxation says how well it chooses",
    "batch_eigenvalue": "a few numbers, which the row of batch_learning_rate compares with drawn matrices",
    "hessian_noise": "Hessian products of the user's loss, which cost what they cost; figures in batch_learning_rate",
    "slq_learning_rate": "two numbers of a spectral_density; the row of batch_learning_rate runs it",
    "mean_square_stability": "the row of sgd_stability runs it",
    "sr_sgc": "figures in the row of gradient_coding",
    "m_sgc": "figures in the row of gradient_coding",
    "straggler_simulation": "figures in the row of gradient_coding, which it makes",
}


def register(row: Row) -> Row:
    """Add a row to the table.

    Raises:
      ValueError: the name is taken, or a field names something that does not exist.
    """
    if row.name in _ROWS:
        raise ValueError(f"register: `name` must be new; got {row.name!r}, which already has a row.")
    for wrong in sorted(set(row.modes) - set(MODES)):
        raise ValueError(f"register: `modes` of {row.name!r} must be among {MODES}; got {wrong!r}.")
    for target in row.targets:
        _check_target(row, target)
    _ROWS[row.name] = row
    return row


def _check_target(row: Row, target: Target) -> None:
    known = [
        ("metric", target.metric, METRICS),
        ("shape", target.shape, (None, *row.shapes)),
        ("mode", target.mode, (None, *row.modes)),
        ("peer", target.peer, (None, *row.peers)),
    ]
    for name, value, allowed in known:
        if value not in allowed:
            raise ValueError(f"register: target `{name}` of {row.name!r} must be among {allowed}; got {value!r}.")


def rows() -> dict[str, Row]:
    """Every row by name, after importing all files of `benchmarks/ops/`."""
    ops = importlib.import_module("benchmarks.ops")
    for module in sorted(entry.name for entry in pkgutil.iter_modules(ops.__path__)):
        importlib.import_module(f"benchmarks.ops.{module}")
    return dict(sorted(_ROWS.items()))


def shapes(name: str) -> Mapping[str, Params]:
    """The named parameter sets of one row, for tests that want the same ones."""
    importlib.import_module(f"benchmarks.ops.{name}")
    return _ROWS[name].shapes


def public_methods() -> set[str]:
    """Names of every public function of the rooms."""
    names = set()
    for package in ROOMS:
        module = importlib.import_module(package)
        listed = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        for name in listed:
            member = getattr(module, name)
            if isinstance(member, types.FunctionType):
                names.add(name)
    return names


def uncovered() -> list[str]:
    """Public methods with neither a row nor a stated reason."""
    covered = {name for row in rows().values() for name in (row.name, *row.covers)}
    return sorted(public_methods() - covered - set(EXEMPT))
