"""jaxnum: functional numerics for JAX. Gradient transforms, jitted solvers and sequence kernels as pure functions."""

from jaxnum import curvature as curvature
from jaxnum import schedules as schedules
from jaxnum import sequence as sequence
from jaxnum import solvers as solvers
from jaxnum import training as training
from jaxnum import transforms as transforms
from jaxnum.core.batched import solve_batched as solve_batched
from jaxnum.core.costs import DenseCost as DenseCost
from jaxnum.core.costs import PointCloudCost as PointCloudCost
from jaxnum.core.operators import DiaOperator as DiaOperator
from jaxnum.core.operators import EllOperator as EllOperator
from jaxnum.core.operators import check_symmetric as check_symmetric
from jaxnum.core.operators import sparse_operator as sparse_operator
from jaxnum.core.problems import FiniteSum as FiniteSum
from jaxnum.core.problems import FixedPoint as FixedPoint
from jaxnum.core.problems import Inclusion as Inclusion
from jaxnum.core.problems import Linear as Linear
from jaxnum.core.problems import Minimize as Minimize
from jaxnum.core.problems import Transport as Transport
from jaxnum.core.solver import Solution as Solution
from jaxnum.core.solver import Solver as Solver
from jaxnum.core.solver import solve as solve
from jaxnum.core.status import SolverError as SolverError
from jaxnum.core.status import Status as Status
from jaxnum.core.status import sentence as sentence
from jaxnum.verbs import fixed_point as fixed_point
from jaxnum.verbs import inclusion as inclusion
from jaxnum.verbs import linear_solve as linear_solve
from jaxnum.verbs import minimize as minimize
from jaxnum.verbs import transport as transport

__version__ = "0.1.0"
