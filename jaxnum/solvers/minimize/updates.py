"""What a step of block coordinate descent does to the block it has chosen."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnum.core.status import Status
from jaxnum.curvature import hessian_product
from jaxnum.solvers.minimize import flat
from jaxnum.solvers.minimize._forest_solve import Forest, forest_solve
from jaxnum.solvers.minimize.selection import Block

# Gauss-Seidel sweeps on the model of a block with a part that is not smooth.
_SWEEPS = 5
# A first guess of a Lipschitz constant, as a share of the curvature along the gradient: the guess only ever doubles.
_FIRST_GUESS = 1e-3
_DOUBLINGS = 80


class Here(NamedTuple):
    """A point and what is known there.

    Attributes:
      problem: a Minimize.
      tree: makes a tree of a vector.
      z: [d] the point.
      gradient: [d], at least on the block.
      image: [n] A z, or None without A.
    """

    problem: Any
    tree: Any
    z: jax.Array
    gradient: jax.Array
    image: Any

    def outer(self, w: jax.Array) -> jax.Array:
        """The smooth function of `argument`, A z or z."""
        return self.problem.outer(self.tree(w) if self.image is None else w)

    @property
    def argument(self) -> jax.Array:
        """What `outer` is a function of."""
        return self.z if self.image is None else self.image

    def columns(self, block: Block) -> jax.Array:
        """How each coordinate of the block moves `argument`.  [tau, d or n]"""
        if self.image is None:
            return jax.vmap(lambda i: (jnp.arange(self.z.size) == i).astype(self.z.dtype))(block.index)
        return self.problem.A.T[block.index]

    def shift(self, block: Block, db: jax.Array) -> jax.Array:
        """How a step on the block moves `argument`."""
        if self.image is None:
            return block.spread(db, self.z.size)
        return jnp.matmul(jnp.where(block.mask, db, 0), self.columns(block), precision="highest")

    def frozen(self) -> Here:
        """Without derivatives."""
        # The function that makes trees is no array.
        problem, *arrays = jax.lax.stop_gradient((self.problem, self.z, self.gradient, self.image))
        return Here(problem, self.tree, *arrays)

    def pulled(self, block: Block, target: jax.Array, steps: jax.Array) -> jax.Array:
        """The resolvent at entries [tau] of the block, with steps [tau] or one for all.  [tau]"""
        if self.problem.resolvent is None:
            return target
        every = block.put(jnp.zeros_like(self.z), jnp.broadcast_to(steps, target.shape))
        return flat.backward(self.problem, block.put(self.z, target), every, self.tree)[block.index]

    def penalty(self, z: jax.Array) -> Any:
        """The sum of the values h_i, or 0 where none are given."""
        return 0 if self.problem.penalty is None else jnp.sum(flat.penalty(self.problem, z, self.tree))


def newton(here: Here, block: Block) -> tuple[jax.Array, jax.Array]:
    """The minimiser of the second-order model on the block, as far towards it as the function decreases.

    Returns:
      The new entries [tau], and a Status or 0.
    """
    return _backtracked(here, block, _minimised(here, block, positive(_block_hessian(here, block))))


def forest(here: Here, block: Block, trees: Forest) -> tuple[jax.Array, jax.Array]:
    """As `newton` on a forest in the graph of the Hessian, by messages; the block holds every coordinate, masked.

    Three Hessian products show all its entries, whatever its size: with the nodes at depths 0, 3, 6, ... as direction,
    the neighbours of a node at depth 1, 4, ... that are in the direction are its parent, and a node in it has none
    but itself; likewise for depths 1, 4, ... and 2, 5, ...
    """
    size, (levels, _) = here.z.size, trees.nodes.shape
    depths = jnp.broadcast_to(jnp.arange(levels - 1, -1, -1, dtype=jnp.int32)[:, None], trees.nodes.shape)
    colour = jnp.zeros((size,), jnp.int32).at[trees.nodes].set(depths % 3, mode="drop")
    probes = (colour == jnp.arange(3)[:, None]) & trees.mask
    product = hessian_product(flat.value(here.problem, here.tree), here.z)
    rows = jax.vmap(product)(probes.astype(here.z.dtype))
    each = jnp.arange(size)
    diagonal, edges = rows[colour, each], rows[(colour + 2) % 3, each][jnp.minimum(trees.nodes, size - 1)]
    rhs = -block.of(here.gradient)
    definite = jnp.all(jnp.isfinite(forest_solve(trees, *jax.lax.stop_gradient((diagonal, edges, rhs)))))
    step = forest_solve(trees, jnp.where(definite, diagonal, _dominant(trees, diagonal, edges)), edges, rhs)
    return _backtracked(here, block, here.z + step)


def _dominant(trees: Forest, diagonal: jax.Array, edges: jax.Array) -> jax.Array:
    """A diagonal that makes any forest positive definite.  [d]"""
    sizes = jnp.where(trees.parents < diagonal.size, jnp.abs(edges), 0)
    rows = jnp.zeros_like(diagonal).at[trees.nodes].add(sizes, mode="drop").at[trees.parents].add(sizes, mode="drop")
    dominant = jnp.maximum(jnp.abs(diagonal), rows)
    largest = jnp.max(dominant)
    return dominant + jnp.where(largest > 0, jnp.finfo(diagonal.dtype).eps ** 0.5 * largest, 1)


def _backtracked(here: Here, block: Block, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From the block's entries towards the target as far as the function decreases, and a Status or 0."""
    gb, zb = block.of(here.gradient), block.of(here.z)
    db = jnp.where(block.mask, target - zb, 0)
    still, moving, step = here.frozen(), *jax.lax.stop_gradient((target, db))
    direction, change = still.shift(block, step), still.penalty(block.put(still.z, moving)) - still.penalty(still.z)

    def value(t: jax.Array) -> jax.Array:
        h = still.penalty(block.put(still.z, still.z[block.index] + t * step))
        return still.outer(still.argument + t * direction) + h

    t = flat.armijo(value, jnp.sum(jax.lax.stop_gradient(gb) * step) + change)
    # Where there is nothing to gain on the block, nothing is amiss.
    idle = (t == 0) & jnp.any(db != 0)
    return jnp.where(t == 1, target, zb + t * db), jnp.where(idle, jnp.int32(Status.stagnated), 0)


