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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnum/jaxnum/blob/main/notebooks/05_equilibrium_of_a_game.ipynb)
#
# # Equilibrium of a game
#
# Where two players' gradients pull in circles, gradient descent runs away, extragradient creeps, and an anchored method
# arrives. Then a matrix game solved to the value that linear programming gives, and the derivative of an equilibrium
# with respect to what is at stake. Runs in well under a minute on two CPU cores.

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
from scipy.optimize import linprog

import jaxnum
from jaxnum.solvers import extragradient, feg, resolvents

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Circles
#
# One player chooses x to make xᵀA y small, the other y to make it large. Their gradients, F(x, y) = (A y, −Aᵀx), turn
# around the equilibrium and never point at it. The singular values of this A lie between 0.001 and 1: some of the
# circles are a thousand times slower than others.

# %%
rates = jnp.linspace(1e-3, 1, 50)


def pull(z):
    x, y = z
    return rates * y, -rates * x


rng = np.random.default_rng(0)
start = tuple(jnp.asarray(part) for part in rng.normal(size=(2, 50)))
runs = {
    "extragradient": jaxnum.inclusion(
        pull, start, solver=extragradient(1.0), atol=0.0, max_steps=5000, history=True, on_failure="return"
    ),
    "feg": jaxnum.inclusion(
        pull, start, solver=feg(1.0), atol=0.0, max_steps=5000, history=True, on_failure="return"
    ),
}


def slope(history, first=100):
    """Slope of log residual against log step."""
    steps = np.arange(first, len(history))
    return np.polyfit(np.log(steps), np.log(history[first:]), 1)[0]


for name, run in runs.items():
    history = np.asarray(run.history)
    print(f"{name:14s} residual {float(run.residual):.1e} after {int(run.steps)} steps, slope {slope(history):.2f}")
assert slope(np.asarray(runs["feg"].history)) < -0.95
assert -0.75 < slope(np.asarray(runs["extragradient"].history)) < -0.45

# %% [markdown]
# Plain gradient steps would move away from the start in every one of these planes: each turns the point outwards.
# Extragradient looks one step ahead, and its residual falls like 1/√k. `feg` also pulls every iterate back towards the
# start, a little less each time; its last iterate falls like 1/k, which no method of this kind can beat.

# %%
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
steps = np.arange(1, 5001)
for (name, run), colour in zip(runs.items(), ("tab:orange", "tab:blue"), strict=True):
    axis.loglog(steps, np.asarray(run.history)[1:], colour, label=name)
distance = float(jnp.sqrt(sum(jnp.sum(part**2) for part in start)))
axis.loglog(steps, 2 * distance / steps, "k:", label="bound of feg, 2 L |x₀ − x*| / k")
axis.set(xlabel="step", ylabel="‖F(z)‖", title="Last iterates of a bilinear game")
axis.legend()
plt.show()

# %% [markdown]
# ## Mixed strategies
#
# Each player now plays a row or a column with some probability. The sets of strategies are simplexes, and they enter as
# a resolvent, here the projection onto a simplex for each player. The default of `inclusion` needs no constant: it
# estimates how steep F is, and restarts its anchor.

# %%
payoff = jnp.asarray(rng.normal(size=(12, 9)))


def game(z, payoff):
    """The first player gains payoff, the second loses it."""
    p, q = z
    return -payoff @ q, payoff.T @ p


mixed = resolvents.product((resolvents.simplex(), resolvents.simplex()))
even = (jnp.full(12, 1 / 12), jnp.full(9, 1 / 9))
solution = jaxnum.inclusion(game, even, payoff, resolvent=mixed)
p, q = solution.x
print(solution)

# %% [markdown]
# Linear programming gives the value of the game for certain.

# %%
rows, columns = payoff.shape
program = linprog(
    c=np.append(np.zeros(rows), -1.0),
    A_ub=np.column_stack([-np.asarray(payoff).T, np.ones(columns)]),
    b_ub=np.zeros(columns),
    A_eq=[np.append(np.ones(rows), 0.0)],
    b_eq=[1.0],
    bounds=[(0, None)] * rows + [(None, None)],
)
value = float(p @ payoff @ q)
print(f"value {value:.8f}, linear programming {-program.fun:.8f}, after {int(solution.steps)} steps")
assert abs(value + program.fun) < 1e-6

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for axis, strategy, player in zip(axes, (p, q), ("first player", "second player"), strict=True):
    axis.bar(np.arange(len(strategy)), strategy, color="tab:blue")
    axis.set(xlabel="move", ylabel="probability", title=f"{player}: {int(jnp.sum(strategy > 1e-6))} moves in play")
plt.show()

# %% [markdown]
# ## What an equilibrium depends on
#
# A solution has derivatives, whatever path led to it. The value of a game changes with a payoff in proportion to how
# often that payoff occurs, so its gradient must be p qᵀ. The strategies have derivatives too: here, what the first
# player does when the payoff of one cell grows.


# %%
def equilibrium(payoff):
    return jaxnum.inclusion(game, even, payoff, resolvent=mixed).x


def worth(payoff):
    p, q = equilibrium(payoff)
    return p @ payoff @ q


gradient = jax.grad(worth)(payoff)
print("largest difference from p qᵀ:", float(jnp.max(jnp.abs(gradient - jnp.outer(p, q)))))
assert jnp.max(jnp.abs(gradient - jnp.outer(p, q))) < 1e-5

cell = (int(jnp.argmax(p)), int(jnp.argmax(q)))
raised = jnp.zeros_like(payoff).at[cell].set(1.0)
_, (change, _) = jax.jvp(equilibrium, (payoff,), (raised,))
step = 1e-5
ahead, behind = (equilibrium(payoff + sign * step * raised)[0] for sign in (1, -1))
print("largest difference from finite differences:", float(jnp.max(jnp.abs(change - (ahead - behind) / (2 * step)))))
assert jnp.max(jnp.abs(change - (ahead - behind) / (2 * step))) < 1e-3
print(f"the first player plays move {cell[0]} by {float(change[cell[0]]):+.2f} a unit of its payoff")
