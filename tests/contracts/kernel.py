"""The contract of every kernel. A new operation registers with one line in KERNELS and is put through all of it.

Each check is a function of a member, so that the mutation tests can hand it a wrong twin and see it refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import interpreters
from tests.contracts.decode_cases import DecodeCase
from tests.contracts.delta_rule_cases import DeltaRuleCase
from tests.contracts.kernel_cases import AttentionCase
from tests.contracts.linear_attention_cases import LinearAttentionCase
from tests.contracts.scan_cases import LinearScanCase, SelectiveScanCase
from tests.contracts.softmin_cases import SoftminCase
from tests.tolerances import tolerance

PLATFORMS = ("cpu", "tpu", "cuda")


class KernelMember(NamedTuple):
    """One row of the table.

    Attributes:
      name: of the operation.
      api: the public function, `api(*arrays, implementation=, **flags)`; returns a tuple of arrays.
      implementations: by name, what runs here: `run(arrays, flags)`, a tuple of arrays.
      backward: by name, backward passes that dispatch does not choose here: `run(arrays, flags, cotangents)`.
      case: makes inputs, and knows the operation.
    """

    name: str
    api: Callable
    implementations: Mapping[str, Callable]
    backward: Mapping[str, Callable]
    case: Any

    def loss(self, implementation: str, flags: dict, weights: tuple) -> Callable:
        """A scalar that every output enters, with weights that leave no symmetry."""

        def scalar(*arrays: jax.Array) -> jax.Array:
            outputs = self.api(*arrays, implementation=implementation, **flags)
            return sum(jnp.sum(finite(o).astype(w.dtype) * w) for o, w in zip(outputs, weights, strict=True))

        return scalar


KERNELS = [
    KernelMember(
        "attention", AttentionCase.api, AttentionCase.implementations(), AttentionCase.backward(), AttentionCase()
    ),
    KernelMember(
        "linear_attention",
        LinearAttentionCase.api,
        LinearAttentionCase.implementations(),
        LinearAttentionCase.backward(),
        LinearAttentionCase(),
    ),
    KernelMember(
        "delta_rule", DeltaRuleCase.api, DeltaRuleCase.implementations(), DeltaRuleCase.backward(), DeltaRuleCase()
    ),
    KernelMember(
        "linear_scan", LinearScanCase.api, LinearScanCase.implementations(), LinearScanCase.backward(), LinearScanCase()
    ),
    KernelMember(
        "selective_scan",
        SelectiveScanCase.api,
        SelectiveScanCase.implementations(),
        SelectiveScanCase.backward(),
        SelectiveScanCase(),
    ),
    KernelMember("decode_attention", DecodeCase.api, DecodeCase.implementations(), DecodeCase.backward(), DecodeCase()),
    KernelMember("softmin", SoftminCase.api, SoftminCase.implementations(), SoftminCase.backward(), SoftminCase()),
]
DIFFERENTIATED = ("xla",)


def finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def close(got: Any, want: Any, dtype: Any, size: int, of: str, factor: float = 1.0) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), err_msg=of)
    got, want = np.where(np.isfinite(want), got, 0), np.where(np.isfinite(want), want, 0)
    scale = max(1.0, float(np.max(np.abs(want), initial=0.0)))
    error = float(np.max(np.abs(got - want), initial=0.0)) / scale
    assert error <= tolerance(dtype, size, condition=factor), (of, error)


def check_forward(m: KernelMember, implementation: str, dtype: str) -> None:
    """Every flag at odd lengths equals the float64 reference on the same inputs."""
    for name, (arrays, flags) in m.case.cases(dtype).items():
        arrays = short(arrays)
        got = jax.jit(lambda *a, f=flags: m.implementations[implementation](a, f))(*arrays)
        want = reference(m, name, arrays, flags)
        for g, w in zip(got, want, strict=True):
            close(g, w, dtype, m.case.terms, f"{implementation} {name}")


def short(arrays: tuple) -> tuple:
    """The arrays rounded to bfloat16 in the dtypes they have: the truth about them is then the same for every dtype."""
    return tuple(x.astype("bfloat16").astype(x.dtype) for x in arrays)


def wide(arrays: tuple) -> tuple:
    return tuple(jnp.asarray(np.asarray(x, np.float64)) for x in arrays)


# The truth by operation, case and inputs: implementations and dtypes share it.
_TRUTHS: dict[tuple, tuple] = {}


def truth(m: KernelMember, what: str, arrays: tuple, compute: Callable) -> tuple:
    key = (m.name, what, *(np.asarray(x, np.float64).tobytes() for x in arrays))
    if key not in _TRUTHS:
        with jax.enable_x64(True):
            _TRUTHS[key] = tuple(np.asarray(x) for x in jax.jit(compute)(*wide(arrays)))
    return _TRUTHS[key]


def reference(m: KernelMember, name: str, arrays: tuple, flags: dict) -> tuple:
    run = m.implementations["reference"]
    return truth(m, name, arrays, lambda *a: run(a, m.case.widened(flags)))


def check_gradients(m: KernelMember, implementation: str, dtype: str) -> None:
    """Cotangents of every array, through every output, equal the reference's."""
    for name, (arrays, flags) in m.case.cases(dtype).items():
        arrays = short(arrays)
        weights = cotangents(m, arrays, flags)
        at = tuple(range(len(arrays)))
        got = jax.jit(jax.grad(m.loss(implementation, flags, weights), at))(*arrays)
        want = true_cotangents(m, name, arrays, flags, weights)
        for g, w, x in zip(got, want, arrays, strict=True):
            assert g.dtype == x.dtype
            close(g, w, dtype, m.case.terms, f"gradient of {implementation} {name}", factor=4.0)


