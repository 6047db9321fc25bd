"""The dropout of attention: one mask whatever the blocks and the implementation, and derivatives through it."""

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import BlockSizes, attention
from kernels_pallas._attention import dropout
from tests.tolerances import tolerance


def test_hash_is_that_of_jax():
    rng = np.random.default_rng(0)
    key, count = (rng.integers(0, 2**32, n, np.uint32) for n in (2, 64))
    want = jax.extend.random.threefry_2x32(key, count)
    words = [jnp.asarray(x.view(np.int32)) for x in (key, count[:32], count[32:])]
    got = dropout.hash_of(words[0][0], words[0][1], words[1], words[2])
    np.testing.assert_array_equal(np.concatenate(got).view(np.uint32), want)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(("row", "column", "shape", "aligned"), [
    (0, 0, (5, 128), True), (7, 512, (9, 1024), True), (130, 1024, (3, 640), True),
    (3, 128, (4, 128), False), (0, 384, (8, 512), False), (1, 1920, (2, 256), False),
])  # fmt: skip
def test_tiles_are_cut_from_one_mask(row, column, shape, aligned, x64):
    with jax.enable_x64(x64):
        keys = dropout.keys_of(jnp.array([5, 2**31 + 3], jnp.uint32), 2, 3)
        whole = dropout.dense(keys, 140, 2200, dropout.threshold(0.3))
        run = lambda k, r, c: dropout.tile(k[0], k[1], r, c, shape, dropout.threshold(0.3), aligned=aligned)  # noqa: E731
        want = whole[1, 2, row : row + shape[0], column : column + shape[1]]
        np.testing.assert_array_equal(jax.jit(run)(keys[1, 2], row, column), want)
        np.testing.assert_array_equal(run(keys[1, 2], row, column), want)


def test_rate_is_that_asked_for_and_heads_differ():
    keys = dropout.keys_of(jnp.array([0, 9], jnp.uint32), 2, 2)
    for rate in (0.1, 0.5, 0.75):
        kept = np.asarray(dropout.dense(keys, 300, 700, dropout.threshold(rate)))
        deviation = np.sqrt(rate * (1 - rate) / kept[0, 0].size)
        assert np.all(np.abs(kept.mean((2, 3)) - (1 - rate)) <= 5 * deviation)
        # Neighbours along every axis are independent: they agree as often as chance says.
        agree = rate**2 + (1 - rate) ** 2
        for axis in range(4):
            a, b = (np.take(kept, range(s, kept.shape[axis] - 1 + s), axis) for s in (0, 1))
            assert abs((a == b).mean() - agree) <= 5 * np.sqrt(agree * (1 - agree) / a.size)


def test_threshold_and_gain_leave_the_mean():
    assert dropout.threshold(0.0) == 0
    assert dropout.threshold(0.99999999) == 65535
    for rate in (0.1, 0.3, 0.9):
        steps = dropout.threshold(rate)
        assert dropout.gain(steps) * (1 - steps / 65536) == pytest.approx(1, abs=1e-15)
        assert abs(steps / 65536 - rate) <= 2**-17


def inputs(seed=0, T=150, S=700):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s), "float32") for s in ((2, T, 4, 16), (2, S, 2, 16), (2, S, 2, 16)))


@pytest.mark.parametrize("blocks", [BlockSizes(128, 128, 128), BlockSizes(128, 512, 256), BlockSizes(256, 512, 512)])
def test_blocks_do_not_matter(blocks):
    arrays = inputs()
    flags = {"dropout_rate": 0.4, "dropout_seed": 3, "return_lse": True}
    got = attention(*arrays, implementation="xla", block_sizes=blocks, **flags)
    want = attention(*arrays, implementation="reference", **flags)
    for g, w in zip(got, want, strict=True):
        assert float(jnp.max(jnp.abs(g - w))) <= tolerance("float32", 700, condition=4)


def test_lse_is_untouched_and_the_mean_over_seeds_is_attention():
    q, k, v = inputs(T=20, S=30)
    whole, lse = attention(q, k, v, return_lse=True)
    run = jax.jit(lambda s: attention(q, k, v, dropout_rate=0.5, dropout_seed=s, return_lse=True))
    draws = [run(np.uint32(s)) for s in range(400)]
    for _, one in draws:
        np.testing.assert_array_equal(one, lse)
    o = np.stack([o for o, _ in draws])
    assert np.abs(o.mean(0) - whole).max() <= 6 * o.std(0).max() / np.sqrt(len(draws))


def test_seeds():
    arrays = inputs(T=20, S=30)
    run = lambda s: attention(*arrays, dropout_rate=0.5, dropout_seed=s)  # noqa: E731
    np.testing.assert_array_equal(run(7), run(np.int32(7)))
    np.testing.assert_array_equal(run(7), jax.jit(run)(jnp.uint32(7)))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(run(7), jax.jit(run)(7))
    assert not np.array_equal(run(7), run(8))
    key = jax.random.key(1)
    np.testing.assert_array_equal(run(key), jax.jit(run)(key))
    lanes = jax.vmap(run)(jax.random.split(key, 3))
    for lane, one in zip(lanes, jax.random.split(key, 3), strict=True):
        np.testing.assert_allclose(lane, run(one), rtol=0, atol=tolerance("float32", 30, condition=4))


def test_without_a_rate_a_seed_does_nothing():
    arrays = inputs(T=20, S=30)
    np.testing.assert_array_equal(attention(*arrays, dropout_seed=1), attention(*arrays))
