"""Softmin on TPU: a Pallas Mosaic kernel with an online maximum.

Grid (batch, block of x, block of y). The points x lie along lanes, the points y along sublanes, so that sums over y are
elementwise additions of registers: each of the eight sublanes keeps a maximum and a sum of its own, and they meet once,
behind the last block. Nothing of the matrix leaves the registers. Costs are differences on the vector unit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import dispatch
from kernels_pallas._softmin.config import Config, Operands

LANES, SUBLANES = 128, 8
# Points x a block, points y a block, and points y that are in registers together.
_ROWS, _COLUMNS, _CHUNK = 512, 1024, 64
# More coordinates than this would be a loop body larger than the instruction memory likes.
MOST_COORDINATES = 64


def forward(config: Config, operands: Operands, *, interpret: Any = False) -> tuple[jax.Array]:
    """The log-sum-exps [B, n] in float32.

    Args:
      config: static part of the call.
      operands: arrays of the call.
      interpret: an interpreter's parameters, for machines without a TPU.
    """
    # With x64 on, Python's ints in index maps would be 64 bits wide, which the compiler does not take.
    with jax.enable_x64(False):
        return _forward(config, operands, interpret)


def _forward(config: Config, operands: Operands, interpret: Any) -> tuple[jax.Array]:
    from jax.experimental.pallas import tpu as pltpu

    x, y, v, epsilon = (a.astype(jnp.float32) for a in operands)
    B, n, d = x.shape
    m = y.shape[1]
    rows, columns = min(_ROWS, _up(n, LANES)), min(_COLUMNS, _up(m, _CHUNK))
    wide, long = _up(n, rows), _up(m, columns)
    x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, wide - n)))
    # One array of columns: the coordinates, and v. Behind the end nothing has mass.
    y = jnp.pad(y, ((0, 0), (0, long - m), (0, 0)))
    v = jnp.pad(v, ((0, 0), (0, long - m)), constant_values=-jnp.inf)
    y = jnp.concatenate([y, v[:, :, None]], axis=2)
    out = pl.pallas_call(
        partial(_kernel, kind=config.kind, d=d),
        out_shape=dispatch.output((B, 1, wide), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, wide // rows, long // columns),
            in_specs=[
                pl.BlockSpec((None, d, rows), lambda b, i, j, _: (b, 0, i)),
                pl.BlockSpec((None, columns, d + 1), lambda b, i, j, _: (b, j, 0)),
            ],
            out_specs=pl.BlockSpec((None, 1, rows), lambda b, i, j, _: (b, 0, i)),
            scratch_shapes=[pltpu.VMEM((SUBLANES, rows), jnp.float32)] * 2,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=B * wide * long * (3 * d + 4),
            transcendentals=B * wide * long,
            bytes_accessed=4 * B * (wide * (d + 1) + long * (d + 1) * (wide // rows)),
        ),
        interpret=interpret,
        name="softmin_forward",
    )(1 / epsilon, x, y)
    return (out[:, 0, :n],)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _kernel(
    inverse_ref: Any, x_ref: Any, y_ref: Any, out_ref: Any, top_ref: Any, sum_ref: Any, *, kind: str, d: int
) -> None:
    inverse = inverse_ref[pl.program_id(0)]
    columns, rows = y_ref.shape[0], x_ref.shape[1]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        # A finite start: of -inf minus -inf there is no exponential.
        top_ref[...] = jnp.full_like(top_ref, jnp.finfo(jnp.float32).min)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def chunk(c: Any, carry: tuple) -> tuple:
        top, total = carry
        span = pl.ds(pl.multiple_of(c * _CHUNK, _CHUNK), _CHUNK)
        cost = jnp.zeros((_CHUNK, rows), jnp.float32)
        for k in range(d):
            difference = x_ref[k : k + 1, :] - y_ref[span, k : k + 1]  # [chunk, rows]
            cost = cost + (jnp.abs(difference) if kind == "cityblock" else difference * difference)
        cost = jnp.sqrt(cost) if kind == "euclidean" else cost
        exponents = (y_ref[span, d : d + 1] - cost * inverse).reshape(_CHUNK // SUBLANES, SUBLANES, rows)
        new = jnp.maximum(top, jnp.max(exponents, axis=0))
        return new, total * jnp.exp(top - new) + jnp.sum(jnp.exp(exponents - new), axis=0)

    top, total = lax.fori_loop(0, columns // _CHUNK, chunk, (top_ref[...], sum_ref[...]))
    top_ref[...], sum_ref[...] = top, total

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        highest = jnp.max(top, axis=0, keepdims=True)
        out_ref[...] = jnp.log(jnp.sum(total * jnp.exp(top - highest), axis=0, keepdims=True)) + highest