def cotangents(m: KernelMember, arrays: tuple, flags: dict) -> tuple:
    """One for every output, without symmetry, and the same for every dtype."""
    shapes = jax.eval_shape(lambda *a: m.api(*a, implementation="reference", **flags), *arrays)
    rng = np.random.default_rng(3)
    return short(tuple(jnp.asarray(rng.normal(size=s.shape), "float32") for s in shapes))


def true_cotangents(m: KernelMember, name: str, arrays: tuple, flags: dict, weights: tuple) -> tuple:
    scalar = m.loss("reference", m.case.widened(flags), weights)
    return truth(m, f"gradient of {name}", arrays, jax.grad(scalar, tuple(range(len(arrays)))))


def check_backward(m: KernelMember, name: str, dtype: str) -> None:
    """A backward pass that other platforms run gives the reference's cotangents too."""
    for case, (arrays, flags) in m.case.cases(dtype).items():
        arrays = short(arrays)
        weights = cotangents(m, arrays, flags)
        outputs = jax.eval_shape(lambda *a, f=flags: m.api(*a, implementation="reference", **f), *arrays)
        given = tuple(w.astype(o.dtype) for w, o in zip(weights, outputs, strict=True))
        got = jax.jit(lambda a, c, f=flags: m.backward[name](a, f, c))(arrays, given)
        want = true_cotangents(m, case, arrays, flags, weights)
        for g, w in zip(got, want, strict=True):
            close(g, w, dtype, m.case.terms, f"backward of {name} {case}", factor=4.0)


def check_second_order(m: KernelMember, implementation: str) -> None:
    """Reverse over reverse equals the reference's Hessian-vector product, and forward mode names the remedy."""
    arrays, flags = m.case.small("float64")
    shapes = jax.eval_shape(lambda *a: m.api(*a, implementation="reference", **flags), *arrays)
    weights = tuple(jnp.ones(s.shape, "float64") * 0.7 for s in shapes)
    at = tuple(range(len(arrays)))

    def product(of: str) -> Any:
        scalar = m.loss(of, flags, weights)
        inner = lambda *a: sum(jnp.sum(jnp.sin(g)) for g in jax.grad(scalar, at)(*a))  # noqa: E731
        return jax.grad(inner, at)(*arrays)

    for got, want in zip(product(implementation), product("reference"), strict=True):
        close(got, want, "float64", m.case.terms, "second order", factor=10.0)
    scalar = m.loss(implementation, flags, weights)
    sentence = rf"^{m.name}: forward-mode differentiation .* pass implementation='reference'"
    for attempt in (
        lambda: jax.jvp(scalar, arrays, arrays),
        lambda: jax.jit(lambda *a: jax.jvp(scalar, a, a))(*arrays),
        lambda: jax.hessian(scalar)(*arrays),
    ):
        with pytest.raises(TypeError, match=sentence):
            attempt()
    jax.hessian(m.loss("reference", flags, weights))(*arrays)


