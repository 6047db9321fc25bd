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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnum/jaxnum/blob/main/notebooks/09_half_the_labels_wrong.ipynb)
#
# # Training with half the labels wrong
#
# A network learns what examples have in common before it learns examples by heart. With half of the labels drawn at
# random, learning by heart ruins it. Aggregators that do not let single examples outvote the rest keep it from
# that, without being told which labels are wrong. Runs in under a minute on two CPU cores.

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
from optax.experimental import aggregating
from sklearn.datasets import load_digits

from jaxnum.transforms import m_coherence, median_of_means, trimmed_mean, winsorized_mean

# %% [markdown]
# ## Digits, and labels that lie
#
# Five hundred handwritten digits to learn from. For half of them a new label is drawn, which is right one time in ten.
# The other digits, with their true labels, say how good the network is.

# %%
digits = load_digits()
rng = np.random.default_rng(0)
order = rng.permutation(len(digits.target))
pixels = (digits.data[order] / 16 - 0.3).astype(np.float32)
truth = digits.target[order]
n = 500
given = np.where(rng.random(n) < 0.5, rng.integers(0, 10, n), truth[:n])
wrong = given != truth[:n]
print(f"{wrong.sum()} of {n} labels are wrong")

inputs, labels = jnp.asarray(pixels[:n]), jnp.asarray(given)
test_inputs, test_labels = jnp.asarray(pixels[n:]), jnp.asarray(truth[n:])

# %%
figure, axes = plt.subplots(2, 10, figsize=(10, 2.6), layout="constrained")
for axis, index in zip(axes.flat, range(20), strict=True):
    axis.imshow(pixels[index].reshape(8, 8), cmap="gray_r")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(f"{given[index]}", color="tab:red" if wrong[index] else "black", fontsize=11)
figure.suptitle("What the network is told; red is wrong")
plt.show()

# %% [markdown]
# ## One gradient an example
#
# `jax.vmap(jax.grad(loss), (None, 0, 0))` gives the gradient of every example of a batch. An aggregator makes one of
# them, and optax's `aggregating.process` puts it ahead of any optimiser. For each parameter by itself, of 64 numbers:
#
# - **mean**: all count; an example far from the others counts most.
# - **winsorized**: the 16 lowest are raised to the 17th, the 16 highest lowered likewise, then the mean.
# - **trimmed**: those 32 are left out.
# - **median of means**: the median of the means of eight groups of eight.


# %%
batch, hidden, steps, look = 64, 64, 1000, 25


