"""Decode attention and its caches beyond the contract: oracles nobody here wrote, streams of tokens, pages, int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from kernels_pallas import (
    KVCache,
    PagedKVCache,
    append_to_cache,
    attention,
    decode_attention,
    init_cache,
    init_paged_cache,
)
from kernels_pallas._decode_attention import api, config, reference, tpu
from kernels_pallas._decode_attention.tiles import Tiles
from tests import interpreters
from tests.compiles import count_compiles
from tests.tolerances import tolerance

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla"])


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(lengths, *, S=200, T=2, H=4, K=2, D=16, V=24, dtype="float32"):
    """Queries, and a cache whose rows hold as many tokens as told and NaN after them."""
    B = len(lengths)
    k, v = normal(B, S, K, D, seed=1, dtype=dtype), normal(B, S, K, V, seed=2, dtype=dtype)
    past = (np.arange(S) >= np.asarray(lengths)[:, None])[:, :, None, None]
    cache = KVCache(*(jnp.where(past, jnp.nan, x) for x in (k, v)), jnp.asarray(lengths, jnp.int32))
    return normal(B, T, H, D, dtype=dtype), cache


def in_pages(cache, page, seed=0):
    """The same cache in pages of a random order; pages and entries that no row needs hold nonsense."""
    B, S = cache.k.shape[:2]
    N = -(-S // page)
    P = B * N + 3
    table = np.random.default_rng(seed).permutation(P)[: B * N].reshape(B, N)

    def scattered(x):
        rows = jnp.pad(x, ((0, 0), (0, N * page - S), *((0, 0),) * (x.ndim - 2)))
        pages = jnp.full((P, page, *x.shape[2:]), jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 99, x.dtype)
        return pages.at[table].set(rows.reshape(B, N, page, *x.shape[2:]))

    scales = (None if x is None else scattered(x) for x in (cache.k_scale, cache.v_scale))
    reached = np.arange(N) * page < np.asarray(cache.length)[:, None]
    table = np.where(reached, table, 12345)
    return PagedKVCache(scattered(cache.k), scattered(cache.v), jnp.asarray(table, jnp.int32), cache.length, *scales)


def close(got, want, dtype="float32", size=200, condition=1.0):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    got, want = np.where(np.isfinite(want), got, 0), np.where(np.isfinite(want), want, 0)
    error = np.max(np.abs(got - want), initial=0) / max(1.0, np.max(np.abs(want), initial=0))
    assert error <= tolerance(dtype, size, condition=condition), error


def dense(q, k, v, *, left=None, cap=None, sinks=None):
    """One row in float64 NumPy: q [T, H, D], its own k [n, K, D] and v."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    T, H, D = q.shape
    n, K = k.shape[:2]
    o, lse = np.zeros((T, H, v.shape[2])), np.full((H, T), -np.inf)
    for t in range(T):
        i = n - T + t
        seen = slice(max(0 if left is None else i - left, 0), max(i + 1, 0))
        for h in range(H):
            s = k[seen, h * K // H] @ q[t, h] * D**-0.5
            s = s if cap is None else cap * np.tanh(s / cap)
            weights = np.exp(s)
            total = weights.sum() + (0 if sinks is None else np.exp(np.asarray(sinks, np.float64)[h]))
            if total > 0:
                o[t, h], lse[h, t] = weights @ v[seen, h * K // H] / total, np.log(total)
    return o, lse


# --- Oracles. ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"left": 30}, {"cap": 2.0}, {"sinks": np.linspace(-1, 2, 4)}])
@IMPLEMENTATIONS
def test_equals_a_dense_softmax_of_what_is_there(implementation, flags):
    lengths = [0, 1, 77, 200]
    q, cache = inputs(lengths)
    own = {
        "window": (flags["left"], 0) if "left" in flags else None,
        "soft_cap": flags.get("cap"),
        "sinks": jnp.asarray(flags["sinks"], "float32") if "sinks" in flags else None,
    }
    o, lse = decode_attention(q, cache, return_lse=True, implementation=implementation, **own)
    for b, n in enumerate(lengths):
        want = dense(q[b], cache.k[b, :n], cache.v[b, :n], **flags)
        for got, w in zip((o[b], lse[b]), want, strict=True):
            close(got, w)


@pytest.mark.parametrize("paged", [False, True])
def test_a_stream_of_tokens_equals_causal_attention_row_by_row(paged, x64):
    q, k, v = normal(2, 40, 4, 8, dtype="float64"), *(normal(2, 40, 2, 8, seed=s, dtype="float64") for s in (1, 2))
    flags = {"window": (25, 0), "soft_cap": 3.0}
    cache = init_cache(2, 40, 2, 8, dtype="float64")
    if paged:
        table = jnp.asarray(np.random.default_rng(0).permutation(10).reshape(2, 5))
        cache = init_paged_cache(table, 10, 8, 2, 8, dtype="float64")

    def step(cache, token):
        q, k, v = token
        cache = append_to_cache(cache, k[:, None], v[:, None])
        o, lse = decode_attention(q[:, None], cache, return_lse=True, **flags)
        return cache, (o[:, 0], lse[:, :, 0])

    cache, (o, lse) = jax.lax.scan(step, cache, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v)))
    want = attention(q, k, v, causal=True, return_lse=True, **flags)
    for got, w in zip((jnp.moveaxis(o, 0, 1), jnp.moveaxis(lse, 0, 2)), want, strict=True):
        close(got, w, "float64")
    # And the last tokens as one call.
    got = decode_attention(q[:, -5:], cache, **flags)
    close(got, want[0][:, -5:], "float64")


