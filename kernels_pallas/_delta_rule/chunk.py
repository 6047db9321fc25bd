"""One chunk of one head of the delta rule, as two-dimensional arithmetic: forward, and backward by hand.

With G the decay summed inside the chunk and each segment, and the masks of segments left out of the notation:
  P_ij = sum_c q_ic k_jc e^{G_ic - G_jc} (j <= i),  M_ij = sum_c k_ic k_jc e^{G_ic - G_jc} (j < i),
  A = (I + diag(beta) M)^{-1} (the UT transform),
  u = A diag(beta) (v - (e^G k) S),  o = (e^G q) S + P u,  S' = e^{G_C} S + (e^{G_C - G} k)^T u.
Nothing here is larger than C C, C K, C V, K V or, for a decay of channels, C 16 K.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import recurrence

# Tokens a sub-block, where every key channel has a decay of its own: inside one the decays between tokens are taken
# pair by pair, between two of them they go through the first token of the later one and are two factors below 1.
_SUB = 16


class Chunk(NamedTuple):
    """What is known of a chunk before its state is; with leading axes, many of them.

    Attributes:
      q: [C, K], times the scale.
      k: [C, K].
      v: [C, V].
      beta: [C].
      log_decay: None, [C] or [C, K].
      segments: None or int32 [C].
      carried: None or int32 [], the segment that the state belongs to.
    """

    q: Any
    k: Any
    v: Any
    beta: Any
    log_decay: Any = None
    segments: Any = None
    carried: Any = None


class Decays(NamedTuple):
    """Decays of a chunk, segments included.

    Attributes:
      total: (coarse, rest), G of each token, [C] or [C, K]; None without a decay.
      seen: bool [C, C], whether token i sees token j.
      into: of what token i reads in the state, [C, 1 or K]; None for 1.
      out: of what token j leaves in the next state, [C, 1 or K]; None for 1.
      all: of the state itself, [1 or K, 1]; None for 1.
    """

    total: Any
    seen: Any
    into: Any
    out: Any
    all: Any


class Cotangents(NamedTuple):
    """Of q (times the scale), k, v, beta, log_decay (None without one)."""

    q: Any
    k: Any
    v: Any
    beta: Any
    log_decay: Any


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


# --- Decays. ----------------------------------------------------------------------------------------------------------


def decays(chunk: Chunk) -> Decays:
    """The decays of a chunk, none of them above 1."""
    g, segments = chunk.log_decay, chunk.segments
    C = chunk.q.shape[0]
    place = jnp.arange(C)
    seen = place[:, None] >= place
    total = into = out = all_of = None
    if g is not None:
        total = recurrence.cumulative_decay(g, 0, segments)
        coarse, rest = (x.reshape(C, -1) for x in total)
        into = jnp.exp(coarse + rest)
        out = jnp.exp(_below_one((coarse[-1:] - coarse) + (rest[-1:] - rest)))
        all_of = into[-1][:, None]
    if segments is not None:
        seen = seen & (segments[:, None] == segments)
        reads, writes = (segments == chunk.carried)[:, None], (segments == segments[-1])[:, None]
        into = jnp.where(reads, 1 if into is None else into, 0).astype(chunk.q.dtype)
        out = jnp.where(writes, 1 if out is None else out, 0).astype(chunk.q.dtype)
        all_of = jnp.where(reads[-1:], 1 if all_of is None else all_of, 0).astype(chunk.q.dtype)
    return Decays(total, seen, into, out, all_of)


def _below_one(exponent: jax.Array) -> jax.Array:
    """The exponent where it belongs to a pair of one segment, <= 0 but for rounding; what may overflow becomes 0."""
    return jnp.where(exponent < 1, exponent, 0)


def _times(factor: Any, x: jax.Array) -> jax.Array:
    return x if factor is None else factor * x


def _between(d: Decays) -> jax.Array:
    """e^{G_i - G_j} where i sees j, else 0; [C, C]."""
    if d.total is None:
        return d.seen
    coarse, rest = d.total
    exponent = (coarse[:, None] - coarse) + (rest[:, None] - rest)
    return jnp.exp(jnp.where(d.seen, exponent, -jnp.inf))


def _strictly_lower(x: jax.Array) -> jax.Array:
    place = jnp.arange(x.shape[-1])
    return jnp.where(place[:, None] > place, x, 0)


# --- Pairs of tokens: P and M, and back. ------------------------------------------------------------------------------


def pairs(chunk: Chunk, d: Decays) -> tuple[jax.Array, jax.Array]:
    """P and M, both [C, C]."""
    if d.total is not None and d.total[0].ndim == 2:
        return _pairs_of_channels(chunk.q, chunk.k, d.total[1], d.total[0], d.seen)
    C = chunk.q.shape[0]
    both = dot(jnp.concatenate([chunk.q, chunk.k]), chunk.k.T)
    between = _between(d)
    if between.dtype == bool:
        P, M = (jnp.where(between, x, 0) for x in (both[:C], both[C:]))
    else:
        P, M = between * both[:C], between * both[C:]
    return P, _strictly_lower(M)


def pairs_back(
    chunk: Chunk, d: Decays, P: jax.Array, M: jax.Array, dP: jax.Array, dM: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Cotangents of q, k and G from those of P and M, of which the part where nothing is seen does not count."""
    if d.total is not None and d.total[0].ndim == 2:
        run = lambda q, k, rest: _pairs_of_channels(q, k, rest, d.total[0], d.seen)  # noqa: E731
        _, back = jax.vjp(run, chunk.q, chunk.k, d.total[1])
        return back((dP, dM))
    between = _between(d)
    dM = _strictly_lower(dM)
    if between.dtype == bool:
        dPd, dMd = jnp.where(between, dP, 0), jnp.where(between, dM, 0)
    else:
        dPd, dMd = between * dP, between * dM
    dq = dot(dPd, chunk.k)
    dk = dot(jnp.concatenate([dPd, dMd]).T, jnp.concatenate([chunk.q, chunk.k])) + dot(dMd, chunk.k)
    if d.total is None:
        return dq, dk, None
    # The diagonal would cancel; next to large entries not to 0.
    weight = _strictly_lower(dP * P) + dM * M
    return dq, dk, jnp.sum(weight, axis=1) - jnp.sum(weight, axis=0)


