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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnum/jaxnum/blob/main/notebooks/08_choosing_a_schedule.ipynb)
#
# # Choosing a schedule after the fact
#
# Two questions that are asked once a training run exists. What would have been a better schedule? The run's gradient
# norms say, and the answer is tried against the usual schedules. And what if nobody knows yet how long to train? Then a
# run is kept at its peak, and finished models are branched off it. Handwritten digits with half of their pixels missing;
# well under a minute on two CPU cores.

# %% [markdown]
# Outside a checkout of the repository, install the library first: `pip install "jaxnum[notebooks]"`. The next cell
# does so where it is missing.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxnum") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "jaxnum[notebooks]", "scikit-learn"], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from jaxnum.schedules import refine_schedule, refine_schedule_values, wsd, wsd_branch, wsd_s
from jaxnum.transforms import record_norms

# %% [markdown]
# ## A noisy task
#
# Every time a digit is drawn, half of its pixels are wiped out, others each time. A network of one hidden layer learns
# from 1,000 of scikit-learn's digits, sixteen a step. 397 others choose the learning rates, 400 others are for testing,
# each with five draws of missing pixels.

# %%
bunch = load_digits()
order = np.random.default_rng(0).permutation(bunch.target.size)
images = jnp.asarray(bunch.data[order] / 16, jnp.float32)
labels = jnp.asarray(bunch.target[order], jnp.int32)
train, choose, test = slice(0, 1000), slice(1000, 1397), slice(1397, None)


def wiped(key, x):
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)


def loss(params, x, y):
    logits = jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"] + params["c"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def held_out(params, part):
    """Loss on digits that were not learned from, with five draws of missing pixels."""
    draws = jax.vmap(lambda key: wiped(key, images[part]))(jax.random.split(jax.random.key(99), 5))
    return jax.vmap(lambda x: loss(params, x, labels[part]))(draws).mean()


def network(seed):
    w, v = jax.random.split(jax.random.key(seed))
    params = {"w": jax.random.normal(w, (64, 32)) / 8, "v": jax.random.normal(v, (32, 10)) / 6}
    return params | {"b": jnp.zeros(32), "c": jnp.zeros(10)}


figure, axes = plt.subplots(2, 6, figsize=(9, 3), layout="constrained")
for index, (above, below) in enumerate(axes.T):
    above.imshow(images[index].reshape(8, 8), cmap="gray_r")
    below.imshow(wiped(jax.random.key(index), images[index]).reshape(8, 8), cmap="gray_r")
    above.set_title(f"a {int(labels[index])}", fontsize=9)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## The first run, and what it writes down
#
# Plain SGD at a constant rate. `record_norms`, first in the chain, keeps the norm of every gradient in the optimiser's
# state. One program trains four seeds at each of four rates.

# %%
steps, seeds = 1500, jnp.arange(4)
rates = jnp.array([0.25, 0.5, 1.0, 2.0])


def gradient_of(params, key):
    which, pixels = jax.random.split(key)
    chosen = jax.random.randint(which, (16,), 0, 1000)
    return jax.grad(loss)(params, wiped(pixels, images[chosen]), labels[chosen])


@jax.jit
def whole_runs(shape):
    """Final losses to choose a rate by, final test losses, and gradient norms [rates, seeds] of a schedule's shape."""

    def one(rate, seed):
        optimiser = optax.chain(record_norms(steps), optax.sgd(lambda count: rate * shape[count]))

        def step(carry, count):
            params, state = carry
            gradient = gradient_of(params, jax.random.fold_in(jax.random.key(1000 + seed), count))
            updates, state = optimiser.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = network(seed)
        (params, state), _ = jax.lax.scan(step, (params, optimiser.init(params)), jnp.arange(steps))
        return held_out(params, choose), held_out(params, test), state[0].norms

    over_seeds = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(over_seeds, in_axes=(0, None))(rates, seeds)


def best(choosing):
    """The rate whose runs are best on the digits that choose."""
    return int(jnp.argmin(choosing.mean(axis=1)))


runs = {"constant": whole_runs(jnp.ones(steps))}
first = best(runs["constant"][0])
norms = np.asarray(runs["constant"][2][first, 0])
print(f"best constant rate {float(rates[first]):g}: test loss {float(runs['constant'][1][first].mean()):.4f}")

# %% [markdown]
# ## The schedule that the norms ask for
#
# Where gradients are large, steps should be small: with smoothed norms G the weight of a step is w = 1 / G², and its
# rate is w times the weights of all later steps. Constant norms would give the linear decay to zero. For Adam the theory
# asks for `record_norms(steps, order=1)` and `p=1`.

