"""Tree blocks of a grid: one block solved beside SciPy's sparse LU, and how many blocks label propagation needs."""

import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, Target, register

LIMIT = 4000


def grid(n: int):
    """The Laplacian of an n x n grid plus one where a label is known, a tenth of the nodes; and the labels."""
    import numpy as np
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    path = sp.diags_array([-np.ones(n - 1), -np.ones(n - 1)], offsets=[-1, 1])
    off = sp.kron(path, sp.eye_array(n)) + sp.kron(sp.eye_array(n), path)
    known = rng.uniform(size=n * n) < 0.1
    A = (off + sp.diags_array(-off.sum(axis=1) + known)).tocsr()
    return A, known * np.where(np.arange(n * n) % n < n / 2, 1.0, -1.0)


def forests(A):
    """A greedy forest, and one that takes what the first left before anything else."""
    from jaxnum.solvers import forest_solve_order

    first = forest_solve_order(A)
    return first, forest_solve_order(A, scores=~first.mask)


def entries(A, forest):
    """The diagonal of A, and its entries between nodes and parents."""
    import numpy as np

    nodes, parents = np.asarray(forest.nodes), np.asarray(forest.parents)
    inside = parents < A.shape[0]
    edges = np.zeros(nodes.shape)
    edges[inside] = A[nodes[inside], parents[inside]]
    return jnp.asarray(A.diagonal()), jnp.asarray(edges)


def make(params: Params) -> tuple:
    A, b = grid(params["n"])
    return (*entries(A, forests(A)[0]), jnp.asarray(b))


def run(params: Params):
    from jaxnum.solvers import forest_solve

    forest = forests(grid(params["n"])[0])[0]
    return lambda diagonal, edges, rhs: forest_solve(forest, diagonal, edges, rhs)


def scipy(params: Params):
    import numpy as np
    import scipy.sparse.linalg

    A = grid(params["n"])[0]
    mask = np.asarray(forests(A)[0].mask)
    block = A[mask][:, mask].tocsc()

    def solve(diagonal, edges, rhs):
        x = np.zeros(len(mask))
        x[mask] = scipy.sparse.linalg.spsolve(block, rhs[mask])
        return x

    return solve


def dense(params: Params):
    A = grid(params["n"])[0]
    mask = jnp.asarray(forests(A)[0].mask)
    block = jnp.where(mask[:, None] & mask, jnp.asarray(A.toarray()), jnp.eye(len(mask)))
    return lambda diagonal, edges, rhs: jnp.linalg.solve(block, jnp.where(mask, rhs, 0))


def label_propagation() -> dict[str, float]:
    """Exact block updates on a 50 x 50 grid to a relative gap of 1e-4: two forests in turn, against red-black."""
    import numpy as np
    import scipy.sparse.linalg

    from jaxnum.solvers import forest_solve

    A, b = grid(50)
    best = scipy.sparse.linalg.spsolve(A.tocsc(), b)
    value = lambda x: 0.5 * x @ (A @ x) - b @ x  # noqa: E731
    red = np.indices((50, 50)).sum(axis=0).ravel() % 2 == 0
    trees = [(forest, np.asarray(forest.mask), *entries(A, forest)) for forest in forests(A)]

    def by_trees(x, k):
        forest, mask, diagonal, edges = trees[k % 2]
        outside = np.where(mask, 0, x)
        return np.where(mask, forest_solve(forest, diagonal, edges, jnp.asarray(b - A @ outside)), x)

    def by_colour(x, k):
        mask = red if k % 2 else ~red
        return np.where(mask, x + (b - A @ x) / A.diagonal(), x)

    def updates(update) -> int:
        x = np.zeros(len(b))
        for k in range(LIMIT):
            if value(x) - value(best) <= 1e-4 * (value(np.zeros(len(b))) - value(best)):
                return k
            x = update(x, k)
        return LIMIT

    counts = {"updates_trees": updates(by_trees), "updates_red_black": updates(by_colour)}
    shares = {"nodes_in_first_forest": float(trees[0][1].mean()), "nodes_in_second_forest": float(trees[1][1].mean())}
    return counts | shares | {"trees_to_red_black": counts["updates_trees"] / counts["updates_red_black"]}


register(
    Row(
        name="forest_solve",
        covers=("forest_solve", "forest_solve_order"),
        shapes={"grid_50": {"n": 50}},
        make=make,
        run=run,
        reference=dense,
        modes=("solve",),
        tests=("tests/solvers/test_forest_solve.py",),
        peers={"scipy": Peer("scipy", scipy, jit=False)},
        targets=(
            Target("error", 1e-10, "forest_solve equals the dense solve to 1e-10."),
            Target(
                "figure",
                0.5,
                "50x50 grid label propagation: tree blocks in at most 0.5x the block updates of red-black.",
                figure="trees_to_red_black",
            ),
        ),
        figures={"label_propagation": label_propagation},
        x64=True,
    )
)