def _pairs_of_channels(
    q: jax.Array, k: jax.Array, rest: jax.Array, coarse: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """P and M where every key channel has a decay of its own, by sub-blocks of 16 tokens."""
    C, K = q.shape
    sub = min(_SUB, C)
    n = C // sub
    blocks = lambda x: x.reshape(n, sub, K)  # noqa: E731
    same = jnp.stack([seen[i * sub : (i + 1) * sub, i * sub : (i + 1) * sub] for i in range(n)])[..., None]
    difference = lambda x: blocks(x)[:, :, None] - blocks(x)[:, None]  # noqa: E731
    decayed = jnp.exp(jnp.where(same, difference(coarse) + difference(rest), -jnp.inf)) * blocks(k)[:, None]
    inside = [jnp.sum(blocks(x)[:, :, None] * decayed, axis=-1) for x in (q, k)]  # [n, sub, sub]
    rows_of_both = []
    for i in range(n):
        at = slice(i * sub, (i + 1) * sub)
        # Where to pass through changes nothing, and so has no derivative.
        through = [jax.lax.stop_gradient(x[i * sub]) for x in (coarse, rest)]
        down = jnp.exp(_below_one((coarse[at] - through[0]) + (rest[at] - through[1])))
        up = jnp.exp(_below_one((through[0] - coarse[: i * sub]) + (through[1] - rest[: i * sub])))
        left = dot(jnp.concatenate([q[at] * down, k[at] * down]), (k[: i * sub] * up).T)
        both = jnp.concatenate([inside[0][i], inside[1][i]])
        row = jnp.concatenate([left, both], axis=1)
        rows_of_both.append(jnp.pad(row, ((0, 0), (0, C - row.shape[1]))))
    P, M = (jnp.concatenate([x[half] for x in rows_of_both]) for half in (slice(None, sub), slice(sub, None)))
    return jnp.where(seen, P, 0), _strictly_lower(jnp.where(seen, M, 0))


# --- The UT transform. ------------------------------------------------------------------------------------------------


@jax.custom_vjp
def inverse(L: jax.Array) -> jax.Array:
    """(I + L)^{-1} of strictly lower triangular L [..., C, C], by block doubling.

    The inverses X1, X2 of two neighbouring diagonal blocks give that of both: its lower left part is -X2 L21 X1. No
    power of L appears, which would be huge where keys are alike.
    """
    C = L.shape[-1]
    X = jnp.ones((*L.shape[:-2], C, 1, 1), L.dtype)
    b = 1
    while b < C:
        tiles = L.reshape(*L.shape[:-2], C // b, b, C // b, b)
        lower = jnp.stack([tiles[..., i + 1, :, i, :] for i in range(0, C // b, 2)], axis=-3)
        first, second = X[..., ::2, :, :], X[..., 1::2, :, :]
        corner = -dot(dot(second, lower), first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        X = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        b *= 2
    return X[..., 0, :, :]


def _inverse_fwd(L: jax.Array) -> tuple[jax.Array, jax.Array]:
    A = inverse(L)
    return A, A


def _inverse_bwd(A: jax.Array, dA: jax.Array) -> tuple[jax.Array]:
    At = jnp.swapaxes(A, -1, -2)
    return (-_strictly_lower(dot(dot(At, dA), At)),)


inverse.defvjp(_inverse_fwd, _inverse_bwd)


# --- One chunk, forward and backward. ---------------------------------------------------------------------------------


def forward(chunk: Chunk, S: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output [C, V] and the next state [K, V]."""
    d = decays(chunk)
    P, M = pairs(chunk, d)
    beta = chunk.beta[:, None]
    C = beta.shape[0]
    A = inverse(beta * M)
    reads = dot(jnp.concatenate([_times(d.into, chunk.q), _times(d.into, chunk.k)]), S)
    u = dot(A, beta * (chunk.v - reads[C:]))
    return reads[:C] + dot(P, u), _next(chunk, d, S, u)


def _next(chunk: Chunk, d: Decays, S: jax.Array, u: jax.Array) -> jax.Array:
    return _times(d.all, S) + dot(_times(d.out, chunk.k).T, u)


def backward(chunk: Chunk, S: jax.Array, do: jax.Array, dS: jax.Array) -> tuple[Cotangents, jax.Array]:
    """Cotangents of a chunk and of its state S, from those of its output and of the next state."""
    d = decays(chunk)
    P, M = pairs(chunk, d)
    beta = chunk.beta[:, None]
    C = beta.shape[0]
    A = inverse(beta * M)
    q_in, k_in, k_out = _times(d.into, chunk.q), _times(d.into, chunk.k), _times(d.out, chunk.k)
    error = chunk.v - dot(k_in, S)
    u = dot(A, beta * error)

    du = dot(P.T, do) + dot(k_out, dS)
    back = dot(A.T, du)  # of beta * error
    products = dot(jnp.concatenate([back, do]), u.T)
    # -A^T dA A^T with dA = du (beta error)^T.
    dL, dP = -_strictly_lower(products[:C]), products[C:]
    dq, dk, dG = pairs_back(chunk, d, P, M, dP, beta * dL)
    dbeta = jnp.sum(back * error, axis=1) + jnp.sum(dL * M, axis=1)
    dv = beta * back

    read_back = jnp.concatenate([do, -dv])
    dreads = dot(read_back, S.T)
    dk_out = dot(u, dS.T)
    dq = dq + _times(d.into, dreads[:C])
    dk = dk + _times(d.into, dreads[C:]) + _times(d.out, dk_out)
    dS_before = _times(d.all, dS) + dot(jnp.concatenate([q_in, k_in]).T, read_back)
    if dG is None:
        return Cotangents(dq, dk, dv, dbeta, None), dS_before
    leaves = dk_out * k_out
    reads = dreads[:C] * q_in + dreads[C:] * k_in - leaves
    last = jnp.sum(leaves, axis=0) + jnp.sum(d.all * dS * S, axis=1)
    if dG.ndim == 1:
        reads, last = jnp.sum(reads, axis=1), jnp.sum(last)
    dG = (dG + reads).at[-1].add(last)
    return Cotangents(dq, dk, dv, dbeta, _sum_back(dG, d.seen)), dS_before


def _sum_back(dG: jax.Array, seen: jax.Array) -> jax.Array:
    """Each token's share: the sum over the tokens of its segment from it on."""
    return dot(seen.T.astype(dG.dtype), dG.reshape(dG.shape[0], -1)).reshape(dG.shape)
