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
# run is kept at its peak, and finished models are branched off it. Handwritten digits with half of their pixels
# missing; well under a minute on two CPU cores.

# %% [markdown]
# Outside a checkout of the repository, install the library first: `pip install "jaxnum[notebooks]" scikit-learn`. The
# next cell does so where either is missing.

# %%
import importlib.util
import subprocess
import sys

missing = [
    package
    for name, package in (("jaxnum", "jaxnum[notebooks]"), ("sklearn", "scikit-learn"))
    if importlib.util.find_spec(name) is None
]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from jaxnum.schedules import refine_schedule, wsd, wsd_branch, wsd_s
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
# state. One program trains four seeds at each of four rates; the norms of the best rate are
# averaged over its seeds.

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
norms = np.asarray(runs["constant"][2][first]).mean(axis=0)
print(f"best constant rate {float(rates[first]):g}: test loss {float(runs['constant'][1][first].mean()):.4f}")

# %% [markdown]
# ## The schedule that the norms ask for
#
# Where gradients are large, steps should be small: with smoothed norms G the weight of a step is w = 1 / G², and its
# rate is w times the weights of all later steps. Constant norms would give the linear decay to zero. For Adam the
# theory asks for `record_norms(steps, order=1)` and `p=1`.
#
# Look at the norms before using them. Those of the first hundred steps are small here, because a fresh network hardly
# tells digits apart, not because there is far to go in small steps; taken at their word they put nearly all of the
# learning at the start. Norms that are NaN are left out: so the first tenth goes, and `total_steps` stretches the rest.