@IMPLEMENTATIONS
def test_pages_equal_the_contiguous_cache(implementation):
    q, cache = inputs([0, 3, 64, 150])
    for page in (7, 16, 200):
        for flags in ({}, {"window": (20, 0), "sinks": normal(4)}):
            run = lambda c, f=flags: decode_attention(q, c, return_lse=True, implementation=implementation, **f)  # noqa: E731
            for got, want in zip(run(in_pages(cache, page)), run(cache), strict=True):
                close(got, want)


# Modules on the deprecated Triton backend, of which only the references are used.
from_triton = pytest.mark.filterwarnings("ignore:jax.experimental.pallas.ops.gpu.*is deprecated:DeprecationWarning")


@from_triton
def test_jax_reference_of_gpu_decode_attention():
    from jax.experimental.pallas.ops.gpu.decode_attention import gqa_reference

    lengths = [1, 77, 200]
    q, cache = inputs(lengths, T=1, V=16)
    k, v = (jnp.nan_to_num(x) for x in (cache.k, cache.v))
    o, (l, m) = gqa_reference(q[:, 0], k, v, kv_seq_len=cache.length, return_residuals=True)
    got, lse = decode_attention(q, cache, return_lse=True)
    close(got[:, 0], o)
    close(lse[:, :, 0], m + jnp.log(l))
    o = gqa_reference(q[:, 0], k, v, start_idx=cache.length - 31, kv_seq_len=cache.length)
    close(decode_attention(q, cache._replace(length=jnp.array([31, 77, 200])), window=(30, 0))[1:, 0], o[1:])


@from_triton
def test_jax_reference_of_gpu_paged_attention():
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention_reference

    q, cache = inputs([1, 77, 200], T=1, V=16)
    k, v = (jnp.nan_to_num(x) for x in (cache.k, cache.v))
    want = paged_attention_reference(q[:, 0], k, v, cache.length, attn_logits_soft_cap=2.0)
    close(decode_attention(q, in_pages(cache, 16), soft_cap=2.0, scale=1.0)[:, 0], want)


@pytest.mark.parametrize("flags", [{}, {"window": (19, 0)}, {"soft_cap": 2.0}])
def test_jax_reference_of_tpu_ragged_paged_attention(flags):
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    lengths, T = [3, 77, 200], 3
    q, cache = inputs(lengths, T=T, V=16)
    pages = in_pages(cache, 16)
    # They lie head by head, k and v in turn, and every entry of the table names a page.
    kv = jnp.nan_to_num(jnp.stack([pages.k, pages.v], axis=3).reshape(*pages.k.shape[:2], 4, 16))
    theirs = {"sliding_window": 20} if "window" in flags else flags
    want = ref_ragged_paged_attention(
        q.reshape(-1, 4, 16),
        kv,
        cache.length,
        jnp.minimum(pages.block_table, pages.k.shape[0] - 1),
        jnp.arange(4, dtype=jnp.int32) * T,
        jnp.array([3], jnp.int32),
        sm_scale=0.25,
        **theirs,
    )
    close(decode_attention(q, pages, **flags), want.reshape(q.shape))


