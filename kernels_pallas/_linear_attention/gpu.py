"""Linear attention forward on Hopper GPUs: a Pallas Mosaic GPU kernel.

A thread block, one warpgroup, owns 64 value columns of one head and walks over chunks of 64 tokens with the state
[K, 64] in float32 in its registers. Chunks come into a ring in shared memory ahead of their turn. What decays and
segments do within a chunk comes in as four numbers a token, made outside: see `decay_rows`.

Notation, within a chunk: D_ij = exp(G_i - G_j) for j <= i of one segment, else 0; S the state before the chunk.
o_i = read_i S^T q_i + sum_j D_ij (q_i . k_j) v_j, and S' = read_C S + sum_j write_j k_j v_j^T.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat, recurrence
from kernels_pallas._linear_attention.config import Config, Operands, gate

# Tokens a chunk, and columns of values a thread block: the rows and columns of a warpgroup's product.
CHUNK = 64
_COLUMNS = 64
# Wider keys leave a thread no registers beside the state.
_WIDEST = 128
_STAGES = 2
# What a token's row of `decay_rows` holds.
COARSE, REST, READ, WRITE = range(4)
# Between segments a decay has this exponent at most: exp(-127) is 0 in float32.
_APART = 128.0


def unsupported(config: Config, operands: Operands) -> str | None:
    """Why the kernel cannot do a call, or None."""
    q = operands.q
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"its tensor cores take float16 and bfloat16, not {q.dtype.name}"
    if not all(isinstance(size, int) for size in (*q.shape, *operands.v.shape)):
        return "its chunks need sizes that are known, not symbolic ones"
    if config.chunk not in (None, CHUNK):
        return f"its chunks have {CHUNK} tokens, not {config.chunk}"
    if gate(operands) == "channel":
        return "it takes no decay per key channel"
    if q.shape[3] > _WIDEST:
        return f"its registers hold states of at most {_WIDEST} key channels"
    return None


def forward(config: Config, operands: Operands, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, V] and final state [B, H, K, V].

    Args:
      config: static part of the call.
      operands: arrays of the call.
      interpret: an interpreter's parameters, for machines without a GPU.
    """
    with jax.enable_x64(False):
        q, k, v, state = padded(*operands[:4])
        rows = decay_rows(operands, q.shape[2])
        inputs = {"q": q, "k": k, "v": v, "state": state} | ({} if rows is None else {"rows": rows})
        o, final = scan(inputs, ("o", "final"), scale=config.scale, interpret=interpret)
    _, T, _, V = operands.v.shape
    return o[:, :T, :, :V], final[:, :, : operands.q.shape[3], :V]


