"""Linear attention against dense sums, closed forms and its own recurrence."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import linear_attention, linear_attention_step
from kernels_pallas.recurrence import cumulative_decay
from tests.contracts.linear_attention_cases import LinearAttentionCase
from tests.tolerances import tolerance

CASE = LinearAttentionCase()
GATES = ("none", "head", "token", "channel")


def dense(q, k, v, state, log_decay=None):
    """The sum over all earlier tokens, with every decay multiplied out, in NumPy and float64."""
    q, k, v, state = (np.asarray(x, np.float64) for x in (q, k, v, state))
    B, T, H, K = q.shape
    g = np.zeros((B, T, H, K))
    if log_decay is not None:
        g = np.asarray(log_decay, np.float64)
        g = g[None, None, :, None] if g.ndim == 1 else g[..., None] if g.ndim == 3 else g
        g = np.broadcast_to(g, (B, T, H, K))
    o, last = np.zeros(v.shape), np.zeros(state.shape)
    for t in range(T + 1):
        end = min(t, T - 1)
        # The decay from behind token s to token t, and from before the first.
        between = np.stack([np.exp(g[:, s + 1 : end + 1].sum(1)) for s in range(end + 1)], 1)
        S = np.einsum("bshk,bshv->bhkv", between * k[:, : end + 1], v[:, : end + 1])
        S += np.exp(g[:, : end + 1].sum(1))[..., None] * state
        if t < T:
            o[:, t] = K**-0.5 * np.einsum("bhk,bhkv->bhv", q[:, t], S)
        last = S
    return o, last


def close(got, want, dtype="float32", size=300, condition=1.0):
    for g, w in zip(got, want, strict=True):
        scale = max(1.0, float(np.max(np.abs(w))))
        np.testing.assert_allclose(g, w, rtol=0, atol=scale * tolerance(dtype, size, condition=condition))


def given(arrays):
    names = ("q", "k", "v", "initial_state", "log_decay")
    return dict(zip(names, arrays, strict=False))


@pytest.mark.parametrize("gates", GATES)
def test_equals_the_dense_sum(gates, float_dtype):
    arrays = CASE.arrays(float_dtype, gates=gates)
    close(linear_attention(**given(arrays)), dense(*arrays), float_dtype)


@pytest.mark.parametrize("T", [1, 7, 64, 65, 133, 257])
def test_lengths_and_gradients_equal_the_recurrence(T, x64):
    arrays = CASE.arrays("float64", gates="token" if T % 2 else "channel", B=1, T=T)
    rng = np.random.default_rng(5)
    weights = tuple(jnp.asarray(rng.normal(size=s.shape)) for s in arrays[2:4])

    def both(implementation):
        def loss(*arrays):
            o, state = linear_attention(**given(arrays), implementation=implementation)
            return jnp.sum(o * weights[0]) + jnp.sum(state * weights[1])

        return jax.jit(jax.grad(loss, tuple(range(5))))(*arrays)

    close(both("xla"), both("reference"), "float64", T)


@pytest.mark.parametrize("gates", ["token", "channel"])
def test_pieces_and_chunk_sizes_give_the_whole(gates):
    arrays = CASE.arrays("float32", gates=gates, T=150)
    want = linear_attention(**given(arrays))
    for chunk in (16, 32, 128):
        close(linear_attention(**given(arrays), chunk_size=chunk), want)
    q, k, v, state, log_decay = arrays
    o = []
    for piece in (slice(0, 37), slice(37, 101), slice(101, None)):
        tokens = (x[:, piece] for x in (q, k, v))
        part, state = linear_attention(*tokens, log_decay=log_decay[:, piece], initial_state=state)
        o.append(part)
    close((np.concatenate(o, 1), state), want)


@pytest.mark.parametrize(("gates", "normalize"), [("none", True), ("head", False), ("token", True), ("channel", False)])
def test_steps_give_the_whole(gates, normalize):
    q, k, v, state, *log_decay = CASE.arrays("float32", gates=gates)
    if normalize:
        q, k = jnp.abs(q), jnp.abs(k)
        state = jnp.concatenate([state, jnp.abs(state[..., :1])], -1)
    log_decay = log_decay[0] if log_decay else None
    options = {"normalize": normalize, "scale": 0.3}
    want = linear_attention(q, k, v, log_decay=log_decay, initial_state=state, **options)
    step = jax.jit(lambda *a, g: linear_attention_step(*a, log_decay=g, **options))
    o = []
    for t in range(q.shape[1]):
        g = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, t]
        one, state = step(state, q[:, t], k[:, t], v[:, t], g=g)
        o.append(one)
    close((np.stack(o, 1), state), want)


def test_constant_decay_has_a_closed_form(x64):
    one = jnp.ones((1, 90, 1, 1))
    decay = 0.93
    o, state = linear_attention(one, one, one, log_decay=jnp.log(jnp.array([decay])), scale=1.0)
    want = (1 - decay ** np.arange(1, 91)) / (1 - decay)
    close((o[0, :, 0, 0], state[0, 0, 0]), (want, want[-1:]), "float64", 90)


def test_normalize_divides_by_the_sum_of_the_weights():
    q, k, v, _ = CASE.arrays("float32")
    q, k = jnp.abs(q), jnp.abs(k)
    o, state = linear_attention(q, k, v, normalize=True)
    scores = np.einsum("bthk,bshk->bhts", np.asarray(q, np.float64), np.asarray(k, np.float64))
    scores *= np.tril(np.ones(scores.shape[-2:]))
    want = np.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdims=True), v)
    close((o, state[..., -1]), (want, np.asarray(k, np.float64).sum(1)))


def test_prefix_is_read_in_both_directions():
    q, k, v, state = CASE.arrays("float32")
    lengths = np.array([0, 18])
    o, _ = linear_attention(q, k, v, prefix_length=jnp.asarray(lengths), scale=1.0)
    T = q.shape[1]
    i, j = np.arange(T)[:, None], np.arange(T)[None, :]
    visible = (j <= i)[None] | ((i < lengths[:, None, None]) & (j < lengths[:, None, None]))
    want = np.einsum(
        "bthk,bshk,bts,bshv->bthv", *(np.asarray(x, np.float64) for x in (q, k, visible, v)), optimize=True
    )
    close((o,), (want,))
    # A query in the prefix reads the state after the prefix, decays and all.
    g = CASE.arrays("float32", gates="token")[4]
    options = {"initial_state": state, "scale": 1.0}
    o, last = linear_attention(q, k, v, log_decay=g, prefix_length=18, **options)
    causal, want_last = linear_attention(q, k, v, log_decay=g, **options)
    _, after = linear_attention(q[:, :18], k[:, :18], v[:, :18], log_decay=g[:, :18], **options)
    close((o[:, 18:], last), (causal[:, 18:], want_last))
    close((o[:, :18],), (jnp.einsum("bthk,bhkv->bthv", q[:, :18], after, precision="highest"),))


def test_reverse_is_the_flipped_sequence():
    q, k, v, state, g = CASE.arrays("float32", gates="channel")
    flip = lambda x: jnp.flip(x, 1)  # noqa: E731
    o, last = linear_attention(q, k, v, log_decay=g, initial_state=state, reverse=True)
    want, want_last = linear_attention(flip(q), flip(k), flip(v), log_decay=flip(g), initial_state=state)
    np.testing.assert_array_equal(o, flip(want))
    np.testing.assert_array_equal(last, want_last)


@pytest.mark.parametrize("gates", ["none", "token", "channel"])
def test_nothing_crosses_a_boundary_bit_by_bit(gates):
    ids = jnp.asarray(np.repeat([[0, 1]], [21, 20], axis=1).repeat(2, 0), jnp.int32)
    run = jax.jit(lambda *a: linear_attention(**given(a), segment_ids=ids, chunk_size=16))
    first, second = (CASE.arrays("float32", seed, gates) for seed in (0, 1))
    mixed = [jnp.concatenate([b[:, :21], a[:, 21:]], 1) for a, b in zip(first, second, strict=True)]
    mixed[3] = second[3]
    for got, want in zip(run(*mixed), run(*first), strict=True):
        got, want = (x if x.shape == first[3].shape else x[:, 21:] for x in (got, want))
        np.testing.assert_array_equal(got, want)


def test_groups_of_heads_share_keys():
    q, k, v, _ = CASE.arrays("float32", H=4)
    o, state = linear_attention(q[:, :, ::2], k[:, :, :1], v)
    want, want_state = linear_attention(jnp.repeat(q[:, :, ::2], 2, 2), jnp.repeat(k[:, :, :1], 4, 2), v)
    np.testing.assert_array_equal(o, want)
    np.testing.assert_array_equal(state, want_state)


def test_sums_of_decays_are_exact_beside_a_decay_of_zero():
    g = np.full(64, -0.1, np.float32)
    g[5::7] = -1000.0
    coarse, rest = (np.asarray(x) for x in cumulative_decay(jnp.asarray(g), 0))
    between = (coarse[26:33] - coarse[26]) + (rest[26:33] - rest[26])
    np.testing.assert_allclose(between, -np.float32(0.1) * np.arange(7), rtol=0, atol=tolerance("float32"))


def test_saves_its_inputs_and_linear_scratch():
    spec = lambda T: [jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)] * 3  # noqa: E731
    run = lambda q, k, v: linear_attention(q, k, v, log_decay=jnp.full(2, -0.1))[0]  # noqa: E731

    def residuals(q, k, v):
        return jax.tree.leaves(jax.vjp(run, q, k, v)[1])

    kept = sum(x.size for x in jax.eval_shape(residuals, *spec(4096)))
    assert kept <= 3 * 4096 * 2 * 32 + 2 * 32 * 32 + 2 * 2
    scratch = [
        jax.jit(jax.grad(lambda *a: run(*a).sum(), (0, 1, 2))).lower(*spec(T)).compile().memory_analysis()
        for T in (1024, 4096)
    ]
    assert scratch[1].temp_size_in_bytes <= 4.4 * scratch[0].temp_size_in_bytes


def test_compiles_once():
    run = jax.jit(lambda *a: linear_attention(**given(a)))
    for seed in range(2):
        run(*CASE.arrays("float32", seed, "token"))
    assert run._cache_size() == 1


Q, K, V, STATE = LinearAttentionCase().arrays("float32")
ERRORS = {
    "heads": (lambda: linear_attention(Q, K[:, :, :1].repeat(3, 2), V), ValueError, "`q` must have a number of heads"),
    "tokens": (
        lambda: linear_attention(Q, K[:, :5], V),
        ValueError,
        "`k` must have shape (2, 41, Hk, 10) to match `q`",
    ),
    "dtypes": (lambda: linear_attention(Q, K, V.astype("bfloat16")), TypeError, "`v` must have dtype float32"),
    "integers": (lambda: linear_attention(Q.astype(int), K, V), TypeError, "`q` must have one of the dtypes"),
    "state's shape": (
        lambda: linear_attention(Q, K, V, initial_state=STATE[:, :1]),
        ValueError,
        "`initial_state` must have shape (2, 2, 10, 7); got (2, 1, 10, 7). States are",
    ),
    "state's dtype": (
        lambda: linear_attention(Q, K, V, initial_state=STATE.astype("bfloat16")),
        TypeError,
        "`initial_state` must have one of the dtypes float32; got bfloat16.",
    ),
    "decay's shape": (
        lambda: linear_attention(Q, K, V, log_decay=jnp.zeros(3)),
        ValueError,
        "`log_decay` must have shape (2,) or (2, 41, 2) or (2, 41, 2, 10); got (3,).",
    ),
    "decay above 1": (
        lambda: linear_attention(Q, K, V, log_decay=jnp.full(2, 0.5)),
        ValueError,
        "`log_decay` must be <= 0; got 0.5. Give the natural logarithm",
    ),
    "chunk": (lambda: linear_attention(Q, K, V, chunk_size=48), ValueError, "`chunk_size` must be a power of two from"),
    "prefix": (
        lambda: linear_attention(Q, K, V, prefix_length=42),
        ValueError,
        "`prefix_length` must be from 0 to the number of tokens, 41; got 42.",
    ),
    "prefix of documents": (
        lambda: linear_attention(Q, K, V, prefix_length=4, segment_ids=jnp.zeros((2, 41), int)),
        ValueError,
        "`segment_ids` must be absent where `prefix_length` is given",
    ),
    "segments": (
        lambda: linear_attention(Q, K, V, segment_ids=jnp.zeros((2, 40), int)),
        ValueError,
        "`segment_ids` must have shape (2, 41); got (2, 40).",
    ),
    "scale": (lambda: linear_attention(Q, K, V, scale=float("nan")), ValueError, "`scale` must be a finite number"),
    "flag": (lambda: linear_attention(Q, K, V, normalize=1), ValueError, "`normalize` must be a Python bool; got 1."),
}


@pytest.mark.parametrize(("call", "error", "sentence"), ERRORS.values(), ids=ERRORS)
def test_bad_input(call, error, sentence):
    with pytest.raises(error, match=re.escape(f"linear_attention: {sentence}")):
        call()


def test_a_traced_decay_above_1_cannot_be_missed():
    o, state = jax.jit(lambda g: linear_attention(Q, K, V, log_decay=g))(jnp.full(2, 0.5))
    assert np.all(np.isnan(state))
    assert np.all(np.isnan(o[:, 1:]))


def test_a_known_decay_may_stand_in_compiled_code():
    decay = jnp.full(2, -0.5)
    close(jax.jit(lambda q: linear_attention(q, K, V, log_decay=decay))(Q), linear_attention(Q, K, V, log_decay=decay))


def test_nothing_in_nothing_out():
    o, state = linear_attention(Q[:, :0], K[:, :0], V[:, :0], initial_state=STATE)
    assert o.shape == (2, 0, 2, 7)
    np.testing.assert_array_equal(state, STATE)
