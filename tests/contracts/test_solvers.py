"""Every solver through the contract, and wrong twins that the contract must refuse."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import jaxnum
from jaxnum.core.solver import Measure
from tests.contracts import solver as contract


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("member", contract.SOLVERS, ids=lambda m: m.name)
def test_solver(member, check, x64):
    check(member)


@pytest.mark.parametrize("member", contract.SOLVERS, ids=lambda m: m.name)
def test_reference(member, float_dtype):
    contract.check_reference(member, float_dtype)


def _never_reports(hyper, x, state, problem):
    m = jaxnum.solvers.picard().measure(hyper, x, state, problem)
    return Measure(jnp.zeros_like(m.residual), m.scale, m.flag)


def _retraces():
    base = jaxnum.solvers.picard()
    return replace(base, step=lambda *args: base.step(*args))


def _drifts(hyper, x, state, problem):
    x, state = jaxnum.solvers.picard().step(hyper, x, state, problem)
    return jax.tree.map(lambda leaf: leaf + 1e-3, x), state


class _WrongSign(jaxnum.FixedPoint):
    """A problem whose derivative with respect to its arguments has the wrong sign."""

    def root(self, x):
        flipped = jax.tree.map(lambda p: 2 * jax.lax.stop_gradient(p) - p, self.args)
        frozen = jax.tree.map(jax.lax.stop_gradient, self.T)
        return jax.tree.map(jnp.subtract, x, frozen(x, *flipped))


jax.tree_util.register_dataclass(_WrongSign, data_fields=["T", "args"], meta_fields=[])


class _WrongSignCase(type(contract.SOLVERS[0].case)):
    def problem(self, params):
        honest = super().problem(params)
        return _WrongSign(honest.T, honest.args)


_BASE = contract.SOLVERS[0]
_TWINS = [
    ("never reports", _BASE._replace(make=lambda: replace(jaxnum.solvers.picard(), measure=_never_reports)), "statuses"),
    ("never moves right", _BASE._replace(make=lambda: replace(jaxnum.solvers.picard(), step=_drifts)), "vmap"),
    ("wrong sign", _BASE._replace(case=_WrongSignCase()), "derivatives"),
    ("retraces", _BASE._replace(make=_retraces), "compiles_once"),
]


@pytest.mark.parametrize(("twin", "check"), [t[1:] for t in _TWINS], ids=[t[0] for t in _TWINS])
def test_contract_rejects(twin, check, x64):
    with pytest.raises((AssertionError, jaxnum.SolverError)):
        getattr(contract, f"check_{check}")(twin)