def padded(q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays with tokens in multiples of 8 and channels of 64, as tiles in shared memory are.

    TMA itself fills up what is left of a chunk.
    """
    q, k, v = (_fill(_fill(x, 1, 8), 3, 64) for x in (q, k, v))
    return q, k, v, _fill(_fill(state, 2, 64), 3, 64)


def _fill(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x


def decay_rows(operands: Operands, heads: int) -> jax.Array | None:
    """What a chunk's tokens do to each other and to the state, float32 [B, H, N, 4, CHUNK]; None if all is 1.

    COARSE and REST: G, the running sum of log decays, as parts whose differences are right to rounding, of which the
      coarse one falls by _APART from segment to segment: exp(G_i - G_j) is 0 between segments.
    READ: the decay from the state before the chunk to the token, 0 in other segments. The last one is the state's.
    WRITE: the decay from the token to the end of the chunk, 0 in other segments than the last.
    """
    if operands.log_decay is None and operands.segments is None:
        return None
    B, T = operands.q.shape[:2]
    decay = operands.log_decay
    if decay is None:
        decay = jnp.zeros((B, 1, 1), jnp.float32)
    elif decay.ndim == 2:
        decay = decay[:, None, :]
    decay = in_chunks(recurrence.pad_tokens(jnp.broadcast_to(decay, (B, T, heads)), CHUNK))
    segments = segments_in_chunks(operands.segments)
    _, rest = recurrence.cumulative_decay(decay, -1, segments)
    # Multiples of 1/64 up to 64 x (1000 + 128): exact, however they are summed.
    coarse = jnp.cumsum(recurrence.split_decay(decay)[0], axis=-1)
    read = jnp.exp(coarse + rest)
    write = jnp.exp((coarse[..., -1:] - coarse) + (rest[..., -1:] - rest))
    if segments is not None:
        carried = jnp.pad(segments[..., :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))
        read = jnp.where(segments == carried, read, 0)
        write = jnp.where(segments == segments[..., -1:], write, 0)
        coarse = coarse - _APART * (segments - segments[..., :1]).astype(jnp.float32)
    return jnp.stack(jnp.broadcast_arrays(coarse, rest, read, write), axis=3)


def in_chunks(x: jax.Array) -> jax.Array:
    """[B, T, H] with T in whole chunks to [B, H, N, CHUNK]."""
    B, T, H = x.shape
    return jnp.moveaxis(x, 2, 1).reshape(B, H, T // CHUNK, CHUNK)


def segments_in_chunks(segments: jax.Array | None) -> jax.Array | None:
    """[B, T] to [B, 1, N, CHUNK]; what is added belongs to the last segment."""
    if segments is None:
        return None
    return in_chunks(recurrence.pad_tokens(segments[:, :, None], CHUNK, last=True))


# --- The walk over chunks. --------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What is static about a kernel."""

    names: tuple[str, ...]  # of its inputs
    outputs: tuple[str, ...]
    chunks: int
    scale: float  # of q . k
    reverse: bool  # from the last chunk to the first


def scan(
    inputs: dict[str, jax.Array],
    outputs: tuple[str, ...],
    *,
    scale: float,
    reverse: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Walk over the chunks with the state.

    Args:
      inputs: k [B, T, H, K], v [B, T, H, V], state [B, H, K, V], rows if anything decays, and q if o is wanted.
      outputs: which of "o" [B, T, H, V], "final" [B, H, K, V] and "states" [B, H, N, K, V] are wanted, in what order.
        The last are those before each chunk, in the dtype of the inputs.
      scale: of q . k.
      reverse: go from the last chunk to the first, where a token is added with scale READ instead of WRITE. This is how
        the cotangent of the state goes, with q and o's cotangent for k and v; "states" are then those after each chunk.
      interpret: an interpreter's parameters.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    k, v = inputs["k"], inputs["v"]
    (B, T, H, K), V = k.shape, v.shape[3]
    plan = _Plan(tuple(inputs), outputs, pl.cdiv(T, CHUNK), scale, reverse)
    shapes = {
        "o": jax.ShapeDtypeStruct((B, T, H, V), v.dtype),
        "final": jax.ShapeDtypeStruct((B, H, K, V), jnp.float32),
        "states": jax.ShapeDtypeStruct((B, H, plan.chunks, K, V), v.dtype),
    }
    return plgpu.kernel(
        partial(_kernel, plan),
        out_type=tuple(shapes[name] for name in outputs),
        scratch_types=(_scratch(plan, K, v.dtype),),
        grid=(V // _COLUMNS, H, B),
        grid_names=("column", "head", "batch"),
        kernel_name=f"linear_attention_{outputs[0]}",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )(*inputs.values())


class _Scratch(NamedTuple):
    """Shared memory: the ring, the tiles that products read, and barriers; None for what a call does without."""

    k_tiles: Any
    v_tiles: Any
    state_tile: Any
    full: Any
    q_tiles: Any = None
    p_tile: Any = None  # D times q . k; then o on its way out
    rows: Any = None


def tile(*shape: int, dtype: Any) -> Any:
    """A tile of shared memory that products and TMA read."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _scratch(plan: _Plan, K: int, dtype: Any) -> _Scratch:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    moving = [name for name in ("q", "k", "v", "rows") if name in plan.names]
    scratch = {
        "k_tiles": tile(_STAGES, CHUNK, K, dtype=dtype),
        "v_tiles": tile(_STAGES, CHUNK, _COLUMNS, dtype=dtype),
        "state_tile": tile(K, _COLUMNS, dtype=dtype),
        "full": plgpu.Barrier(num_arrivals=len(moving), num_barriers=_STAGES),
    }
    if "q" in plan.names:
        scratch["q_tiles"] = tile(_STAGES, CHUNK, K, dtype=dtype)
        scratch["p_tile"] = tile(CHUNK, CHUNK, dtype=dtype)
    if "rows" in plan.names:
        scratch["rows"] = plgpu.SMEM((_STAGES, 4, CHUNK), jnp.float32)
    return _Scratch(**scratch)


class _Place(NamedTuple):
    """Where a thread block is in the grid."""

    batch: Any
    head: Any
    columns: Any  # of the values


def _kernel(plan: _Plan, *refs: Any) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs = dict(zip(plan.names, refs, strict=False))
    *outs, scratch = refs[len(plan.names) :]
    outputs = dict(zip(plan.outputs, outs, strict=True))
    at = _Place(lax.axis_index("batch"), lax.axis_index("head"), pl.ds(lax.axis_index("column") * _COLUMNS, _COLUMNS))
    for n in range(min(_STAGES - 1, plan.chunks)):
        _send(plan, inputs, at, jnp.int32(n), scratch)
    start = inputs["state"].at[at.batch, at.head, :, at.columns]
    state = compat.gpu_load(start, layout=plgpu.Layout.WGMMA, optimized=False)
    step = partial(_step, plan, inputs, at, outputs, scratch)
    state = lax.fori_loop(jnp.int32(0), jnp.int32(plan.chunks), step, state)
    if "final" in outputs:
        outputs["final"].at[at.batch, at.head, :, at.columns][...] = state
    plgpu.wait_smem_to_gmem(0)


def _chunk(plan: _Plan, n: Any) -> Any:
    """Which chunk comes n-th."""
    return plan.chunks - 1 - n if plan.reverse else n


def _slot(n: Any) -> Any:
    return lax.rem(n, jnp.int32(_STAGES))


def _send(plan: _Plan, inputs: dict[str, Any], at: _Place, n: Any, scratch: _Scratch) -> None:
    """Start the copies of the n-th chunk into its slot of the ring."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    slot, chunk = _slot(n), _chunk(plan, n)
    span = at.batch, pl.ds(chunk * CHUNK, CHUNK), at.head
    full = scratch.full.at[slot]
    plgpu.copy_gmem_to_smem(inputs["k"].at[span], scratch.k_tiles.at[slot], full)
    plgpu.copy_gmem_to_smem(inputs["v"].at[(*span, at.columns)], scratch.v_tiles.at[slot], full)
    if "q" in inputs:
        plgpu.copy_gmem_to_smem(inputs["q"].at[span], scratch.q_tiles.at[slot], full)
    if "rows" in inputs:
        plgpu.copy_gmem_to_smem(inputs["rows"].at[at.batch, at.head, chunk], scratch.rows.at[slot], full)


def _step(
    plan: _Plan,
    inputs: dict[str, Any],
    at: _Place,
    outputs: dict[str, Any],
    scratch: _Scratch,
    n: Any,
    state: jax.Array,
) -> jax.Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    slot, chunk = _slot(n), _chunk(plan, n)
    k, v, held = scratch.k_tiles.at[slot], scratch.v_tiles.at[slot], scratch.state_tile
    rows = None if scratch.rows is None else scratch.rows.at[slot]
    # What the step before left in shared memory is on its way out.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if plan.outputs != ("final",):
        held[...] = state.astype(held.dtype)
    # Behind this every warp is done with the step before, whose slot of the ring is then free.
    plgpu.commit_smem()
    pl.when(n + (_STAGES - 1) < plan.chunks)(lambda: _send(plan, inputs, at, n + (_STAGES - 1), scratch))
    if "states" in outputs:
        plgpu.copy_smem_to_gmem(held, outputs["states"].at[at.batch, at.head, chunk, :, at.columns])
    plgpu.barrier_wait(scratch.full.at[slot])
    if "o" in outputs:
        scratch.p_tile[...] = _read(plan, rows, slot, v, scratch).astype(v.dtype)
    if rows is not None:
        weight = line(rows, READ if plan.reverse else WRITE, 0, (CHUNK, _COLUMNS))
        v[...] = (compat.gpu_load(v, layout=plgpu.Layout.WGMMA).astype(jnp.float32) * weight).astype(v.dtype)
    plgpu.commit_smem()
    if "o" in outputs:
        span = pl.ds(chunk * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(scratch.p_tile, outputs["o"].at[at.batch, span, at.head, at.columns])
    added = product(k.transpose((1, 0)), v)
    if plan.reverse:
        added = added * plan.scale
    return added + (state if rows is None else state * rows[READ, CHUNK - 1])


def _read(plan: _Plan, rows: Any, slot: Any, v: Any, scratch: _Scratch) -> jax.Array:
    """o of a chunk [CHUNK, columns], in float32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, p = scratch.q_tiles.at[slot], scratch.p_tile

    def early(s: Any, o: Any) -> jax.Array:
        plgpu.wgmma(s, q, scratch.k_tiles.at[slot].transpose((1, 0)))
        plgpu.wgmma(o, q, scratch.state_tile)
        s = plgpu.wgmma_accumulator_load(s, wait_n=1)
        p[...] = (s * (decays(rows, 0) * plan.scale)).astype(p.dtype)
        return o[...]

    o = pl.run_scoped(early, *(plgpu.ACC((CHUNK, size), jnp.float32) for size in (CHUNK, _COLUMNS)))
    plgpu.commit_smem()
    o = o * (plan.scale if rows is None else plan.scale * line(rows, READ, 0, o.shape))
    return o + product(p, v)


# --- What the backward pass shares. -----------------------------------------------------------------------------------


def product(a: Any, b: Any) -> jax.Array:
    """a b, of tiles in shared memory, in float32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def line(rows: Any, which: int, axis: int, shape: tuple[int, int]) -> jax.Array:
    """One line of a chunk's rows, along `axis` of a tile."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x = compat.gpu_load(rows.at[which], layout=plgpu.Layout.WGMMA.reduce(1 - axis))
    return lax.broadcast_in_dim(x, shape, (axis,))


def decays(rows: Any, axis: int) -> jax.Array:
    """D of a chunk, float32; its readers i run along `axis`, the tokens j along the other."""
    seen = later(axis, itself=True)
    if rows is None:
        return jnp.where(seen, 1.0, 0.0)
    shape = (CHUNK, CHUNK)
    coarse, rest = (line(rows, part, axis, shape) - line(rows, part, 1 - axis, shape) for part in (COARSE, REST))
    return jnp.exp(jnp.where(seen, coarse + rest, -jnp.inf))


def later(axis: int, *, itself: bool = False) -> jax.Array:
    """Which tokens of a chunk, along `axis`, come after which others, along the other axis."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape, layout = (CHUNK, CHUNK), plgpu.Layout.WGMMA
    i, j = (plgpu.broadcasted_iota(jnp.int32, shape, at, layout=layout) for at in (axis, 1 - axis))
    return i >= j if itself else i > j
