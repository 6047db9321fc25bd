"""The linear scan on TPU: Pallas Mosaic kernels, forward and backward.

Grid (batch, channel block, time block): the time axis runs in the order of the scan and carries the state in VMEM.
Channels lie along lanes, time along sublanes. A tile of a few tokens is scanned by itself in steps that double, which
tiles do independently of each other; only its last row then waits for the tile before it.

The backward pass runs against the order: p_t = a_t p_{t+1} + a_t dh_t is the same scan, and g_t = dh_t + p_{t+1} is the
cotangent of b_t. It needs h_{t-1}, whose row before a tile lies in the tile before, and before a block in the block
before: that one tile of it comes as an input of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import dispatch
from kernels_pallas._parallel_scan._linear_scan.config import Config, Operands
from kernels_pallas._parallel_scan.doubling import times

LANES = 128
# Tokens a block: with the widest block of channels, six arrays of it and their second buffers take 6 MiB.
_TOKENS = 256
_CHANNELS = (512, 256, 128)


def forward(
    config: Config, operands: Operands, *, tokens: int = _TOKENS, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """States [B, T, D] in the dtype of b, and the final state [B, D].

    Args:
      config: static part of the call.
      operands: arrays of the call.
      tokens: tokens a block.
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    # With x64 on, Python's ints in index maps would be 64 bits wide, which the compiler does not take.
    with jax.enable_x64(False):
        return _forward(config, operands, tokens, interpret)


