"""Jitted solvers: factories of `Solver`s, and what composes them. `jaxnum.solve` runs them."""

from typing import TYPE_CHECKING

from kernels_pallas import lazy

if TYPE_CHECKING:
    from jaxnum.core.combinators import phase as phase
    from jaxnum.core.combinators import restarted as restarted
    from jaxnum.core.combinators import then as then
    from jaxnum.core.combinators import warm_started as warm_started
    from jaxnum.solvers import resolvents as resolvents
    from jaxnum.solvers.fixed_point._anderson import anderson as anderson
    from jaxnum.solvers.fixed_point._convergent_graph_solver import convergent_graph_solver as convergent_graph_solver
    from jaxnum.solvers.fixed_point._convergent_graph_solver import (
        convergent_graph_solver_weights as convergent_graph_solver_weights,
    )
    from jaxnum.solvers.fixed_point._halpern import halpern as halpern
    from jaxnum.solvers.fixed_point._picard import picard as picard
    from jaxnum.solvers.linear._cg import cg as cg
    from jaxnum.solvers.linear._cheb_cb import cheb_cb as cheb_cb
    from jaxnum.solvers.linear._dcdm import dcdm as dcdm
    from jaxnum.solvers.linear._dcdm import dcdm_loss as dcdm_loss
    from jaxnum.solvers.linear._dcdm_network import dcdm_network as dcdm_network
    from jaxnum.solvers.linear._dcdm_network import init_dcdm_network as init_dcdm_network
    from jaxnum.solvers.linear._dcdm_network import linear_dcdm_network as linear_dcdm_network
    from jaxnum.solvers.linear._gcro_dr import gcro_dr as gcro_dr
    from jaxnum.solvers.linear._learned_relaxation import learned_relaxation as learned_relaxation
    from jaxnum.solvers.linear._leverage_scores import leverage_scores as leverage_scores
    from jaxnum.solvers.linear._minres import minres as minres
    from jaxnum.solvers.linear._newton_schulz import newton_schulz as newton_schulz
    from jaxnum.solvers.linear._newton_schulz import newton_schulz_regression as newton_schulz_regression
    from jaxnum.solvers.linear._ritz_dataset import ritz_dataset as ritz_dataset
    from jaxnum.solvers.linear._sample_rows import sample_rows as sample_rows
    from jaxnum.solvers.linear._sketch import sketch as sketch
    from jaxnum.solvers.linear._sketched_least_squares import sketched_least_squares as sketched_least_squares
    from jaxnum.solvers.linear._skr import skr as skr
    from jaxnum.solvers.linear._skr import skr_order as skr_order
    from jaxnum.solvers.linear._sor import sor as sor
    from jaxnum.solvers.linear._sor import sor_schedule as sor_schedule
    from jaxnum.solvers.linear._ssor import ssor as ssor
    from jaxnum.solvers.linear._ssor import ssor_preconditioner as ssor_preconditioner
    from jaxnum.solvers.linear._train_dcdm import train_dcdm as train_dcdm
    from jaxnum.solvers.linear._tsallis_inf import tsallis_inf as tsallis_inf
    from jaxnum.solvers.minimize._bcd import bcd as bcd
    from jaxnum.solvers.minimize._bcd_partition import bcd_partition as bcd_partition
    from jaxnum.solvers.minimize._bcd_partition import bcd_partition_forests as bcd_partition_forests
    from jaxnum.solvers.minimize._forest_solve import Forest as Forest
    from jaxnum.solvers.minimize._forest_solve import forest_solve as forest_solve
    from jaxnum.solvers.minimize._forest_solve import forest_solve_order as forest_solve_order
    from jaxnum.solvers.minimize._newton_cg import newton_cg as newton_cg
    from jaxnum.solvers.monotone._cocoercive_halpern import cocoercive_halpern as cocoercive_halpern
    from jaxnum.solvers.monotone._extragradient import extragradient as extragradient
    from jaxnum.solvers.monotone._feg import feg as feg
    from jaxnum.solvers.monotone._inexact_halpern import inexact_halpern as inexact_halpern
    from jaxnum.solvers.monotone._vr_halpern import vr_halpern as vr_halpern
    from jaxnum.solvers.transport._newton import newton as newton
    from jaxnum.solvers.transport._sinkhorn import sinkhorn as sinkhorn
    from jaxnum.solvers.transport._sinkhorn_barycenter import SinkhornBarycenter as SinkhornBarycenter
    from jaxnum.solvers.transport._sinkhorn_barycenter import sinkhorn_barycenter as sinkhorn_barycenter
    from jaxnum.solvers.transport._sinkhorn_divergence import SinkhornDivergence as SinkhornDivergence
    from jaxnum.solvers.transport._sinkhorn_divergence import sinkhorn_divergence as sinkhorn_divergence
    from jaxnum.solvers.transport._sns import sns as sns

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "jaxnum.core.combinators": ("phase", "restarted", "then", "warm_started"),
        ".": ("resolvents",),
        ".fixed_point._anderson": ("anderson",),
        ".fixed_point._convergent_graph_solver": ("convergent_graph_solver", "convergent_graph_solver_weights"),
        ".fixed_point._halpern": ("halpern",),
        ".fixed_point._picard": ("picard",),
        ".linear._cg": ("cg",),
        ".linear._cheb_cb": ("cheb_cb",),
        ".linear._dcdm": ("dcdm", "dcdm_loss"),
        ".linear._dcdm_network": ("dcdm_network", "init_dcdm_network", "linear_dcdm_network"),
        ".linear._gcro_dr": ("gcro_dr",),
        ".linear._learned_relaxation": ("learned_relaxation",),
        ".linear._leverage_scores": ("leverage_scores",),
        ".linear._minres": ("minres",),
        ".linear._newton_schulz": ("newton_schulz", "newton_schulz_regression"),
        ".linear._ritz_dataset": ("ritz_dataset",),
        ".linear._sample_rows": ("sample_rows",),
        ".linear._sketch": ("sketch",),
        ".linear._sketched_least_squares": ("sketched_least_squares",),
        ".linear._skr": ("skr", "skr_order"),
        ".linear._sor": ("sor", "sor_schedule"),
        ".linear._ssor": ("ssor", "ssor_preconditioner"),
        ".linear._train_dcdm": ("train_dcdm",),
        ".linear._tsallis_inf": ("tsallis_inf",),
        ".minimize._bcd": ("bcd",),
        ".minimize._bcd_partition": ("bcd_partition", "bcd_partition_forests"),
        ".minimize._forest_solve": ("Forest", "forest_solve", "forest_solve_order"),
        ".minimize._newton_cg": ("newton_cg",),
        ".monotone._cocoercive_halpern": ("cocoercive_halpern",),
        ".monotone._extragradient": ("extragradient",),
        ".monotone._feg": ("feg",),
        ".monotone._inexact_halpern": ("inexact_halpern",),
        ".monotone._vr_halpern": ("vr_halpern",),
        ".transport._newton": ("newton",),
        ".transport._sinkhorn": ("sinkhorn",),
        ".transport._sinkhorn_barycenter": ("SinkhornBarycenter", "sinkhorn_barycenter"),
        ".transport._sinkhorn_divergence": ("SinkhornDivergence", "sinkhorn_divergence"),
        ".transport._sns": ("sns",),
    },
)
