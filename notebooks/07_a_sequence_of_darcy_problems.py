# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnum/jaxnum/blob/main/notebooks/07_a_sequence_of_darcy_problems.ipynb)
#
# # A sequence of Darcy problems
#
# Training data for a surrogate of groundwater flow: the same equation solved for forty permeabilities. Each system is
# new, but not very; a solver that remembers directions from the last one saves nearly half of the work. Runs in well
# under a minute on two CPU cores.

# %% [markdown]
# Outside a checkout of the repository, install the library first: `pip install "jaxnum[notebooks]"`. The next cell
# does so where it is missing.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxnum") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "jaxnum[notebooks]"], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.sparse import diags
from scipy.sparse.linalg import spsolve

import jaxnum
from jaxnum.solvers import gcro_dr, learned_relaxation, skr, skr_order, sor

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Forty permeabilities
#
# −∇·(K ∇p) = 1 on the unit square, p = 0 on its edge, on 32 × 32 cells. The logarithm of K is a sum of four cosines with
# random weights. Between two cells the harmonic mean of K counts, as for resistances in series.

# %%
n, systems = 32, 40
modes = ((1, 0), (0, 1), (1, 1), (2, 1))
weights = jnp.asarray(0.7 * np.random.default_rng(0).normal(size=(systems, len(modes))))
middle = (jnp.arange(n) + 0.5) / n


def permeability(theta):
    waves = [jnp.cos(jnp.pi * i * middle)[:, None] * jnp.cos(jnp.pi * j * middle) for i, j in modes]
    return jnp.exp(sum(weight * wave for weight, wave in zip(theta, waves, strict=True)))


def between(K):
    """Transmissibilities across the faces along the first axis, with the pressure 0 outside."""
    return jnp.concatenate([2 * K[:1], 2 * K[1:] * K[:-1] / (K[1:] + K[:-1]), 2 * K[-1:]])


def stencil(theta):
    K = permeability(theta)
    x, y = between(K), between(K.T).T
    return x, y, x[1:] + x[:-1] + y[:, 1:] + y[:, :-1]


def darcy(theta):
    """One system: a function for the matrix, and its diagonal as the preconditioner."""
    x, y, diagonal = stencil(theta)

    def apply(p):
        q = jnp.pad(p, 1)
        sides = x[1:] * q[2:, 1:-1] + x[:-1] * q[:-2, 1:-1] + y[:, 1:] * q[1:-1, 2:] + y[:, :-1] * q[1:-1, :-2]
        return diagonal * p - sides

    return jaxnum.Linear(apply, jnp.full((n, n), 1 / n**2), lambda r: r / diagonal, symmetric=False)


# %%
figure, axes = plt.subplots(2, 4, figsize=(9, 4.6), layout="constrained")
for column, index in zip(axes.T, (0, 1, 2, 3), strict=True):
    one = jaxnum.solve(gcro_dr(), jnp.zeros((n, n)), darcy(weights[index]), rtol=1e-8)
    column[0].imshow(jnp.log(permeability(weights[index])).T, origin="lower", cmap="viridis", vmin=-3, vmax=3)
    column[1].imshow(one.x.T, origin="lower", cmap="magma")
    column[0].set_title(f"log K of system {index}", fontsize=9)
    column[1].set_title(f"pressure, up to {float(one.x.max()):.2f}", fontsize=9)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## With and without memory
#
# Three ways to the same forty solutions, each to a residual of 1e-8 relative. All hold 40 directions at most.
#
# - GMRES(40): `gcro_dr` with k = 0. It forgets at every restart, and between systems.
# - Recycling: `skr` keeps the k = 10 directions in which the matrix is smallest, over restarts and from one system to
#   the next, in the order in which the systems came.
# - Recycling along a tour: the same, each system followed by the nearest one that is left.
#
# What counts is products with the matrix, the ones that make recycled directions fit the next system included.


# %%
@jax.jit
def forgetful(weights):
    one = lambda theta: jaxnum.solve(gcro_dr(m=40, k=0), jnp.zeros((n, n)), darcy(theta), rtol=1e-8)
    return jax.lax.map(one, weights)


tour = skr_order(weights)
runs = {
    "GMRES(40)": forgetful(weights),
    "recycling, as they came": skr(darcy, weights, m=40, k=10, order=jnp.arange(systems), rtol=1e-8),
    "recycling, sorted": skr(darcy, weights, m=40, k=10, order=tour, rtol=1e-8),
}
means = {name: float(jnp.mean(run.state.matvecs)) for name, run in runs.items()}
for name, mean in means.items():
    print(f"{name:24s} {mean:6.1f} products a system, {mean / means['GMRES(40)']:.0%} of GMRES(40)'s")

# %% [markdown]
# Every run solved every system, to what a sparse LU of SciPy's finds.


# %%
def direct(theta):
    x, y, diagonal = (np.array(part) for part in stencil(theta))
    right = y[:, 1:].copy()
    right[:, -1] = 0
    down, right = -x[1:-1].ravel(), -right.ravel()[:-1]
    A = diags([diagonal.ravel(), down, down, right, right], (0, n, -n, 1, -1)).tocsc()
    return spsolve(A, np.full(n * n, 1 / n**2)).reshape(n, n)