def backward(
    config: Config,
    a: jax.Array,
    h: jax.Array,
    initial: jax.Array,
    h_cotangent: jax.Array,
    final_cotangent: jax.Array,
    *,
    tokens: int = _TOKENS,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of a, b and the initial state.

    Args:
      config: static part of the call.
      a: [B, T, D].
      h: states [B, T, D], as the forward pass gave them.
      initial: [B, D].
      h_cotangent: like h.
      final_cotangent: like the initial state.
      tokens: tokens a block.
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    with jax.enable_x64(False):
        return _backward(config, (a, h, initial, h_cotangent, final_cotangent), tokens, interpret)


class _Plan:
    """How a call is cut, and where the blocks of each step of the grid lie."""

    def __init__(self, shape: tuple[int, ...], tile: int, tokens: int, *, reverse: bool) -> None:
        B, T, D = shape
        self.reverse, self.tile = reverse, tile
        self.tokens = min(tokens, -(-T // tile) * tile)
        self.columns = -(-D // LANES) * LANES
        self.rows = -(-T // self.tokens) * self.tokens
        self.channels = next(n for n in _CHANNELS if self.columns % n == 0)
        self.grid = (B, self.columns // self.channels, self.rows // self.tokens)

    def block(self, i: Any) -> Any:
        """The block of time of step i."""
        return self.grid[2] - 1 - i if self.reverse else i

    def array(self) -> pl.BlockSpec:  # of [B, T, D]
        return pl.BlockSpec((None, self.tokens, self.channels), lambda b, j, i: (b, self.block(i), j))

    def state(self) -> pl.BlockSpec:  # of [B, 1, D]
        return pl.BlockSpec((None, 1, self.channels), lambda b, j, i: (b, 0, j))

    def neighbour(self) -> pl.BlockSpec:  # of [B, T, D]: the tile of the block that this pass comes to next
        tiles, last = self.tokens // self.tile, self.rows // self.tile - 1

        def index(b: Any, j: Any, i: Any) -> tuple:
            at = self.block(i) * tiles
            return b, jnp.maximum(at - 1, 0) if self.reverse else jnp.minimum(at + tiles, last), j

        return pl.BlockSpec((None, self.tile, self.channels), index)

    def padded(self, x: jax.Array, value: float = 0) -> jax.Array:
        """[B, T, D] in whole blocks. Behind the end a is 1 and b is 0, which leaves the state alone."""
        _, T, D = x.shape
        x = jnp.pad(x, ((0, 0), (0, self.rows - T), (0, 0)), constant_values=value) if self.rows > T else x
        return jnp.pad(x, ((0, 0), (0, 0), (0, self.columns - D))) if self.columns > D else x


def _tile(*dtypes: Any) -> int:
    """Tokens a tile: the sublanes of a register of the narrowest dtype."""
    return 32 // min(jnp.dtype(dtype).itemsize for dtype in dtypes)


def _call(kernel: Any, plan: _Plan, name: str, interpret: Any, specs: list, outputs: list, *inputs: Any) -> Any:
    from jax.experimental.pallas import tpu as pltpu

    size = inputs[0].size
    moved = sum(x.size * x.dtype.itemsize for x in (*inputs, *(shape for shape, _ in outputs)))
    return pl.pallas_call(
        kernel,
        out_shape=tuple(shape for shape, _ in outputs),
        grid=plan.grid,
        in_specs=specs,
        out_specs=tuple(spec for _, spec in outputs),
        scratch_shapes=[pltpu.VMEM((1, plan.channels), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=20 * size, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name=name,
    )(*inputs)


def _forward(config: Config, operands: Operands, tokens: int, interpret: Any) -> tuple[jax.Array, jax.Array]:
    a, b, initial = operands
    T, D = b.shape[1:]
    plan = _Plan(b.shape, _tile(a.dtype, b.dtype), tokens, reverse=config.reverse)
    a, b, state = plan.padded(a, 1), plan.padded(b), plan.padded(initial[:, None])[:, :1]
    outputs = [
        (dispatch.output(b.shape, b.dtype), plan.array()),
        (dispatch.output((b.shape[0], 1, plan.columns), jnp.float32), plan.state()),
    ]
    specs = [plan.array(), plan.array(), plan.state()]
    kernel = partial(_forward_kernel, plan=plan)
    h, final = _call(kernel, plan, "linear_scan_forward", interpret, specs, outputs, a, b, state)
    return h[:, :T, :D], final[:, 0, :D]


def _backward(config: Config, inputs: tuple, tokens: int, interpret: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    a, h, initial, dh, dfinal = inputs
    T, D = a.shape[1:]
    plan = _Plan(a.shape, _tile(a.dtype, h.dtype), tokens, reverse=not config.reverse)
    a, h, dh = plan.padded(a, 1), plan.padded(h), plan.padded(dh)
    initial, dfinal = (plan.padded(x[:, None])[:, :1] for x in (initial, dfinal))
    outputs = [
        (dispatch.output(a.shape, a.dtype), plan.array()),
        (dispatch.output(h.shape, h.dtype), plan.array()),
        (dispatch.output(initial.shape, jnp.float32), plan.state()),
    ]
    specs = [*[plan.array()] * 3, plan.neighbour(), plan.state(), plan.state()]
    kernel = partial(_backward_kernel, plan=plan, length=T)
    arrays = (a, h, dh, h, initial, dfinal)
    da, db, dinitial = _call(kernel, plan, "linear_scan_backward", interpret, specs, outputs, *arrays)
    return da[:, :T, :D], db[:, :T, :D], dinitial[:, 0, :D]


# --- The kernels. -----------------------------------------------------------------------------------------------------


def _forward_kernel(
    a_ref: Any, b_ref: Any, initial_ref: Any, h_ref: Any, final_ref: Any, state: Any, *, plan: _Plan
) -> None:
    def tile(span: Any, carry: jax.Array) -> jax.Array:
        h = _scan(a_ref[span, :].astype(jnp.float32), b_ref[span, :].astype(jnp.float32), carry, plan.reverse)
        h_ref[span, :] = h.astype(h_ref.dtype)
        return _last(h, plan.reverse)

    _walk(tile, initial_ref, final_ref, state, plan)


def _backward_kernel(
    a_ref: Any,
    h_ref: Any,
    dh_ref: Any,
    neighbour_ref: Any,
    initial_ref: Any,
    dfinal_ref: Any,
    da_ref: Any,
    db_ref: Any,
    dinitial_ref: Any,
    state: Any,
    *,
    plan: _Plan,
    length: int,
) -> None:
    size, forwards = plan.tile, not plan.reverse
    start = plan.block(pl.program_id(2)) * plan.tokens
    row = lax.broadcasted_iota(jnp.int32, (size, plan.channels), 0)

    def tile(span: Any, carry: jax.Array) -> jax.Array:
        a, dh = a_ref[span, :].astype(jnp.float32), dh_ref[span, :].astype(jnp.float32)
        p = _scan(a, times(a, dh), carry, plan.reverse)
        g = dh + _shifted(p, carry, 1, plan.reverse)
        # h one token earlier in the order of the forward pass: of the tile that this pass comes to next, the near row.
        at = span.start + (size if forwards else -size)
        inside = (at >= 0) & (at < plan.tokens)
        at = pl.multiple_of(jnp.clip(at, 0, plan.tokens - size), size)
        near = jnp.where(inside, h_ref[pl.ds(at, size), :], neighbour_ref[...]).astype(jnp.float32)
        earlier = _shifted(h_ref[span, :].astype(jnp.float32), _last(near, forwards), 1, forwards)
        first = row + (start + span.start) == (length - 1 if forwards else 0)
        da_ref[span, :] = (g * jnp.where(first, initial_ref[...], earlier)).astype(da_ref.dtype)
        db_ref[span, :] = g.astype(db_ref.dtype)
        return _last(p, plan.reverse)

    _walk(tile, dfinal_ref, dinitial_ref, state, plan)


def _walk(tile: Any, first_ref: Any, last_ref: Any, state: Any, plan: _Plan) -> None:
    """The tiles of a block in the order of the scan; `tile(span, carry)` gives the next carry [1, channels]."""
    i, tiles = pl.program_id(2), plan.tokens // plan.tile

    @pl.when(i == 0)
    def _() -> None:
        state[...] = first_ref[...]

    def body(k: Any, carry: jax.Array) -> jax.Array:
        k = tiles - 1 - k if plan.reverse else k
        return tile(pl.ds(pl.multiple_of(k * plan.tile, plan.tile), plan.tile), carry)

    state[...] = lax.fori_loop(0, tiles, body, state[...])

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        last_ref[...] = state[...]


def _scan(a: jax.Array, b: jax.Array, carry: jax.Array, reverse: bool) -> jax.Array:
    """The states of a tile [tile, channels] after the state [1, channels]."""
    size, by = a.shape[0], 1
    while by < size:
        # What no row precedes is scanned already: there the neutral element comes in.
        b = b + times(a, _shifted(b, jnp.zeros_like(carry), by, reverse))
        a = times(a, _shifted(a, jnp.ones_like(carry), by, reverse))
        by *= 2
    return times(a, carry) + b


def _shifted(x: jax.Array, fill: jax.Array, by: int, reverse: bool) -> jax.Array:
    """The rows of a tile moved `by` rows on in the order of the scan, with a row [1, channels] where none was."""
    from jax.experimental.pallas import tpu as pltpu

    size = x.shape[0]
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    moved = pltpu.roll(x, size - by if reverse else by, 0)
    return jnp.where(row >= size - by if reverse else row < by, fill, moved)


def _last(x: jax.Array, reverse: bool) -> jax.Array:
    """The row [1, channels] of a tile that the scan comes to last."""
    return x[:1] if reverse else x[-1:]
