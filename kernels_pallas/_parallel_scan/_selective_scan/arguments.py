"""The arguments of the selective scan: their checks, and the canonical form that every implementation takes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import checks
from kernels_pallas._parallel_scan._selective_scan.config import LEAST_CHUNK, Config, Operands, default_chunk
from kernels_pallas._parallel_scan.arguments import DTYPES
from kernels_pallas._parallel_scan.segments import marks
from kernels_pallas.recurrence import accumulator, hide_padding

# Of a channel that keeps nothing: -inf times a step size of 0 would be NaN.
_LEAST_RATE = -1e30
_REAL = "Rates are real here: for decays that change the sign of a state use eigenvalues='symmetric'."


class Call(NamedTuple):
    """What the canonical form leaves out, and the result takes in again.

    Attributes:
      batch: leading axes.
      groups: of B and C; they are part of the batch in the canonical form.
      u: [B, T, D], zero in padding.
      D: [D] or None.
      z: [B, T, D] or None.
      valid: bool [B, T] or None.
    """

    batch: tuple[int, ...]
    groups: int
    u: jax.Array
    D: Any
    z: Any
    valid: Any

    def finish(self, y: jax.Array, final: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The public outputs: y [*B, T, D] with skip and gate, and the state [*B, D, N]."""
        B, T, D = self.u.shape
        if self.groups > 1:
            y = jnp.swapaxes(y.reshape(B, self.groups, T, D // self.groups), 1, 2).reshape(B, T, D)
        if self.D is not None:
            y = y + self.D.astype(y.dtype) * self.u.astype(y.dtype)
        if self.z is not None:
            y = y * jax.nn.silu(self.z.astype(y.dtype))
        if self.valid is not None:
            y = jnp.where(self.valid[:, :, None], y, 0)
        final = jnp.swapaxes(final, 1, 2)  # [B G, D / G, N]
        return y.astype(self.u.dtype).reshape(*self.batch, T, D), final.reshape(*self.batch, D, final.shape[2])


def prepare(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = True,
    initial_state: Any = None,
    segment_ids: Any = None,
    reverse: bool = False,
    eigenvalues: str = "positive",
    chunk_size: Any = None,
    step: bool = False,
) -> tuple[Config, Operands, Call]:
    """Check the arguments; give the static part, the arrays in canonical form, and what finishes the result.

    With `step` the arrays are of one token and have no axis of time, and the errors speak of `selective_scan_step`.
    """
    name = "selective_scan_step" if step else "selective_scan"
    batch, groups = _check_arrays(name, u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids, step)
    checks.choice(name, "eigenvalues", eigenvalues, ("positive", "symmetric"))
    config = Config(
        checks.flag(name, "reverse", reverse),
        eigenvalues == "symmetric",
        default_chunk(jnp.shape(A)[1]) if chunk_size is None else _check_chunk(name, chunk_size),
    )

    def flat(x: Any) -> Any:
        if x is None:
            return None
        x = jnp.asarray(x)
        x = x.reshape(math.prod(batch), *x.shape[len(batch) :])
        return x[:, None] if step else x

    wide = accumulator(jnp.result_type(u))
    u, delta, B, C, z, ids = (flat(x) for x in (u, delta, B, C, z, segment_ids))
    found = None if ids is None else marks(ids, reverse=config.reverse)
    valid = None if found is None else found.valid
    u, delta, B, C = hide_padding(valid, u, delta, B, C)
    z = None if z is None else hide_padding(valid, z)[0]
    dt = delta.astype(wide)
    if delta_bias is not None:
        dt = dt + jnp.asarray(delta_bias).astype(wide)
    if checks.flag(name, "delta_softplus", delta_softplus):
        dt = jax.nn.softplus(dt)
    (dt,) = hide_padding(valid, dt)
    dt = _check_steps(name, dt)
    A = _check_rates(name, jnp.asarray(A)).astype(wide)
    if initial_state is None:
        state = jnp.zeros((u.shape[0], *A.shape), wide)
    else:
        state = jnp.asarray(initial_state).reshape(u.shape[0], *A.shape)
    restart = None if found is None else jnp.repeat(found.restart, groups, axis=0)
    return config, _fold(groups, u, dt, A, B, C, state, restart), Call(batch, groups, u, D, z, valid)


def _fold(
    groups: int, u: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, state: jax.Array, restart: Any
) -> Operands:
    """Groups as part of the batch; channels last."""
    rows, T, channels = u.shape
    A, N = A.T[None], A.shape[1]
    state = jnp.swapaxes(state, 1, 2)
    if groups == 1:
        B, C = (x.reshape(rows, T, N) for x in (B, C))
        return Operands(u, dt, A, B, C, state, restart)

    def divided(x: jax.Array) -> jax.Array:  # [B, M, D] -> [B G, M, D / G]
        x = x.reshape(*x.shape[:2], groups, channels // groups)
        return jnp.swapaxes(x, 1, 2).reshape(x.shape[0] * groups, x.shape[1], channels // groups)

    B, C = (jnp.swapaxes(x, 1, 2).reshape(rows * groups, T, N) for x in (B, C))
    A = jnp.broadcast_to(A, (rows, N, channels))
    return Operands(divided(u), divided(dt), divided(A), B, C, divided(state), restart)


# --- Checks. ----------------------------------------------------------------------------------------------------------


def _check_arrays(
    name: str,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    state: Any,
    segment_ids: Any,
    step: bool,
) -> tuple[tuple[int, ...], int]:
    """The batch shape and the number of groups, when dtypes and shapes fit."""
    required = {"u": u, "delta": delta, "A": A, "B": B, "C": C} | ({"state": state} if step else {})
    checks.arrays(name, **required)
    checks.dtype(name, DTYPES, u=u)
    checks.same_dtype(name, remedy="Cast them to one dtype.", u=u, B=B, C=C, z=z)
    narrow, wide = jnp.result_type(u), accumulator(jnp.result_type(u))
    either = (narrow,) if narrow == wide else (narrow, wide)
    checks.dtype(name, either, A=A, remedy=_REAL)
    checks.dtype(name, either, delta=delta, D=D, delta_bias=delta_bias)
    T = "" if step else " T"
    grouped = " G N" if jnp.ndim(B) > jnp.ndim(u) else " N"
    argument = "state" if step else "initial_state"
    remedy = "The layout is [*batch, channels]." if step else "The layout is [*batch, time, channels]."
    sizes = checks.shape(
        name,
        remedy=remedy,
        u=(u, f"*B{T} D"),
        delta=(delta, f"*B{T} D"),
        A=(A, "D N"),
        B=(B, f"*B{T}{grouped}"),
        C=(C, f"*B{T}{grouped}"),
        D=(D, "D"),
        z=(z, f"*B{T} D"),
        delta_bias=(delta_bias, "D"),
        segment_ids=(segment_ids, f"*B{T}"),
        **{argument: (state, "*B D N")},
    )
    checks.dtype(name, "integer", segment_ids=segment_ids)
    checks.dtype(name, (wide,), remedy="States are kept wide, as they are returned.", **{argument: state})
    groups, channels = sizes.get("G", 1), sizes["D"]
    fits = groups > 0 and channels % groups == 0
    wanted = f"have a number of groups that divides the channels of `u`, {channels}"
    checks.value(name, "B", fits, wanted, groups, "Channels share groups equally.", checks.ShapeError)
    return sizes["B"], groups


def _check_rates(name: str, A: jax.Array) -> jax.Array:
    """Rates <= 0: a positive one raises where it is known, and is NaN inside a compiled program."""
    if not checks.traced(A):
        # By NumPy: inside of a trace, JAX would trace this too.
        highest = float(np.fmax.reduce(np.asarray(A, np.float64), axis=None, initial=-np.inf))
        checks.value(name, "A", not highest > 0, "be <= 0", highest, "Give -exp(A_log): states would grow.")
    return jnp.where(A > 0, jnp.nan, jnp.maximum(A, _LEAST_RATE))


def _check_steps(name: str, dt: jax.Array) -> jax.Array:
    """Step sizes >= 0, like `_check_rates`."""
    if not checks.traced(dt):
        least = float(np.fmin.reduce(np.asarray(dt, np.float64), axis=None, initial=np.inf))
        remedy = "Leave delta_softplus on, or give step sizes: states would grow."
        checks.value(name, "delta", not least < 0, "be >= 0 where delta_softplus is False", least, remedy)
    return jnp.where(dt < 0, jnp.nan, dt)


def _check_chunk(name: str, given: Any) -> int:
    ok = isinstance(given, (int, np.integer)) and not isinstance(given, bool)
    ok = ok and given >= LEAST_CHUNK and given & (given - 1) == 0
    checks.value(name, "chunk_size", bool(ok), f"be a power of two >= {LEAST_CHUNK}", given)
    return int(given)
