"""The delta rule against explicit products, closed forms, state tracking and itself cut in pieces."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import delta_rule, delta_rule_step
from kernels_pallas._delta_rule import chunk
from tests.compiles import count_compiles
from tests.contracts.delta_rule_cases import DeltaRuleCase
from tests.contracts.kernel import close

CASE = DeltaRuleCase()
NAMES = ("q", "k", "v", "beta", "initial_state", "log_decay")


def named(arrays):
    return dict(zip(NAMES, arrays, strict=False))


def by_hand(q, k, v, beta, initial_state, log_decay=None, *, n=1, scale=None):
    """Explicit transition matrices in NumPy: S_t = (I - beta k k^T) ... diag(e^g) S_{t-1} + ..., one by one."""
    q, k, v, beta, S = (np.array(x, np.float64) for x in (q, k, v, beta, initial_state))
    B, T, H, K = q.shape
    HV = v.shape[2]
    out = np.zeros((B, T, HV, v.shape[3]))
    scale = K**-0.5 if scale is None else scale
    for b, t, h in np.ndindex(B, T, HV):
        if log_decay is not None:
            S[b, h] = np.exp(np.asarray(log_decay, np.float64)[b, t, h].reshape(-1, 1)) * S[b, h]
        for i in range(n * t, n * t + n):
            key = k[b, i, h * H // HV]
            transition = np.eye(K) - beta[b, i, h] * np.outer(key, key)
            S[b, h] = transition @ S[b, h] + beta[b, i, h] * np.outer(key, v[b, i, h])
        out[b, t, h] = scale * S[b, h].T @ q[b, t, h * H // HV]
    return out, S


def with_gradients(implementation, arrays, weights, **flags):
    """Both outputs and the cotangents of every array."""
    run = lambda *a: delta_rule(**named(a), implementation=implementation, **flags)  # noqa: E731
    out, pull = jax.vjp(run, *arrays)
    return *out, *pull(weights)


def weights_of(arrays, dtype, seed=5):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=x.shape), dtype) for x in (arrays[2], arrays[4]))


# The implementation's own chunk: lengths below, at and beyond one, with every kind of decay.
@pytest.mark.parametrize(
    ("T", "gates"), [(1, "token"), (7, "channel"), (64, "none"), (65, "channel"), (133, "token"), (257, "none")]
)
def test_outputs_and_gradients_equal_the_reference_at_every_length(T, gates, float_dtype):
    arrays = CASE.arrays(float_dtype, gates=gates, B=1, T=T)
    weights = weights_of(arrays, float_dtype)
    got = jax.jit(lambda *a: with_gradients("xla", a, weights))(*arrays)
    with jax.enable_x64(True):
        wide = tuple(x.astype("float64") for x in (*arrays, *weights))
        want = jax.jit(lambda *a: with_gradients("reference", a[:-2], a[-2:]))(*wide)
    for g, w in zip(got, want, strict=True):
        close(g, w, float_dtype, T, f"{T} {gates}", factor=4.0)


def test_alike_keys_with_reflections(x64):
    # Keys with a correlation of 0.9 and beta = 2: powers of the matrix of a chunk would overflow.
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 256, 2, 32)) for _ in range(3))
    k = np.sqrt(0.9) * rng.normal(size=(1, 1, 2, 32)) + np.sqrt(0.1) * k
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    assert np.mean(np.einsum("bihk,bjhk->hij", k, k)) > 0.85
    arrays = tuple(jnp.asarray(x) for x in (q, k, v, np.full((1, 256, 2), 2.0), rng.normal(size=(1, 2, 32, 32))))
    weights = weights_of(arrays, "float64")
    want = with_gradients("reference", arrays, weights)
    narrow = lambda xs: tuple(x.astype("float32") for x in xs)  # noqa: E731
    got = jax.jit(lambda *a: with_gradients("xla", a, narrow(weights)))(*narrow(arrays))
    for g, w in zip(got, want, strict=True):
        assert np.all(np.isfinite(g))
        # 256 reflections one after the other, each with its rounding of |k| in float32.
        close(g, w, "float32", 256, "reflections", factor=4.0)


def test_groups_of_heads_and_several_updates_equal_explicit_products(x64):
    for gates, n in (("token", 3), ("channel", 2), ("none", 1)):
        arrays = CASE.arrays("float64", gates=gates, B=1, T=9, H=2, HV=4, n=n)
        want = by_hand(**named(arrays), n=n, scale=0.3)
        for implementation in ("xla", "reference"):
            flags = {"updates_per_token": n, "scale": 0.3, "implementation": implementation}
            for g, w in zip(delta_rule(**named(arrays), **flags), want, strict=True):
                close(g, w, "float64", 9, f"{gates} {implementation}")


def test_pieces_steps_and_chunks_equal_the_whole():
    arrays = CASE.arrays("float32", gates="channel", T=150, n=2, HV=4)
    flags = {"updates_per_token": 2, "l2norm": True, "scale": 0.5}
    whole = delta_rule(**named(arrays), **flags)
    for size in (16, 64, 256):
        for g, w in zip(delta_rule(**named(arrays), **flags, chunk_size=size), whole, strict=True):
            close(g, w, "float32", 150, f"chunks of {size}")

    q, k, v, beta, state, log_decay = arrays
    o = []
    for a, b in ((0, 77), (77, 150)):
        of_tokens = {"q": q[:, a:b], "log_decay": log_decay[:, a:b]}
        of_updates = {"k": k[:, 2 * a : 2 * b], "v": v[:, 2 * a : 2 * b], "beta": beta[:, 2 * a : 2 * b]}
        piece, state = delta_rule(**of_tokens, **of_updates, initial_state=state, **flags)
        o.append(piece)
    for g, w in zip((jnp.concatenate(o, 1), state), whole, strict=True):
        close(g, w, "float32", 150, "two pieces")

    k, v, beta = (x.reshape(x.shape[0], -1, 2, *x.shape[2:]) for x in (k, v, beta))
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, beta, log_decay))

    def token(state, at):
        *at, g = at
        return delta_rule_step(state, *at, log_decay=g, **flags)[::-1]

    state, o = jax.lax.scan(token, arrays[4], tokens)
    for g, w in zip((jnp.moveaxis(o, 0, 1), state), whole, strict=True):
        close(g, w, "float32", 150, "steps")


def test_documents_do_not_touch_each_other():
    arrays = CASE.arrays("float32", gates="token", B=1, T=90)
    ids = jnp.asarray(np.repeat([3, -1, 8, 3], [20, 5, 30, 35])[None], jnp.int32)
    weights = weights_of(arrays, "float32")
    run = jax.jit(lambda *a: with_gradients("xla", a, weights, segment_ids=ids))
    first = run(*arrays)
    # Other numbers in the second document: all that belongs to the others keeps every bit.
    other = CASE.arrays("float32", 1, "token", B=1, T=90)
    inside = jnp.asarray(np.arange(90) // 1 == np.clip(np.arange(90), 25, 54))
    changed = [
        x if x.shape[1] != 90 else jnp.where(inside.reshape(-1, *(1,) * (x.ndim - 2)), y, x)
        for x, y in zip(arrays, other, strict=True)
    ]
    second = run(*changed)
    for a, b in zip(first, second, strict=True):
        if a.shape[1] == 90:
            a, b = (np.asarray(x)[:, ~np.asarray(inside)] for x in (a, b))
        np.testing.assert_array_equal(a, b)
    assert np.any(np.asarray(first[0]) != np.asarray(second[0]))


def test_orthonormal_keys_recall_the_last_value():
    rng = np.random.default_rng(0)
    keys = np.linalg.qr(rng.normal(size=(32, 32)))[0][:16]
    order = np.concatenate([rng.permutation(16) for _ in range(4)])
    values = rng.normal(size=(64, 8))
    last = np.array([np.flatnonzero(order == i)[-1] for i in range(16)])
    arrays = [jnp.asarray(x, "float32")[None, :, None] for x in (keys[order], keys[order], values)]
    _, state = delta_rule(*arrays, jnp.ones((1, 64, 1)), chunk_size=16)
    close(keys @ np.asarray(state[0, 0]), values[last], "float32", 64, "recall")
    # beta = 0 leaves the state, whatever the keys and values.
    _, same = delta_rule(*arrays, jnp.zeros((1, 64, 1)), initial_state=state)
    np.testing.assert_array_equal(same, state)


@pytest.mark.parametrize(("chunks", "C", "lanes"), [(3000, 32, 1), (400, 256, 1), (300, 256, 3)])
def test_many_small_blocks_are_inverted_like_few(chunks, C, lanes):
    # More blocks side by side than the compiler of jax 0.10.2 gets right on a CPU.
    ones = np.random.default_rng(0).integers(0, 2, size=(lanes, chunks, C, 1))
    L = np.tril(2.0 * ones * np.ones((1, C)), -1).astype("float32")
    got = np.asarray(
        jax.jit(jax.vmap(chunk.invert_small) if lanes > 1 else lambda L: chunk.invert_small(L[0])[None])(L)
    )
    blocks = np.stack([L[..., i : i + 16, i : i + 16] for i in range(0, C, 16)], 2)
    np.testing.assert_array_equal(got @ (np.eye(16, dtype="float32") + blocks), np.broadcast_to(np.eye(16), got.shape))


def test_parity_by_reflections():
    T = 100_000
    x = np.random.default_rng(0).integers(0, 2, T)
    ones, zeros = jnp.ones((1, T, 1, 1)), jnp.zeros((1, T, 1, 1))
    beta = jnp.asarray(2.0 * x, "float32").reshape(1, T, 1)
    o, _ = jax.jit(lambda b: delta_rule(ones, ones, zeros, b, initial_state=jnp.ones((1, 1, 1, 1))))(beta)
    np.testing.assert_array_equal(np.asarray(o).ravel(), 1 - 2 * (np.cumsum(x) % 2))


def test_counting_modulo_3_by_two_reflections():
    # Lines at 60 degrees: one reflection after the other turns by 120.
    T = 100_000
    x = np.random.default_rng(1).integers(0, 2, T)
    keys = np.array([[1.0, 0.0], [np.cos(np.pi / 3), np.sin(np.pi / 3)]])
    k = jnp.asarray(np.tile(keys, (T, 1)), "float32").reshape(1, 2 * T, 1, 2)
    beta = jnp.asarray(np.repeat(2.0 * x, 2), "float32").reshape(1, 2 * T, 1)
    # The state carries the vector (1, 0); two queries would read it, one reads its first entry, the other its second.
    q = jnp.asarray(np.stack([np.eye(2)] * T), "float32")[None]
    run = lambda b: delta_rule(  # noqa: E731
        q,
        jnp.repeat(k, 2, axis=2),
        jnp.zeros((1, 2 * T, 2, 1)),
        jnp.repeat(b, 2, axis=2),
        initial_state=jnp.asarray([1.0, 0.0]).reshape(1, 1, 2, 1).repeat(2, 1),
        scale=1.0,
        updates_per_token=2,
    )
    o, _ = jax.jit(run)(beta)
    vector = np.asarray(o)[0, :, :, 0]
    turns = np.rint(np.arctan2(vector[:, 1], vector[:, 0]) / (2 * np.pi / 3)).astype(int) % 3
    np.testing.assert_array_equal(turns, np.cumsum(x) % 3)
    np.testing.assert_allclose(np.linalg.norm(vector, axis=1), 1, atol=1e-3)


def test_l2norm_at_zero_and_no_second_trace():
    arrays = CASE.arrays("float32", gates="token", B=1, T=20)
    q, k = (x.at[:, 3].set(0) for x in arrays[:2])
    run = jax.jit(jax.grad(lambda *a: sum(jnp.sum(x**2) for x in delta_rule(**named(a), l2norm=True)), tuple(range(6))))
    for g in run(q, k, *arrays[2:]):
        assert np.all(np.isfinite(g))
    with count_compiles() as compiles:
        run(*arrays)
    assert compiles() == 0
    # Keys of any length act as those of length 1.
    o, state = delta_rule(**named(arrays))
    longer = (3 * arrays[0], 5 * arrays[1], *arrays[2:])
    scaled = delta_rule(**named(longer), l2norm=True)
    norm = jnp.linalg.norm(arrays[0], axis=-1, keepdims=True)
    for g, w in zip(scaled, (o / norm, state), strict=True):
        # 1e-6 under the root, relative to 25.
        close(g, w, "float32", 20, "l2norm", factor=4.0)


def test_nothing_to_do():
    q, v, beta = jnp.zeros((2, 0, 3, 4)), jnp.zeros((2, 0, 3, 5)), jnp.zeros((2, 0, 3))
    start = jnp.ones((2, 3, 4, 5))
    o, state = delta_rule(q, q, v, beta, initial_state=start)
    assert o.shape == (2, 0, 3, 5)
    np.testing.assert_array_equal(state, start)


Q, V, BETA = jnp.ones((1, 6, 2, 4)), jnp.ones((1, 6, 2, 3)), jnp.ones((1, 6, 2))
STEP = (jnp.ones((1, 2, 4, 3)), Q[:, 0], Q[:, 0], V[:, 0], BETA[:, 0])
BAD = {
    "beta of a wrong shape": (
        lambda: delta_rule(Q, Q, V, BETA[..., :1]),
        ValueError,
        "delta_rule: `beta` must have shape (1, 6, 2) to match `v` (1, 6, 2, 3); got (1, 6, 1).",
    ),
    "beta of whole numbers": (
        lambda: delta_rule(Q, Q, V, BETA.astype(int)),
        TypeError,
        "delta_rule: `beta` must have a floating-point dtype; got int32.",
    ),
    "state of a wrong shape": (
        lambda: delta_rule(Q, Q, V, BETA, initial_state=jnp.ones((1, 2, 3, 4))),
        ValueError,
        "delta_rule: `initial_state` must have shape (1, 2, 4, 3); got (1, 2, 3, 4).",
    ),
    "state of a wrong dtype": (
        lambda: delta_rule(Q, Q, V, BETA, initial_state=jnp.ones((1, 2, 4, 3), "bfloat16")),
        TypeError,
        "delta_rule: `initial_state` must have one of the dtypes float32; got bfloat16.",
    ),
    "chunk that is no power of two": (
        lambda: delta_rule(Q, Q, V, BETA, chunk_size=48),
        ValueError,
        "delta_rule: `chunk_size` must be a power of two from 16 to 256; got 48.",
    ),
    "growth instead of decay": (
        lambda: delta_rule(Q, Q, V, BETA, log_decay=0.5 * BETA),
        ValueError,
        "delta_rule: `log_decay` must be <= 0; got 0.5.",
    ),
    "decay of a wrong shape": (
        lambda: delta_rule(Q, Q, V, BETA, log_decay=-V),
        ValueError,
        "delta_rule: `log_decay` must have shape (1, 6, 2) or (1, 6, 2, 4); got (1, 6, 2, 3).",
    ),
    "other number of updates": (
        lambda: delta_rule(Q, Q, V, BETA, updates_per_token=2),
        ValueError,
        "delta_rule: `k` must have shape (1, 12, 2, 4); got (1, 6, 2, 4).",
    ),
    "no updates": (
        lambda: delta_rule(Q, Q, V, BETA, updates_per_token=0),
        ValueError,
        "delta_rule: `updates_per_token` must be an int of at least 1; got 0.",
    ),
    "heads that are no multiple": (
        lambda: delta_rule(Q, Q, jnp.ones((1, 6, 3, 3)), jnp.ones((1, 6, 3))),
        ValueError,
        "delta_rule: `v` must have a number of heads that is a multiple of that of `q` and `k`, 2; got 3.",
    ),
    "values of another dtype": (
        lambda: delta_rule(Q, Q, V.astype("bfloat16"), BETA),
        TypeError,
        "delta_rule: `v` must have dtype float32 to match `q`; got bfloat16.",
    ),
    "segments of a wrong shape": (
        lambda: delta_rule(Q, Q, V, BETA, segment_ids=jnp.zeros((1, 5), int)),
        ValueError,
        "delta_rule: `segment_ids` must have shape (1, 6); got (1, 5).",
    ),
    "step with a state of a wrong dtype": (
        lambda: delta_rule_step(STEP[0].astype("float16"), *STEP[1:]),
        TypeError,
        "delta_rule_step: `state` must have one of the dtypes float32; got float16.",
    ),
    "step with other updates": (
        lambda: delta_rule_step(*STEP, updates_per_token=2),
        ValueError,
        "delta_rule_step: `k` must have shape (1, 2, 2, 4); got (1, 2, 4).",
    ),
}


@pytest.mark.parametrize(("call", "error", "sentence"), BAD.values(), ids=list(BAD))
def test_bad_input(call, error, sentence):
    with pytest.raises(error, match="^" + re.escape(sentence)):
        call()
