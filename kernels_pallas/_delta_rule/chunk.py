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
# Diagonal blocks of the UT transform of this size are inverted entry by entry, larger ones by matrix products.
_SUB = 16
# Blocks that are inverted side by side. XLA of jax 0.10.2 miscompiles this for CPUs above 4096.
_TOGETHER = 2048


class Chunk(NamedTuple):
    """The inputs of a chunk; with leading axes, of many.

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
    """Decays of a chunk, segments included, none above 1.

    Attributes:
      total: (coarse, rest), G of each token, [C] or [C, K]; None without a decay.
      into: of what token i reads in the state, [C, 1 or K]; None for 1.
      out: of what token j leaves in the next state, [C, 1 or K]; None for 1.
      all: of the state itself, [1 or K, 1]; None for 1.
    """

    total: Any
    into: Any
    out: Any
    all: Any


class Prepared(NamedTuple):
    """What is known of a chunk before its state is.

    Attributes:
      decays: see there.
      P: [C, C].
      M: [C, C].
    """

    decays: Decays
    P: Any
    M: Any


class Solved(NamedTuple):
    """What a chunk corrects, once the state before it is known.

    Attributes:
      A: [C, C], the UT transform.
      error: [C, V], v - (e^G k) S.
      u: [C, V], the corrections.
    """

    A: Any
    error: Any
    u: Any


class Cotangents(NamedTuple):
    """Of q (times the scale), k, v, beta, log_decay (None without one)."""

    q: Any
    k: Any
    v: Any
    beta: Any
    log_decay: Any


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of matrices in full precision."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


# --- Decays. ----------------------------------------------------------------------------------------------------------


def seen(chunk: Chunk) -> jax.Array:
    """Whether token i sees token j, bool [C, C]."""
    place = jnp.arange(chunk.q.shape[0])
    earlier = place[:, None] >= place
    return earlier if chunk.segments is None else earlier & (chunk.segments[:, None] == chunk.segments)


def _decays(chunk: Chunk) -> Decays:
    g, segments = chunk.log_decay, chunk.segments
    C = chunk.q.shape[0]
    total = into = out = all_of = None
    if g is not None:
        total = recurrence.cumulative_decay(g, 0, segments)
        coarse, rest = (x.reshape(C, -1) for x in total)
        into = jnp.exp(coarse + rest)
        out = jnp.exp(_below_one((coarse[-1:] - coarse) + (rest[-1:] - rest)))
        all_of = into[-1][:, None]
    if segments is not None:
        reads, writes = (segments == chunk.carried)[:, None], (segments == segments[-1])[:, None]
        into = jnp.where(reads, 1 if into is None else into, 0).astype(chunk.q.dtype)
        out = jnp.where(writes, 1 if out is None else out, 0).astype(chunk.q.dtype)
        all_of = jnp.where(reads[-1:], 1 if all_of is None else all_of, 0).astype(chunk.q.dtype)
    return Decays(total, into, out, all_of)


def _below_one(exponent: jax.Array) -> jax.Array:
    """The exponent where it belongs to a pair of one segment, <= 0 but for rounding; what may overflow becomes 0."""
    return jnp.where(exponent < 1, exponent, 0)


def _times(factor: Any, x: jax.Array) -> jax.Array:
    return x if factor is None else factor * x


def _between(chunk: Chunk, d: Decays, x: jax.Array) -> jax.Array:
    """x [C, C] times e^{G_i - G_j} where i sees j, else 0."""
    if d.total is None:
        return jnp.where(seen(chunk), x, 0)
    coarse, rest = d.total
    exponent = (coarse[:, None] - coarse) + (rest[:, None] - rest)
    return jnp.exp(jnp.where(seen(chunk), exponent, -jnp.inf)) * x


def _strictly_lower(x: jax.Array) -> jax.Array:
    place = jnp.arange(x.shape[-1])
    return jnp.where(place[:, None] > place, x, 0)


# --- Pairs of tokens: P and M, and back. ------------------------------------------------------------------------------


def prepare(chunk: Chunk) -> Prepared:
    """The part of a chunk that needs no state."""
    d = _decays(chunk)
    if d.total is not None and d.total[0].ndim == 2:
        return Prepared(d, *_pairs_of_channels(chunk.q, chunk.k, d.total[1], d.total[0], seen(chunk)))
    P, M = (_between(chunk, d, dot(x, chunk.k.T)) for x in (chunk.q, chunk.k))
    return Prepared(d, P, _strictly_lower(M))


def _pairs_back(chunk: Chunk, prepared: Prepared, dP: jax.Array, dM: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """Cotangents of q, k and G from those of P and M, of which the part where nothing is seen does not count."""
    d, P, M = prepared
    if d.total is not None and d.total[0].ndim == 2:
        run = lambda q, k, rest: _pairs_of_channels(q, k, rest, d.total[0], seen(chunk))  # noqa: E731
        _, back = jax.vjp(run, chunk.q, chunk.k, d.total[1])
        return back((dP, dM))
    dP_near, dM_near = _between(chunk, d, dP), _between(chunk, d, _strictly_lower(dM))
    dq = dot(dP_near, chunk.k)
    dk = dot(dP_near.T, chunk.q) + dot(dM_near + dM_near.T, chunk.k)
    if d.total is None:
        return dq, dk, None
    # The diagonal would cancel; next to large entries not to 0.
    weight = _strictly_lower(dP * P) + dM * M
    return dq, dk, jnp.sum(weight, axis=1) - jnp.sum(weight, axis=0)


def _pairs_of_channels(
    q: jax.Array, k: jax.Array, rest: jax.Array, coarse: jax.Array, visible: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """P and M where every key channel has a decay of its own, by sub-blocks of 16 tokens."""
    C, K = q.shape
    sub = min(_SUB, C)
    n = C // sub
    blocks = lambda x: x.reshape(n, sub, K)  # noqa: E731
    same = jnp.stack([visible[i * sub : (i + 1) * sub, i * sub : (i + 1) * sub] for i in range(n)])[..., None]
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
    return jnp.where(visible, P, 0), _strictly_lower(jnp.where(visible, M, 0))


# --- The UT transform. ------------------------------------------------------------------------------------------------


def invert_small(L: jax.Array) -> jax.Array:
    """Inverses of the diagonal blocks of I + L, L strictly lower triangular [n, C, C], sub = min(16, C) tokens each.

    By block doubling: the inverses X1, X2 of two neighbouring diagonal blocks give that of both, whose lower left part
    is -X2 L21 X1. No power of L appears, which would be huge where keys are alike. Entry by entry, the blocks of all
    chunks side by side, since products of such small matrices would cost more than their arithmetic. The result is
    [n, C / sub, sub, sub].
    """
    n, C, _ = L.shape
    group = min(_TOGETHER // _tiled(C)[0], n)
    padded = jnp.pad(L, ((0, -n % group), (0, 0), (0, 0)))
    return jax.lax.map(_invert_group, padded.reshape(-1, group, C, C)).reshape(-1, *_tiled(C))[:n]


def _tiled(C: int) -> tuple[int, int, int]:
    sub = min(_SUB, C)
    return C // sub, sub, sub


def _invert_group(L: jax.Array) -> jax.Array:
    n, C, _ = L.shape
    sub = min(_SUB, C)
    tiles = L.reshape(n, C // sub, sub, C // sub, sub)
    # [sub, sub, blocks]
    diagonal = jnp.stack([tiles[:, i, :, i] for i in range(C // sub)], axis=1)
    L = diagonal.reshape(-1, sub * sub).T.reshape(sub, sub, -1)
    # [blocks of b tokens, b, b, lanes]
    times = lambda a, b: jnp.sum(a[:, :, :, None] * b[:, None], axis=2)  # noqa: E731
    X = jnp.ones((sub, 1, 1, L.shape[-1]), L.dtype)
    b = 1
    while b < sub:
        lower = jnp.stack([L[i + b : i + 2 * b, i : i + b] for i in range(0, sub, 2 * b)])
        first, second = X[::2], X[1::2]
        X = _joined(first, -times(second, times(lower, first)), second, axis=1)
        b *= 2
    return X[0].reshape(sub * sub, -1).T.reshape(n, C // sub, sub, sub)


def _joined(first: jax.Array, corner: jax.Array, second: jax.Array, axis: int = 0) -> jax.Array:
    """[[first, 0], [corner, second]] in an axis and the next."""
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=axis + 1)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], axis=axis + 1)], axis=axis)


@jax.custom_vjp
def _inverse(L: jax.Array, small: jax.Array) -> jax.Array:
    """(I + L)^{-1} [C, C] from the inverses of its small diagonal blocks, by the last rounds of block doubling."""
    blocks = list(small)
    while len(blocks) > 1:
        b = blocks[0].shape[0]
        pairs = range(0, len(blocks), 2)
        lower = [L[(i + 1) * b : (i + 2) * b, i * b : (i + 1) * b] for i in pairs]
        corners = [dot(-blocks[i + 1], dot(x, blocks[i])) for i, x in zip(pairs, lower, strict=True)]
        blocks = [_joined(blocks[i], x, blocks[i + 1]) for i, x in zip(pairs, corners, strict=True)]
    return blocks[0]


def _inverse_fwd(L: jax.Array, small: jax.Array) -> tuple[jax.Array, jax.Array]:
    A = _inverse(L, small)
    return A, A


def _inverse_bwd(A: jax.Array, dA: jax.Array) -> tuple[jax.Array, None]:
    # Of L alone: the small inverses are intermediate results of it.
    return -_strictly_lower(dot(dot(A.T, dA), A.T)), None


_inverse.defvjp(_inverse_fwd, _inverse_bwd)


# --- One chunk, forward and backward. ---------------------------------------------------------------------------------


def solve(chunk: Chunk, prepared: Prepared, small: jax.Array, S: jax.Array) -> Solved:
    """The corrections of a chunk behind the state S [K, V]; small: inverses of the diagonal blocks of I + beta M."""
    beta = chunk.beta[:, None]
    A = _inverse(beta * prepared.M, small)
    error = chunk.v - dot(_times(prepared.decays.into, chunk.k), S)
    return Solved(A, error, dot(A, beta * error))


def read(chunk: Chunk, prepared: Prepared, solved: Solved, S: jax.Array) -> jax.Array:
    """The output [C, V]."""
    return dot(_times(prepared.decays.into, chunk.q), S) + dot(prepared.P, solved.u)


def update(chunk: Chunk, prepared: Prepared, solved: Solved, S: jax.Array) -> jax.Array:
    """The next state [K, V]."""
    return _times(prepared.decays.all, S) + dot(_times(prepared.decays.out, chunk.k).T, solved.u)


def backward(
    chunk: Chunk, prepared: Prepared, solved: Solved, S: jax.Array, do: jax.Array, dS: jax.Array
) -> tuple[Cotangents, jax.Array]:
    """Cotangents of a chunk and of its state S, from those of its output and of the next state."""
    d, P, M = prepared
    A, error, u = solved
    beta = chunk.beta[:, None]
    q_in, k_in, k_out = _times(d.into, chunk.q), _times(d.into, chunk.k), _times(d.out, chunk.k)

    du = dot(P.T, do) + dot(k_out, dS)
    back = dot(A.T, du)  # of beta * error
    # -A^T dA A^T with dA = du (beta error)^T.
    dL = -_strictly_lower(dot(back, u.T))
    dq, dk, dG = _pairs_back(chunk, prepared, dot(do, u.T), beta * dL)
    dbeta = jnp.sum(back * error, axis=1) + jnp.sum(dL * M, axis=1)
    dv = beta * back

    dq_in, dk_in, dk_out = dot(do, S.T), -dot(dv, S.T), dot(u, dS.T)
    dq = dq + _times(d.into, dq_in)
    dk = dk + _times(d.into, dk_in) + _times(d.out, dk_out)
    dS_before = _times(d.all, dS) + dot(q_in.T, do) - dot(k_in.T, dv)
    if dG is None:
        return Cotangents(dq, dk, dv, dbeta, None), dS_before
    leaves = dk_out * k_out
    reads = dq_in * q_in + dk_in * k_in - leaves
    last = jnp.sum(leaves, axis=0) + jnp.sum(d.all * dS * S, axis=1)
    if dG.ndim == 1:
        reads, last = jnp.sum(reads, axis=1), jnp.sum(last)
    dG = (dG + reads).at[-1].add(last)
    return Cotangents(dq, dk, dv, dbeta, _sum_back(dG, seen(chunk))), dS_before


def _sum_back(dG: jax.Array, visible: jax.Array) -> jax.Array:
    """Each token's share: the sum over the tokens of its segment from it on."""
    return dot(visible.T.astype(dG.dtype), dG.reshape(dG.shape[0], -1)).reshape(dG.shape)