# %%
refined = refine_schedule(norms)
shapes = {
    "constant": lambda count: jnp.ones_like(count, float),
    "linear": optax.linear_schedule(1.0, 0.0, steps),
    "cosine": optax.cosine_decay_schedule(1.0, steps),
    "wsd": wsd(1.0, steps, 0, steps // 5),
    "refined": refined,
}
colours = dict(zip(shapes, ("tab:gray", "tab:green", "tab:orange", "tab:red", "tab:blue"), strict=True))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(norms, ".", color="tab:gray", markersize=2)
left.set(xlabel="step", ylabel="norm of the gradient", ylim=(0, None), title="what the first run wrote down")
for name, shape in shapes.items():
    right.plot(jax.vmap(shape)(jnp.arange(steps)), color=colours[name], label=name)
right.set(xlabel="step", ylabel="rate / peak", title="what it asks for, and others", ylim=(0, None))
right.legend(fontsize=8, loc="lower left")
plt.show()

# %% [markdown]
# ## The second run
#
# Each schedule at its best peak of the same four.

# %%
runs |= {name: whole_runs(jax.vmap(shape)(jnp.arange(steps))) for name, shape in shapes.items()}
peaks = {name: best(run[0]) for name, run in runs.items()}
final = {name: np.asarray(run[1][peaks[name]]) for name, run in runs.items()}
for name, values in final.items():
    error = values.std(ddof=1) / np.sqrt(values.size)
    print(f"{name:9s} peak {float(rates[peaks[name]]):4g}   test loss {values.mean():.4f} ± {error:.4f}")

# %%
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
means = [values.mean() for values in final.values()]
bars = axis.barh(list(final), means, color=[colours[name] for name in final])
for position, values in enumerate(final.values()):
    axis.plot(values, np.full(values.size, position), "k.", markersize=4)
axis.bar_label(bars, fmt="%.3f", padding=14, fontsize=8)
axis.invert_yaxis()
axis.set(xlabel="test loss, four seeds", xlim=(0.9 * min(means), 1.06 * max(means)))
plt.show()

# %% [markdown]
# ## When the length is not known
#
# All of these needed to know the last step beforehand. `wsd` needs it last: its peak can go on for as long as anyone
# likes, and a decay of a few hundred steps finishes a model from any of its checkpoints: `wsd_branch`. `wsd_s` does not
# even branch: it decays, hands over a model, and goes on from there at the peak. Here models are wanted after 500, 1,000
# and 2,000 steps; beside them a run of its own for each length, by `wsd` and by linear decay.

# %%
ends, peak = (500, 1000, 2000), float(rates[peaks["wsd"]])


@jax.jit
def hundred_steps(rates, carry, first):
    """A hundred steps further on with every seed's run, and the test loss there, mean over seeds."""
    optimiser = optax.sgd(lambda count: rates[count])

    def one(carry, seed):
        def step(carry, count):
            params, state = carry
            gradient = gradient_of(params, jax.random.fold_in(jax.random.key(1000 + seed), count))
            updates, state = optimiser.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, carry, first + jnp.arange(100))
        return carry, held_out(carry[0], test)

    carry, losses = jax.vmap(one)(carry, seeds)
    return carry, losses.mean()


def begin(seed):
    params = network(seed)
    return params, optax.sgd(optax.constant_schedule(1.0)).init(params)


start = jax.vmap(begin)(seeds)


def go(schedule, checkpoint, first, last):
    """Go on from a checkpoint by a schedule: the next checkpoint, and the losses on the way."""
    rates, losses = jax.vmap(schedule)(jnp.arange(ends[-1])), []
    for count in range(first, last, 100):
        checkpoint, value = hundred_steps(rates, checkpoint, count)
        losses.append(float(value))
    return checkpoint, losses


stable, kept = start, start
pieces = {"stable": [], "wsd_branch": [], "wsd_s": []}
table, spent = {}, {"wsd": 0, "linear": 0, "wsd_branch": ends[-1], "wsd_s": ends[-1]}
one_run, left_at, last_end = wsd_s(peak, ends, 0, decay_fraction=0.2), 0, 0
for end in ends:
    decay = (end - last_end) // 5
    stable, losses = go(wsd(peak, 10**6, 0, 1), stable, left_at, end - decay)
    pieces["stable"].append((left_at, losses))
    _, branch = go(wsd_branch(peak, end - decay, decay), stable, end - decay, end)
    pieces["wsd_branch"].append((end - decay, branch))
    kept, losses = go(one_run, kept, last_end, end)
    pieces["wsd_s"].append((last_end, losses))
    table[end] = {
        "wsd": go(wsd(peak, end, 0, decay), start, 0, end)[1][-1],
        "linear": go(optax.linear_schedule(peak, 0.0, end), start, 0, end)[1][-1],
        "wsd_branch": branch[-1],
        "wsd_s": losses[-1],
    }
    spent["wsd"], spent["linear"] = spent["wsd"] + end, spent["linear"] + end
    spent["wsd_branch"] += decay if end < ends[-1] else 0
    left_at, last_end = end - decay, end

print("test loss after      " + "".join(f"{end:8d}" for end in ends) + "   steps for all three")
for name in spent:
    print(f"{name:18s}   " + "".join(f"{table[end][name]:8.4f}" for end in ends) + f"   {spent[name]:6d}")

# %%
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
styles = {"stable": ("tab:gray", "at the peak"), "wsd_branch": ("tab:blue", "branches"), "wsd_s": ("tab:orange", "wsd_s")}
for name, (colour, label) in styles.items():
    for turn, (begun, losses) in enumerate(pieces[name]):
        axis.plot(begun + 100 * np.arange(1, len(losses) + 1), losses, color=colour, label=label if turn == 0 else None)
for name, mark in (("wsd", "kx"), ("linear", "k+")):
    axis.plot(ends, [table[end][name] for end in ends], mark, label=f"a run for each length, {name}")
axis.set(xlabel="step", ylabel="test loss, mean of four seeds", ylim=(0.95 * min(min(t.values()) for t in table.values()), 1.1))
axis.legend(fontsize=8)
plt.show()
