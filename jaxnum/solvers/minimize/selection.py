"""Which block of coordinates a step of block coordinate descent takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.solvers.minimize._forest_solve import Forest
from kernels_pallas import checks

_THRESHOLDINGS = 10


class Block(NamedTuple):
    """Coordinates [tau] int32, and which of them are meant; the others hold 0."""

    index: jax.Array
    mask: jax.Array

    def of(self, vector: jax.Array) -> jax.Array:
        """Its entries of a vector, zero where none is meant."""
        return jnp.where(self.mask, vector[self.index], 0)

    def put(self, vector: jax.Array, entries: jax.Array) -> jax.Array:
        """The vector with these entries in place of its own."""
        return vector.at[jnp.where(self.mask, self.index, vector.size)].set(entries, mode="drop")

    def matrix(self, H: jax.Array) -> jax.Array:
        """Its rows and columns of a matrix; see `padded`."""
        return self.padded(H[self.index][:, self.index])

    def padded(self, H: jax.Array) -> jax.Array:
        """A matrix [tau, tau] with a multiple of the identity where no coordinate is meant."""
        both = self.mask[:, None] & self.mask
        # Of the size of the rest, lest it make the rest look singular.
        largest = jnp.max(jnp.where(both, jnp.abs(H), 0))
        return jnp.where(both, H, jnp.where(largest > 0, largest, 1) * jnp.eye(len(self.index), dtype=H.dtype))

    def spread(self, entries: jax.Array, size: int) -> jax.Array:
        """The vector [size] with these entries, zero elsewhere."""
        return jnp.zeros((size,), entries.dtype).at[self.index].add(jnp.where(self.mask, entries, 0))


def promised(g: jax.Array, z: jax.Array, curvature: jax.Array, backward: Any, penalty: Any) -> jax.Array:
    """The gradient of a smooth function that would promise each coordinate as much, up to sign.  [d]

    A step d along coordinate i decreases g d + c d² / 2 + h(z + d) - h(z) by g² / 2 c where h = 0. Where h is known by
    its resolvent alone, by c d² / 2 at least, because h is convex.

    Args:
      g: [d] gradient of the smooth part.
      z: [d] the point.
      curvature: [d] c > 0.
      backward: the resolvent, of vectors (z, steps).
      penalty: None, or the values h of a vector.
    """
    d = backward(z - g / curvature, 1 / curvature) - z
    decrease = curvature * d**2 / 2
    if penalty is not None:
        # The difference is rounding when d is small; what convexity says is not.
        decrease = jnp.maximum(decrease, penalty(z) - penalty(z + d) - g * d - decrease)
    return jnp.sqrt(2 * curvature * decrease)


def checked(blocks: Any) -> np.ndarray:
    """Fixed blocks of `bcd`, int32 [K, tau], or an error that says what is wrong with them."""
    checks.shape("bcd", blocks=(blocks, "K T"))
    given = np.asarray(blocks)
    checks.dtype("bcd", "integer", blocks=given)
    empty = [] if given.size else ["all"]
    empty += np.flatnonzero((given < 0).all(axis=1)).tolist() if given.size else []
    checks.value("bcd", "blocks", not empty, "have a coordinate in every block", f"empty blocks {empty[:5]}")
    missing = sorted(set(range(given.max() + 1)) - set(given.ravel().tolist()))
    checks.value("bcd", "blocks", not missing, "cover every coordinate", f"blocks without {missing[:5]}")
    twice = [i for i, row in enumerate(given) if len(set(row[row >= 0])) < np.sum(row >= 0)]
    checks.value("bcd", "blocks", not twice, "name a coordinate once in a block", f"it twice in blocks {twice[:5]}")
    return given.astype(np.int32)


def check_forests(forests: Forest, selection: str, update: str) -> int:
    """Whether forests can be the blocks of `bcd` with these rules, and how many coordinates there are."""
    sizes = checks.shape(
        "bcd", nodes=(forests.nodes, "K L W"), parents=(forests.parents, "K L W"), mask=(forests.mask, "K D")
    )
    everywhere = bool(np.asarray(forests.mask).any(axis=0).all())
    checks.value("bcd", "blocks", everywhere, "cover every coordinate", "forests that leave some out")
    checks.value("bcd", "update", update == "newton", "be 'newton' where the blocks are forests", update)
    known = selection not in ("gsl", "gsq", "gsn")
    remedy = "The others measure a block by a dense matrix."
    checks.value("bcd", "selection", known, "be 'gs' or 'gsd' where the blocks are forests", selection, remedy)
    return sizes["D"]


def fixed(blocks: Any) -> Block:
    """All fixed blocks, [K, tau] int32 with -1 where one is shorter, or K forests, as one Block with a leading axis."""
    if isinstance(blocks, Forest):
        size = blocks.mask.shape[1]
        return Block(jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), blocks.mask.shape), blocks.mask)
    return Block(jnp.maximum(blocks, 0), blocks >= 0)


def width(blocks: Any) -> int:
    """By how much the coordinates' bounds are raised to bound a block; of a forest, where one number suits all, 1."""
    return 1 if isinstance(blocks, Forest) else blocks.shape[1]