def check_sees_nothing(m: KernelMember, implementation: str) -> None:
    """Rows that see nothing give what the case says, and zero gradients."""
    arrays, flags, rows = m.case.sees_nothing()
    got = m.implementations[implementation](arrays, flags)
    m.case.assert_nothing(got, rows)
    if implementation in DIFFERENTIATED:
        weights = tuple(jnp.ones(o.shape, jnp.float32) for o in got)

        # What a merge of partial results sends back for such a row is NaN.
        def poisoned(*a: jax.Array) -> jax.Array:
            outputs = m.api(*a, implementation=implementation, **flags)
            nan = m.case.nan_from_nothing(outputs)
            return m.loss(implementation, flags, weights)(*a) + nan

        gradients = jax.grad(poisoned, tuple(range(len(arrays))))(*arrays)
        m.case.assert_no_gradient(gradients, rows)


def check_padding(m: KernelMember, implementation: str) -> None:
    """NaN in the padding reaches neither the outputs nor the gradients of the rest."""
    clean, dirty, flags, kept = m.case.padded()
    want, got = (m.implementations[implementation](arrays, flags) for arrays in (clean, dirty))
    for w, g in zip(kept(want), kept(got), strict=True):
        np.testing.assert_array_equal(w, g)
    if implementation in DIFFERENTIATED:
        scalar = lambda *a: sum(  # noqa: E731
            jnp.sum(finite(o)) for o in kept(m.api(*a, implementation=implementation, **flags))
        )
        for g in jax.grad(scalar, tuple(range(len(dirty))))(*dirty):
            assert np.all(np.isfinite(g))


def check_packed(m: KernelMember, implementation: str) -> None:
    """Packed sequences equal the separate ones."""
    packed, flags, pieces = m.case.packed()
    together = m.implementations[implementation](packed, flags)
    for arrays, own_flags, cut in pieces:
        alone = m.implementations[implementation](arrays, own_flags)
        # An output that only a whole run has may be missing from what is cut.
        for t, a in zip(cut(together), alone, strict=False):
            close(t, a, "float32", m.case.terms, "packed")


