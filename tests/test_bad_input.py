"""Bad input, verb by verb: each gives its own sentence before the solve, or a status that an eager call raises."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import FixedPoint, PointCloudCost, SolverError, Status, fixed_point, inclusion, linear_solve, transport
from jaxnum.solvers import cg, halpern, picard
from tests.tolerances import tolerance

NAN, INF = float("nan"), float("inf")
X0 = np.zeros(3)
A, B = np.diag(np.arange(1.0, 5)), np.ones(4)
COST = np.random.default_rng(0).uniform(size=(4, 3))
ROWS, COLUMNS = np.full(4, 1 / 4), np.full(3, 1 / 3)


def halve(x):
    return 0.5 * x + 1


def changed(array, index, value):
    out = np.array(array)
    out[index] = value
    return out


def short(array):
    return np.asarray(array, np.float32)


# What the arguments alone show: an exception with the function, the argument, what was wanted and what came.
ERRORS = {
    "map of a wrong shape": (
        lambda: fixed_point(lambda x: x[:2], X0),
        ValueError,
        "fixed_point: `T(x0)` must have shape (3,) to match `x0`; got (2,).",
    ),
    "map of a wrong dtype": (
        lambda: fixed_point(lambda x: x.astype(jnp.int32), X0),
        TypeError,
        "fixed_point: `T(x0)` must have dtype float64 to match `x0`; got int32.",
    ),
    "map of another tree": (
        lambda: fixed_point(lambda x: {"a": x}, X0),
        ValueError,
        "fixed_point: `T(x0)` must have the tree structure of `x0`, *; got {'a': *}.",
    ),
    "map that is an array": (
        lambda: fixed_point(X0, X0),
        TypeError,
        "fixed_point: `T` must be a function; got ndarray.",
    ),
    "integer start": (
        lambda: fixed_point(halve, np.zeros(3, int)),
        TypeError,
        "fixed_point: `x0` must have a floating-point or complex dtype; got int64.",
    ),
    "empty start": (lambda: fixed_point(halve, {}), ValueError, "fixed_point: `x0` must have at least one array leaf"),
    "start of no entry": (lambda: fixed_point(halve, np.zeros(0)), ValueError, "`x0` must have at least one entry"),
    "solver for another problem": (
        lambda: fixed_point(halve, X0, solver=cg()),
        TypeError,
        "fixed_point: `problem` must be a Linear for cg; got FixedPoint.",
    ),
    "factory that was not called": (
        lambda: fixed_point(halve, X0, solver=picard),
        TypeError,
        "fixed_point: `solver` must be what a factory of jaxnum.solvers returns; got",
    ),
    "operator of a wrong shape": (
        lambda: inclusion(lambda x: x[:2], X0),
        ValueError,
        "inclusion: `F(x0)` must have shape (3,) to match `x0`; got (2,).",
    ),
    "resolvent of a wrong shape": (
        lambda: inclusion(halve, X0, resolvent=lambda x, step: x[:2]),
        ValueError,
        "inclusion: `resolvent(x0)` must have shape (3,) to match `x0`; got (2,).",
    ),
    "resolvent that is an array": (
        lambda: inclusion(halve, X0, resolvent=X0),
        TypeError,
        "inclusion: `resolvent` must be a function; got ndarray.",
    ),
    "A that is not square": (
        lambda: linear_solve(np.ones((4, 3)), B),
        ValueError,
        "linear_solve: `A` must have shape (N, N); got (4, 3).",
    ),
    "A with a batch": (lambda: linear_solve(np.stack([A, A]), B), ValueError, "Use jax.vmap or jaxnum.solve_batched."),
    "A that is a list": (
        lambda: linear_solve(A.tolist(), B),
        TypeError,
        "linear_solve: `A` must be an array [n, n], a sparse matrix, a linear function or an object with a method "
        "`mv`; got list.",
    ),
    "A of another dtype": (
        lambda: linear_solve(short(A), B),
        TypeError,
        "linear_solve: `A` must have dtype float64 to match `b`; got float32.",
    ),
    "A that changes the tree": (
        lambda: linear_solve(lambda v: {"u": v}, B),
        ValueError,
        "linear_solve: `A(b)` must have the tree structure of `b`",
    ),
    "b of a wrong length": (
        lambda: linear_solve(A, B[:3]),
        ValueError,
        "linear_solve: `b` must have shape (4,) to match `A` (4, 4); got (3,).",
    ),
    "integer b": (
        lambda: linear_solve(A, np.ones(4, int)),
        TypeError,
        "linear_solve: `b` must have a floating-point or complex dtype; got int64.",
    ),
    "tree b for an array A": (
        lambda: linear_solve(A, {"u": B}),
        ValueError,
        "linear_solve: `b` must be one array when `A` is one; got dict.",
    ),
    "x0 of a wrong length": (
        lambda: linear_solve(A, B, np.zeros(5)),
        ValueError,
        "linear_solve: `x0` must have shape (4,) to match `b`; got (5,).",
    ),
    "preconditioner of a wrong size": (
        lambda: linear_solve(A, B, preconditioner=np.eye(3)),
        ValueError,
        "linear_solve: `b` must have shape (3,) to match `preconditioner` (3, 3); got (4,).",
    ),
    "null space of a wrong length": (
        lambda: linear_solve(A, B, null_space=np.ones((1, 3))),
        ValueError,
        "linear_solve: `null_space[i]` must have shape (4,) to match `b`; got (3,).",
    ),
    "rows of a wrong length": (
        lambda: transport(COST, ROWS[:3], COLUMNS, 0.1),
        ValueError,
        "transport: `a` must have shape (4,); got (3,).",
    ),
    "columns with a batch": (
        lambda: transport(COST, ROWS, COLUMNS[:, None], 0.1),
        ValueError,
        "transport: `b` must have shape (3,); got (3, 1).",
    ),
    "integer weights": (
        lambda: transport(COST, np.ones(4, int), COLUMNS, 0.1),
        TypeError,
        "transport: `a` must have a floating-point dtype; got int64.",
    ),
    "weights of another dtype": (
        lambda: transport(COST, short(ROWS), COLUMNS, 0.1),
        TypeError,
        "transport: `a` must have dtype float64 to match `cost`; got float32.",
    ),
    "cost that is a vector": (
        lambda: transport(COST[0], ROWS, COLUMNS, 0.1),
        ValueError,
        "transport: `cost` must have shape (n, m); got (3,).",
    ),
    "cost that is a function": (
        lambda: transport(halve, ROWS, COLUMNS, 0.1),
        TypeError,
        "transport: `cost` must be an array [n, m], a DenseCost or a PointCloudCost; got function.",
    ),
    "complex cost": (
        lambda: transport(COST + 0j, ROWS, COLUMNS, 0.1),
        TypeError,
        "transport: `cost` must have a floating-point dtype; got complex128.",
    ),
    "empty cost": (
        lambda: transport(np.zeros((0, 3)), np.zeros(0), COLUMNS, 0.1),
        ValueError,
        "transport: `cost` must have at least one row and one column; got (0, 3).",
    ),
    "epsilon that is text": (
        lambda: transport(COST, ROWS, COLUMNS, "0.1"),
        TypeError,
        "transport: `epsilon` must be a real scalar; got 0.1.",
    ),
    "several epsilons": (
        lambda: transport(COST, ROWS, COLUMNS, np.ones(2)),
        ValueError,
        "`epsilon` must have shape ()",
    ),
    "tau above 1": (
        lambda: transport(COST, ROWS, COLUMNS, 0.1, tau_a=1.5),
        ValueError,
        "transport: `tau_a` must be in (0, 1]; got 1.5.",
    ),
    "start of another tree": (
        lambda: transport(COST, ROWS, COLUMNS, 0.1, x0=np.zeros(4)),
        ValueError,
        "transport: `x0` must have the tree structure of `(a, b)`",
    ),
}
ERRORS |= {
    f"epsilon {bad}": (
        lambda bad=bad: transport(COST, ROWS, COLUMNS, bad),
        ValueError,
        f"transport: `epsilon` must be positive and finite; got {bad}.",
    )
    for bad in (0.0, -1.0, INF, NAN)
}

VERBS = {
    "fixed_point": lambda **options: fixed_point(halve, X0, **options),
    "halpern": lambda **options: fixed_point(halve, X0, solver=halpern(contraction=0.5), **options),
    "inclusion": lambda **options: inclusion(halve, X0, **options),
    "linear_solve": lambda **options: linear_solve(A, B, **options),
    "transport": lambda **options: transport(COST, ROWS, COLUMNS, 0.1, **options),
}


@pytest.mark.parametrize(("call", "error", "sentence"), ERRORS.values(), ids=ERRORS)
def test_error(call, error, sentence, x64):
    with pytest.raises(error, match=re.escape(sentence)):
        call()


@pytest.mark.parametrize("verb", VERBS)
def test_bad_limits(verb, x64):
    for options, sentence in (
        ({"max_steps": -1}, "`max_steps` must be a Python int >= 0; got -1."),
        ({"max_steps": 2.5}, "`max_steps` must be a Python int >= 0; got 2.5."),
        ({"rtol": -0.1}, "`rtol` must be a finite real number >= 0; got -0.1."),
        ({"rtol": NAN}, "`rtol` must be a finite real number >= 0; got nan."),
        ({"atol": INF}, "`atol` must be a finite real number >= 0; got inf."),
        ({"rtol": np.ones(2)}, "`rtol` must have shape (); got (2,)."),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            VERBS[verb](**options)


# What only the values show. Each call takes the options of the verb.
STATUSES = {
    "map with NaN": (Status.nonfinite, lambda **o: fixed_point(lambda x, c: halve(x) + c, X0, NAN, **o)),
    "start with NaN": (Status.nonfinite, lambda **o: fixed_point(halve, changed(X0, 1, NAN), **o)),
    "map that expands": (Status.nonfinite, lambda **o: fixed_point(lambda x: 3 * x + 1, X0, **o)),
    "map without a fixed point": (Status.max_steps, lambda **o: fixed_point(lambda x: x + 1, X0, max_steps=99, **o)),
    "operator with NaN": (Status.nonfinite, lambda **o: inclusion(lambda x, c: halve(x) + c, X0, NAN, **o)),
    "resolvent with NaN": (Status.nonfinite, lambda **o: inclusion(halve, X0, resolvent=lambda x, s: x * NAN, **o)),
    "operator not monotone": (Status.nonfinite, lambda **o: inclusion(lambda x: 1 - x, X0, **o)),
    "operator without a zero": (Status.max_steps, lambda **o: inclusion(lambda x: 0 * x + 1, X0, max_steps=99, **o)),
    "A with NaN": (Status.nonfinite, lambda **o: linear_solve(changed(A, (0, 1), NAN), B, **o)),
    "A with infinity": (Status.nonfinite, lambda **o: linear_solve(changed(A, (1, 1), INF), B, **o)),
    "b with NaN": (Status.nonfinite, lambda **o: linear_solve(A, changed(B, 0, NAN), **o)),
    "x0 with NaN": (Status.nonfinite, lambda **o: linear_solve(A, B, changed(B, 0, NAN), **o)),
    "A not symmetric": (Status.breakdown, lambda **o: linear_solve(changed(A, (0, 1), 1.0), B, **o)),
    "A not Hermitian": (Status.breakdown, lambda **o: linear_solve(np.eye(2) + 1j * (1 - np.eye(2)), B[:2] + 0j, **o)),
    "A indefinite": (Status.breakdown, lambda **o: linear_solve(changed(A, (1, 1), -1.0), B, **o)),
    "A negative, as a function": (Status.breakdown, lambda **o: linear_solve(lambda v: -v, B, **o)),
    "preconditioner negative": (Status.breakdown, lambda **o: linear_solve(A, B, preconditioner=-np.eye(4), **o)),
    "preconditioner with NaN": (Status.nonfinite, lambda **o: linear_solve(A, B, preconditioner=NAN * np.eye(4), **o)),
    "b in the null space": (
        Status.infeasible,
        lambda **o: linear_solve(changed(A, (3, 3), 0.0), B, null_space=np.eye(4)[3:], **o),
    ),
    "null space that A does not annihilate": (
        Status.infeasible,
        lambda **o: linear_solve(A + 1 - np.eye(4), changed(B, 0, 0.0), null_space=np.eye(4)[:1], **o),
    ),
    "rows of another mass": (Status.infeasible, lambda **o: transport(COST, 2 * ROWS, COLUMNS, 0.1, **o)),
    "rows almost of the mass": (Status.infeasible, lambda **o: transport(COST, ROWS * (1 + 1e-6), COLUMNS, 0.1, **o)),
    "weights all zero": (Status.infeasible, lambda **o: transport(COST, 0 * ROWS, 0 * COLUMNS, 0.1, **o)),
    "weights with NaN": (Status.infeasible, lambda **o: transport(COST, changed(ROWS, 0, NAN), COLUMNS, 0.1, **o)),
    "weights negative": (
        Status.infeasible,
        lambda **o: transport(COST, ROWS + np.array([-0.5, 0.5, 0, 0]), COLUMNS, 0.1, **o),
    ),
    "weights a little negative": (
        Status.infeasible,
        lambda **o: transport(COST, np.array([-1e-12, 0.5 + 1e-12, 0.25, 0.25]), COLUMNS, 0.1, **o),
    ),
    "weights negative, unbalanced": (
        Status.infeasible,
        lambda **o: transport(COST, changed(ROWS, 0, -0.1), COLUMNS, 0.1, tau_a=0.9, tau_b=0.9, **o),
    ),
    "cost with NaN": (Status.nonfinite, lambda **o: transport(changed(COST, (0, 0), NAN), ROWS, COLUMNS, 0.1, **o)),
    "cost of minus infinity": (
        Status.nonfinite,
        lambda **o: transport(changed(COST, (0, 0), -INF), ROWS, COLUMNS, 0.1, **o),
    ),
    "a point that may go nowhere": (
        Status.nonfinite,
        lambda **o: transport(changed(COST, 0, INF), ROWS, COLUMNS, 0.1, **o),
    ),
    "points with NaN": (
        Status.nonfinite,
        lambda **o: transport(PointCloudCost(jnp.full((4, 2), NAN), jnp.ones((3, 2))), ROWS, COLUMNS, 0.1, **o),
    ),
    "potentials with NaN": (
        Status.nonfinite,
        lambda **o: transport(COST, ROWS, COLUMNS, 0.1, x0=(changed(ROWS, 0, NAN), COLUMNS), **o),
    ),
}
STATUSES |= {
    f"max_steps=0, {verb}": (Status.max_steps, lambda call=call, **o: call(max_steps=0, **o))
    for verb, call in VERBS.items()
}


@pytest.mark.parametrize(("status", "call"), STATUSES.values(), ids=STATUSES)
def test_status(status, call, x64):
    solution = call(on_failure="return")
    assert Status(int(solution.status)) is status
    with pytest.raises(SolverError, match=f"{status.name} after .* {re.escape(jaxnum.sentence(status))}"):
        call()


def test_a_singular_system_without_a_solution_is_not_solved(x64):
    with pytest.raises(SolverError) as raised:
        linear_solve(changed(A, (3, 3), 0.0), B)
    assert raised.value.status in (Status.breakdown, Status.nonfinite)


@pytest.mark.parametrize("epsilon", [-0.1, 0.0, NAN])
def test_a_traced_epsilon_out_of_range_has_a_status(epsilon, x64):
    status = jax.jit(lambda e: transport(COST, ROWS, COLUMNS, e).status)(epsilon)
    assert Status(int(status)) in (Status.infeasible, Status.nonfinite)


ILL = np.geomspace(1, 1e4, 30)
TOO_TIGHT = {
    "fixed_point": (lambda **o: fixed_point(jnp.cos, np.float32(1), **o), 0.7390851332151607, 1e1),
    "linear_solve": (
        lambda **o: linear_solve(short(np.diag(ILL) + 0.1), short(np.ones(30)), **o),
        np.linalg.solve(np.diag(ILL) + 0.1, np.ones(30)),
        1e4,
    ),
    "transport": (
        lambda **o: transport(short(COST), short(ROWS), short(COLUMNS), 0.1, **o),
        None,
        1e2,
    ),
}


@pytest.mark.parametrize("verb", TOO_TIGHT)
def test_rtol_below_what_float32_can_reach(verb):
    call, truth, condition = TOO_TIGHT[verb]
    options = {"rtol": 1e-12, "atol": 0.0, "max_steps": 2000}
    solution = call(on_failure="return", **options)
    assert Status(int(solution.status)) in (Status.stagnated, Status.max_steps)
    with pytest.raises(SolverError, match="stagnated|max_steps"):
        call(**options)
    if truth is None:
        with jax.enable_x64(True):
            f, g = transport(COST, ROWS, COLUMNS, 0.1, rtol=1e-12).x
        truth = np.concatenate([f, g])
    got = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(solution.x)])
    np.testing.assert_allclose(got, truth, rtol=0, atol=tolerance("float32", np.size(truth), condition=condition))


def test_a_batch_names_its_bad_lane(x64):
    C, b = np.stack([COST] * 3), np.stack([COLUMNS] * 3)
    rows = np.stack([ROWS, 2 * ROWS, ROWS])
    problem = jaxnum.Transport(jnp.asarray(C), jnp.asarray(rows), jnp.asarray(b), 0.1)
    x0 = (jnp.zeros((3, 4)), jnp.zeros((3, 3)))
    with pytest.raises(SolverError, match=r"solve_batched: 1 of 3 lanes failed: 1 \(infeasible"):
        jaxnum.solve_batched(jaxnum.solvers.sinkhorn(), x0, problem)


def test_solve_says_what_the_verbs_say():
    with pytest.raises(TypeError, match="solve: `problem` must be a Linear for cg; got FixedPoint"):
        jaxnum.solve(cg(), jnp.ones(4), FixedPoint(lambda x: x))