def choose_fixed(rule: str, blocks: Block, g: Any, bounds: Any, H: Any, count: jax.Array, key: Any) -> jax.Array:
    """The number of the block with the largest score, the next one, or a random one.  []

    Args:
      rule: a selection of `bcd`.
      blocks: all of them, see `fixed`.
      g: [d] gradient, or None for a rule that ignores it.
      bounds: [d] what divides the squares, or None.
      H: [d, d] what measures the promised decrease, or None.
      count: [] int32 steps taken.
      key: typed key, or None.
    """
    number = blocks.index.shape[0]
    if rule == "cyclic":
        return count % number
    if rule == "random":
        return jax.random.randint(jax.random.fold_in(key, count), (), 0, number, jnp.int32)
    return jnp.argmax(scores(rule, blocks, g, bounds, H))


def scores(rule: str, blocks: Block, g: jax.Array, bounds: Any, H: Any) -> jax.Array:
    """The score of every block, twice the decrease that a step on it guarantees.  [K]"""
    gradients = jax.vmap(lambda b: b.of(g))(blocks)
    squares = gradients**2
    if rule == "gs":
        return jnp.sum(squares, axis=1)
    if rule == "gsd":
        return jnp.sum(squares / jax.vmap(lambda b: jnp.where(b.mask, bounds[b.index], 1))(blocks), axis=1)
    if rule == "gsl":
        return jnp.sum(squares, axis=1) / jax.vmap(lambda b: block_bound(b, bounds, H))(blocks)
    return jax.vmap(lambda b, gb: gb @ jnp.linalg.solve(b.matrix(H), gb))(blocks, gradients)


def block_bound(block: Block, bounds: Any, H: Any) -> jax.Array:
    """L_B: the largest eigenvalue of the block of the bound, or the sum of the coordinates' bounds.  []"""
    if H is None:
        return jnp.sum(block.of(bounds))
    both = block.mask[:, None] & block.mask
    return jnp.linalg.eigvalsh(jnp.where(both, H[block.index][:, block.index], 0))[-1]


def choose_variable(rule: str, size: int, total: int, g: Any, bounds: Any, H: Any, count: jax.Array, key: Any) -> Block:
    """The `size` coordinates that score most, of all `total`; see `choose_fixed`."""
    if rule == "cyclic":
        index = (count * size + jnp.arange(size, dtype=jnp.int32)) % total
    elif rule == "random":
        index = jax.random.permutation(jax.random.fold_in(key, count), total)[:size].astype(jnp.int32)
    elif rule in ("gsq", "gsn"):
        index = thresholded(size, g, H)
    else:
        score = jnp.abs(g) if rule == "gs" else jnp.abs(g) / jnp.sqrt(bounds)
        index = jax.lax.top_k(score, size)[1]
    return Block(index, jnp.ones((size,), bool))


def thresholded(size: int, g: jax.Array, H: jax.Array) -> jax.Array:
    """Coordinates of iterative hard thresholding on g.d + 0.5 d.H d: gradient steps that keep the largest |d|.  [size]

    The step is the inverse of the largest row sum of |H|, which bounds its eigenvalues.
    """
    rows = jnp.max(jnp.sum(jnp.abs(H), axis=1))
    step = 1 / jnp.where(rows == 0, 1, rows)
    diagonal = jnp.abs(jnp.diag(H))
    start = -g / jnp.sqrt(jnp.where(diagonal == 0, 1, diagonal))

    def turn(_: Any, d: jax.Array) -> jax.Array:
        d = d - step * (g + H @ d)
        kept = jax.lax.top_k(jnp.abs(d), size)[1]
        return jnp.zeros_like(d).at[kept].set(d[kept])

    return jax.lax.top_k(jnp.abs(jax.lax.fori_loop(0, _THRESHOLDINGS, turn, start)), size)[1]
