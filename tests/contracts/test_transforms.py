"""Every transformation against its contract, and every check of the contract against a wrong twin."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnum.curvature import gauss_newton_bartlett, hutchinson
from jaxnum.transforms import (
    MkorLayer,
    adamw_independent,
    adan,
    harp,
    lion,
    mfac,
    mkor,
    mkor_hybrid,
    mu_param,
    n_igt,
    normalized_gd,
    record_norms,
    scale_by_last_iterate,
    sophia,
    strict,
)
from tests.contracts import transform
from tests.contracts.transform import TransformMember


def strict_adam(learning_rate):
    return strict(optax.adam(learning_rate), name="adam")


def strict_sgd(learning_rate, momentum):
    return strict(optax.sgd(learning_rate, momentum), name="sgd")


def slowing_igt(learning_rate, eta_power):
    """What a loop holds is the transported point, which comes to rest with the steps."""
    return n_igt(lambda count: 10 * learning_rate / (count + 10), eta_power=eta_power)


def recorded_sgd(learning_rate, momentum):
    return strict(optax.chain(record_norms(4), optax.sgd(learning_rate, momentum)), name="recorded_sgd")


def last_iterate_sgd(learning_rate, momentum):
    shrinking = optax.chain(optax.sgd(learning_rate, momentum), scale_by_last_iterate(np.ones(20_000)))
    return strict(shrinking, name="last_iterate_sgd")


def mu_param_sgd(learning_rate, momentum):
    fan_in = lambda path, leaf: 2.0 if path == "w" else None  # noqa: E731
    # First, so that it is its checks that speak.
    return optax.chain(mu_param(fan_in, base_fan_in=1), optax.sgd(learning_rate, momentum))


def layer_of(params):
    """The parabola as a layer, whose bias must fit; other problems have none."""
    if not isinstance(params, dict) or not {"w", "b"} <= set(params):
        return {}
    fits = params["b"].shape == params["w"].shape[1:]
    return {"w": MkorLayer("w", "b" if fits else None)}


def fitted_mkor(learning_rate, momentum):
    """Statistics come with each step: here they are those of the parameters that it gets."""
    optimiser = mkor(learning_rate, layer_of, momentum=momentum, stats_every=2)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            return optimiser.update(updates, state)
        stats = {}
        for name, layer in layer_of(params).items():
            one = [jnp.ones(1, params["w"].dtype)] if layer.bias else []
            stats[name] = jnp.concatenate([params["w"].mean(axis=1), *one]), params["w"].mean(axis=0) - 1
        return optimiser.update(updates, state, params, stats=stats, **extra_args)

    return optax.GradientTransformationExtraArgs(optimiser.init, update)


def switching_sgd(learning_rate, momentum):
    """A loss that never falls switches after two windows, from one momentum to another that begins anew."""
    return mkor_hybrid(optax.sgd(learning_rate, momentum), optax.sgd(learning_rate, momentum), window=20)


def short_mfac(learning_rate, damping, weight_decay):
    """The length of the window is a shape: no hyperparameter to inject."""
    return mfac(learning_rate, window=4, damping=damping, momentum=0.5, weight_decay=weight_decay, warm_window=True)


def normalized_momentum(learning_rate, momentum):
    """One rate suits parabola and Rosenbrock with momentum only; margins of 0 double the gradient."""
    return optax.chain(normalized_gd(learning_rate), optax.trace(momentum))


def sophia_member(name, estimator, extra):
    hyper = {"learning_rate": 0.02, "b1": 0.9, "weight_decay": 0.0}
    other = {"hessian_fn": estimator(jax.random.key(0)), "update_interval": 2}
    return TransformMember(name, sophia, hyper, other, extra, {"learning_rate": 0.01})


TRANSFORMS = [
    sophia_member("sophia_h", hutchinson, lambda loss, residuals: {"obj_fn": loss}),
    TransformMember("mu_param_sgd", mu_param_sgd, {"learning_rate": 0.0005, "momentum": 0.99}, array_rates=False),
    TransformMember(
        "mkor",
        fitted_mkor,
        {"learning_rate": 0.002, "momentum": 0.95},
        optax_hyper={"learning_rate": 0.0005, "momentum": 0.99},
    ),
    TransformMember(
        "adan", adan, {"learning_rate": 0.02, "b1": 0.9, "weight_decay": 1e-3}, optax_hyper={"learning_rate": 0.1}
    ),
    TransformMember(
        "adan_decoupled",
        adan,
        {"learning_rate": 0.02, "b1": 0.9, "weight_decay": 1e-3},
        {"decay": "decoupled", "max_grad_norm": 1e4},
        optax_hyper={"learning_rate": 0.1},
    ),
    TransformMember(
        "mkor_hybrid",
        switching_sgd,
        {"learning_rate": 0.0005, "momentum": 0.99},
        extra=lambda loss, residuals: {"value": jnp.float32(1.0)},
    ),
    TransformMember(
        "adamw_independent",
        adamw_independent,
        {"peak": 0.05, "weight_decay": 1e-4},
        optax_hyper={"weight_decay": 1e-6},
    ),
    TransformMember(
        "lion",
        lion,
        {"learning_rate": 0.02, "weight_decay": 1e-3},
        optax_hyper={"learning_rate": 0.01, "weight_decay": 1e-4},
    ),
    TransformMember(
        "n_igt",
        slowing_igt,
        {"learning_rate": 0.2, "eta_power": 0.5},
        optax_hyper={"learning_rate": 0.3, "eta_power": 0.1},
    ),
    TransformMember(
        "harp",
        harp,
        {"learning_rate": 0.05},
        {"key": jax.random.key(0)},
        lambda loss, residuals: {"obj_fn": loss},
        optax_hyper={"learning_rate": lambda count: 3 / (count + 30)},
    ),
    TransformMember(
        "mfac",
        short_mfac,
        {"learning_rate": 0.2, "damping": 1.0, "weight_decay": 1e-3},
        optax_hyper={"learning_rate": 0.05, "weight_decay": 0.0},
    ),
    TransformMember(
        "normalized_gd",
        normalized_momentum,
        {"learning_rate": 0.00025, "momentum": 0.99},
        extra=lambda loss, residuals: {"margins": jnp.zeros(4)},
    ),
    TransformMember("recorded_sgd", recorded_sgd, {"learning_rate": 0.0005, "momentum": 0.99}, array_rates=False),
    TransformMember(
        "last_iterate_sgd", last_iterate_sgd, {"learning_rate": 0.0005, "momentum": 0.99}, array_rates=False
    ),
    TransformMember("strict_adam", strict_adam, {"learning_rate": 0.05}, array_rates=False),
    TransformMember("strict_sgd", strict_sgd, {"learning_rate": 0.0005, "momentum": 0.99}, array_rates=False),
]
GAUSSIAN = sophia_member(
    "sophia_g",
    lambda key: gauss_newton_bartlett(key, likelihood="gaussian"),
    lambda loss, residuals: {"logits_fn": residuals},
)
TRANSFORMS.append(GAUSSIAN)


@pytest.mark.parametrize("check", transform.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("member", TRANSFORMS, ids=lambda m: m.name)
def test_contract(member, check):
    check(member)


def twin(change, keeps=None):
    """A member whose update is gradient descent passed through `change`, with an int32 state (count, spare)."""

    def factory(learning_rate):
        def init(params):
            return keeps(params) if keeps else jnp.zeros([], jnp.int32)

        def update(updates, state, params=None, **extra_args):
            return change(jax.tree.map(lambda g: -learning_rate * g, updates), state)

        return optax.GradientTransformationExtraArgs(init, update)

    return TransformMember("twin", factory, {"learning_rate": 0.05}, array_rates=False)


def tree(f):
    return lambda u, s: (jax.tree.map(f, u), s)


CALLS = []
SHARED = twin(lambda u, s: (u, s), lambda p: (p["w"], p["w"]))
REFUSES_EXTRA = TransformMember(
    "twin",
    lambda learning_rate: optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (u, s)),
    {"learning_rate": 0.05},
)


def doubles_schedules(learning_rate: optax.ScalarOrSchedule):
    return optax.sgd(2 * learning_rate(0) if callable(learning_rate) else learning_rate)


def forgets_mu_dtype(learning_rate, mu_dtype=None):
    return optax.adam(learning_rate)


BAKES_IN = TransformMember(
    "twin", lambda learning_rate: optax.sgd(float(f"{learning_rate:r}")), {"learning_rate": 0.05}
)
WRONG_TWINS = [
    (twin(tree(lambda u: -u)), transform.parabola),
    (twin(tree(lambda u: -u)), transform.descends_rosenbrock),
    (twin(tree(lambda u: u.astype(jnp.float32))), transform.keeps_types),
    (twin(lambda u, s: (u, s.astype(jnp.float32))), transform.keeps_types),
    (TransformMember("twin", optax.sgd, {"learning_rate": 0.05}), transform.keeps_types),
    (twin(lambda u, s: (u, s.astype(jnp.float32))), transform.traces_once),
    (twin(lambda u, s: (u, s.astype(jnp.float32))), transform.vmap_and_scan),
    (twin(tree(lambda u: u), lambda p: float(jnp.sum(p["w"]))), transform.abstract_init),
    (twin(tree(lambda u: u)), transform.refuses_mismatches),
    (twin(tree(jnp.nan_to_num)), transform.shows_nan),
    (SHARED, transform.donates),
    (twin(lambda u, s: (CALLS.append(1), (jax.tree.map(lambda x: x * len(CALLS), u), s))[1]), transform.checkpoints),
    (twin(lambda u, s: (CALLS.append(1), (jax.tree.map(lambda x: x * len(CALLS), u), s))[1]), transform.chains),
    (twin(lambda u, s: (CALLS.append(1), (jax.tree.map(lambda x: x * len(CALLS), u), s))[1]), transform.accumulates),
    (twin(tree(lambda u: u * (2 if u.dtype == "float64" else 1))), transform.precisions_agree),
    (twin(lambda u, s: (u, jnp.zeros(8)), lambda p: p["b"]), transform.keeps_sharding),
    (REFUSES_EXTRA, transform.ignores_extra_arguments),
    (BAKES_IN, transform.injected_hyperparameters),
    (twin(tree(lambda u: -u)), transform.reaches_optax_targets),
    (twin(tree(lambda u: jnp.real(u).astype(u.dtype))), transform.complex_or_refused),
    (twin(lambda u, s: (u, s + 0.5)), transform.steps_under_cond),
    (twin(lambda u, s: (u, jnp.zeros_like(s, out_sharding=jax.P())), lambda p: p["b"]), transform.keeps_sharding_types),
    (TransformMember("twin", doubles_schedules, {"learning_rate": 0.05}), transform.takes_schedules),
    (TransformMember("twin", forgets_mu_dtype, {"learning_rate": 0.05}), transform.takes_the_dtype_of_momentum),
]


@pytest.mark.parametrize(("member", "check"), WRONG_TWINS)
def test_wrong_twins_are_rejected(member, check):
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(member)


def test_the_right_twin_passes_what_the_wrong_ones_fail():
    right = twin(lambda u, s: (u, s))
    slow = TransformMember("twin", right.factory, {"learning_rate": 0.001})
    heavy = TransformMember("twin", optax.sgd, {"learning_rate": 0.0005, "momentum": 0.99})
    others = {
        transform.descends_rosenbrock: slow,
        transform.reaches_optax_targets: heavy,
        transform.complex_or_refused: heavy,
        transform.takes_schedules: heavy,
        transform.takes_the_dtype_of_momentum: TransformMember("twin", optax.adam, {"learning_rate": 0.05}),
    }
    for _, check in WRONG_TWINS:
        if check is not transform.refuses_mismatches:
            check(others.get(check, right))


def test_the_table_of_optax_is_whole():
    """Every body of the version that the table names, each with a check that runs or with a reason."""
    checks = [held for held in transform.OPTAX_BODIES.values() if not isinstance(held, str)]
    assert {check for held in checks for check in held} <= set(transform.CHECKS)
    assert transform.OPTAX_EXCEPTIONS.keys() <= {(m.name, body) for m in TRANSFORMS for body in transform.OPTAX_BODIES}
    without = len(transform.OPTAX_BODIES) - len(checks)
    counts = (
        f"{len(transform.OPTAX_BODIES)} bodies of tests",
        f"{len(checks)} are checks here",
        f"{len(TRANSFORMS) * len(checks)} rows in all",
        f"{without} does not apply",
    )
    assert all(words in transform.__doc__.replace("\n", " ") for words in counts)
    if f"optax {optax.__version__} " not in transform.__doc__:
        pytest.skip("the table is that of another optax")
    found = set()
    for file, name in (
        ("_src/alias", "AliasTest"),
        ("contrib/_common", "ContribTest"),
        ("_src/sharding", "ShardingTest"),
    ):
        path = Path(optax.__file__).parent / f"{file}_test.py"
        (suite,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
        found |= {f"{path.stem}.{n.name}" for n in suite.body if getattr(n, "name", "").startswith("test_")}
    assert found == set(transform.OPTAX_BODIES)