def matrix(here: Here, block: Block, H: jax.Array) -> jax.Array:
    """The minimiser of the model whose matrix is the bound H [d, d], which lies above the function.  [tau]"""
    return _minimised(here, block, positive(block.matrix(H)))


def _minimised(here: Here, block: Block, H: jax.Array) -> jax.Array:
    """The minimiser of g.d + d.H d / 2 over the block: exact for a smooth problem, else by Gauss-Seidel sweeps."""
    gb, zb = block.of(here.gradient), block.of(here.z)
    if here.problem.resolvent is None:
        return zb - jnp.linalg.solve(H, gb)
    steps, size = 1 / jnp.diag(H), zb.size

    def turn(k: Any, y: jax.Array) -> jax.Array:
        j = k % size
        moved = y.at[j].add(-steps[j] * (gb[j] + jnp.sum(H[j] * (y - zb))))
        return y.at[j].set(here.pulled(block, moved, steps)[j])

    return jax.lax.fori_loop(0, _SWEEPS * size, turn, zb)


def gradient(here: Here, block: Block, bound: jax.Array) -> jax.Array:
    """A step along the gradient, through the resolvent where there is one: z_B - g_B / L_B.  [tau]"""
    step = 1 / jnp.where(bound > 0, bound, 1)
    return here.pulled(block, block.of(here.z) - step * block.of(here.gradient), step)


def doubled(here: Here, block: Block, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first of L, 2 L, 4 L, ... that bounds what f does along the step of its own.

    That is f(z + d) <= f(z) + g.d + L |d|² / 2 (f(z) - |g_B|² / 2 L without a resolvent), and what follows from it for
    a convex quadratic f, d.(g(z + d) - g) <= L |d|². Near a minimum values of f are rounding, and say nothing or force
    L up for ever, long before gradients are: where the step promises less than a share of f, the second decides alone.

    Returns:
      The bound, and a Status or 0.
    """
    still = here.frozen()
    zb, gb = block.of(still.z), block.of(still.gradient)
    start = still.outer(still.argument)
    eps = 8 * jnp.finfo(start.dtype).eps

    def refused(carry: tuple) -> jax.Array:
        L, count = carry
        db = gradient(still, block, L) - zb
        slope, room = jnp.sum(gb * db), L * jnp.sum(db**2)
        direction = still.shift(block, db)
        end, ahead = jax.value_and_grad(lambda t: still.outer(still.argument + t * direction))(jnp.ones_like(L))
        below = (end <= start + slope + room / 2) | (room <= jnp.sqrt(eps) * jnp.abs(start))
        bent = ahead - slope <= room + eps * (jnp.abs(ahead) + jnp.abs(slope))
        return ~(below & bent) & (count < _DOUBLINGS)

    L, count = jax.lax.while_loop(refused, lambda c: (2 * c[0], c[1] + 1), (bound, jnp.int32(0)))
    return L, jnp.where(count == _DOUBLINGS, jnp.int32(Status.stagnated), 0)


def first_guess(here: Here) -> jax.Array:
    """Where the doubling of every coordinate's bound begins: low, at the scale of the curvature.  [d]"""
    here = here.frozen()
    g = here.gradient
    curved = jnp.abs(jnp.sum(g * hessian_product(flat.value(here.problem, here.tree), here.z)(g)))
    size = jnp.sum(g**2)
    guess = _FIRST_GUESS * curved / jnp.where(size > 0, size, 1)
    return jnp.full_like(g, jnp.where(guess > 0, guess, 1))


def _block_hessian(here: Here, block: Block) -> jax.Array:
    """The block of the Hessian, one product a column.  [tau, tau]"""
    columns = here.columns(block)
    products = jax.vmap(hessian_product(here.outer, here.argument))(columns)
    if here.image is None:
        rows = products[:, block.index]
    else:
        rows = jnp.matmul(products, columns.T, precision="highest")
    return block.padded((rows + rows.T) / 2)


def positive(H: jax.Array) -> jax.Array:
    """H where it is safely positive definite, else shifted by what turns its lowest eigenvalue positive."""
    values = jnp.linalg.eigvalsh(jax.lax.stop_gradient(H))
    size = jnp.max(jnp.abs(values))
    floor = jnp.where(size > 0, jnp.finfo(H.dtype).eps ** 0.5 * size, 1)
    lowest = values[0]
    shift = jnp.where(lowest > floor, 0, floor + jnp.maximum(-2 * lowest, 0))
    # NaN stays: the driver sees it in the gradient.
    return H + shift * jnp.eye(H.shape[0], dtype=H.dtype)
