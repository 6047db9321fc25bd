"""The selective scan's gradient on TPU: a Pallas Mosaic kernel.

The grid of the forward pass, with the chunks against the order of the scan. Of each chunk the states are recomputed
from the one that was kept before it, and stay in VMEM; the notation is that of `xla`. The cotangents of B and C sum
over channels: each token leaves a row of partial sums for every n, and one product of the matrix unit with ones sums
the lanes of all of them. Blocks of channels are summed by XLA.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import dispatch
from kernels_pallas._parallel_scan._selective_scan import tpu
from kernels_pallas._parallel_scan._selective_scan.config import Config, Operands, decay
from kernels_pallas._parallel_scan._selective_scan.tpu import LANES, Plan


def backward(
    config: Config,
    operands: Operands,
    states: jax.Array,
    y_cotangent: jax.Array,
    final_cotangent: jax.Array,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Cotangents of u, dt, A, B, C and the initial state.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      states: [B, K, N, D], as `tpu.forward` kept them.
      y_cotangent: [B, T, D].
      final_cotangent: [B, N, D].
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    with jax.enable_x64(False):
        return _backward(config, operands, states, y_cotangent, final_cotangent, interpret)


def _backward(
    config: Config, operands: Operands, states: jax.Array, dy: jax.Array, dfinal: jax.Array, interpret: Any
) -> tuple[jax.Array, ...]:
    from jax.experimental.pallas import tpu as pltpu

    p = tpu.plan(config, operands, backward=True)
    shared = operands.A.shape[0] == 1
    of = tpu.specs(p, shared=shared)
    inputs = [tpu.by_tokens(p, tpu.by_channels(p, x)) for x in (operands.u, operands.dt, dy)]
    inputs += [tpu.weights(p, x) for x in (operands.B, operands.C)]
    inputs += [tpu.by_states(p, x) for x in (operands.A, states, dfinal)]
    blocks = [*[of.tokens] * 3, of.weights, of.weights, of.rates, of.kept, of.state]
    if operands.restart is not None:
        inputs.append(tpu.flags(p, operands.restart))
        blocks.append(of.restart)
    square = (p.rows * p.blocks, LANES)
    sums = pl.BlockSpec((None, None, None, 1, p.chunk * p.states), lambda b, j, k: (b, j, p.place(k), 0, 0))
    outputs = [
        *[(dispatch.output((p.batch, p.chunks * p.chunk, *square), jnp.float32), of.tokens)] * 2,
        (dispatch.output((p.batch, p.states, *square), jnp.float32), of.state),
        *[(dispatch.output((p.batch, p.blocks, p.chunks, 1, p.chunk * p.states), jnp.float32), sums)] * 2,
        (dispatch.output((p.batch, p.states, *square), jnp.float32), of.state),
    ]
    state = (p.states, p.rows, LANES)
    work = p.batch * p.length * p.channels * p.states
    du, ddt, dA, dB, dC, dinitial = pl.pallas_call(
        partial(_kernel, config=config, plan=p, restarts=operands.restart is not None),
        out_shape=tuple(shape for shape, _ in outputs),
        grid=(p.batch, p.blocks, p.chunks),
        in_specs=blocks,
        out_specs=tuple(spec for _, spec in outputs),
        scratch_shapes=[
            pltpu.VMEM(state, jnp.float32),
            pltpu.VMEM(state, jnp.float32),
            pltpu.VMEM((p.chunk, *state), jnp.float32),
            *[pltpu.VMEM((p.chunk * p.states, LANES), jnp.float32)] * 2,
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=25 * work,
            transcendentals=2 * work,
            bytes_accessed=sum(x.size * 4 for x in (*inputs, *(shape for shape, _ in outputs))),
        ),
        interpret=interpret,
        name="selective_scan_backward",
    )(*inputs)

    du, ddt = (tpu.without_channels(p, x)[:, : p.length] for x in (du, ddt))
    N = operands.A.shape[1]
    dA, dinitial = (tpu.without_channels(p, x)[:, :N] for x in (dA, dinitial))
    dB, dC = (jnp.sum(x, axis=1).reshape(p.batch, -1, p.states)[:, : p.length, :N] for x in (dB, dC))
    dA = jnp.sum(dA, axis=0, keepdims=True) if shared else dA
    grads = (du, ddt, dA, dB, dC, dinitial)
    return tuple(g.astype(x.dtype) for g, x in zip(grads, operands[:6], strict=True))


def _kernel(
    u_ref: Any,
    dt_ref: Any,
    dy_ref: Any,
    b_ref: Any,
    c_ref: Any,
    a_ref: Any,
    kept_ref: Any,
    dfinal_ref: Any,
    *refs: Any,
    config: Config,
    plan: Plan,
    restarts: bool,
) -> None:
    restart_ref, refs = (refs[0], refs[1:]) if restarts else (None, refs)
    du_ref, ddt_ref, dA_ref, dB_ref, dC_ref, dinitial_ref, pending, dA_sum, before, dB_rows, dC_rows = refs
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        pending[...] = dfinal_ref[...]
        dA_sum[...] = jnp.zeros(dA_sum.shape, jnp.float32)

    def recompute(i: Any, h: jax.Array) -> jax.Array:
        # The tokens of the grid run against the order of the scan, these with it.
        t = plan.token(plan.chunk - 1 - i)
        found, _, h = tpu.advance(config, plan, u_ref, dt_ref, b_ref, a_ref, restart_ref, h, t)
        before[t] = found
        return h

    lax.fori_loop(0, plan.chunk, recompute, kept_ref[...])

    def step(i: Any, p: jax.Array) -> jax.Array:
        t = plan.token(i)
        u, dt, dy = u_ref[t], dt_ref[t], dy_ref[t]
        A, h, x = a_ref[...], before[t], dt * u
        b = tpu.spread(plan, b_ref, t)
        a, slope = decay(config, dt[None] * A)
        g = p + tpu.spread(plan, c_ref, t) * dy[None]
        w = g * h * slope
        total = jnp.sum(g * b, axis=0)
        du_ref[t] = dt * total
        ddt_ref[t] = u * total + jnp.sum(w * A, axis=0)
        dA_sum[...] += w * dt[None]
        rows = pl.ds(pl.multiple_of(t * plan.states, 8), plan.states)
        dB_rows[rows, :] = jnp.sum(g * x[None], axis=1)
        dC_rows[rows, :] = jnp.sum((a * h + x[None] * b) * dy[None], axis=1)
        p = a * g
        return p if restart_ref is None else jnp.where(restart_ref[0, t] != 0, 0.0, p)

    pending[...] = lax.fori_loop(0, plan.chunk, step, pending[...])
    dB_ref[...] = _over_lanes(dB_rows[...])
    dC_ref[...] = _over_lanes(dC_rows[...])

    @pl.when(k == pl.num_programs(2) - 1)
    def _() -> None:
        dA_ref[...] = dA_sum[...]
        dinitial_ref[...] = pending[...]


def _over_lanes(x: jax.Array) -> jax.Array:
    """The sums [1, M] of the rows of x [M, 128], on the matrix unit."""
    ones = jnp.ones((8, LANES), jnp.float32)
    contract = (((1,), (1,)), ((), ()))
    highest = lax.Precision.HIGHEST
    return lax.dot_general(ones, x, contract, precision=highest, preferred_element_type=jnp.float32)[:1]
