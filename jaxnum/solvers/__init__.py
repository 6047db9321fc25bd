"""Jitted solvers: factories of `Solver`s, and what composes them. `jaxnum.solve` runs them."""

from jaxnum.core.combinators import phase as phase
from jaxnum.core.combinators import restarted as restarted
from jaxnum.core.combinators import then as then
from jaxnum.core.combinators import warm_started as warm_started
from jaxnum.solvers.fixed_point._halpern import halpern as halpern
from jaxnum.solvers.fixed_point._picard import picard as picard
from jaxnum.solvers.linear._cg import cg as cg
from jaxnum.solvers.linear._gcro_dr import gcro_dr as gcro_dr
from jaxnum.solvers.linear._leverage_scores import leverage_scores as leverage_scores
from jaxnum.solvers.linear._newton_schulz import newton_schulz as newton_schulz
from jaxnum.solvers.linear._newton_schulz import newton_schulz_regression as newton_schulz_regression
from jaxnum.solvers.linear._sample_rows import sample_rows as sample_rows
from jaxnum.solvers.linear._sketch import sketch as sketch
from jaxnum.solvers.linear._sketched_least_squares import sketched_least_squares as sketched_least_squares
from jaxnum.solvers.linear._skr import skr as skr
from jaxnum.solvers.linear._skr import skr_order as skr_order
from jaxnum.solvers.transport._sinkhorn import sinkhorn as sinkhorn
