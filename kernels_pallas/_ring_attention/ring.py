"""The two rings: keys and values travel in the first, and in the second their cotangents travel with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import dispatch
from kernels_pallas._attention import (
    Config,
    Operands,
    accumulator,
    backward_call,
    check_backward,
    check_implementation,
    forward_call,
    forward_reference,
)
from kernels_pallas._ring_attention.layout import positions


@dataclass(frozen=True)
class Ring:
    """The static part of a call.

    Attributes:
      axis: name of the mesh axis, or a tuple of names.
      shards: W, its size.
      layout: which shard holds which token.
      offsets: how far behind a device the owners of the keys lie that it reads, in the order it reads them; from 0.
      implementation: of the attention of one shard to another.
      config: of that attention.
    """

    axis: Any
    shards: int
    layout: str
    offsets: tuple[int, ...]
    implementation: str | None
    config: Config


def attend(ring: Ring, operands: Operands, shard: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output [B, n, Hq, Dv] in the dtype of q and log-sum-exp [B, Hq, n] of this device's queries.

    Args:
      ring: static part of the call.
      operands: q, k, v and segments of this device's shard.
      shard: its index, int32 [].
    """
    operands, shard = dispatch.align((operands, shard))
    check_implementation(ring.implementation, ring.config, _placed(ring, operands, shard, 0), "ring_attention")
    if ring.implementation == "reference":
        return _forward_ring(ring, operands, shard)
    return _differentiable(ring, dispatch.refuse_forward_mode("ring_attention", operands), shard)


# --- Derivatives: one rule around the whole ring; by itself, JAX would keep the keys of all W shards. -----------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(ring: Ring, operands: Operands, shard: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _forward_ring(ring, operands, shard)


def _differentiable_fwd(ring: Ring, operands: Operands, shard: jax.Array) -> tuple:
    o, lse = _differentiable(ring, operands, shard)  # pyright: ignore[reportGeneralTypeIssues]
    o, lse = checkpoint_name(o, "attention_output"), checkpoint_name(lse, "attention_lse")
    return (o, lse), (operands, shard, o, lse)


def _differentiable_bwd(ring: Ring, saved: tuple, cotangents: tuple) -> tuple:
    inputs = dispatch.align((*saved, *cotangents))
    grads = _backward(ring, *inputs)
    return Operands(*grads), None  # pyright: ignore[reportGeneralTypeIssues]


