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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnum/jaxnum/blob/main/notebooks/01_fixed_points_and_transport.ipynb)
#
# # Fixed points and transport
#
# What a solve looks like in jaxnum: its solution, its status, its history, and its gradient, which comes from the
# solution itself and not from the steps that led there. Runs in well under a minute on two CPU cores.

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

import jaxnum
from jaxnum.solvers import halpern, picard, sinkhorn

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## A fixed point
#
# `fixed_point` finds x = T(x). What comes back is a `Solution`: the point, how many steps it took, the residual
# ‖x − T(x)‖, and a status.

# %%
solution = jaxnum.fixed_point(jnp.cos, 1.0)
print(solution)
print("status:", jaxnum.Status(int(solution.status)).name)
assert jaxnum.Status(int(solution.status)) == jaxnum.Status.converged
assert abs(float(solution.x) - 0.7390851332) < 1e-7

# %% [markdown]
# A solve that fails says so. Turning the plane by a quarter has one fixed point, the origin, but Picard's iteration
# x ← T(x) circles around it for ever. An eager call raises; `on_failure="return"` hands over what there is.


# %%
def turn(x):
    return jnp.stack([-x[1], x[0]])


start = jnp.array([1.0, 0.5])
try:
    jaxnum.fixed_point(turn, start, max_steps=1000)
    raise AssertionError("Picard's iteration cannot converge here")
except jaxnum.SolverError as error:
    print(error)

# %% [markdown]
# ## Picard and Halpern
#
# Halpern's iteration x ← λₖ x₀ + (1 − λₖ) T(x) converges for every map that does not expand distances, and its
# residual after N steps is at most 2 ‖x₀ − x*‖ / (N + 1). `history=True` records the residual at every step.

# %%
options = dict(rtol=0.0, atol=1e-14, max_steps=2000, history=True, on_failure="return")
small_turn = jnp.array([[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]])
runs = {
    "Picard": picard(),
    "Picard, damped by 1/2": picard(damping=0.5),
    "Halpern": halpern(),
}
histories = {
    name: np.asarray(jaxnum.fixed_point(lambda x, A: A @ x, start, small_turn, solver=solver, **options).history)
    for name, solver in runs.items()
}
steps = np.arange(2001)
bound = 2 * np.linalg.norm(start) / (steps + 1)
assert (histories["Halpern"] <= bound * (1 + 1e-12)).all()

fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, history in histories.items():
    ax.loglog(steps[1:], history[1:], label=name)
ax.loglog(steps[1:], bound[1:], "k--", linewidth=1, label="2 ‖x₀ − x*‖ / (N + 1)")
ax.set(xlabel="step N", ylabel="‖x − T(x)‖", title="turning the plane by 0.1 rad", ylim=(1e-8, 10))
ax.grid(True, alpha=0.3)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The implicit gradient
#
# The derivative of a solution follows from the equation it solves: one linear system, whatever the solver and however
# many steps it took. Forward mode, reverse mode and second derivatives all work. Here y = tanh(A y + 1), and the
# gradient of Σ y with respect to A is compared with finite differences.

# %%
A = jnp.array([[0.3, 0.1], [0.2, 0.4]])


def total(A):
    return jnp.sum(jaxnum.fixed_point(lambda y, A: jnp.tanh(A @ y + 1), jnp.zeros(2), A, rtol=1e-13).x)


gradient = jax.grad(total)(A)
h = 1e-5
differences = np.array(
    [[(total(A.at[i, j].add(h)) - total(A.at[i, j].add(-h))) / (2 * h) for j in (0, 1)] for i in (0, 1)]
)
print(gradient)
print("largest difference:", np.abs(gradient - differences).max())
assert np.abs(gradient - differences).max() < 1e-8

# %% [markdown]
# ## A transport plan
#
# `transport` moves the weights `a` to the weights `b` at the least cost, up to entropy: the plan is
# Pᵢⱼ = exp((fᵢ + gⱼ − Cᵢⱼ) / ε). The unknowns are the potentials f and g; a `Transport` problem makes plans and prices
# from them.

# %%
n = 120
grid = jnp.linspace(0, 1, n)


def bump(centre, width):
    return jnp.exp(-((grid - centre) ** 2) / (2 * width**2))


def normalised(w):
    return w / jnp.sum(w)


a = normalised(bump(0.25, 0.07) + 0.6 * bump(0.55, 0.04) + 0.01)
b = normalised(bump(0.45, 0.05) + bump(0.8, 0.06) + 0.01)
cost = (grid[:, None] - grid[None, :]) ** 2
epsilon = 1e-3

moved = jaxnum.transport(cost, a, b, epsilon, rtol=1e-10, history=True)
problem = jaxnum.Transport(cost, a, b, epsilon)
plan = problem.plan(moved.x)
print(moved)
print("price <C, P>:", float(problem.primal_cost(moved.x)))
assert np.abs(plan.sum(1) - a).sum() < 1e-9
assert np.abs(plan.sum(0) - b).sum() < 1e-9

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
left.imshow(plan, cmap="Greys", origin="lower", extent=(0, 1, 0, 1))
left.plot(grid, 0.25 * b / b.max(), color="#2f6db5", label="b, along y")
left.plot(0.25 * a / a.max(), grid, color="#d9722e", label="a, along x")
left.set(xlabel="y", ylabel="x", title="the plan P")
left.legend(frameon=False, loc="upper left", fontsize=8)
history = np.asarray(moved.history)
checks = np.arange(history.size)
right.semilogy(checks[1:], history[1:], "-", color="#2f6db5")
right.set(xlabel="step", ylabel="L1 error of the marginals", title="Sinkhorn's algorithm", xlim=(0, int(moved.steps)))
right.grid(True, alpha=0.3)
plt.show()

# %% [markdown]
# Over-relaxation makes the same solve quicker, and the answer is the same.

# %%
quick = jaxnum.transport(cost, a, b, epsilon, solver=sinkhorn(momentum=1.5), rtol=1e-10)
print("steps:", int(moved.steps), "plain,", int(quick.steps), "over-relaxed")
assert np.abs(problem.plan(quick.x) - plan).max() < 1e-8

# %% [markdown]
# ## The gradient through it
#
# How does the price change when the source is pulled about? Differentiating through the solve tells, point by point;
# a central difference in one direction confirms it. The direction sums to zero, so that the masses stay equal.


# %%
def price(a):
    x = jaxnum.transport(cost, a, b, epsilon, rtol=1e-11).x
    return jaxnum.Transport(cost, a, b, epsilon).primal_cost(x)


gradient = jax.grad(price)(a)
direction = normalised(bump(0.35, 0.05)) - a
h = 1e-4
difference = (price(a + h * direction) - price(a - h * direction)) / (2 * h)
print("gradient:", float(gradient @ direction), " finite difference:", float(difference))
assert abs(gradient @ direction - difference) < 1e-5 * abs(difference)

fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.plot(grid, gradient - gradient @ a, color="#3f9b6a", label="change of the price per unit of mass put at x")
ax.fill_between(grid, 0, 0.15 * a / a.max(), color="#d9722e", alpha=0.4, linewidth=0, label="a")
ax.fill_between(grid, 0, 0.15 * b / b.max(), color="#2f6db5", alpha=0.4, linewidth=0, label="b")
ax.axhline(0, color="#8a8f98", linewidth=0.8)
ax.set(xlabel="x", ylabel="gradient of <C, P>")
ax.legend(frameon=False, fontsize=9)
plt.show()
