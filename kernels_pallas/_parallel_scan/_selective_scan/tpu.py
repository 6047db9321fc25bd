"""The selective scan on TPU: a Pallas Mosaic kernel.

Grid (batch, channel block, chunk): the chunks run in the order of the scan, and the state stays in VMEM. The channels
of a block fill whole registers, [rows, 128], and every state index n has a register of its own: a token then takes no
sum across sublanes or lanes. What all channels share, B_tn and C_tn, comes as scalars.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import dispatch
from kernels_pallas._parallel_scan._selective_scan.config import Config, Operands, decay

LANES = 128
_ROWS = 8


def forward(config: Config, operands: Operands, *, interpret: Any = False) -> tuple[jax.Array, ...]:
    """Readings [B, T, D], the final state [B, N, D], and where the config says so the states [B, K, N, D].

    Args:
      config: static part of the call.
      operands: arrays of the call.
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    # With x64 on, Python's ints in index maps would be 64 bits wide, which the compiler does not take.
    with jax.enable_x64(False):
        return _forward(config, operands, interpret)


class Plan(NamedTuple):
    """How a call is cut.

    Attributes:
      batch: sequences.
      length: tokens.
      channels: of each.
      states: N in whole registers of a row each, a multiple of 8; those behind the end stay 0.
      chunk: tokens a step of the grid.
      chunks: steps along time.
      rows: of 128 channels a block.
      blocks: of channels.
      against: whether the steps run from the end of the arrays.
    """

    batch: int
    length: int
    channels: int
    states: int
    chunk: int
    chunks: int
    rows: int
    blocks: int
    against: bool

    def place(self, k: Any) -> Any:
        """The chunk of time of step k, or the token of a chunk at its k-th place."""
        return self.chunks - 1 - k if self.against else k

    def token(self, i: Any) -> Any:
        """The token of a chunk that comes i-th."""
        return self.chunk - 1 - i if self.against else i