# %%
later = np.where(np.arange(steps) < steps // 10, np.nan, norms)
shapes = {
    "constant": wsd(1.0, 10**6, 0, 1),
    "linear": optax.linear_schedule(1.0, 0.0, steps),
    "cosine": optax.cosine_decay_schedule(1.0, steps),
    "wsd": wsd(1.0, steps, 0, steps // 5),
    "refined": refine_schedule(norms),
    "refined, later norms": refine_schedule(later, total_steps=steps),
}
palette = ("tab:gray", "tab:green", "tab:orange", "tab:red", "tab:purple", "tab:blue")
colours = dict(zip(shapes, palette, strict=True))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(norms, ".", color="tab:gray", markersize=2)
left.axvspan(0, steps // 10, color="tab:purple", alpha=0.15, label="left out by the last schedule")
left.set(xlabel="step", ylabel="norm of the gradient", ylim=(0, None), title="what the first run wrote down")
left.legend(fontsize=8, loc="lower right")
for name, shape in shapes.items():
    right.plot(jax.vmap(shape)(jnp.arange(steps)), color=colours[name], label=name)
right.set(xlabel="step", ylabel="rate / peak", title="what it asks for, and the usual ones", ylim=(0, 1.05))
figure.legend(*right.get_legend_handles_labels(), fontsize=8, ncols=6, loc="outside lower center")
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
    print(f"{name:21s} peak {float(rates[peaks[name]]):4g}   test loss {values.mean():.4f} ± {error:.4f}")

# %%
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for position, (name, values) in enumerate(final.items()):
    axis.plot(values, np.full(values.size, position), "o", color=colours[name], markersize=4, alpha=0.6)
    axis.plot(values.mean(), position, "|", color=colours[name], markersize=18, markeredgewidth=3)
    axis.text(values.max() + 0.004, position, f"{values.mean():.3f}", va="center", fontsize=8)
axis.set_yticks(range(len(final)), list(final))
axis.invert_yaxis()
axis.set(xlabel="test loss of four seeds, and their mean")
axis.margins(x=0.15, y=0.12)
plt.show()

# %% [markdown]
# Any decay is much better than none. The norms taken at their word lose to the plain linear decay, the more so the
# noisier they are. With the steps of a fresh network left out they are nearly level, refining them nearly gives the
# linear decay back, and what it is ahead by is no more than the seeds differ by. Refining can pay where norms change
# along a whole run; the picture of the norms says beforehand whether they do.

# %%
constant, linear = final["constant"].mean(), final["linear"].mean()
assert linear < 0.95 * constant
assert final["refined"].mean() > linear
assert abs(final["refined, later norms"].mean() / linear - 1) < 0.03

# %% [markdown]
# ## When the length is not known
#
# All of these needed to know the last step beforehand. `wsd` needs it last: its peak can go on for as long as anyone
# likes, and a decay of a few hundred steps finishes a model from any of its checkpoints: `wsd_branch`. `wsd_s` does not
# even branch: it decays, hands over a model, and goes on from there at the peak. Here models are wanted after 500,
# 1,000 and 2,000 steps; beside them a run of its own for each length, by `wsd` and by linear decay.

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
pieces = {"stable": [(0, [])], "wsd_branch": [], "wsd_s": [(0, [])]}
table, spent = {}, {"wsd": 0, "linear": 0, "wsd_branch": ends[-1], "wsd_s": ends[-1]}
one_run, left_at, last_end = wsd_s(peak, ends, 0, decay_fraction=0.2), 0, 0
for end in ends:
    decay = (end - last_end) // 5
    stable, on_the_way = go(wsd(peak, 10**6, 0, 1), stable, left_at, end - decay)
    _, branch = go(wsd_branch(peak, end - decay, decay), stable, end - decay, end)
    kept, kept_losses = go(one_run, kept, last_end, end)
    pieces["stable"][0][1].extend(on_the_way)
    pieces["wsd_branch"].append((end - decay - 100, [on_the_way[-1], *branch]))
    pieces["wsd_s"][0][1].extend(kept_losses)
    table[end] = {
        "wsd": go(wsd(peak, end, 0, decay), start, 0, end)[1][-1],
        "linear": go(optax.linear_schedule(peak, 0.0, end), start, 0, end)[1][-1],
        "wsd_branch": branch[-1],
        "wsd_s": kept_losses[-1],
    }
    spent["wsd"], spent["linear"] = spent["wsd"] + end, spent["linear"] + end
    spent["wsd_branch"] += decay if end < ends[-1] else 0
    left_at, last_end = end - decay, end

print("test loss after      " + "".join(f"{end:8d}" for end in ends) + "   steps for all three")
for name in spent:
    print(f"{name:18s}   " + "".join(f"{table[end][name]:8.4f}" for end in ends) + f"   {spent[name]:6d}")

# %%
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
styles = {
    "stable": ("tab:gray", "at the peak"),
    "wsd_s": ("tab:orange", "wsd_s"),
    "wsd_branch": ("tab:blue", "branches"),
}
for name, (colour, label) in styles.items():
    for turn, (begun, losses) in enumerate(pieces[name]):
        axis.plot(begun + 100 * np.arange(1, len(losses) + 1), losses, color=colour, label=label if turn == 0 else None)
for name, mark in (("wsd", "kx"), ("linear", "k+")):
    axis.plot(ends, [table[end][name] for end in ends], mark, markersize=8, label=f"a run for each length, {name}")
axis.set(xlabel="step", ylabel="test loss, mean of four seeds", ylim=(0.62, 1.15), title="three models from one run")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# A branch is the run of its own length, to the last digit: until they part, both take the same steps. `wsd_s` is as
# good within the noise, for fewer steps still, since its decays are part of the way. Knowing the length beforehand is
# worth something all the same: the linear decay at the same peak is ahead in all but the shortest run.

# %%
for end in ends:
    assert abs(table[end]["wsd_branch"] / table[end]["wsd"] - 1) < 1e-3
    assert abs(table[end]["wsd_s"] / table[end]["wsd"] - 1) < 0.02
assert spent["wsd_s"] < spent["wsd_branch"] < 0.65 * spent["wsd"]

# %% [markdown]
# ## What to do
#
# - Length known: a linear decay to zero. It needs nothing but a peak.
# - Length not known, or several lengths wanted: `wsd`, and `wsd_branch` from its checkpoints, parameters and optimiser
#   state; or `wsd_s`, whose next stretch starts from the end of the last decay, optimiser state included.
# - A run to be repeated: `record_norms` costs nothing, so keep them. If they rise or fall along the run, try
#   `refine_schedule` beside the linear decay; if they are level, there is nothing to refine.