def scores(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


def loss(params, x, label):
    return optax.softmax_cross_entropy_with_integer_labels(scores(params, x), label)


gradients = jax.vmap(jax.grad(loss), (None, 0, 0))
keys = jax.random.split(jax.random.key(0), 3)
start = {
    "w": jax.random.normal(keys[0], (64, hidden)) * (2 / 64) ** 0.5,
    "b": jnp.zeros(hidden),
    "v": jax.random.normal(keys[1], (hidden, 10)) * hidden**-0.5,
    "c": jnp.zeros(10),
}
right_ones, wrong_ones = np.flatnonzero(~wrong), np.flatnonzero(wrong)


def train(aggregator):
    """Clean accuracy, share of the given labels that it repeats, and coherences, every `look` steps."""
    optimiser = aggregating.process(optax.identity(), aggregator, optax.sgd(0.3))

    def step(carry, key):
        params, state = carry
        chosen = jax.random.randint(key, (batch,), 0, n)
        updates, state = optimiser.update(gradients(params, inputs[chosen], labels[chosen]), state, params)
        return (optax.apply_updates(params, updates), state), None

    def some_steps(carry, keys):
        params = carry[0]
        seen = {
            "clean": jnp.mean(scores(params, test_inputs).argmax(axis=1) == test_labels),
            "right": jnp.mean(scores(params, inputs[right_ones]).argmax(axis=1) == labels[right_ones]),
            "wrong": jnp.mean(scores(params, inputs[wrong_ones]).argmax(axis=1) == labels[wrong_ones]),
            "coherence of right": m_coherence(gradients(params, inputs[right_ones], labels[right_ones])),
            "coherence of wrong": m_coherence(gradients(params, inputs[wrong_ones], labels[wrong_ones])),
        }
        return jax.lax.scan(step, carry, keys)[0], seen

    drawn = jax.random.split(keys[2], (steps // look, look))
    seen = jax.jit(lambda drawn: jax.lax.scan(some_steps, (start, optimiser.init(start)), drawn)[1])(drawn)
    return {name: np.asarray(values) for name, values in seen.items()}


aggregators = {
    "mean": aggregating.average_per_element_updates(),
    "winsorized": winsorized_mean(16),
    "trimmed": trimmed_mean(16),
    "median of means": median_of_means(8),
}
runs = {name: train(aggregator) for name, aggregator in aggregators.items()}
for name, seen in runs.items():
    print(
        f"{name:16s} clean accuracy: best {seen['clean'].max():.3f}, mean of the last 200 steps "
        f"{seen['clean'][-8:].mean():.3f}; wrong labels learned by heart: {seen['wrong'][-8:].mean():.3f}"
    )

# What is said of them below.
best = {name: seen["clean"].max() for name, seen in runs.items()}
last = {name: seen["clean"][-8:].mean() for name, seen in runs.items()}
lies = {name: seen["wrong"][-8:].mean() for name, seen in runs.items()}
wobble = {name: seen["clean"][len(seen["clean"]) // 2 :].std() for name, seen in runs.items()}
assert best["mean"] > max(best.values()) - 0.05
assert last["winsorized"] > last["mean"] + 0.1
assert max(lies["winsorized"], lies["trimmed"]) < 0.1 < lies["median of means"] < lies["mean"] - 0.1
assert min(wobble["winsorized"], wobble["trimmed"]) > max(wobble["mean"], wobble["median of means"])

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharex=True)
at = look * np.arange(steps // look)
for (name, seen), style in zip(runs.items(), ("-", "--", "-.", ":"), strict=True):
    axes[0].plot(at, seen["clean"], style, label=name)
    axes[1].plot(at, seen["wrong"], style, label=name)
axes[0].set(xlabel="step", ylabel="clean accuracy", title="Digits never seen, true labels", ylim=(0, 1))
axes[1].set(xlabel="step", ylabel="share repeated", title="Wrong labels learned by heart", ylim=(0, 1))
axes[0].legend(loc="lower center")
plt.show()

# %% [markdown]
# The mean learns the digits first, about as well as any, and then the lies. The winsorized and the trimmed mean take
# longer to learn the digits and hardly ever learn a lie: what an example alone asks for is beyond the 16th of 64. At this
# constant rate their accuracy wobbles more than that of the others. The median of means learns by heart more than these
# two and less than the mean.
#
# ## Who agrees with whom
#
# `m_coherence` of m gradients is m where all are equal, 1 where they are orthogonal: how many examples one example's
# step helps. Here along the run of the mean, for the examples whose labels are right and for the others: over the first
# 250 steps wrong labels agree with each other less than half as much.

# %%
figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
for group, colour in (("right", "tab:blue"), ("wrong", "tab:red")):
    axis.plot(at, runs["mean"][f"coherence of {group}"], color=colour, label=f"{group} labels")
axis.axhline(1, color="grey", linewidth=0.8)
axis.set(xlabel="step", ylabel="m-coherence", yscale="log", title="Examples helped by one example's step, mean")
axis.legend()
plt.show()

early = {group: runs["mean"][f"coherence of {group}"][1:11].mean() for group in ("right", "wrong")}
for group, coherence in early.items():
    print(f"{group} labels, steps 25 to 250: {coherence:.1f}")
assert early["wrong"] < early["right"] / 2
