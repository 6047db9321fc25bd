"""What the tests of inclusion solvers share: driving a solver by hand, and the bilinear saddle point."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxnum import Inclusion

SINGULAR = np.linspace(1e-3, 1, 50)
COUNTS = np.array([100, 300, 1000, 3000, 5000])


def driven(solver, problem, x0, counts):
    """x, state and residual after each of these counts of steps, without the driver's stopping rule."""

    def body(_, pair):
        return solver.step(solver.hyper, *pair, problem)

    # A traced count: one compilation serves all.
    advance = jax.jit(lambda pair, steps: jax.lax.fori_loop(0, steps, body, pair))
    out, pair, done = [], (x0, solver.init(solver.hyper, x0, problem)), 0
    for count in counts:
        pair = advance(pair, int(count) - done)
        out.append((*pair, solver.measure(solver.hyper, *pair, problem).residual))
        done = int(count)
    return out


def residuals(solver, problem, x0, counts):
    return np.array([float(residual) for *_, residual in driven(solver, problem, x0, counts)])


def slope(counts, values):
    return np.polyfit(np.log(counts), np.log(values), 1)[0]


def bilinear():
    """F(p, q) = (S q, -S p) in the basis of the singular vectors: monotone, 1-Lipschitz, not cocoercive; zero at 0."""
    return Inclusion(lambda z: jnp.stack([SINGULAR * z[1], -SINGULAR * z[0]]))


def hard_start():
    """Weights S^-1/8 of the singular directions: the sum over S that extragradient leaves then falls as k^-11/16."""
    return jnp.asarray(np.stack([SINGULAR**-0.125] * 2))


def game(seed=0, rows=5, columns=4):
    """A zero-sum matrix game over the box [0, 1]^n beside a linear term, and its linear program's value."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, columns)), rng.normal(size=rows), rng.normal(size=columns)
