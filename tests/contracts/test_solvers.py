"""Every solver through the contract, and for each check a wrong twin that it must refuse."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxnum import FixedPoint, SolverError, Transport
from jaxnum.core.solver import Measure
from jaxnum.solvers import picard
from tests.contracts import solver as contract
from tests.contracts.solver_problems import ContractionCase, TransportCase

# A variant adds nothing that another version of jax could break.
MEMBERS = pytest.mark.parametrize(
    "member",
    [pytest.param(m, id=m.name, marks=[pytest.mark.once] if m.variant else []) for m in contract.SOLVERS],
)


def applicable():
    """Every member with every check but its exceptions."""
    for member in contract.SOLVERS:
        for check in contract.CHECKS:
            if check.__name__ not in member.exceptions:
                marks = [pytest.mark.once] if member.variant else []
                yield pytest.param(member, check, id=f"{member.name}-{check.__name__}", marks=marks)


@pytest.mark.parametrize(("member", "check"), list(applicable()))
def test_solver(member, check, x64):
    check(member)


def test_exceptions_are_checks_and_few():
    names = {check.__name__ for check in contract.CHECKS}
    assert all(set(m.exceptions) < names for m in contract.SOLVERS)
    assert sum(map(len, (m.exceptions for m in contract.SOLVERS))) <= 2


@MEMBERS
def test_reference(member, float_dtype):
    contract.check_reference(member, float_dtype)


def never_reports(hyper, x, state, problem):
    m = picard().measure(hyper, x, state, problem)
    return m._replace(residual=jnp.zeros_like(m.residual))


def hides_nan(hyper, x, state, problem):
    m = picard().measure(hyper, x, state, problem)
    residual, scale = (jnp.where(jnp.isnan(value), 1.0, value) for value in (m.residual, m.scale))
    return m._replace(residual=residual, scale=scale)


def asks_the_host(hyper, x, state, problem):
    m = picard().measure(hyper, x, state, problem)
    shape = jax.ShapeDtypeStruct((), m.residual.dtype)
    return m._replace(residual=jax.pure_callback(lambda r: r, shape, m.residual, vmap_method="sequential"))


def measures_by_vdot(hyper, x, state, problem):
    r = jax.tree.map(jnp.subtract, x, state.image)
    return Measure(jnp.sqrt(contract.inner(r, r)), jnp.float64(1), jnp.int32(0))


def drifts(hyper, x, state, problem):
    x, state = picard().step(hyper, x, state, problem)
    return jax.tree.map(lambda leaf: leaf + 1e-3, x), state


def hides_its_derivative(hyper, x, state, problem):
    return jax.lax.stop_gradient(picard().step(hyper, x, state, problem))


def steps_at_the_end(hyper, x, state, problem):
    return picard().step(hyper, x, state, problem)[0]


def forgets_the_start(hyper, x, problem):
    return picard().init(hyper, jax.tree.map(jnp.zeros_like, x), problem)


@jax.custom_batching.custom_vmap
def leak(leaf):
    return leaf


@leak.def_vmap
def _leak_between_lanes(axis_size, in_batched, leaf):
    return jnp.broadcast_to(jnp.mean(leaf, axis=0), leaf.shape), True


def leaks(hyper, x, state, problem):
    x, state = picard().step(hyper, x, state, problem)
    return jax.tree.map(leak, x), state


def retraces():
    base = picard()
    return replace(base, step=lambda *args: base.step(*args))


class WrongSign(FixedPoint):
    """Its derivative with respect to its arguments has the wrong sign."""

    def root(self, x):
        flipped = jax.tree.map(lambda p: 2 * jax.lax.stop_gradient(p) - p, self.args)
        return jax.tree.map(jnp.subtract, x, jax.lax.stop_gradient(self.T)(x, *flipped))


class NoGauge(Transport):
    """Its potentials are those the iteration happens to end with."""

    def canonical(self, x):
        return x


for twin, honest in ((WrongSign, FixedPoint), (NoGauge, Transport)):
    jax.tree_util.register_dataclass(twin, data_fields=list(honest.__dataclass_fields__), meta_fields=[])


class WrongSignCase(ContractionCase):
    def problem(self, params):
        return WrongSign(*vars(super().problem(params)).values())


class NoGaugeCase(TransportCase):
    def problem(self, params):
        return NoGauge(*vars(super().problem(params)).values())


class DroppedCaptureCase(ContractionCase):
    """What a verb that does not hoist captured arrays would make of them."""

    def problem(self, params):
        return super().problem({"M": params["M"], "c": jax.lax.stop_gradient(params["c"])})


class Silent(contract.SolverMember):
    def solve(self, params, x0=None, progress=None, **options):
        return super().solve(params, x0, **options)


BASE = contract.SOLVERS[0]
SINKHORN = next(m for m in contract.SOLVERS if m.name == "sinkhorn")
REFUSED = (AssertionError, pytest.fail.Exception)


def twin_of_picard(**parts):
    return BASE._replace(make=lambda: replace(picard(), **parts))


TWINS = {
    "drifts": (twin_of_picard(step=drifts), "reference", (*REFUSED, SolverError), None),
    "wrong sign": (BASE._replace(case=WrongSignCase()), "derivatives", REFUSED, "jvp differs"),
    "no gauge": (SINKHORN._replace(case=NoGaugeCase()), "derivatives", REFUSED, "jvp differs"),
    "drops captured arrays": (BASE._replace(case=DroppedCaptureCase()), "derivatives", REFUSED, "jvp differs"),
    "leaks between lanes": (twin_of_picard(step=leaks), "vmap", REFUSED, None),
    "retraces": (BASE._replace(make=retraces), "compiles_once", REFUSED, None),
    "asks the host": (twin_of_picard(measure=asks_the_host), "jit_and_export", Exception, "callback|custom call"),
    "never reports": (twin_of_picard(measure=never_reports), "statuses", REFUSED, "max_steps"),
    "hides NaN": (twin_of_picard(measure=hides_nan), "nonfinite_keeps_last", REFUSED, None),
    "steps at the end": (twin_of_picard(finish=steps_at_the_end), "step_limit", REFUSED, None),
    "claims what it cannot reach": (twin_of_picard(measure=never_reports), "asked_too_much", REFUSED, None),
    "forgets the start": (twin_of_picard(init=forgets_the_start), "warm_start", REFUSED, None),
    "records nothing": (twin_of_picard(measure=never_reports), "history", REFUSED, None),
    "hides its derivative": (twin_of_picard(step=hides_its_derivative), "adjoints", REFUSED, "unrolled against"),
    "refuses shards": (twin_of_picard(measure=measures_by_vdot), "sharding", Exception, "shard"),
    "loses a failed lane": (twin_of_picard(measure=never_reports), "failed_lane_is_named", REFUSED, "DID NOT RAISE"),
    "silent": (Silent(*BASE), "progress", (*REFUSED, IndexError), None),
}


@pytest.mark.parametrize(("twin", "check", "error", "match"), TWINS.values(), ids=TWINS)
def test_contract_rejects(twin, check, error, match, x64):
    run = getattr(contract, f"check_{check}")
    with pytest.raises(error, match=match):
        (partial(run, dtype="float64") if check == "reference" else run)(twin)


def test_every_check_has_a_twin():
    assert {check.__name__ for check in contract.CHECKS} <= {f"check_{check}" for _, check, *_ in TWINS.values()}