def check_repeats(m: KernelMember, implementation: str) -> None:
    """The second run equals the first bit by bit."""
    arrays, flags = m.case.small("float32")
    first, second = (m.implementations[implementation](arrays, flags) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def check_vmap(m: KernelMember, implementation: str) -> None:
    """vmap over all, over any part, over a flag, twice, and of the gradient equals a loop."""
    lanes = [m.case.small("float32", seed)[0] for seed in range(3)]
    flags = m.case.small("float32")[1]
    run = lambda *a, **f: m.api(*a, implementation=implementation, **flags, **f)  # noqa: E731
    scalar = lambda *a: sum(jnp.sum(finite(o) ** 2) for o in run(*a))  # noqa: E731
    at = tuple(range(len(lanes[0])))
    both = lambda *a: (*run(*a), *(jax.grad(scalar, at)(*a) if implementation in DIFFERENTIATED else ()))  # noqa: E731
    stacked = tuple(jnp.stack(leaves) for leaves in zip(*lanes, strict=True))
    # All, all but one, and one alone.
    parts = {frozenset(at)} | {frozenset(at) - {i} for i in at} | {frozenset({i}) for i in at}
    for mapped in sorted(map(sorted, parts)):
        axes = tuple(0 if i in mapped else None for i in at)
        given = tuple(s if axis == 0 else x for s, x, axis in zip(stacked, lanes[0], axes, strict=True))
        many = jax.vmap(both, in_axes=axes)(*given)
        for lane in range(len(lanes)):
            one = both(*(x[lane] if axis == 0 else x for x, axis in zip(given, axes, strict=True)))
            for g, w in zip(many, one, strict=True):
                close(g[lane], w, "float32", m.case.terms, f"vmap over {axes}", factor=4.0)
    twice = jax.vmap(jax.vmap(run))(*(jnp.stack([x, x[::-1]]) for x in stacked))
    for g, w in zip(twice, run(*lanes[0]), strict=True):
        close(g[1, -1], w, "float32", m.case.terms, "vmap of vmap")
    for name, values in m.case.mapped_flags().items():
        many = jax.vmap(lambda value, n=name: run(*lanes[0], **{n: value}))(values)
        for lane, value in enumerate(values):
            for g, w in zip(many, run(*lanes[0], **{name: value}), strict=True):
                close(g[lane], w, "float32", m.case.terms, f"vmap over {name}")


def check_races(m: KernelMember, implementation: str) -> None:
    """The interpreter finds no race and no read of memory never written, for several orders of the parallel axes."""
    arrays, flags = m.case.small("float32")
    want = m.implementations["reference"](arrays, flags)
    for seed in range(3):
        got = m.case.interpreted(arrays, flags, seed)
        assert not interpreters.tpu_races_found()
        for g, w in zip(got, want, strict=True):
            close(g, w, "float32", m.case.terms, f"interpreted, seed {seed}")


def check_export(m: KernelMember) -> None:
    """One jitted function exports for cpu, tpu and cuda together, serialises, reloads and runs; gradient too."""
    arrays, flags = m.case.small("float32")
    forward = jax.jit(lambda *a: m.api(*a, implementation=None, **flags))
    scalar = lambda *a: sum(jnp.sum(finite(o) ** 2) for o in forward(*a))  # noqa: E731
    for function in (forward, jax.jit(jax.grad(scalar, tuple(range(len(arrays)))))):
        exported = jax.export.export(function, platforms=PLATFORMS)(*arrays)
        assert exported.platforms == PLATFORMS
        assert "tpu_custom_call" in exported.mlir_module()
        reloaded = jax.export.deserialize(exported.serialize())
        # The branches for other platforms may change what XLA fuses, and so the last bit.
        for g, w in zip(reloaded.call(*arrays), function(*arrays), strict=True):
            close(g, w, "float32", m.case.terms, "exported")


def check_named_implementations(m: KernelMember) -> None:
    """A named implementation on the wrong platform, or one that cannot do the call, refuses in one sentence."""
    arrays, flags = m.case.small("float32")
    with pytest.raises(NotImplementedError, match=rf"^{m.name}: implementation 'tpu' does not run on cpu. Use impl"):
        m.api(*arrays, implementation="tpu", **flags)
    with pytest.raises(ValueError, match=rf"^{m.name}: `implementation` must be one of .*; got 'fast'\."):
        m.api(*arrays, implementation="fast", **flags)
    with jax.enable_x64(True):
        wide = m.case.small("float64")[0]
        with pytest.raises(
            NotImplementedError, match=rf"^{m.name}: implementation 'tpu' cannot do this call: .*float64"
        ):
            m.api(*wide, implementation="tpu", **flags)


def check_compiles_for_tpu(m: KernelMember, topology: str) -> None:
    """The TPU's compiler takes forward and gradient, at a real size and at odd lengths, for one generation."""
    for specs, flags in m.case.compiled():
        forward = lambda *a, f=flags: m.api(*a, implementation=None, **f)  # noqa: E731
        scalar = lambda *a, f=forward: sum(jnp.sum(finite(o).astype("float32")) for o in f(*a))  # noqa: E731
        compiled = interpreters.compile_for_tpu(forward, topology, specs)
        assert "tpu_custom_call" in compiled.as_text()
        with jax.enable_x64(True):
            interpreters.compile_for_tpu(forward, topology, specs)
        interpreters.compile_for_tpu(jax.grad(scalar, tuple(range(len(specs)))), topology, specs)
