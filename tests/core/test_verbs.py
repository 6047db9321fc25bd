"""What every verb promises alike: a second eager call with a fresh function compiles nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from tests import source
from tests.compiles import count_compiles

RNG = np.random.default_rng(0)
COST, ROWS, COLUMNS = RNG.uniform(size=(5, 4)), np.full(5, 1 / 5), np.full(4, 1 / 4)

# Each takes an array that the call captures or is given.
CALLS = {
    "fixed_point": lambda c: jaxnum.fixed_point(lambda x: 0.5 * jnp.cos(x) + c, np.zeros(5)),
    "inclusion": lambda c: jaxnum.inclusion(
        lambda x: x - c, np.zeros(5), resolvent=jaxnum.solvers.resolvents.box(0.0, jnp.asarray(0.2 + c[0]))
    ),
    "minimize": lambda c: jaxnum.minimize(lambda x: jnp.sum((x - c) ** 2 + jnp.cosh(x)), np.zeros(5)),
    "linear_solve": lambda c: jaxnum.linear_solve(
        lambda v: (2 + c) * v, np.ones(5), preconditioner=lambda r: r / (2 + c)
    ),
    "linear_solve of an array": lambda c: jaxnum.linear_solve(np.diag(2 + c), np.ones(5)),
    "transport": lambda c: jaxnum.transport(COST + c[:, None], ROWS, COLUMNS, 0.1 + float(c[0])),
    "transport of points": lambda c: jaxnum.transport(
        jaxnum.PointCloudCost(jnp.asarray(c[:, None]), jnp.asarray(COST[0, :, None])), ROWS, COLUMNS, 0.1 + float(c[0])
    ),
    "solve": lambda c: jaxnum.solve(
        jaxnum.solvers.halpern(contraction=0.5 + 0.1 * float(c[0])),
        np.zeros(5),
        jaxnum.FixedPoint(lambda x: 0.5 * jnp.cos(x) + c),
        rtol=1e-6 + 1e-7 * float(c[1]),
    ),
    "solve_batched": lambda c: jaxnum.solve_batched(
        jaxnum.solvers.picard(),
        np.zeros((2, 5)),
        jaxnum.FixedPoint(lambda x, s: s * jnp.cos(x) + c, (np.array([0.3, 0.5]),)),
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_second_eager_call_with_a_fresh_function_compiles_nothing(call, x64):
    call(np.linspace(0.1, 0.2, 5))
    with count_compiles() as compiled:
        call(np.linspace(0.3, 0.5, 5))
    assert compiled() == 0


def test_every_verb_is_here():
    assert {name.name for name in source.verbs()} <= set(CALLS)