def test_two_caches_merge_by_their_lse(x64):
    """A prefix that all rows share, and what each has of its own."""
    q, cache = inputs([60, 200], dtype="float64")
    first = KVCache(cache.k[:, :50], cache.v[:, :50], jnp.full(2, 50))
    # The queries stand behind all of the prefix: as many tokens as to see all of it.
    ahead = first._replace(length=jnp.full(2, 50 + q.shape[1]))
    rest = KVCache(cache.k[:, 50:], cache.v[:, 50:], cache.length - 50)
    parts = [decode_attention(q, c, return_lse=True) for c in (ahead, rest)]
    lse = jnp.logaddexp(parts[0][1], parts[1][1])
    o = sum(o * jnp.exp(part - lse).swapaxes(1, 2)[..., None] for o, part in parts)
    for got, want in zip((o, lse), decode_attention(q, cache, return_lse=True), strict=True):
        close(got, want, "float64")


# --- int8. ------------------------------------------------------------------------------------------------------------


def rounded(lengths, *, S=256, page=None, T=2, K=2):
    B = len(lengths)
    k, v = normal(B, S, K, 16, seed=1), normal(B, S, K, 24, seed=2)
    cache = init_cache(B, S, K, 16, v_dim=24, dtype=jnp.int8)
    cache = cache._replace(**{f"{x}_scale": jnp.full((B, S, K), jnp.nan) for x in "kv"})
    cache = append_to_cache(cache, k, v, count=jnp.asarray(lengths))
    whole = KVCache(k, v, cache.length)
    return normal(B, T, 4, 16), in_pages(cache, page) if page else cache, whole


@pytest.mark.parametrize("page", [None, 16])
@IMPLEMENTATIONS
def test_int8_equals_the_cache_multiplied_out(implementation, page):
    q, cache, _ = rounded([0, 77, 256], page=page)
    out = lambda x, scale: x.astype("float32") * scale[..., None]  # noqa: E731
    plain = cache._replace(k=out(cache.k, cache.k_scale), v=out(cache.v, cache.v_scale), k_scale=None, v_scale=None)
    run = lambda c: decode_attention(q, c, return_lse=True, implementation=implementation)  # noqa: E731
    for got, want in zip(run(cache), run(plain), strict=True):
        close(got, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("page", "K"), [(None, 1), (None, 4), (128, 2)])
def test_int8_on_a_tpu(page, K, dtype):
    q, cache, _ = rounded([0, 77, 256], page=page, K=K)
    settings, operands, _ = api.prepare(q.astype(dtype), cache, window=(100, 0))
    tiles = Tiles(128, 2 if page else 1, 128 * K * (2 if page else 1))
    got = tpu.forward(settings, operands, tiles=tiles, interpret=interpreters.tpu_parameters())
    assert not interpreters.tpu_races_found()
    for g, w in zip(got, reference.forward(settings, operands), strict=True):
        close(g, w, dtype)


def test_int8_rounds_by_at_most_half_a_step():
    _, cache, whole = rounded([256])
    for x, scale, true in ((cache.k, cache.k_scale, whole.k), (cache.v, cache.v_scale, whole.v)):
        error = np.abs(np.asarray(x, np.float64) * np.asarray(scale, np.float64)[..., None] - np.asarray(true))
        bound = np.abs(true).max(axis=-1, keepdims=True) / 254
        assert np.all(error <= bound * (1 + tolerance("float32")))
    zeros = append_to_cache(init_cache(1, 2, 1, 4, dtype=jnp.int8), jnp.zeros((1, 1, 1, 4)), jnp.zeros((1, 1, 1, 4)))
    assert np.all(np.isfinite(zeros.k_scale))
    np.testing.assert_array_equal(zeros.k, 0)


def test_int8_halves_or_quarters_the_bytes():
    bytes_of = lambda dtype: sum(x.nbytes for x in jax.tree.leaves(init_cache(1, 512, 2, 128, dtype=dtype)))  # noqa: E731
    assert bytes_of(jnp.int8) <= 0.27 * bytes_of(jnp.float32)
    assert bytes_of(jnp.int8) <= 0.54 * bytes_of(jnp.bfloat16)


# --- Appending. -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True])
def test_append_writes_the_real_tokens_and_no_others(paged):
    table = jnp.asarray([[4, 1], [0, 3]])
    cache = init_paged_cache(table, 5, 4, 1, 2) if paged else init_cache(2, 8, 1, 2)
    first, second = normal(2, 3, 1, 2), normal(2, 4, 1, 2, seed=1)
    cache = append_to_cache(cache, first, first, count=jnp.array([3, 1]))
    cache = append_to_cache(cache, second, 2 * second)
    np.testing.assert_array_equal(cache.length, [7, 5])
    k, v = (x[table].reshape(2, 8, 1, 2) if paged else x for x in (cache.k, cache.v))
    for b, kept in enumerate((3, 1)):
        want = np.concatenate([first[b, :kept], second[b], np.zeros((8 - kept - 4, 1, 2))])
        np.testing.assert_array_equal(k[b], want)
        np.testing.assert_array_equal(v[b, kept:], 2 * want[kept:])
    if paged:
        np.testing.assert_array_equal(cache.k[2], 0)  # the page of no row


