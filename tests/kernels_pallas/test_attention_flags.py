"""Every flag of attention, alone and in pairs, against the float64 reference: outputs and every gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels_pallas import BlockSizes, attention
from tests.tolerances import tolerance

BLOCKS = BlockSizes(128, 128, 128)
LENGTHS = (1, 7, 128, 200, 257)
# All with one batch of one key head and two query heads, so that the pairs differ in nothing but their flags.
H, K, D, V = 2, 1, 8, 12


def arrays(T, S, rng, dtype="float64"):
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in ((1, T, H, D), (1, S, K, D), (1, S, K, V)))


def segments(n, rng):
    """Documents of random lengths with padding at the end."""
    ids = np.sort(rng.integers(0, 4, n))
    ids[n - n // 8 :] = -1
    return jnp.asarray(ids[None], jnp.int32)


FLAGS = {
    "causal": lambda T, S, rng: {"causal": True},
    "window": lambda T, S, rng: {"window": (T // 3 + 1, S // 5)},
    "segments": lambda T, S, rng: {"segment_ids": (segments(T, rng), segments(S, rng))},
    "positions": lambda T, S, rng: {"kv_positions": jnp.asarray(rng.permutation(S), jnp.int32)},
    "offset": lambda T, S, rng: {"q_offset": S // 2},
    "mask": lambda T, S, rng: {"mask": jnp.asarray(rng.random((1, 1, T, S)) < 0.4)},
    "bias": lambda T, S, rng: {"bias": jnp.asarray(rng.normal(size=(1, H, T, S)))},
    "soft cap": lambda T, S, rng: {"soft_cap": 1.2},
    "scale": lambda T, S, rng: {"scale": 0.7},
    "dropout": lambda T, S, rng: {"dropout_rate": 0.25, "dropout_seed": 11},
}
PAIRS = [*itertools.combinations(FLAGS, 2)]


def check(given, flags, dtype, implementation="xla"):
    """Outputs, and the gradients of q, k, v and a bias through both outputs, against the reference in float64."""
    flags = dict(flags)
    bias = flags.pop("bias", None)
    leaves = given if bias is None else (*given, bias.astype(dtype))

    def outputs(of, *leaves):
        q, k, v, *rest = leaves
        o, lse = attention(q, k, v, bias=rest[0] if rest else None, return_lse=True, implementation=of,
                           block_sizes=BLOCKS, **flags)  # fmt: skip
        return o, jnp.where(jnp.isfinite(lse), lse, -100.0)

    def loss(of, *leaves):
        o, lse = outputs(of, *leaves)
        return jnp.sum(jnp.sin(o.astype(lse.dtype))) + jnp.sum(jnp.cos(lse)), (o, lse)

    run = jax.value_and_grad(loss, tuple(range(1, 1 + len(leaves))), has_aux=True)
    (_, got), got_grads = jax.jit(run, static_argnums=0)(implementation, *leaves)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in leaves]
        (_, want), want_grads = jax.jit(run, static_argnums=0)("reference", *wide)
    T, S = given[0].shape[1], given[1].shape[1]
    for g, w in zip(got, want, strict=True):
        close(g, w, dtype, S, 1.0)
    for g, w in zip(got_grads, want_grads, strict=True):
        close(g, w, dtype, max(T, S), 4.0)


def close(got, want, dtype, size, condition):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.abs(got - want).max(initial=0.0) / max(1.0, np.abs(want).max(initial=0.0))
    assert error <= tolerance(dtype, size, condition=condition), error


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: " and ".join(p))
def test_pairs_of_flags(pair):
    rng = np.random.default_rng(PAIRS.index(pair))
    # Every length meets every other as the pairs go by.
    T = LENGTHS[PAIRS.index(pair) % 5]
    S = LENGTHS[PAIRS.index(pair) // 5 % 5]
    flags = {name: value for flag in pair for name, value in FLAGS[flag](T, S, rng).items()}
    check(arrays(T, S, rng, "float32"), flags, "float32")


# In 16 bits once, with the slow tests: pairs of flags are long as it is.
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("flag", FLAGS)
def test_single_flags_at_every_length(flag, dtype):
    rng = np.random.default_rng(0)
    for T in LENGTHS if dtype == "float32" else LENGTHS[-1:]:
        check(arrays(T, T, rng, dtype), FLAGS[flag](T, T, rng), dtype)


@pytest.mark.slow
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_set_of_flags_at_any_shape(data):
    T, S = data.draw(st.sampled_from(LENGTHS)), data.draw(st.sampled_from(LENGTHS))
    chosen = data.draw(st.sets(st.sampled_from(sorted(FLAGS)), max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    flags = {name: value for flag in sorted(chosen) for name, value in FLAGS[flag](T, S, rng).items()}
    check(arrays(T, S, rng, "float32"), flags, "float32")
