"""Jitted solvers: factories of `Solver`s, and what composes them. `jaxnum.solve` runs them."""

from jaxnum.core.combinators import phase as phase
from jaxnum.core.combinators import restarted as restarted
from jaxnum.core.combinators import then as then
from jaxnum.core.combinators import warm_started as warm_started
from jaxnum.solvers.fixed_point._halpern import halpern as halpern
from jaxnum.solvers.fixed_point._picard import picard as picard
from jaxnum.solvers.linear._cg import cg as cg
from jaxnum.solvers.transport._newton import newton as newton
from jaxnum.solvers.transport._sinkhorn import sinkhorn as sinkhorn
from jaxnum.solvers.transport._sns import sns as sns
