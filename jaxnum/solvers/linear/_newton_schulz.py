"""Newton-Schulz iteration for inverses, pseudo-inverses and least squares out of matrix products alone.

Cost: two products of the shape of M A M a step (three at order 3); memory 4 arrays like A.
Source: Schulz 1933; Ben-Israel & Cohen 1966; regression in context: Fu, Chen, Jia & Sharan 2023.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.batched import raise_unless_all_converged
from jaxnum.core.problem import Problem
from jaxnum.core.solver import Defaults, Measure, Solution, Solver, raise_unless_converged, solve
from jaxnum.core.status import Status
from kernels_pallas import checks

# Beyond 2 the iteration diverges, and at 2 exactly one error stays at -1 for ever.
_SAFE = 1.9
# Small singular values keep the relative residual from falling for log2(kappa) steps, 53 at most; rounding for ever.
_PATIENCE = 55


@partial(jax.tree_util.register_dataclass, data_fields=["A"], meta_fields=["symmetric"])
class Inverse(Problem):
    """Find the pseudo-inverse of A [n, d]; `symmetric` says that A is its own transpose."""

    def __init__(self, A: Any, symmetric: bool):
        self.A, self.symmetric = A, symmetric


class NewtonSchulzState(NamedTuple):
    """E M with E = I - M A, E A-side product P = M A, ||E M||, ||M||, the best of their ratio and steps since."""

    correction: jax.Array
    product: jax.Array
    residual: jax.Array
    scale: jax.Array
    best: jax.Array
    waited: jax.Array