def plan(config: Config, operands: Operands, *, backward: bool = False) -> Plan:
    """Whole registers of channels: 1024 a block where there are so many.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      backward: whether the steps run against the order of the scan.
    """
    B, T, D = operands.u.shape
    full = -(-D // LANES)
    rows = min(full, _ROWS)
    return Plan(
        B,
        T,
        D,
        -(-operands.A.shape[1] // _ROWS) * _ROWS,
        config.chunk,
        -(-T // config.chunk),
        rows,
        -(-full // rows),
        config.reverse != backward,
    )


def by_channels(plan: Plan, x: jax.Array) -> jax.Array:
    """[..., D] as float32 [..., rows, 128], zeros behind the end."""
    wide = plan.rows * plan.blocks * LANES
    x = jnp.pad(x.astype(jnp.float32), ((0, 0),) * (x.ndim - 1) + ((0, wide - x.shape[-1]),))
    return x.reshape(*x.shape[:-1], plan.rows * plan.blocks, LANES)


def by_tokens(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, T, ...] in whole chunks. Zeros behind the end leave the state alone."""
    missing = plan.chunks * plan.chunk - plan.length
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))


def by_states(plan: Plan, x: jax.Array) -> jax.Array:
    """[..., N, D] as float32 [..., N', rows, 128], zeros behind both ends."""
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, plan.states - x.shape[-2]), (0, 0)))
    return by_channels(plan, x)


def weights(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, T, N] as float32 [B, K, 1, chunk N'], for scalar memory."""
    x = jnp.pad(by_tokens(plan, x.astype(jnp.float32)), ((0, 0), (0, 0), (0, plan.states - x.shape[2])))
    return x.reshape(plan.batch, plan.chunks, 1, -1)


def flags(plan: Plan, x: jax.Array) -> jax.Array:
    """Bools [B, T] as int32 [B, K, 1, chunk], for scalar memory."""
    return by_tokens(plan, x.astype(jnp.int32)).reshape(plan.batch, plan.chunks, 1, -1)


def without_channels(plan: Plan, x: jax.Array) -> jax.Array:
    """The inverse of `by_channels`."""
    return x.reshape(*x.shape[:-2], -1)[..., : plan.channels]


class Specs(NamedTuple):
    """Blocks of the arrays of a call."""

    tokens: Any  # [B, T, rows, 128]
    state: Any  # [B, N, rows, 128]
    rates: Any  # [B|1, N, rows, 128]
    kept: Any  # [B, K, N, rows, 128]
    weights: Any  # [B, K, 1, chunk N]
    restart: Any  # [B, K, 1, chunk]


def specs(plan: Plan, *, shared: bool) -> Specs:
    """Where a step (b, j, k) finds its blocks; the kept states lie in the order of the time of the arrays.

    Args:
      plan: of the call.
      shared: whether the batch shares its rates.
    """
    from jax.experimental.pallas import tpu as pltpu

    square, place = (plan.rows, LANES), plan.place
    return Specs(
        pl.BlockSpec((None, plan.chunk, *square), lambda b, j, k: (b, place(k), j, 0)),
        pl.BlockSpec((None, plan.states, *square), lambda b, j, k: (b, 0, j, 0)),
        pl.BlockSpec((None, plan.states, *square), lambda b, j, k: (0 if shared else b, 0, j, 0)),
        pl.BlockSpec((None, None, plan.states, *square), lambda b, j, k: (b, place(k), 0, j, 0)),
        pl.BlockSpec(
            (None, None, 1, plan.chunk * plan.states),
            lambda b, j, k: (b, place(k), 0, 0),
            memory_space=pltpu.SMEM,
        ),
        pl.BlockSpec((None, None, 1, plan.chunk), lambda b, j, k: (b, place(k), 0, 0), memory_space=pltpu.SMEM),
    )


def _forward(config: Config, operands: Operands, interpret: Any) -> tuple[jax.Array, ...]:
    from jax.experimental.pallas import tpu as pltpu

    p = plan(config, operands)
    of = specs(p, shared=operands.A.shape[0] == 1)
    inputs = [by_tokens(p, by_channels(p, x)) for x in (operands.u, operands.dt)]
    inputs += [weights(p, x) for x in (operands.B, operands.C)]
    inputs += [by_states(p, x) for x in (operands.A, operands.initial)]
    blocks = [of.tokens, of.tokens, of.weights, of.weights, of.rates, of.state]
    if operands.restart is not None:
        inputs.append(flags(p, operands.restart))
        blocks.append(of.restart)
    square = (p.rows * p.blocks, LANES)
    outputs = [
        (dispatch.output((p.batch, p.chunks * p.chunk, *square), jnp.float32), of.tokens),
        (dispatch.output((p.batch, p.states, *square), jnp.float32), of.state),
    ]
    if config.keeps:
        outputs.append((dispatch.output((p.batch, p.chunks, p.states, *square), jnp.float32), of.kept))
    work = p.batch * p.length * p.channels * p.states
    y, final, *kept = pl.pallas_call(
        partial(_kernel, config=config, plan=p, restarts=operands.restart is not None),
        out_shape=tuple(shape for shape, _ in outputs),
        grid=(p.batch, p.blocks, p.chunks),
        in_specs=blocks,
        out_specs=tuple(spec for _, spec in outputs),
        scratch_shapes=[pltpu.VMEM((p.states, p.rows, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=7 * work,
            transcendentals=work,
            bytes_accessed=sum(x.size * 4 for x in (*inputs, *(shape for shape, _ in outputs))),
        ),
        interpret=interpret,
        name="selective_scan_forward",
    )(*inputs)
    N = operands.A.shape[1]
    states = (without_channels(p, x)[..., :N, :] for x in (final, *kept))
    return without_channels(p, y)[:, : p.length], *states


def _kernel(
    u_ref: Any,
    dt_ref: Any,
    b_ref: Any,
    c_ref: Any,
    a_ref: Any,
    initial_ref: Any,
    *refs: Any,
    config: Config,
    plan: Plan,
    restarts: bool,
) -> None:
    restart_ref, refs = (refs[0], refs[1:]) if restarts else (None, refs)
    y_ref, final_ref, *kept_ref, state = refs
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        state[...] = initial_ref[...]

    if config.keeps:
        kept_ref[0][...] = state[...]

    def step(i: Any, h: jax.Array) -> jax.Array:
        t = plan.token(i)
        _, _, h = advance(config, plan, u_ref, dt_ref, b_ref, a_ref, restart_ref, h, t)
        y_ref[t] = jnp.sum(spread(plan, c_ref, t) * h, axis=0)
        return h

    state[...] = lax.fori_loop(0, plan.chunk, step, state[...])

    @pl.when(k == pl.num_programs(2) - 1)
    def _() -> None:
        final_ref[...] = state[...]


def spread(plan: Plan, ref: Any, t: Any) -> jax.Array:
    """The weights of a token, each in all entries of its register: [N, rows, 128]."""
    square = (1, plan.rows, LANES)
    return jnp.concatenate([jnp.full(square, ref[0, t * plan.states + n]) for n in range(plan.states)])


def advance(
    config: Config,
    plan: Plan,
    u_ref: Any,
    dt_ref: Any,
    b_ref: Any,
    a_ref: Any,
    restart_ref: Any,
    h: jax.Array,
    t: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state [N, rows, 128] before a token, as its decay finds it, that decay's slope, and the state after it."""
    if restart_ref is not None:
        h = jnp.where(restart_ref[0, t] != 0, 0.0, h)
    dt = dt_ref[t]
    a, slope = decay(config, dt[None] * a_ref[...])
    return h, slope, a * h + (dt * u_ref[t])[None] * spread(plan, b_ref, t)
