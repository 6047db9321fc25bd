"""The verbs say the same words as `solve`, and each is `solve` on its problem with its default solver."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import solvers
from tests import source

VERBS = [name.function for name in source.verbs()]

X = jnp.linspace(0.0, 1.0, 6)
A = jnp.diag(jnp.arange(1.0, 7.0))
WEIGHTS = jnp.full(6, 1 / 6)
COST = (X[:, None] - X[None] + 0.5) ** 2


def bowl(x):
    return jnp.sum(jnp.cosh(x)) + jnp.sum(x) ** 2


# verb: (its positional arguments, its default solver, its problem, its default start)
CASES = {
    "fixed_point": ((jnp.cos, X), solvers.picard(), jaxnum.FixedPoint(jnp.cos), X),
    "inclusion": (
        (jnp.sinh, X),
        solvers.restarted(solvers.feg()),
        jaxnum.Inclusion(jnp.sinh),
        X,
    ),
    "linear_solve": ((A, X), solvers.cg(), jaxnum.Linear(A, X), jnp.zeros(6)),
    "minimize": ((bowl, X), solvers.newton_cg(), jaxnum.Minimize(bowl), X),
    "transport": (
        (COST, WEIGHTS, WEIGHTS, 0.1),
        solvers.sinkhorn(),
        jaxnum.Transport(jaxnum.DenseCost(COST), WEIGHTS, WEIGHTS, 0.1),
        (jnp.zeros(6), jnp.zeros(6)),
    ),
}


def options(function):
    """Its keyword-only parameters that are options of `solve`, with their defaults."""
    wanted = {p.name for p in inspect.signature(jaxnum.solve).parameters.values() if p.kind is p.KEYWORD_ONLY}
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.name in wanted}


@pytest.mark.parametrize("verb", [*VERBS, jaxnum.solve_batched], ids=lambda f: f.__name__)
def test_every_verb_takes_the_options_of_solve(verb):
    assert options(verb) == options(jaxnum.solve)


@pytest.mark.parametrize("verb", VERBS, ids=lambda f: f.__name__)
def test_a_verb_is_solve_on_its_problem(verb):
    arguments, solver, problem, x0 = CASES[verb.__name__]
    got, want = verb(*arguments), jaxnum.solve(solver, x0, problem)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    chosen = verb(*arguments, solver=solver, max_steps=1, on_failure="return")
    assert int(chosen.steps) == 1


@pytest.mark.parametrize("verb", VERBS, ids=lambda f: f.__name__)
def test_errors_bear_the_name_of_the_verb(verb):
    with pytest.raises(ValueError, match=rf"^{verb.__name__}: `adjoint` must be one of"):
        verb(*CASES[verb.__name__][0], adjoint="magic")
