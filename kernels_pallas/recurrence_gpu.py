"""What the Hopper kernels of linear attention and the delta rule share: chunks, decays, and the walk over chunks.

On a walk a thread block, one warpgroup, owns 64 value columns of one head and takes chunks of 64 tokens one after the
other, with the state [K, 64] in float32 in its registers. Chunks come into a ring in shared memory ahead of their turn.
What decays and segments do within a chunk comes in as numbers of its tokens, made outside: see `decay_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import compat, recurrence

# Tokens a chunk, and columns of values a thread block: the rows and columns of a warpgroup's product.
CHUNK = 64
COLUMNS = 64
# Wider keys leave a thread no registers beside the state.
WIDEST = 128
_STAGES = 2
# What a token's rows hold; the last is the delta rule's.
COARSE, REST, READ, WRITE, BETA = range(5)
# Between segments a decay has this exponent at most: exp(-127) is 0 in float32.
_APART = 128.0


def unsupported(config: Any, operands: Any) -> str | None:
    """Why the kernels cannot do a call of linear attention or of the delta rule, or None."""
    q, decay = operands.q, operands.log_decay
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"its tensor cores take float16 and bfloat16, not {q.dtype.name}"
    if not all(isinstance(size, int) for size in (*q.shape, *operands.v.shape)):
        return "its chunks need sizes that are known, not symbolic ones"
    if config.chunk not in (None, CHUNK):
        return f"its chunks have {CHUNK} tokens, not {config.chunk}"
    if decay is not None and decay.ndim == 4:
        return "it takes no decay per key channel"
    if q.shape[3] > WIDEST:
        return f"its registers hold states of at most {WIDEST} key channels"
    return None


# --- Outside of the kernels. ------------------------------------------------------------------------------------------


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


def decay_rows(log_decay: jax.Array | None, segments: jax.Array | None, shape: tuple[int, int, int]) -> jax.Array:
    """What a chunk's tokens do to each other and to the state, float32 [B, H, N, 4, CHUNK].

    COARSE and REST: G, the running sum of log decays, as parts whose differences are right to rounding, of which the
      coarse one falls by _APART from segment to segment: exp(G_i - G_j) is 0 between segments.
    READ: the decay from the state before the chunk to the token, 0 in other segments. The last one is the state's.
    WRITE: the decay from the token to the end of the chunk, 0 in other segments than the last.

    Args:
      log_decay: None, [B, H] or [B, T, H].
      segments: None or int32 [B, T].
      shape: B, T, H.
    """
    if log_decay is None:
        log_decay = jnp.zeros((1, 1, 1), jnp.float32)
    elif log_decay.ndim == 2:
        log_decay = log_decay[:, None, :]
    decay = in_chunks(jnp.broadcast_to(log_decay, shape))
    segments = segments_in_chunks(segments)
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


def in_chunks(x: jax.Array, *, last: bool = False) -> jax.Array:
    """[B, T, H] to [B, H, N, CHUNK]; what is added is 0, or like the last token."""
    x = recurrence.pad_tokens(x, CHUNK, last=last)
    B, T, H = x.shape
    return jnp.moveaxis(x, 2, 1).reshape(B, H, T // CHUNK, CHUNK)


def segments_in_chunks(segments: jax.Array | None) -> jax.Array | None:
    """[B, T] to [B, 1, N, CHUNK]; what is added belongs to the last segment."""
    return None if segments is None else in_chunks(segments[:, :, None], last=True)


# --- The walk over chunks. --------------------------------------------------------------------------------------------


class Walk(NamedTuple):
    """What is static about a walk.

    Attributes:
      step: `step(chunk, state)`, the next state [K, COLUMNS] in float32.
      name: of the kernel.
      chunks: how many.
      moving: the inputs that come chunk by chunk: "q" and "k" [B, T, H, K], "v" [B, T, H, V], "r" [B, T, H, V],
        "rows" [B, H, N, lines, CHUNK], "inverse" [B, H, N, 2, CHUNK, CHUNK].
      outputs: of the kernel, in order. Those named "final" and "states" are the walk's own.
      reverse: from the last chunk to the first.
      scale: of q . k.
    """

    step: Callable[[Chunk, jax.Array], jax.Array]
    name: str
    chunks: int
    moving: tuple[str, ...]
    outputs: tuple[str, ...]
    reverse: bool
    scale: float


class Chunk(NamedTuple):
    """What a step sees.

    Attributes:
      walk: that it is a step of.
      tiles: what came of the moving inputs.
      own: scratch, "state" (rounded) among it and, where a step wants its rounding error, "state_low".
      send: `send(name, tile)` starts the copy of a tile to an output [B, T, H, V], which must be committed before.
      put: `put(name, x)` stores a number a token to an output [B, H, N, V / COLUMNS, CHUNK].
    """

    walk: Walk
    tiles: dict[str, Any]
    own: dict[str, Any]
    send: Callable[[str, Any], None]
    put: Callable[[str, jax.Array], None]

    @property
    def rows(self) -> Any:
        """Lines of numbers of the tokens, or None."""
        return self.tiles.get("rows")


def walk(plan: Walk, inputs: dict[str, jax.Array], own: dict[str, Any], interpret: Any) -> tuple[jax.Array, ...]:
    """Take the state over all chunks.

    Args:
      plan: of the walk.
      inputs: the moving ones, and "state" [B, H, K, V], where it starts.
      own: scratch of the step.
      interpret: an interpreter's parameters.

    Returns:
      The outputs: "final" [B, H, K, V], in float32; "states" [B, H, N, K, V], before each chunk; others as
      `Chunk.send` and `Chunk.put` say, of which the former are in the dtype of the inputs.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    v, (B, H, K, V) = inputs["v"], inputs["state"].shape
    # In place of a shape: what a step sends is like v.
    shapes = {
        "final": jax.ShapeDtypeStruct((B, H, K, V), jnp.float32),
        "states": jax.ShapeDtypeStruct((B, H, plan.chunks, K, V), v.dtype),
        "dbeta": jax.ShapeDtypeStruct((B, H, plan.chunks, V // COLUMNS, CHUNK), jnp.float32),
    }
    widths = {"q": K, "k": K, "v": COLUMNS, "r": COLUMNS}
    ring = {name: tile(_STAGES, CHUNK, widths[name], dtype=v.dtype) for name in plan.moving if name in widths}
    if "inverse" in plan.moving:
        ring["inverse"] = tile(_STAGES, 2, CHUNK, CHUNK, dtype=v.dtype)
    if "rows" in plan.moving:
        ring["rows"] = plgpu.SMEM((_STAGES, inputs["rows"].shape[3], CHUNK), jnp.float32)
    full = plgpu.Barrier(num_arrivals=len(plan.moving), num_barriers=_STAGES)
    return plgpu.kernel(
        partial(_kernel, plan, tuple(inputs)),
        out_type=tuple(shapes.get(name, jax.ShapeDtypeStruct(v.shape, v.dtype)) for name in plan.outputs),
        scratch_types=(_Scratch(ring, {"state": tile(1, K, COLUMNS, dtype=v.dtype), **own}, full),),
        grid=(V // COLUMNS, H, B),
        grid_names=("column", "head", "batch"),
        kernel_name=plan.name,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )(*inputs.values())


class _Scratch(NamedTuple):
    """Shared memory: the ring, the step's own, and a barrier a slot of the ring."""

    ring: dict[str, Any]
    own: dict[str, Any]
    full: Any


def _kernel(plan: Walk, names: tuple[str, ...], *refs: Any) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs = dict(zip(names, refs, strict=False))
    *outs, scratch = refs[len(names) :]
    outputs = dict(zip(plan.outputs, outs, strict=True))
    batch, head, column = (lax.axis_index(name) for name in ("batch", "head", "column"))
    columns = pl.ds(column * COLUMNS, COLUMNS)

    def source(name: str, chunk: Any) -> Any:
        """Where a chunk is in a moving input or an output."""
        ref = (inputs | outputs)[name]
        if name in ("rows", "inverse"):
            return ref.at[batch, head, chunk]
        span = batch, pl.ds(chunk * CHUNK, CHUNK), head
        return ref.at[span] if name in ("q", "k") else ref.at[(*span, columns)]

    def fetch(n: Any) -> None:
        """Start the copies of the n-th chunk into its slot of the ring."""
        slot, chunk = _slot(n), _place(plan, n)
        for name, tiles in scratch.ring.items():
            plgpu.copy_gmem_to_smem(source(name, chunk), tiles.at[slot], scratch.full.at[slot])

    def step(n: Any, state: jax.Array) -> jax.Array:
        slot, chunk = _slot(n), _place(plan, n)
        # An index that the compiler cannot know: it would keep addresses across steps in registers that the sums need.
        own = {name: ref.at[lax.optimization_barrier(jnp.int32(0))] for name, ref in scratch.own.items()}
        # What the step before left in shared memory is on its way out.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _hold(state, own)
        # Behind this every warp is done with the step before, whose slot of the ring is then free.
        plgpu.commit_smem()
        pl.when(n + (_STAGES - 1) < plan.chunks)(lambda: fetch(n + (_STAGES - 1)))
        if "states" in outputs:
            plgpu.copy_smem_to_gmem(own["state"], outputs["states"].at[batch, head, chunk, :, columns])
        plgpu.barrier_wait(scratch.full.at[slot])
        tiles = {name: ring.at[slot] for name, ring in scratch.ring.items()}

        def send(name: str, tile: Any) -> None:
            plgpu.copy_smem_to_gmem(tile, source(name, chunk))

        def put(name: str, x: jax.Array) -> None:
            outputs[name].at[batch, head, chunk, column][...] = x

        return plan.step(Chunk(plan, tiles, own, send, put), state)

    for n in range(min(_STAGES - 1, plan.chunks)):
        fetch(jnp.int32(n))
    start = inputs["state"].at[batch, head, :, columns]
    state = compat.gpu_load(start, layout=plgpu.Layout.WGMMA, optimized=False)
    state = lax.fori_loop(jnp.int32(0), jnp.int32(plan.chunks), step, state)
    if "final" in outputs:
        outputs["final"].at[batch, head, :, columns][...] = state
    plgpu.wait_smem_to_gmem(0)


def _place(plan: Walk, n: Any) -> Any:
    """Which chunk comes n-th."""
    return plan.chunks - 1 - n if plan.reverse else n


def _slot(n: Any) -> Any:
    return lax.rem(n, jnp.int32(_STAGES))


def _hold(state: jax.Array, own: dict[str, Any]) -> None:
    """Leave the state where products read it."""
    if "state_low" in own:
        store_split(state, own["state"], own["state_low"])
    else:
        own["state"][...] = state.astype(own["state"].dtype)


# --- Inside of the kernels. -------------------------------------------------------------------------------------------


def tile(*shape: int, dtype: Any) -> Any:
    """A tile of shared memory that products and TMA read."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def product(*pairs: tuple[Any, Any]) -> jax.Array:
    """The sum of a b over pairs of tiles in shared memory, in float32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(accumulator: Any) -> jax.Array:
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    a, b = pairs[0]
    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def turned(tile: Any) -> Any:
    """The transpose of a tile."""
    return tile.transpose((1, 0))


def entries(tile: Any) -> jax.Array:
    """A tile in registers, where a product of its shape would be, in float32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return compat.gpu_load(tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def store_split(x: jax.Array, high: Any, low: Any) -> None:
    """Leave x in two tiles whose sum is x to twice the digits of their dtype."""
    # Rounded in float32, by its bits: a conversion there and back takes many more instructions.
    dropped = 23 - jnp.finfo(high.dtype).nmant
    bits = lax.bitcast_convert_type(x, jnp.int32) + jnp.int32(1 << (dropped - 1))
    rounded = lax.bitcast_convert_type(bits & jnp.int32(-1 << dropped), jnp.float32)
    high[...] = rounded.astype(high.dtype)
    low[...] = (x - rounded).astype(low.dtype)


def line(rows: Any, which: int, axis: int, shape: tuple[int, int] = (CHUNK, COLUMNS)) -> jax.Array:
    """One line of a chunk's rows, along `axis` of a tile."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x = compat.gpu_load(rows.at[which], layout=plgpu.Layout.WGMMA.reduce(1 - axis))
    return lax.broadcast_in_dim(x, shape, (axis,))


def decays(rows: Any, axis: int) -> jax.Array:
    """D of a chunk, float32: exp(G_i - G_j) for j <= i of one segment, else 0.

    Args:
      rows: of the chunk; None for no decay.
      axis: along which the readers i run; the tokens j run along the other.
    """
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
