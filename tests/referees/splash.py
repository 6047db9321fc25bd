"""JAX's splash attention as a referee: the reference functions that it ships, and masks made of its mask classes.

Its own tests are not shipped. They try multi-query or grouped heads, with or without segments, with masks of known
classes or given as arrays; so do these. What they try of their kernel's own options (memory layouts, a fused backward
pass, a shrunken grid) has no counterpart in ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from kernels_pallas import BlockSizes, attention
from tests.referees.outcome import Outcome
from tests.tolerances import tolerance

# What a mask is made of: ("full",), ("causal", offset), ("local", left, right, offset), ("chunked", size),
# ("random", sparsity, seed), ("and", recipe, recipe), ("or", recipe, recipe).
Recipe = tuple


@dataclass(frozen=True)
class Sizes:
    """Lengths, heads and head dimension of a case."""

    T: int
    S: int
    heads: int
    k_heads: int
    dim: int


@dataclass(frozen=True)
class Case:
    """One case: what the masks are made of, one for all heads or one a head, and whether ours may be told by flags."""

    sizes: Sizes
    dtype: str
    recipes: tuple[Recipe, ...]
    dynamic: bool
    segments: tuple[tuple[int, ...], tuple[int, ...]] | None
    soft_cap: float | None
    through_lse: bool
    blocks: BlockSizes | None
    seed: int


# Every combination of what their tests are parametrised by: one key head, segments, masks given as arrays.
CELLS = {
    ", ".join(("one key head" if mqa else "grouped heads", "segments" if segmented else "no segments",
               "dense masks" if dynamic else "masks as flags")): (mqa, segmented, dynamic)
    for mqa, segmented, dynamic in itertools.product((False, True), repeat=3)
}  # fmt: skip
_GROUPS = ((1, 1), (2, 2), (8, 4), (6, 2))


def run(name: str, examples: int) -> Outcome:
    """Judge so many cases of one combination, with any sizes and numbers; always the same ones."""
    mqa, segmented, dynamic = CELLS[name]
    outcome = Outcome()
    lengths = st.sampled_from([130, 256, 384, 512])
    heads = st.just((4, 1)) if mqa else st.sampled_from(_GROUPS)
    sizes = st.builds(lambda T, S, h, dim: Sizes(T, S, *h, dim), lengths, lengths, heads, st.sampled_from([64, 128]))

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(sizes.flatmap(lambda s: cases(s, segmented=segmented, dynamic=dynamic, any_number=True)))
    def judge(case: Case) -> None:
        try:
            check(case)
        except AssertionError as complaint:
            outcome.failed[repr(case)] = str(complaint)
        else:
            outcome.passed.append(repr(case))

    judge()
    return outcome


# --- Strategies. ------------------------------------------------------------------------------------------------------


def recipes(T: int, S: int, edges: st.SearchStrategy, offsets: st.SearchStrategy) -> st.SearchStrategy[Recipe]:
    """Masks of every class, and conjunctions and disjunctions of two."""
    single = st.one_of(
        st.just(("full",)),
        st.tuples(st.just("causal"), offsets),
        st.tuples(st.just("local"), edges, edges, offsets),
        st.tuples(st.just("chunked"), st.integers(1, T)),
        st.tuples(st.just("random"), st.floats(0.0, 0.5), st.integers(0, 2**32 - 1)),
    )
    return st.one_of(single, st.tuples(st.sampled_from(["and", "or"]), single, single))


@st.composite
def cases(draw: Callable, sizes: Sizes, *, segmented: bool, dynamic: bool, any_number: bool = False) -> Case:
    """Cases at these sizes; with few static numbers, so that programs are shared, unless `any_number`."""
    T, S = sizes.T, sizes.S
    if any_number:
        edges = st.one_of(st.none(), st.integers(0, T))
        offsets = st.integers(-T, T - 1)
        caps = st.one_of(st.none(), st.floats(1.0, 50.0))
        blocks = st.sampled_from(
            [None, BlockSizes(128, 128, 128), BlockSizes(128, 256, 128), BlockSizes(256, 256, 256)]
        )
    else:
        edges = st.sampled_from([None, 0, T // 3])
        offsets = st.integers(-T, T - 1)
        caps = st.sampled_from([None, 5.0])
        blocks = st.just(BlockSizes(128, 128, 128))
    one = recipes(T, S, edges, offsets)
    cuts = lambda n: st.lists(st.integers(1, n - 1), min_size=1, max_size=4, unique=True).map(sorted).map(tuple)  # noqa: E731
    return Case(
        sizes=sizes,
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        recipes=draw(st.one_of(st.tuples(one), st.tuples(*[one] * sizes.heads))),
        dynamic=dynamic,
        segments=draw(st.tuples(cuts(T), cuts(S))) if segmented else None,
        soft_cap=draw(caps),
        through_lse=draw(st.booleans()),
        blocks=draw(blocks),
        seed=draw(st.integers(0, 4)),
    )  # fmt: skip


# --- What a case means, to them and to us. ----------------------------------------------------------------------------


def their_mask(recipe: Recipe, T: int, S: int) -> masks.Mask:
    """The mask as an object of theirs."""
    kind, *rest = recipe
    if kind in ("and", "or"):
        left, right = (their_mask(r, T, S) for r in rest)
        return left & right if kind == "and" else left | right
    if kind == "full":
        return masks.FullMask((T, S))
    if kind == "causal":
        return masks.CausalMask((T, S), offset=rest[0])
    if kind == "local":
        return masks.LocalMask((T, S), tuple(rest[:2]), offset=rest[2])
    if kind == "chunked":
        return masks.ChunkedCausalMask((T, S), rest[0])
    return masks.NumpyMask(masks.make_random_mask((T, S), *rest))


def our_flags(recipe: Recipe) -> dict[str, Any] | None:
    """The same mask in our flags; None where only an array can say it."""
    kind, *rest = recipe
    if kind == "full":
        return {}
    if kind == "causal":
        return {"causal": True, "q_offset": rest[0]}
    if kind == "local":
        return {"window": tuple(rest[:2]), "q_offset": rest[2]}
    if kind == "chunked":
        return {"causal": True, "chunk": rest[0]}
    if kind == "and":
        bands = [_band(r) for r in rest]
        if None in bands:
            return None
        low, high = max(b[0] for b in bands), min(b[1] for b in bands)
        if low > high:
            return None
        if high < np.inf:
            return {
                "causal": True,
                "window": (None if low == -np.inf else int(high - low), None),
                "q_offset": int(high),
            }
        return {} if low == -np.inf else {"window": (0, None), "q_offset": int(low)}
    return None


def _band(recipe: Recipe) -> tuple[float, float] | None:
    """Least and greatest distance of a visible key from its query, when the mask is no more than that."""
    kind, *rest = recipe
    if kind == "full":
        return -np.inf, np.inf
    if kind == "causal":
        return -np.inf, rest[0]
    if kind == "local":
        left, right, offset = rest
        return -np.inf if left is None else offset - left, np.inf if right is None else offset + right
    return None


def arrays(case: Case) -> tuple[jax.Array, ...]:
    """Queries, keys and values in our layout with one batch, and cotangents of o and lse."""
    rng = np.random.default_rng(case.seed)
    z = case.sizes
    shapes = (1, z.T, z.heads, z.dim), (1, z.S, z.k_heads, z.dim), (1, z.S, z.k_heads, z.dim), (1, z.T, z.heads, z.dim)
    # Their scores have no scale of their own: these have a standard deviation of 2.
    spread = (2 * z.dim**-0.5, 1.0, 1.0, 1.0)
    q, k, v, do = (jnp.asarray(s * rng.normal(size=n), case.dtype) for s, n in zip(spread, shapes, strict=True))
    dlse = rng.normal(size=(1, z.heads, z.T)) if case.through_lse else np.zeros((1, z.heads, z.T))
    return q, k, v, do, jnp.asarray(dlse, "float32")


def segment_ids(case: Case) -> tuple[np.ndarray, np.ndarray] | None:
    """Whose token is whose: ids that step up at the cuts."""
    if case.segments is None:
        return None
    lengths = case.sizes.T, case.sizes.S
    return tuple(
        np.searchsorted(c, np.arange(n), "right").astype(np.int32) for c, n in zip(case.segments, lengths, strict=True)
    )


def dense_mask(case: Case) -> np.ndarray:
    """What each head of theirs sees [heads, T, S], segments aside."""
    z = case.sizes
    all_heads = case.recipes * (z.heads // len(case.recipes))
    whole = slice(0, z.heads), slice(0, z.T), slice(0, z.S)
    return masks.MultiHeadMask(tuple(their_mask(r, z.T, z.S) for r in all_heads))[whole]


def our_arguments(case: Case) -> dict[str, Any]:
    """The masks and segments of a case as arguments of ours: flags where one mask of all heads is no more than that."""
    z, ids = case.sizes, segment_ids(case)
    flags = our_flags(case.recipes[0]) if len(case.recipes) == 1 and not case.dynamic else None
    if flags is None:
        seen = dense_mask(case)[: len(case.recipes)]
        flags = {"mask": jnp.asarray(seen[None])}
    flags = dict(flags)
    chunk = flags.pop("chunk", None)
    if chunk is not None:
        # A chunk is a segment; a chunk of a segment too.
        chunks = tuple(np.arange(n, dtype=np.int32) // chunk for n in (z.T, z.S))
        ids = chunks if ids is None else tuple(8 * c + i for c, i in zip(chunks, ids, strict=True))
    if ids is not None:
        flags["segment_ids"] = tuple(jnp.asarray(i[None]) for i in ids)
    return flags | {"soft_cap": case.soft_cap, "scale": 1.0, "block_sizes": case.blocks}


# --- The comparison. --------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="soft_cap")
def verdict(mask: Any, ids: Any, given: tuple, soft_cap: float | None) -> dict[str, tuple]:
    """Their output and log-sum-exp, and the gradients of all three of their backward passes, in our layout.

    Automatic differentiation goes through both outputs; their two rules know the first alone.
    """
    q, k, v, do, dlse = (x[0].astype(jnp.float32) for x in given)
    q, k, v, do = (jnp.swapaxes(x, 0, 1) for x in (q, k, v, do))
    segments = None if ids is None else splash.SegmentIds(*ids)

    def heads(reference: Callable, q: Any, k: Any, v: Any) -> Any:
        k, v = (jnp.repeat(x, q.shape[0] // k.shape[0], axis=0) for x in (k, v))
        one = lambda *a: reference(*a, segments, attn_logits_soft_cap=soft_cap)  # noqa: E731
        return jax.vmap(one)(mask, q, k, v)

    def both(*a: Any) -> tuple:
        o, (lse,) = heads(partial(splash.attention_reference, save_residuals=True), *a)
        return o, lse

    (o, lse), pull = jax.vjp(both, q, k, v)
    found = {"outputs": (jnp.swapaxes(o, 0, 1)[None], lse[None]), "autodiff": pull((do, dlse))}
    for rule in ("flash", "vanilla"):
        reference = partial(splash.attention_reference_custom, custom_type=rule)
        found[rule] = jax.vjp(partial(heads, reference), q, k, v)[1](do)
    for way in ("autodiff", "flash", "vanilla"):
        found[way] = tuple(jnp.swapaxes(g, 0, 1)[None] for g in found[way])
    return found


@partial(jax.jit, static_argnames=("causal", "window", "soft_cap", "scale", "block_sizes"))
def ours(given: tuple, **flags: Any) -> tuple[tuple, tuple]:
    """Outputs and gradients of the function under test."""
    q, k, v, *cotangents = given
    call = partial(attention, return_lse=True, implementation="xla", **flags)
    outputs, pull = jax.vjp(call, q, k, v)
    return outputs, pull(tuple(cotangents))


def sees(case: Case) -> np.ndarray:
    """Which rows see anything, [1, heads, T]."""
    seen, ids = dense_mask(case), segment_ids(case)
    if ids is not None:
        seen = seen & (ids[0][:, None] == ids[1][None, :])
    return seen.any(-1)[None]


def check(case: Case, run: Callable = ours, *, gradients: bool = True) -> None:
    """Hold a run of ours to every reference of theirs.

    What theirs makes of a row that sees nothing (a mean of v) has no meaning; ours must be 0 with lse = -inf, and such
    rows take no part in the gradients.
    """
    rows = sees(case)
    q, k, v, do, dlse = arrays(case)
    do = jnp.where(rows.swapaxes(1, 2)[..., None], do, 0)
    given = (q, k, v, do, jnp.where(rows, dlse, 0))
    outputs, grads = run(given, **our_arguments(case))
    want = verdict(dense_mask(case), segment_ids(case), given, case.soft_cap)
    o, lse = (np.asarray(x, np.float64) for x in outputs)
    assert outputs[0].dtype == case.dtype
    assert outputs[1].dtype == jnp.float32
    np.testing.assert_array_equal(lse[~rows], -np.inf)
    np.testing.assert_array_equal(o[~rows.swapaxes(1, 2)], 0)
    _close("o", o, np.where(rows.swapaxes(1, 2)[..., None], want["outputs"][0], 0), case.dtype, case)
    _close("lse", np.where(rows, lse, 0), np.where(rows, want["outputs"][1], 0), "float32", case)
    if not gradients:
        return
    for way in ("autodiff",) if case.through_lse else ("autodiff", "flash", "vanilla"):
        for name, g, w in zip("qkv", grads, want[way], strict=True):
            assert g.dtype == case.dtype
            _close(f"d{name} by {way}", g, w, case.dtype, case, 4.0)


def _close(what: str, got: Any, want: Any, dtype: str, case: Case, condition: float = 1.0) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.max(np.abs(got - want)) / max(1.0, np.max(np.abs(want)))
    limit = tolerance(dtype, max(case.sizes.T, case.sizes.S), condition=condition)
    assert error <= limit, f"{what}: relative error {error:.2e}, allowed {limit:.2e}"
