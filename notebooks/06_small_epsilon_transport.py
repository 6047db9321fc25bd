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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnum/jaxnum/blob/main/notebooks/06_small_epsilon_transport.ipynb)
#
# # Transport at small epsilon
#
# The smaller epsilon, the sharper the plan, and the longer Sinkhorn's sweeps crawl. A few sweeps followed by Newton's
# method on the dual reach nine digits where thousands of sweeps reach six. Runs in well under a minute on two CPU cores.

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
from scipy.optimize import linear_sum_assignment

import jaxnum
from jaxnum.solvers import sinkhorn, sns

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## A hundred workers, a hundred tasks
#
# Random prices between 0 and 1 and equal weights. Without entropy the cheapest plan is an assignment. `transport` blurs
# it by epsilon; here epsilon is 1/400.

# %%
n = 100
C = jnp.asarray(np.random.default_rng(0).random((n, n)))
a = jnp.full(n, 1 / n)
epsilon = 1 / 400

sweeps = jaxnum.transport(
    C, a, a, epsilon, solver=sinkhorn(), rtol=1e-9, max_steps=12_000, history=True, on_failure="return"
)
newton = jaxnum.transport(C, a, a, epsilon, solver=sns(), rtol=1e-9, history=True)
for name, solution in (("sweeps alone", sweeps), ("sweeps, then Newton", newton)):
    status = jaxnum.Status(int(solution.status)).name
    print(f"{name:20s} {status:10s} {int(solution.steps):6d} steps, marginal error {float(solution.residual):.1e}")
print("steps of the two phases:", newton.phase_steps.tolist())
assert jaxnum.Status(int(newton.status)) == jaxnum.Status.converged
assert int(newton.phase_steps[1]) <= 20
assert float(sweeps.residual) > 1e-7

# %% [markdown]
# Each sweep costs one pass over the matrix for the rows and one for the columns; a Newton step also solves a linear
# system of the size of the columns. Twenty sweeps bring the potentials near enough for the second phase, whose error
# squares from step to step at the end.

# %%
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
for solution, label, colour in ((sweeps, "sweeps alone", "tab:orange"), (newton, "20 sweeps, then Newton", "tab:blue")):
    history = np.asarray(solution.history)
    history = history[np.isfinite(history)]
    axis.loglog(1 + np.arange(history.size), history, color=colour, label=label)
axis.set(xlabel="step", ylabel="marginal error", title="100 x 100 random prices, epsilon = 1/400")
axis.legend()
plt.show()

# %% [markdown]
# ## Towards the assignment
#
# As epsilon falls, the price of the plan falls towards that of the best assignment, which scipy finds by combinatorics.
# The gap is at most epsilon log n.

# %%
rows, columns = linear_sum_assignment(np.asarray(C))
best = float(C[rows, columns].mean())
epsilons = [1 / 25, 1 / 100, 1 / 400, 1 / 1200]
plans, gaps = [], []
for e in epsilons:
    solution = jaxnum.transport(C, a, a, e, solver=sns(epsilon_scaling=0.5, sweeps=50), rtol=1e-9)
    problem = jaxnum.Transport(C, a, a, e)
    plans.append(np.asarray(problem.plan(solution.x)))
    gaps.append(float(problem.primal_cost(solution.x)) - best)
    print(f"epsilon 1/{1 / e:<5.0f} price {best + gaps[-1]:.5f} after {int(solution.phase_steps[-1])} Newton steps")
print(f"assignment       price {best:.5f}")
assert all(0 <= gap <= e * np.log(n) for gap, e in zip(gaps, epsilons, strict=True))

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
order = np.argsort(columns)
for axis, plan, e in zip(axes, plans, epsilons, strict=True):
    axis.imshow(plan[rows[order]] ** 0.25, cmap="Blues")
    axis.set(title=f"epsilon = 1/{1 / e:.0f}", xticks=[], yticks=[])
figure.suptitle("Plans, rows in the order of the best assignment (fourth root, so that faint entries show)")
plt.show()

# %% [markdown]
# ## What a price is worth
#
# The value of the problem is differentiable, and its gradient with respect to the prices is the plan itself. The plan
# is differentiable too, by the implicit function theorem: no step of either phase is stored.


# %%
def value(C):
    problem = jaxnum.Transport(C, a, a, 1 / 100)
    return problem.dual_cost(jaxnum.transport(C, a, a, 1 / 100, solver=sns(), rtol=1e-10).x)


gradient = jax.jit(jax.grad(value))(C)
print("largest difference between gradient and plan:", float(jnp.max(jnp.abs(gradient - plans[1]))))
assert jnp.max(jnp.abs(gradient - plans[1])) < 1e-8


cell = (0, int(columns[0]))


def share_of_cell(price):
    prices = C.at[cell].set(price)
    problem = jaxnum.Transport(prices, a, a, 1 / 25)
    return problem.plan(jaxnum.transport(prices, a, a, 1 / 25, solver=sns(), rtol=1e-12).x)[cell]


share = jax.jit(share_of_cell)
slope = jax.jit(jax.grad(share_of_cell))(C[cell])
step = 1e-5
numeric = (share(C[cell] + step) - share(C[cell] - step)) / (2 * step)
print(f"the first worker's best task made dearer: its share changes by {float(slope):.6f} a unit of price")
print(f"by finite differences: {float(numeric):.6f}")
assert abs(float(slope - numeric)) < 1e-5 * abs(float(numeric))