@pytest.mark.parametrize("paged", [False, True])
def test_what_finds_no_room_is_dropped_and_counted(paged):
    cache = init_paged_cache(jnp.asarray([[1, 0]]), 2, 4, 1, 2) if paged else init_cache(1, 8, 1, 2)
    new = normal(1, 6, 1, 2)
    cache = append_to_cache(append_to_cache(cache, new, new), new, new)
    assert cache.length.tolist() == [12]
    k = cache.k[cache.block_table[0]].reshape(8, 1, 2) if paged else cache.k[0]
    np.testing.assert_array_equal(k, np.concatenate([new[0], new[0, :2]]))
    # The newest query stands at 11; of keys 0 to 11 the first 8 are there.
    o = decode_attention(normal(1, 1, 1, 2), cache)
    close(o[0, 0, 0], dense(normal(1, 1, 1, 2)[0], k, k)[0][0, 0])


def test_a_page_that_is_not_there_takes_nothing():
    cache = init_paged_cache(jnp.array([[3, 0], [1, 2]]), 4, 16, 1, 8)
    cache = cache._replace(block_table=jnp.array([[3, -1], [1, 9]]), length=jnp.array([16, 16], jnp.int32))
    token = jnp.ones((2, 1, 1, 8))
    after = append_to_cache(cache, token, token)
    np.testing.assert_array_equal(after.k, cache.k)
    assert after.length.tolist() == [17, 17]


def test_a_count_outside_of_its_range_is_taken_into_it():
    cache = init_cache(2, 8, 1, 4)
    token = jnp.ones((2, 3, 1, 4))
    assert append_to_cache(cache, token, token, count=jnp.array([5, -3])).length.tolist() == [3, 0]


