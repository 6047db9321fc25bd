"""Exact solution of sparse symmetric systems whose graph is a forest, and the choice of forests in any graph.

The elimination order is built on the host, once; the device goes through the levels of the trees.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import checks


class Forest(NamedTuple):
    """Rooted trees over chosen coordinates, by level; what `forest_solve_order` returns.

    Attributes:
      nodes: int32 [levels, width], the coordinates of each level, deepest level first, d where a level is narrower.
      parents: int32 [levels, width], the parent of each, d at a root and where no node is.
      mask: [d] bool, the coordinates that belong to the forest.
    """

    nodes: jax.Array
    parents: jax.Array
    mask: jax.Array


def forest_solve_order(A: Any, *, scores: Any = None) -> Forest:
    """Choose a maximal forest in the graph of a symmetric sparse matrix, and the order in which to eliminate it.

    Coordinates are visited by decreasing score. One joins if no two of its neighbours that have joined are in the same
    tree, so that it closes no cycle; its trees are then one (union-find). Of a matrix that is a forest all join.

    Args:
      A: [d, d] symmetric, a NumPy array or anything with a method `tocoo` (SciPy); its pattern of nonzeros counts, the
        diagonal does not, nor do entries that are stored but zero.
      scores: None (visit in order), or [d] real, as of |g_i| / sqrt(D_i).

    Returns:
      A `Forest`. Its shapes depend on A and the scores: a new one may recompile `forest_solve`.

    Raises:
      ShapeError: A is not square, or scores do not fit.
      ValueError: A is not symmetric, or has no rows.

    Cost: on the host, one pass over the nonzeros, nearly linear.

    Source: Nutini, Laradji & Schmidt, "Let's make block coordinate descent converge faster" (2022), section 5.4.

    Example:
      >>> import numpy as np
      >>> triangle = np.ones((3, 3))
      >>> forest_solve_order(triangle).mask.tolist()
      [True, True, False]
    """
    triples = A.tocoo() if hasattr(A, "tocoo") else None
    checks.shape("forest_solve_order", A=(A, "D D"), scores=(scores, "D"))
    d = A.shape[0]
    checks.value("forest_solve_order", "A", d > 0, "have at least one row", d)
    rows, columns = (
        np.nonzero(np.asarray(A))
        if triples is None
        else (triples.row[triples.data != 0], triples.col[triples.data != 0])
    )
    off = rows != columns
    neighbours: list[set[int]] = [set() for _ in range(d)]
    for i, j in zip(rows[off].tolist(), columns[off].tolist(), strict=True):
        neighbours[i].add(j)
    symmetric = all(i in neighbours[j] for i in range(d) for j in neighbours[i])
    checks.value("forest_solve_order", "A", symmetric, "have a symmetric pattern", "another", "Pass (A + A.T) / 2.")
    order = range(d) if scores is None else np.argsort(-np.asarray(scores, np.float64), kind="stable").tolist()
    return _levels(neighbours, _grown(neighbours, order), order)


def _grown(neighbours: list[set[int]], order: Any) -> np.ndarray:
    """Which coordinates join, in visiting order."""
    tree = list(range(len(neighbours)))
    joined = np.zeros(len(neighbours), bool)

    def root(i: int) -> int:
        while tree[i] != i:
            tree[i] = tree[tree[i]]
            i = tree[i]
        return i

    for i in order:
        roots = [root(j) for j in neighbours[i] if joined[j]]
        if len(set(roots)) == len(roots):
            joined[i] = True
            for other in roots:
                tree[other] = i
    return joined


def _levels(neighbours: list[set[int]], joined: np.ndarray, order: Any) -> Forest:
    """Breadth first from a root of every tree; the deepest level comes first."""
    d, seen = len(neighbours), ~joined
    levels: list[list[tuple[int, int]]] = [[]]
    for i in order:
        if seen[i]:
            continue
        seen[i] = True
        levels[0].append((i, d))
        reached = [(i, 0)]
        for node, depth in reached:
            for j in sorted(neighbours[node]):
                if not seen[j]:
                    seen[j] = True
                    reached.append((j, depth + 1))
                    if len(levels) == depth + 1:
                        levels.append([])
                    levels[depth + 1].append((j, node))
    levels.reverse()
    nodes = np.full((len(levels), max(map(len, levels))), d, np.int32)
    parents = nodes.copy()
    for row, level in enumerate(levels):
        for column, (node, parent) in enumerate(level):
            nodes[row, column], parents[row, column] = node, parent
    return Forest(jnp.asarray(nodes), jnp.asarray(parents), jnp.asarray(joined))


def forest_solve(forest: Forest, diagonal: jax.Array, edges: jax.Array, rhs: jax.Array) -> jax.Array:
    """Solve A_BB x_B = rhs_B where the graph of A_BB is a forest, by two passes of messages.

    Leaves to roots: P_i = a_ii - sum over children a_ij² / P_j, h_i = rhs_i - sum a_ij h_j / P_j; roots to leaves:
    x_j = (h_j - a_jp x_p) / P_j, p the parent of j. For a block of a larger system rhs is b_B - A_BC x_C.

    Args:
      forest: of `forest_solve_order`.
      diagonal: [d] floating, the diagonal of A.
      edges: [levels, width] floating, the entry of A between each node and its parent, like `forest.nodes`; anything
        where there is none. `A[forest.nodes, forest.parents]` of a dense A, indices clipped by JAX.
      rhs: [d] floating.

    Returns:
      x [d], zero outside the forest. Where A_BB is not positive definite, some pivot P_i is not positive, and x is NaN.

    Raises:
      ShapeError, DtypeError: the arrays do not fit.

    Cost: O(d) operations in two scans over the levels. A deep tree takes as many steps as it is deep: for a single
      chain use `jax.lax.linalg.tridiagonal_solve`.

    Numerics: no pivoting is needed for a positive definite A.

    Source: Nutini, Laradji & Schmidt (2022), section 5.4; Gaussian elimination in the order of a perfect elimination.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> A = np.array([[2.0, -1.0, 0.0], [-1.0, 2.0, 0.0], [0.0, 0.0, 4.0]])
      >>> forest = forest_solve_order(A)
      >>> edges = jnp.asarray(A)[forest.nodes, forest.parents]
      >>> forest_solve(forest, jnp.diag(jnp.asarray(A)), edges, jnp.array([1.0, 1.0, 2.0])).round(4).tolist()
      [1.0, 1.0, 0.5]
    """
    sizes = checks.shape(
        "forest_solve",
        mask=(forest.mask, "D"),
        diagonal=(diagonal, "D"),
        rhs=(rhs, "D"),
        nodes=(forest.nodes, "L W"),
        edges=(edges, "L W"),
    )
    checks.dtype("forest_solve", "floating", diagonal=diagonal, edges=edges, rhs=rhs)
    return _messages(forest, diagonal, edges, rhs, sizes["D"])


@partial(jax.jit, static_argnames="d")
def _messages(forest: Forest, diagonal: jax.Array, edges: jax.Array, rhs: jax.Array, d: int) -> jax.Array:
    nodes, parents = forest.nodes, forest.parents
    # One entry more, where what is sent by nodes that do not exist, and to parents that do not, is lost.
    pivots = jnp.append(jnp.where(forest.mask, diagonal, 1), 1)
    heights = jnp.append(jnp.where(forest.mask, rhs, 0), 0)
    edges = jnp.where(parents < d, edges, 0)

    def up(carry: tuple, level: tuple) -> tuple[tuple, None]:
        pivots, heights = carry
        node, parent, edge = level
        share = edge / pivots[node]
        return (pivots.at[parent].add(-share * edge), heights.at[parent].add(-share * heights[node])), None

    def down(x: jax.Array, level: tuple) -> tuple[jax.Array, None]:
        node, parent, edge = level
        return x.at[node].set((heights[node] - edge * x[parent]) / pivots[node]).at[d].set(0), None

    (pivots, heights), _ = jax.lax.scan(up, (pivots, heights), (nodes, parents, edges))
    x, _ = jax.lax.scan(down, jnp.zeros_like(heights), (nodes, parents, edges), reverse=True)
    definite = jnp.all(jnp.where(jnp.append(forest.mask, False), pivots > 0, True))
    return jnp.where(definite, x[:d], jnp.nan)
