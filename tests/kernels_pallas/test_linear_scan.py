"""The linear scan against other people's recurrences, closed forms and itself cut in pieces."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from kernels_pallas import linear_scan
from tests.compiles import count_compiles
from tests.contracts.kernel import close
from tests.tolerances import tolerance

LENGTHS = (1, 7, 64, 65, 133, 257)


def inputs(T, dtype="float64", B=2, D=5, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.uniform(-1, 1, size=(B, T, D)) * (rng.random((B, T, D)) < 0.9)
    return tuple(jnp.asarray(x, dtype) for x in (a, rng.normal(size=(B, T, D)), rng.normal(size=(B, D))))


def by_hand(a, b, h, ids=None, reverse=False):
    """The recurrence and its segments, token by token in NumPy."""
    a, b, h = (np.array(x, np.float64) for x in (a, b, h))
    B, T, _ = a.shape
    out = np.zeros_like(b)
    for row in range(B):
        last = None
        for t in reversed(range(T)) if reverse else range(T):
            if ids is not None and ids[row, t] < 0:
                continue
            if ids is not None and last is not None and ids[row, t] != last:
                h[row] = 0
            last = None if ids is None else ids[row, t]
            h[row] = a[row, t] * h[row] + b[row, t]
            out[row, t] = h[row]
    return out, h


@pytest.mark.parametrize("T", LENGTHS)
def test_outputs_and_gradients_equal_the_reference_at_every_length(T, float_dtype):
    arrays = inputs(T, float_dtype)
    rng = np.random.default_rng(T)
    ids = rng.integers(-1, 3, size=(2, T))
    weights = tuple(jnp.asarray(rng.normal(size=x.shape), float_dtype) for x in arrays[1:])

    def both(implementation, *arrays):
        found = []
        for flags in ({}, {"segment_ids": ids}, {"segment_ids": ids, "reverse": True}):
            run = lambda *a, f=flags: linear_scan(*a, implementation=implementation, **f)  # noqa: E731
            out, pull = jax.vjp(run, *arrays)
            found += [*out, *pull(weights)]
        return found

    got = jax.jit(both, static_argnums=0)("xla", *arrays)
    want = jax.jit(both, static_argnums=0)("reference", *arrays)
    for g, w in zip(got, want, strict=True):
        close(g, w, float_dtype, T, f"T = {T}", factor=4.0)
    for at, flags in ((0, {}), (5, {"ids": ids}), (10, {"ids": ids, "reverse": True})):
        for g, w in zip(want[at : at + 2], by_hand(*arrays, **flags), strict=True):
            close(g, w, float_dtype, T, "by hand")


def test_constant_decay_is_a_filter_of_scipy(x64):
    _, b, _ = inputs(257, B=1, D=3)
    for a in (0.9, -0.5, 0.0):
        h, _ = linear_scan(jnp.full_like(b, a), b)
        want = scipy.signal.lfilter([1], [1, -a], b[0], axis=0)
        np.testing.assert_allclose(h[0], want, rtol=tolerance("float64", 257), atol=tolerance("float64", 257))


def test_closed_forms(x64):
    a, b, start = inputs(133)
    one = jnp.ones_like(a)
    np.testing.assert_allclose(linear_scan(one, b)[0], np.cumsum(b, 1), atol=tolerance("float64", 133, condition=20))
    signs = jnp.sign(a)
    h, final = linear_scan(signs, 0 * b, start)
    np.testing.assert_array_equal(h, start[:, None] * np.cumprod(signs, axis=1))
    np.testing.assert_array_equal(final, h[:, -1])


@pytest.mark.parametrize("reverse", [False, True])
def test_split_and_flipped_runs_equal_the_whole(reverse, x64):
    a, b, start = inputs(65)
    whole, end = linear_scan(a, b, start, reverse=reverse)
    first, second = (slice(30, None), slice(30)) if reverse else (slice(30), slice(30, None))
    part, middle = linear_scan(a[:, first], b[:, first], start, reverse=reverse)
    rest, last = linear_scan(a[:, second], b[:, second], middle, reverse=reverse)
    np.testing.assert_array_equal(whole[:, first], part)
    np.testing.assert_array_equal(whole[:, second], rest)
    np.testing.assert_array_equal(end, last)
    flipped, final = linear_scan(a[:, ::-1], b[:, ::-1], start, reverse=not reverse)
    np.testing.assert_array_equal(flipped[:, ::-1], whole)
    np.testing.assert_array_equal(final, end)


@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_crosses_a_boundary_bit_for_bit(reverse):
    a, b, start = inputs(65, "float32")
    ids = jnp.asarray(np.repeat([[0, 1, 0]], [20, 25, 20], axis=1).repeat(2, 0))
    before = slice(45, None) if reverse else slice(20)
    behind = slice(45) if reverse else slice(20, None)

    @jax.jit
    def behind_it(a, b, start):
        run = lambda a, b, start: linear_scan(a, b, start, reverse=reverse, segment_ids=ids)  # noqa: E731
        (h, final), pull = jax.vjp(run, a, b, start)
        da, db, dstart = pull((jnp.ones_like(h), jnp.ones_like(final)))
        return h[:, behind], final, da[:, behind], db[:, behind], da[:, before], db[:, before], dstart

    want = behind_it(a, b, start)
    poison = lambda x, value: x.at[:, before].set(value)  # noqa: E731
    for bad in (jnp.inf, -1e30, jnp.nan):
        for g, w in zip(behind_it(a, poison(b, bad), jnp.full_like(start, bad))[:4], want[:4], strict=True):
            assert np.asarray(g).tobytes() == np.asarray(w).tobytes()
    # Nor does a cotangent cross it the other way.
    for g, w in zip(behind_it(a, b.at[:, behind].set(jnp.inf), start)[4:], want[4:], strict=True):
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


def test_the_gradient_keeps_a_and_h_alone():
    a, b, start = inputs(257, "float32", D=64)
    _, pull = jax.vjp(lambda *x: linear_scan(*x, implementation="xla"), a, b, start)
    kept = sum(x.size for x in jax.tree.leaves(pull))
    assert kept == 2 * a.size + start.size
    scalar = lambda scan: jax.grad(lambda *x: jnp.sum(scan(*x)[0] ** 2), (0, 1, 2))  # noqa: E731
    ours, theirs = (
        jax.jit(scalar(f)).lower(*(jax.ShapeDtypeStruct((1, 65536, 64), "float32"),) * 2, start[:1])
        for f in (linear_scan, associative)
    )
    ours, theirs = (x.compile().memory_analysis().temp_size_in_bytes for x in (ours, theirs))
    assert ours <= theirs / 4


def associative(a, b, start):
    product, h = jax.lax.associative_scan(lambda x, y: (y[0] * x[0], y[0] * x[1] + y[1]), (a, b), axis=1)
    return product * start[:, None] + h, None


def test_one_trace_serves_all_values():
    run = jax.jit(jax.grad(lambda *x: jnp.sum(linear_scan(*x[:3], segment_ids=x[3])[0] ** 2), (0, 1, 2)))
    arrays = inputs(20, "float32")
    run(*arrays, jnp.zeros((2, 20), jnp.int32))
    other, ids = inputs(20, "float32", seed=1), jnp.ones((2, 20), jnp.int32)
    with count_compiles() as compiles:
        run(*other, ids)
    assert compiles() == 0


def test_leading_axes_and_empty_sizes():
    a, b, start = (x.reshape(2, 1, *x.shape[1:]) for x in inputs(9, "float32"))
    h, final = linear_scan(a, b, start)
    flat, last = linear_scan(a[:, 0], b[:, 0], start[:, 0])
    np.testing.assert_array_equal(h[:, 0], flat)
    np.testing.assert_array_equal(final[:, 0], last)
    single, _ = linear_scan(a[0, 0], b[0, 0], start[0, 0])
    np.testing.assert_allclose(single, flat[0], atol=tolerance("float32", 9))
    empty = a[..., :0, :]
    h, final = linear_scan(empty, empty, start, segment_ids=jnp.zeros((2, 1, 0), jnp.int32))
    assert h.shape == empty.shape
    np.testing.assert_array_equal(final, start)


A, B, START = (np.asarray(x) for x in inputs(6, "float32"))
BAD = {
    "complex decay": (
        lambda: linear_scan(A + 1j, B),
        TypeError,
        "linear_scan: `a` must have one of the dtypes float32, bfloat16, float16, float64; got complex64. Scan",
    ),
    "integers": (lambda: linear_scan(A, B.astype(int)), TypeError, "linear_scan: `b` must have one of the dtypes"),
    "decay that would be broadcast": (
        lambda: linear_scan(A[:, :, :1], B),
        ValueError,
        "linear_scan: `b` must have shape (2, 6, 1) to match `a` (2, 6, 1); got (2, 6, 5). The layout",
    ),
    "two dtypes": (
        lambda: linear_scan(A.astype("bfloat16"), B),
        TypeError,
        "linear_scan: `a` must have dtype float32 to match `b`; got bfloat16.",
    ),
    "state of another shape": (
        lambda: linear_scan(A, B, START[:1]),
        ValueError,
        "linear_scan: `initial_state` must have shape (2, 5) to match `a` (2, 6, 5); got (1, 5).",
    ),
    "state of another dtype": (
        lambda: linear_scan(A, B, START.astype("bfloat16")),
        TypeError,
        "linear_scan: `initial_state` must have one of the dtypes float32; got bfloat16. States are kept wide",
    ),
    "ids of another length": (
        lambda: linear_scan(A, B, segment_ids=np.zeros((2, 5), int)),
        ValueError,
        "linear_scan: `segment_ids` must have shape (2, 6) to match `a` (2, 6, 5); got (2, 5).",
    ),
    "ids that are not whole": (
        lambda: linear_scan(A, B, segment_ids=np.zeros((2, 6))),
        TypeError,
        "linear_scan: `segment_ids` must have an integer dtype; got float",
    ),
    "reverse that is no bool": (
        lambda: linear_scan(A, B, reverse=1),
        ValueError,
        "linear_scan: `reverse` must be a Python bool; got 1.",
    ),
    "GPU": (
        lambda: linear_scan(A, B, implementation="gpu"),
        NotImplementedError,
        "linear_scan: implementation 'gpu' cannot do this call: it has no kernel for GPUs",
    ),
}


@pytest.mark.parametrize(("call", "error", "sentence"), BAD.values(), ids=BAD)
def test_bad_input(call, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        call()
