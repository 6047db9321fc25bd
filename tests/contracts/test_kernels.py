"""Every kernel against its contract, and every check of the contract against a wrong twin."""

import jax
import jax.numpy as jnp
import pytest

from tests import interpreters
from tests.contracts import kernel
from tests.contracts.kernel import KERNELS

MEMBERS = pytest.mark.parametrize("member", KERNELS, ids=lambda m: m.name)
EVERY = [
    pytest.param(m, name, id=f"{m.name}-{name}") for m in KERNELS for name in m.implementations if name != "reference"
]
# Long where kernels are interpreted or differentiated: once, with the slow tests.
NARROW = pytest.param("bfloat16", marks=pytest.mark.slow)
PER_IMPLEMENTATION = ("sees_nothing", "padding", "packed", "repeats")


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.once), "float32"])
@pytest.mark.parametrize(("member", "implementation"), EVERY)
def test_forward(member, implementation, dtype):
    kernel.check_forward(member, implementation, dtype)


@pytest.mark.once
@MEMBERS
def test_forward_in_float64(member, x64):
    kernel.check_forward(member, "xla", "float64")


@pytest.mark.parametrize("dtype", [NARROW, pytest.param("float32", marks=pytest.mark.slow), "float64"])
@MEMBERS
def test_gradients(member, dtype):
    with jax.enable_x64(dtype == "float64"):
        kernel.check_gradients(member, "xla", dtype)


@pytest.mark.parametrize("dtype", [NARROW, "float32"])
@pytest.mark.parametrize(
    ("member", "name"), [pytest.param(m, n, id=f"{m.name}-{n}") for m in KERNELS for n in m.backward]
)
def test_backward(member, name, dtype):
    kernel.check_backward(member, name, dtype)


@MEMBERS
def test_second_order(member, x64):
    kernel.check_second_order(member, "xla")


@pytest.mark.once
@pytest.mark.parametrize("check", PER_IMPLEMENTATION)
@pytest.mark.parametrize(("member", "implementation"), EVERY)
def test_contract(member, implementation, check):
    getattr(kernel, f"check_{check}")(member, implementation)


@MEMBERS
def test_vmap(member):
    kernel.check_vmap(member, "xla")


@MEMBERS
def test_races(member):
    kernel.check_races(member, "tpu")


@MEMBERS
def test_export(member):
    kernel.check_export(member)


@MEMBERS
def test_named_implementations(member):
    kernel.check_named_implementations(member)


@pytest.mark.aot
@pytest.mark.parametrize("topology", interpreters.TOPOLOGIES)
@MEMBERS
def test_compiles_for_tpu(member, topology):
    kernel.check_compiles_for_tpu(member, topology)


# --- Wrong twins. -----------------------------------------------------------------------------------------------------

ATTENTION = KERNELS[0]


def twin(change):
    """The attention member whose every implementation but the reference is changed by `change(run)`."""

    def api(*arrays, implementation, **flags):
        if implementation == "forward only":
            implementation = "xla"
        if implementation == "reference":
            return ATTENTION.api(*arrays, implementation=implementation, **flags)
        run = lambda a, f: ATTENTION.api(*a, implementation=implementation, **f)  # noqa: E731
        return change(run)(arrays, flags)

    changed = {name: run if name == "reference" else change(run) for name, run in ATTENTION.implementations.items()}
    return ATTENTION._replace(api=api, implementations=changed)


def without(*names):
    return lambda run: lambda arrays, flags: run(arrays, {k: v for k, v in flags.items() if k not in names})


def output(change):
    return lambda run: lambda arrays, flags: change(*run(arrays, flags))


def constant_lse(run):
    def changed(arrays, flags):
        o, lse = run(arrays, flags)
        return o, jax.lax.stop_gradient(lse)

    return changed


def mixes_the_lanes(run):
    """Takes the first lane's keys for all, as a batching rule that forgets an axis would."""

    @jax.custom_batching.custom_vmap
    def first_of_all(x):
        return x

    @first_of_all.def_vmap
    def _(size, batched, x):
        return jnp.broadcast_to(x[:1], x.shape), batched[0]

    return lambda arrays, flags: run((arrays[0], jax.lax.stop_gradient(first_of_all(arrays[1])), arrays[2]), flags)


CALLS = []


def unsteady(o, lse):
    CALLS.append(1)
    return o * (1 + len(CALLS) * 1e-6), lse


def mean_instead_of_nothing(run):
    def changed(arrays, flags):
        o, lse = run(arrays, flags)
        return jnp.where(jnp.isfinite(lse).swapaxes(1, 2)[..., None], o, 1.0), lse

    return changed


def forgets_padding(run):
    def changed(arrays, flags):
        o, lse = run(arrays, flags)
        return o + 0 * jnp.sum(arrays[2]), lse

    return changed


def mixes_the_batch(run):
    def changed(arrays, flags):
        o, lse = run(arrays, flags)
        return o[::-1], lse[::-1]

    return changed


TWINS = [
    ("ignores the mask", without("mask"), lambda m: kernel.check_forward(m, "xla", "float32")),
    ("ignores the segments", without("segment_ids"), lambda m: kernel.check_packed(m, "xla")),
    (
        "rounds to bfloat16",
        output(lambda o, lse: (o.astype("bfloat16"), lse)),
        lambda m: kernel.check_forward(m, "xla", "float32"),
    ),
    ("drops the gradient of lse", constant_lse, lambda m: kernel.check_gradients(m, "xla", "float32")),
    (
        "gives the mean of v to rows that see nothing",
        mean_instead_of_nothing,
        lambda m: kernel.check_sees_nothing(m, "xla"),
    ),
    ("lets padding through", forgets_padding, lambda m: kernel.check_padding(m, "xla")),
    ("differs from run to run", output(unsteady), lambda m: kernel.check_repeats(m, "xla")),
    ("mixes the lanes of a vmap", mixes_the_lanes, lambda m: kernel.check_vmap(m, "forward only")),
    ("mixes the batch", mixes_the_batch, lambda m: kernel.check_forward(m, "xla", "float32")),
]


@pytest.mark.parametrize(("change", "check"), [t[1:] for t in TWINS], ids=[t[0] for t in TWINS])
def test_contract_rejects(change, check):
    with pytest.raises(AssertionError):
        check(twin(change))


def test_contract_rejects_a_backward_pass_with_a_wrong_sign():
    def wrong(arrays, flags, cotangents):
        dq, dk, dv = ATTENTION.backward["xla, all heads at once"](arrays, flags, cotangents)
        return dq, -dk, dv

    with pytest.raises(AssertionError):
        kernel.check_backward(ATTENTION._replace(backward={"wrong": wrong}), "wrong", "float32")


def test_contract_rejects_a_twin_that_exports_for_one_platform():
    def api(*arrays, implementation, **flags):
        return ATTENTION.api(*arrays, implementation="xla", **flags)

    with pytest.raises(AssertionError):
        kernel.check_export(ATTENTION._replace(api=api))


def test_contract_rejects_a_silent_fallback():
    def api(*arrays, implementation, **flags):
        return ATTENTION.api(*arrays, implementation="reference", **flags)

    with pytest.raises(pytest.fail.Exception):
        kernel.check_named_implementations(ATTENTION._replace(api=api))