_differentiable.defvjp(_differentiable_fwd, _differentiable_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward(
    ring: Ring, operands: Operands, shard: Any, o: Any, lse: Any, o_cotangent: Any, lse_cotangent: Any
) -> tuple:
    return _backward_ring(ring, operands, shard, o, lse, o_cotangent, lse_cotangent)


def _backward_fwd(ring: Ring, *inputs: Any) -> tuple:
    operands, shard, _, lse, *cotangents = inputs
    return _backward(ring, *inputs), (operands, shard, lse, cotangents)


def _backward_bwd(ring: Ring, saved: tuple, cotangents: tuple) -> tuple:
    """The derivative of the backward pass, dense: o and lse are seen as functions of the operands here."""
    operands, shard, lse, (o_cotangent, lse_cotangent) = saved
    # As in the backward pass itself: what comes back from a row that sees nothing does not count.
    sees = lse != -jnp.inf
    o_cotangent = jnp.where(jnp.swapaxes(sees, 1, 2)[..., None], o_cotangent, 0)
    lse_cotangent = jnp.where(sees, lse_cotangent, 0)

    def pulled(arrays: tuple, *given: Any) -> tuple:
        def run(q: Any, k: Any, v: Any) -> tuple:
            return _forward_ring(ring, operands._replace(q=q, k=k, v=v), shard, dense=True)

        return jax.vjp(run, *arrays)[1](given)

    grads, *rest = jax.vjp(pulled, tuple(operands[:3]), o_cotangent, lse_cotangent)[1](cotangents)
    return (Operands(*grads), None, None, None, *rest)


_backward.defvjp(_backward_fwd, _backward_bwd)


# --- The rings. Python loops: unrolled, so that XLA sends the next shard while the present one is at work. ------------


def _forward_ring(ring: Ring, operands: Operands, shard: jax.Array, *, dense: bool = False) -> tuple:
    dense = dense or ring.implementation == "reference"
    state: Any = None
    for local, arriving in _steps(ring, operands, shard):
        part = forward_reference(ring.config, local) if dense else forward_call(ring.implementation, ring.config, local)
        o, lse = part[0].astype(part[1].dtype), part[1]
        state = (o, lse) if state is None else _merge(*state, o, lse)
        state = arriving.wait_for(state)
    o, lse = state
    return o.astype(operands.q.dtype), lse


def _backward_ring(
    ring: Ring, operands: Operands, shard: Any, o: Any, lse: Any, o_cotangent: Any, lse_cotangent: Any
) -> tuple:
    """Cotangents of this device's q, k, v. Those of k and v follow their shard around, and then come home."""
    acc = accumulator(operands.q.dtype)
    # In a program that holds both rings, XLA would otherwise find the sends of k and v equal and keep what every one of
    # them brought until the backward ring, which is what this ring is there to avoid.
    k, v, o_cotangent = jax.lax.optimization_barrier((operands.k, operands.v, o_cotangent))
    totals: list[Any] = []
    for local, arriving in _steps(ring, operands._replace(k=k, v=v), shard):
        inputs = (local, o, lse, o_cotangent, lse_cotangent)
        check_backward(ring.implementation, ring.config, inputs, "ring_attention")
        shares = [x.astype(acc) for x in backward_call(ring.implementation, ring.config, inputs)]
        totals = [total + share for total, share in zip(totals, shares, strict=True)] if totals else shares
        totals = arriving.wait_for(totals)
        # What has been summed is needed again at the end of the next step only: it travels meanwhile.
        totals[1:] = _send(ring, totals[1:], arriving.hop)
    return tuple(x.astype(operands.q.dtype) for x in totals)


class _Arriving:
    """The keys and values of the next step, on their way."""

    def __init__(self, ring: Ring, arrays: list[Any], hop: int) -> None:
        self.hop = hop
        self.arrays = _send(ring, arrays, hop)

    def wait_for(self, results: Any) -> Any:
        """The results unchanged; nothing is sent on before they are there: two shards are all that a device holds."""
        results, self.arrays = jax.lax.optimization_barrier((results, self.arrays))
        return results


def _steps(ring: Ring, operands: Operands, shard: jax.Array) -> Iterator[tuple[Operands, _Arriving]]:
    """For every step the operands of this device, and the keys and values that follow; after the last, none do."""
    moving = [operands.k, operands.v, operands.kv_segments]
    for offset, following in zip(ring.offsets, (*ring.offsets[1:], ring.shards), strict=True):
        last = following == ring.shards
        arriving = _Arriving(ring, [] if last else moving, following - offset)
        local = operands._replace(k=moving[0], v=moving[1], kv_segments=moving[2])
        yield _placed(ring, local, shard, offset), arriving
        moving = arriving.arrays


def _placed(ring: Ring, operands: Operands, shard: jax.Array, offset: int) -> Operands:
    """With the positions of this device's queries, and of the keys of the device `offset` behind it."""
    if not ring.config.causal and ring.config.window is None:
        return operands
    owner = jax.lax.rem(shard + (ring.shards - offset), jnp.int32(ring.shards))
    of = (positions(ring.layout, ring.shards, operands.q.shape[1], s)[None] for s in (shard, owner))
    return operands._replace(**dict(zip(("q_positions", "kv_positions"), of, strict=True)))


def _send(ring: Ring, arrays: list[Any], hop: int) -> list[Any]:
    """Every array to the device that is `hop` further on."""
    if hop % ring.shards == 0:
        return arrays
    pairs = [(source, (source + hop) % ring.shards) for source in range(ring.shards)]
    return [None if x is None else jax.lax.ppermute(x, ring.axis, pairs) for x in arrays]


def _merge(o: jax.Array, lse: jax.Array, other_o: jax.Array, other_lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The attention to both sets of keys, from that to each."""
    top = jax.lax.stop_gradient(jnp.maximum(lse, other_lse))
    # Neither has seen anything: -inf - -inf is NaN, and so would be the gradient.
    top = jnp.where(top == -jnp.inf, 0, top)
    weight, other_weight = jnp.exp(lse - top), jnp.exp(other_lse - top)
    total = weight + other_weight
    sees = total != 0
    total = jnp.where(sees, total, 1)
    across = lambda x: jnp.swapaxes(x / total, 1, 2)[..., None]  # [B, H, n] -> [B, n, H, 1]  # noqa: E731
    merged = across(weight) * o + across(other_weight) * other_o
    return merged, jnp.where(sees, top + jnp.log(total), -jnp.inf)