def test_shard_map_lowers_to_the_kernel_of_a_tpu():
    mesh = jax.make_mesh((4,), ("rows",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("rows")
    run = lambda q, k, v, n: decode_attention(q, KVCache(k, v, n))  # noqa: E731
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows))
    q, k = jax.ShapeDtypeStruct((4, 1, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((4, 256, 1, 64), jnp.bfloat16)
    traced = sharded.trace(q, k, k, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_a_donated_cache_is_written_in_place():
    cache = init_cache(2, 4096, 2, 64)

    def step(cache, q, k, v):
        cache = append_to_cache(cache, k, v)
        return cache, decode_attention(q, cache)

    new = normal(2, 1, 2, 64)
    compiled = jax.jit(step, donate_argnums=0).lower(cache, new, new, new).compile()
    memory = compiled.memory_analysis()
    whole = cache.k.nbytes + cache.v.nbytes
    assert memory.alias_size_in_bytes >= whole
    assert memory.temp_size_in_bytes <= 0.1 * whole


def test_batch_axes_none_and_two():
    q, cache = inputs([5, 77, 0, 200, 3, 9])
    want = decode_attention(q, cache, return_lse=True)
    lone = KVCache(cache.k[1], cache.v[1], cache.length[1])
    o, lse = decode_attention(q[1], lone, return_lse=True)
    close(o, want[0][1])
    assert (o.shape, lse.shape) == ((2, 4, 24), (4, 2))
    split = lambda x: x.reshape(2, 3, *x.shape[1:])  # noqa: E731
    for c in (cache, in_pages(cache, 16)):
        both = c._replace(**{n: split(getattr(c, n)) for n in ("length", "block_table") if n in c._fields})
        if c is cache:
            both = both._replace(k=split(c.k), v=split(c.v))
        for got, w in zip(decode_attention(split(q), both, return_lse=True), want, strict=True):
            close(got.reshape(w.shape), w)
        grown = append_to_cache(both, normal(2, 3, 1, 2, 16), normal(2, 3, 1, 2, 24))
        np.testing.assert_array_equal(grown.length, both.length + 1)
    assert init_cache((), 8, 2, 4).k.shape == (8, 2, 4)
    assert append_to_cache(init_cache((), 8, 2, 4), normal(3, 2, 4), normal(3, 2, 4)).length == 3
    assert init_cache((2, 3), 8, 2, 4).length.shape == (2, 3)


# --- Transformations. -------------------------------------------------------------------------------------------------


def test_vmap_over_pages_and_over_rows_of_one_cache():
    q, cache = inputs([5, 200])
    pages = [in_pages(cache, 16, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *pages)
    many = jax.vmap(lambda c: decode_attention(q, c))(stacked)
    for lane in many:
        close(lane, decode_attention(q, cache))
    # Several queries ask one cache, which is not copied.
    lone = KVCache(cache.k[1], cache.v[1], cache.length[1])
    asked = jax.jit(jax.vmap(lambda x: decode_attention(x, lone)))
    text = asked.lower(normal(7, 2, 4, 16)).as_text()
    assert "tensor<7x200x2x16xf32>" not in text
    close(asked(normal(7, 2, 4, 16))[3], decode_attention(normal(7, 2, 4, 16)[3], lone))
    appended = jax.vmap(append_to_cache)(stacked, normal(2, 2, 1, 2, 16), normal(2, 2, 1, 2, 24))
    np.testing.assert_array_equal(appended.length, stacked.length + 1)


def test_shared_arrays_on_a_tpu():
    """After a vmap some arrays have the batch and some do not: each is read at its own place."""
    q, cache = inputs([70, 200])
    for c in (cache, in_pages(cache, 16)):
        settings, operands, _ = api.prepare(q, c)
        shared = c is not cache
        k = jnp.concatenate([operands.k, operands.k + 1]) if shared else operands.k
        mixed = operands._replace(k=k, v=operands.v if shared else operands.v[:1])
        if not shared:
            mixed = mixed._replace(v=jnp.nan_to_num(mixed.v))
        got = tpu.forward(settings, mixed, interpret=interpreters.tpu_parameters())
        for g, w in zip(got, reference.forward(settings, mixed), strict=True):
            close(g, w)


@pytest.mark.parametrize("page", [None, 16])
def test_gradients_reach_scales_and_sinks(page):
    q, cache, _ = rounded([0, 77, 256], page=page)
    sinks = normal(4)

    def scalar(q, k_scale, v_scale, sinks, implementation):
        own = cache._replace(k_scale=k_scale, v_scale=v_scale)
        o, lse = decode_attention(q, own, sinks=sinks, return_lse=True, implementation=implementation)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(lse))

    at = (q, cache.k_scale, cache.v_scale, sinks)
    got, want = (jax.grad(scalar, (0, 1, 2, 3))(*at, name) for name in ("xla", "reference"))
    for g, w in zip(got, want, strict=True):
        close(g, w, condition=10)
        assert np.any(g != 0)


def test_gradients_through_a_stream(x64):
    q, k, v = (normal(1, 6, 2, 4, seed=s, dtype="float64") for s in range(3))

    def streamed(q, k, v):
        def step(cache, token):
            cache = append_to_cache(cache, *(x[None, None] for x in token[1:]))
            return cache, decode_attention(token[0][None, None], cache)[0, 0]

        return jax.lax.scan(step, init_cache(1, 6, 2, 4, dtype="float64"), (q[0], k[0], v[0]))[1]

    scalar = lambda f: lambda *a: jnp.sum(jnp.sin(f(*a)))  # noqa: E731
    got = jax.grad(scalar(streamed), (0, 1, 2))(q, k, v)
    want = jax.grad(scalar(lambda *a: attention(*a, causal=True)), (0, 1, 2))(q, k, v)
    for g, w in zip(got, want, strict=True):
        close(g, w, "float64", condition=10)


def test_a_new_length_compiles_nothing():
    q, cache = inputs([5, 77])
    longer = cache._replace(length=cache.length + 1)
    decode_attention(q, cache)
    with count_compiles() as compiled:
        decode_attention(q, longer)
    assert compiled() == 0


def test_shard_map_over_rows_and_heads():
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("rows", None, "heads")
    q, cache = inputs([5, 77, 0, 200])
    cache = cache._replace(k=jnp.nan_to_num(cache.k), v=jnp.nan_to_num(cache.v))
    specs = KVCache(spec, spec, jax.sharding.PartitionSpec("rows"), None, None)
    mapped = jax.shard_map(decode_attention, mesh=mesh, in_specs=(spec, specs), out_specs=spec)
    close(jax.jit(mapped)(q, cache), decode_attention(q, cache))
    scalar = lambda f: lambda q, k: jnp.sum(jnp.sin(f(q, cache._replace(k=k))))  # noqa: E731
    got = jax.jit(jax.grad(scalar(mapped), (0, 1)))(q, cache.k)
    for g, w in zip(got, jax.grad(scalar(decode_attention), (0, 1))(q, cache.k), strict=True):
        close(g, w, condition=10)


def test_explicit_sharding_is_refused_in_one_sentence():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i"))
    q, cache = inputs([5, 77])
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match="decode_attention: explicitly sharded arrays .*shard_map"),
    ):
        decode_attention(jax.device_put(q, sharding), jax.device_put(cache, sharding))


# --- Cost. ------------------------------------------------------------------------------------------------------------


def test_a_cpu_reads_no_more_than_the_length():
    """The loop ends with the row: what lies behind it may be NaN even where a mask could not have saved the result."""
    q, cache = inputs([64], S=4096, T=1)
    text = jax.jit(decode_attention).lower(q, cache).compile().as_text()
    # Nothing as long as the capacity is computed: only the cache itself has that size.
    made = [line for line in text.splitlines() if "= f32[" in line and "4096" in line.split(" = ")[1].split(" ")[0]]
    assert [line for line in made if "parameter" not in line and "get-tuple-element" not in line] == []


@pytest.mark.parametrize(
    ("page", "window", "splits"), [(None, None, 1), (None, (40, 0), 2), (16, None, 1), (16, (99, 0), 2)]
)
def test_a_tpu_fetches_live_blocks_only(page, window, splits):
    """Walk the grid: a tile is fetched when its place changes, which happens once for each live tile."""
    lengths = [7, 0, 190, 0, 33]
    q, cache = inputs(lengths)
    given = in_pages(cache, page) if page else cache
    settings, operands, _ = api.prepare(q, given, window=window)
    tiles = Tiles(page, 3, 3 * page * 2) if page else Tiles(32, 1, 64)
    low, stop = (np.asarray(x) for x in config.reach(settings, operands))
    scalars = {name: np.asarray(x) for name, x in tpu._scalars(settings, operands, tiles).items()}
    _, specs = tpu._cached(operands, "k", tiles, splits)
    steps = -(-scalars["count"].max() // splits)
    for n, spec in enumerate(specs):
        places = [
            tuple(int(x) for x in spec.index_map(b, i, j, *scalars.values()))
            for b in range(len(lengths))
            for i in range(splits)
            for j in range(steps)
        ]
        fetched = 1 + sum(a != b for a, b in zip(places, places[1:], strict=False))
        live = [
            tile
            for b in range(len(lengths))
            for tile in range(-(-200 // tiles.keys))
            if tile % tiles.many == n and tile * tiles.keys < stop[b] and (tile + 1) * tiles.keys > low[b]
        ]
        # A page of a row too short for all places of a step is fetched although nothing of it is seen.
        spare = sum(stop > low) if page else 0
        assert len(live) <= fetched <= len(live) + spare
    assert isinstance(specs[0], pl.BlockSpec)


# (rows, queries, query heads, key heads, page, int8)
IN_PLACE = [(8, 1, 32, 8, None, False), (2, 4, 8, 1, None, False), (8, 1, 32, 8, 128, True), (4, 1, 16, 2, 16, False)]


@pytest.mark.aot
@pytest.mark.parametrize("topology", interpreters.TOPOLOGIES)
@pytest.mark.parametrize(("B", "T", "H", "K", "page", "small"), IN_PLACE)
def test_a_tpu_reads_the_cache_in_place(topology, B, T, H, K, page, small):
    """With lengths that only the running program knows, and no copy of the cache in that program."""
    lead = (B * 4096 // page, page) if page else (B, 4096)
    dtype = jnp.int8 if small else jnp.bfloat16
    specs = [((B, T, H, 128), jnp.bfloat16), *[((*lead, K, 128), dtype)] * 2, ((B,), jnp.int32)]
    specs += [((B, 4096 // page), jnp.int32)] if page else []
    specs += [((*lead, K), jnp.float32)] * 2 if small else []

    def run(q, k, v, length, *rest):
        scales = rest[-2:] if small else (None, None)
        cache = PagedKVCache(k, v, rest[0], length, *scales) if page else KVCache(k, v, length, *scales)
        return decode_attention(q, cache, return_lse=True)

    compiled = interpreters.compile_for_tpu(run, topology, specs)
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**20
    assert f"[{','.join(map(str, (*lead, K, 128)))}]" + "{" not in "".join(
        line for line in compiled.as_text().splitlines() if " copy(" in line or " reshape(" in line
    )


# --- What is refused. -------------------------------------------------------------------------------------------------

Q, CACHE = inputs([5, 77])
PAGES = in_pages(CACHE, 16)
INT8 = init_cache(2, 200, 2, 16, dtype=jnp.int8)
BAD = [
    (lambda: decode_attention(Q, (CACHE.k, CACHE.v)), TypeError,
     r"decode_attention: `cache` must be a KVCache or a PagedKVCache; got tuple"),
    (lambda: decode_attention(Q[:, :, :3], CACHE), ValueError,
     r"decode_attention: `cache.k` must have a number of heads that divides those of `q`, 3; got 2. Query heads"),
    (lambda: decode_attention(Q[..., :8], CACHE), ValueError,
     r"decode_attention: `q` must have shape \(2, T, Hq, 16\); got \(2, 2, 4, 8\). The layout is"),
    (lambda: decode_attention(Q[:1], PAGES), ValueError,
     r"decode_attention: `q` must have shape \(2, T, Hq, 16\); got \(1, 2, 4, 16\)"),
    (lambda: decode_attention(Q.astype(int), CACHE), TypeError,
     r"decode_attention: `q` must have one of the dtypes float32, .*; got int32"),
    (lambda: decode_attention(Q.astype("bfloat16"), CACHE), TypeError,
     r"decode_attention: `cache.k` must have dtype bfloat16 to match `q`; got float32. Cast them"),
    (lambda: decode_attention(Q, CACHE._replace(v=CACHE.v[:, :9])), ValueError,
     r"decode_attention: `cache.v` must have shape \(2, 200, 2, Dv\) to match `cache.k`"),
    (lambda: decode_attention(Q, CACHE._replace(length=CACHE.length[:1])), ValueError,
     r"decode_attention: `cache.length` must have shape \(2,\) to match `cache.k`"),
    (lambda: decode_attention(Q, CACHE._replace(length=jnp.ones(2))), TypeError,
     r"decode_attention: `cache.length` must have an integer dtype; got float32"),
    (lambda: decode_attention(Q, PAGES._replace(block_table=PAGES.block_table[0])), ValueError,
     r"decode_attention: `cache.length` must have shape \(\) to match `cache.block_table`"),
    (lambda: decode_attention(Q, PAGES._replace(block_table=jnp.ones((2, 13)))), TypeError,
     r"decode_attention: `cache.block_table` must have an integer dtype; got float32"),
    (lambda: decode_attention(Q, INT8._replace(k_scale=None)), ValueError,
     r"decode_attention: `cache.k_scale` must be given beside int8; got None. `init_cache` makes them"),
    (lambda: decode_attention(Q, INT8._replace(k_scale=INT8.k_scale[..., 0])), ValueError,
     r"decode_attention: `cache.k_scale` must have shape \(2, 200, 2\) to match"),
    (lambda: decode_attention(Q, CACHE, window=(-1, 0)), ValueError,
     r"decode_attention: `window` must be a pair \(left, right\) of ints >= 0 or None; got \(-1, 0\)"),
    (lambda: decode_attention(Q, CACHE, window=7), ValueError, r"decode_attention: `window` must be a pair .*; got 7"),
    (lambda: decode_attention(Q, CACHE, soft_cap=-1.0), ValueError,
     r"decode_attention: `soft_cap` must be a positive Python number; got -1.0"),
    (lambda: decode_attention(Q, CACHE, scale=np.inf), ValueError,
     r"decode_attention: `scale` must be a finite Python number; got inf. Multiply a traced"),
    (lambda: decode_attention(Q, CACHE, sinks=jnp.ones(3)), ValueError,
     r"decode_attention: `sinks` must have shape \(4,\) to match `q`"),
    (lambda: decode_attention(Q, CACHE, sinks=jnp.ones(4, int)), TypeError,
     r"decode_attention: `sinks` must have a floating-point dtype; got int32"),
    (lambda: decode_attention(Q, CACHE, num_splits=0), ValueError,
     r"decode_attention: `num_splits` must be a whole number >= 1; got 0"),
    (lambda: decode_attention(Q, CACHE, implementation="fast"), ValueError,
     r"decode_attention: `implementation` must be one of None, 'reference', 'xla', 'tpu', 'gpu'; got 'fast'"),
    (lambda: init_cache(0, 8, 2, 4), ValueError, r"init_cache: `batch` must be a whole number >= 1; got 0"),
    (lambda: init_cache(1, 8, 2, 4, v_dim=0), ValueError, r"init_cache: `v_dim` must be a whole number >= 1; got 0"),
    (lambda: init_cache(1, 8, 2, 4, dtype=jnp.int16), TypeError,
     r"init_cache: `dtype` must be a floating-point dtype or int8; got int16"),
    (lambda: init_paged_cache(jnp.array([[4]]), 4, 8, 2, 4), ValueError,
     r"init_paged_cache: `block_table` must name pages in 0..3; got \(4, 4\)"),
    (lambda: init_paged_cache(jnp.ones((1, 1)), 4, 8, 2, 4), TypeError,
     r"init_paged_cache: `block_table` must have an integer dtype; got float32"),
    (lambda: init_paged_cache(jnp.array(1), 4, 8, 2, 4), ValueError,
     r"init_paged_cache: `block_table` must have shape \(\*B, N\); got \(\). One line"),
    (lambda: append_to_cache(CACHE, normal(2, 1, 2, 8), normal(2, 1, 2, 24)), ValueError,
     r"append_to_cache: `k` must have shape \(2, T, 2, 16\); got \(2, 1, 2, 8\). The layout is"),
    (lambda: append_to_cache(CACHE, normal(2, 1, 2, 16), normal(2, 2, 2, 24)), ValueError,
     r"append_to_cache: `v` must have shape \(2, 1, 2, 24\) to match `k`"),
    (lambda: append_to_cache(CACHE, normal(2, 1, 2, 16, dtype="bfloat16"), normal(2, 1, 2, 24)), TypeError,
     r"append_to_cache: `k` must have dtype float32 to match `cache.k`; got bfloat16. Cast"),
    (lambda: append_to_cache(INT8, jnp.ones((2, 1, 2, 16), int), normal(2, 1, 2, 16)), TypeError,
     r"append_to_cache: `k` must have a floating-point dtype; got int32. They are rounded"),
    (lambda: append_to_cache(CACHE, normal(2, 1, 2, 16), normal(2, 1, 2, 24), count=jnp.ones(2)), TypeError,
     r"append_to_cache: `count` must have an integer dtype; got float32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "sentence"), BAD, ids=range(len(BAD)))
def test_bad_arguments_each_with_its_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float16"}, "TPUs have no float16; cast to float32 or bfloat16"),
        ({"page": 3}, "a page must hold a multiple of 8 keys times heads of float32"),
        ({"heads": 2048}, "a step would hold .* bytes of keys and values"),
        ({"table": 2**17}, "its block table would have more than 65536 entries; use larger pages"),
        ({"int8": 200}, "scales need a capacity or pages of a multiple of 128 tokens"),
        ({"int8": 256, "heads": 3}, "scales need a number of key heads that divides 128"),
    ],
)
def test_what_a_tpu_cannot_do_falls_back_and_says_why_when_named(change, reason):
    K, S = change.get("heads", 2), change.get("int8", 64)
    dtype = jnp.int8 if "int8" in change else change.get("dtype", "float32")
    cache = jax.eval_shape(lambda: init_cache(2, S, K, 16, dtype=dtype))
    if "page" in change or "table" in change:
        table = jnp.zeros((2, change.get("table", 16)), jnp.int32)
        cache = jax.eval_shape(lambda: init_paged_cache(table, 16, change.get("page", 8), K, 16, dtype=dtype))
    q = jax.ShapeDtypeStruct((2, 1, K, 16), change.get("dtype", "float32"))
    with pytest.raises(
        NotImplementedError, match=f"decode_attention: implementation 'tpu' cannot do this call: {reason}"
    ):
        jax.eval_shape(lambda q, c: decode_attention(q, c, implementation="tpu"), q, cache)
    exported = jax.export.export(jax.jit(lambda q, c: decode_attention(q, c)), platforms=("tpu",))(q, cache)
    assert "tpu_custom_call" not in exported.mlir_module()


@IMPLEMENTATIONS
def test_nothing_to_attend_to(implementation):
    q = normal(2, 1, 4, 16)
    empty = KVCache(jnp.zeros((2, 0, 2, 16)), jnp.zeros((2, 0, 2, 24)), jnp.zeros(2, int))
    o, lse = decode_attention(q, empty, return_lse=True, implementation=implementation)
    np.testing.assert_array_equal(o, jnp.zeros((2, 1, 4, 24)))
    np.testing.assert_array_equal(lse, -np.inf)
    sinks = jnp.arange(4.0)
    for cache in (empty, init_cache(2, 8, 2, 16, v_dim=24)):
        o, lse = decode_attention(q, cache, sinks=sinks, return_lse=True, implementation=implementation)
        np.testing.assert_array_equal(o, 0)
        np.testing.assert_array_equal(lse[:, :, 0], [sinks] * 2)
    assert decode_attention(q[:, :0], empty, implementation=implementation).shape == (2, 0, 4, 24)
