"""Every transformation against its contract, and every check of the contract against a wrong twin."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxnum.curvature import gauss_newton_bartlett, hutchinson
from jaxnum.transforms import adamw_independent, adan, harp, lion, mfac, n_igt, record_norms, sophia, strict
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


def short_mfac(learning_rate, damping, weight_decay):
    """The length of the window is a shape: no hyperparameter to inject."""
    return mfac(learning_rate, window=4, damping=damping, momentum=0.5, weight_decay=weight_decay, warm_window=True)


def sophia_member(name, estimator, extra):
    hyper = {"learning_rate": 0.02, "b1": 0.9, "weight_decay": 0.0}
    return TransformMember(
        name, sophia, hyper, {"hessian_fn": estimator(jax.random.key(0)), "update_interval": 2}, extra
    )


TRANSFORMS = [
    sophia_member("sophia_h", hutchinson, lambda loss, residuals: {"obj_fn": loss}),
    TransformMember("adan", adan, {"learning_rate": 0.02, "b1": 0.9, "weight_decay": 1e-3}),
    TransformMember("adamw_independent", adamw_independent, {"peak": 0.05, "weight_decay": 1e-4}),
    TransformMember("lion", lion, {"learning_rate": 0.02, "weight_decay": 1e-3}),
    TransformMember("mfac", short_mfac, {"learning_rate": 0.2, "damping": 1.0, "weight_decay": 1e-3}),
    TransformMember("n_igt", slowing_igt, {"learning_rate": 0.2, "eta_power": 0.5}),
    TransformMember(
        "harp", harp, {"learning_rate": 0.05}, {"key": jax.random.key(0)}, lambda loss, residuals: {"obj_fn": loss}
    ),
    TransformMember("recorded_sgd", recorded_sgd, {"learning_rate": 0.0005, "momentum": 0.99}),
    TransformMember("strict_adam", strict_adam, {"learning_rate": 0.05}),
    TransformMember("strict_sgd", strict_sgd, {"learning_rate": 0.0005, "momentum": 0.99}),
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

    return TransformMember("twin", factory, {"learning_rate": 0.05})


def tree(f):
    return lambda u, s: (jax.tree.map(f, u), s)


CALLS = []
SHARED = twin(lambda u, s: (u, s), lambda p: (p["w"], p["w"]))
REFUSES_EXTRA = TransformMember(
    "twin",
    lambda learning_rate: optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (u, s)),
    {"learning_rate": 0.05},
)
BAKES_IN = TransformMember(
    "twin", lambda learning_rate: optax.sgd(float(f"{learning_rate:r}")), {"learning_rate": 0.05}
)
WRONG_TWINS = [
    (twin(tree(lambda u: -u)), transform.parabola),
    (twin(tree(lambda u: -u)), transform.descends_rosenbrock),
    (twin(tree(lambda u: u.astype(jnp.float32))), transform.keeps_types),
    (twin(lambda u, s: (u, s.astype(jnp.float32))), transform.keeps_types),
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
]


@pytest.mark.parametrize(("member", "check"), WRONG_TWINS)
def test_wrong_twins_are_rejected(member, check):
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(member)


def test_the_right_twin_passes_what_the_wrong_ones_fail():
    right = twin(lambda u, s: (u, s))
    for _, check in WRONG_TWINS:
        if check is not transform.refuses_mismatches:
            if check is transform.descends_rosenbrock:
                right = TransformMember("twin", right.factory, {"learning_rate": 0.001})
            check(
                TransformMember("twin", right.factory, {"learning_rate": 0.05})
                if check is transform.parabola
                else right
            )