exact = np.stack([direct(theta) for theta in weights])
for name, run in runs.items():
    error = np.max(np.linalg.norm(run.x - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2)))
    print(f"{name:24s} largest relative error {error:.1e}")
    assert np.all(run.status == jaxnum.Status.converged)
    assert error < 1e-5

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.6), layout="constrained", gridspec_kw={"width_ratios": (2, 1)}
)
colours = ("tab:gray", "tab:orange", "tab:blue")
orders = (np.arange(systems), np.arange(systems), np.asarray(tour))
for (name, run), order, colour in zip(runs.items(), orders, colours, strict=True):
    left.plot(np.asarray(run.state.matvecs)[order], "o-", color=colour, markersize=3, label=name)
left.set(xlabel="system, in the order of solving", ylabel="products with the matrix", ylim=(0, None))
left.legend(fontsize=8)
bars = right.bar(["GMRES(40)", "recycling", "sorted"], list(means.values()), color=colours)
right.bar_label(bars, fmt="%.0f")
right.set(title="mean of a system", ylim=(0, 1.15 * max(means.values())))
plt.show()

# %% [markdown]
# ## What does the saving, and what does not
#
# Recycling does: it saves nearly half. Sorting hardly does. It brings about five products in a hundred of those that
# recycling leaves, because the directions that hold GMRES back, the smooth ones, are much the same for all forty
# permeabilities, near or far. The tour is shorter, as it should be; the steps along it just matter little.

# %%
recycled, tidy = means["recycling, as they came"], means["recycling, sorted"]
assert recycled < 0.6 * means["GMRES(40)"]
assert 0.90 < tidy / recycled < 0.99


def length(order):
    return float(jnp.sum(jnp.linalg.norm(jnp.diff(weights[jnp.asarray(order)], axis=0), axis=1)))


print(f"recycling saves {1 - recycled / means['GMRES(40)']:.0%}; sorting saves {1 - tidy / recycled:.0%} of the rest")
print(f"length of the path through the weights: {length(range(systems)):.1f} as they came, {length(tour):.1f} sorted")
assert length(tour) < 0.7 * length(range(systems))

# %% [markdown]
# ## Learning a parameter instead
#
# Sweeps have one parameter, the relaxation omega, and how many sweeps a system takes depends on it strongly. Over a
# sequence of systems it can be learned from the counts alone: `learned_relaxation` draws omega from a grid for each
# system by a bandit, Tsallis-INF, and is told how many sweeps the solve took. Here 600 Darcy problems of 8 × 8 cells,
# beside the same omega for all of them.

# %%
coarse, many = 8, 600
middle = (jnp.arange(coarse) + 0.5) / coarse  # permeability() now draws on these cells
more = jnp.asarray(0.7 * np.random.default_rng(1).normal(size=(many, len(modes))))


def small(theta):
    x, y, diagonal = stencil(theta)
    down, right = -x[1:-1].ravel(), -jnp.pad(y[:, 1:-1], ((0, 0), (0, 1))).ravel()[:-1]
    A = jnp.diag(diagonal.ravel()) + jnp.diag(down, coarse) + jnp.diag(down, -coarse)
    return jaxnum.Linear(A + jnp.diag(right, 1) + jnp.diag(right, -1), jnp.full(coarse**2, 1 / coarse**2))


grid = jnp.linspace(1, 1.95, 20)
learned = jax.jit(lambda key: learned_relaxation(small, more, key, omegas=grid, rtol=1e-8, max_steps=2000))(
    jax.random.key(0)
)


@jax.jit
def fixed(omega):
    """Sweeps of every system with one omega."""
    zero = jnp.zeros(coarse**2)
    one = lambda theta: jaxnum.solve(sor(omega), zero, small(theta), rtol=1e-8, max_steps=2000, on_failure="return").steps
    return jax.lax.map(one, more)


counts = jnp.stack([fixed(omega) for omega in grid[::3]])
best = float(counts.mean(axis=1).min())
halves = [float(half.mean()) for half in jnp.split(learned.steps, 2)]
print(f"mean sweeps: best fixed omega {best:.1f}, omega = 1 {float(counts[0].mean()):.1f}")
print(f"learned on the way: {halves[0]:.1f} in the first half, {halves[1]:.1f} in the second")
assert halves[1] < halves[0] < float(counts[0].mean())
assert halves[1] < 1.5 * best

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(grid[::3], counts.mean(axis=1), "o-", color="tab:gray", label="the same omega for all")
left.axhline(halves[1], color="tab:blue", label="learned, second half")
left.set(xlabel="omega", ylabel="sweeps a system", ylim=(0, None))
left.legend(fontsize=8)
right.plot(grid[learned.arms], ".", color="tab:blue", markersize=3)
right.set(xlabel="system", ylabel="omega chosen", title="what the bandit tries, and what it settles on")
plt.show()
