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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnum/jaxnum/blob/main/notebooks/10_how_many_dimensions.ipynb)
#
# # How many dimensions does this problem have
#
# A network of nine thousand parameters learns handwritten digits. How many numbers does that really take? Freeze the
# network where it starts, let it move in a random subspace alone, and see how small the subspace may be. Runs in well
# under a minute on two CPU cores.

# %% [markdown]
# Outside a checkout of the repository, install the library first: `pip install "jaxnum[notebooks]"`. The next cell
# does so where it is missing.

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
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from jaxnum.training import intrinsic_dimension, random_subspace, random_subspace_projection

# %% [markdown]
# ## A problem whose answer is known
#
# A thousand unknowns, ten conditions: the sums of ten blocks of a hundred shall be 1, 2, ..., 10. The solutions fill a
# space of 990 dimensions, so that a random subspace through the origin meets them once it has ten dimensions, and
# misses them before. In d dimensions the best point is one least-squares fit; the score is exp(−mean squared error).

# %%
wanted = np.arange(1.0, 11.0)
P = random_subspace_projection(jax.random.key(0), 20, 1000, kind="dense")
blocks = jnp.kron(jnp.eye(10), jnp.ones(100))
sums = np.asarray(jax.vmap(P.adjoint)(blocks), float)  # what the ten sums are, for each direction of the subspace


def toy(d):
    best = np.linalg.lstsq(sums[:, :d], wanted)[0]
    return np.exp(-np.mean((sums[:, :d] @ best - wanted) ** 2))


known = intrinsic_dimension(toy, range(1, 21), baseline=1.0, search="all")
print(f"dimensions needed: {known.dimension}; the score is {toy(9):.2f} in 9 and {toy(10):.6f} in 10")
assert known.dimension == 10
assert known.monotone

# %% [markdown]
# ## Digits
#
# The network has two hidden layers. `random_subspace` gives `theta`, d zeros, and a subspace whose `params(theta)` are
# the parameters start + P theta. Adam trains theta; the start and P stay as they were drawn.
#
# To try many d with one compiled program, the subspace has 320 dimensions and all but the first d are masked.

# %%
images, labels = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = (
    jnp.asarray(part)
    for part in train_test_split((images / 16).astype("float32"), labels, test_size=0.3, random_state=0, stratify=labels)
)
most = 320


def network(key, width):
    """Random weights of 64 inputs, two hidden layers and 10 outputs."""
    sizes = (64, width, width, 10)
    keys = jax.random.split(key, 3)
    return [
        {"w": jax.random.normal(key, (i, o)) * (2 / i) ** 0.5, "b": jnp.zeros(o)}
        for key, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def logits(layers, x):
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def accuracy(layers, x, y):
    return jnp.mean(logits(layers, x).argmax(axis=1) == y)


def train(params_of, theta, x, y, key, rate, steps):
    """Adam on the cross-entropy of params_of(theta), in batches of 128."""
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(theta, chosen):
        scores = logits(params_of(theta), x[chosen])
        return optax.softmax_cross_entropy_with_integer_labels(scores, y[chosen]).mean()

    def step(carry, key):
        theta, state = carry
        slope = jax.grad(loss)(theta, jax.random.randint(key, (128,), 0, len(x)))
        updates, state = optimiser.update(slope, state)
        return (optax.apply_updates(theta, updates), state), None

    start = (theta, optimiser.init(theta))
    return jax.lax.scan(step, start, jax.random.split(key, steps))[0][0]


@partial(jax.jit, static_argnames=("width", "steps"))
def full(key, x, y, width, steps=400):
    """The network, all of its parameters trained."""
    start, batches = jax.random.split(key)
    return train(lambda layers: layers, network(start, width), x, y, batches, 3e-3, steps)


@partial(jax.jit, static_argnames=("width", "steps", "most"))
def confined(key, x, y, d, width, steps=400, most=most):
    """The network trained in the first d of `most` dimensions, and its theta."""
    start, batches = jax.random.split(key)
    theta, subspace = random_subspace(network(start, width), key, most, kind="sparse")
    inside = jnp.arange(most) < d
    theta = inside * train(lambda theta: subspace.params(inside * theta), theta, x, y, batches, 0.1, steps)
    return subspace.params(theta), theta


# %%
seeds = jax.random.split(jax.random.key(0), 3)
candidates = (8, 32, 64, 96, 112, 128, 144, 160, 192, 256, 320)
widths = (32, 64, 128)
sizes, baselines, found = {}, {}, {}
for width in widths:
    sizes[width] = sum(leaf.size for leaf in jax.tree.leaves(network(seeds[0], width)))
    baselines[width] = float(np.mean([accuracy(full(key, x_train, y_train, width), x_test, y_test) for key in seeds]))

    def evaluate(d, width=width):
        runs = [confined(key, x_train, y_train, d, width)[0] for key in seeds]
        return [accuracy(layers, x_test, y_test) for layers in runs]

    found[width] = intrinsic_dimension(evaluate, candidates, baselines[width], search="all")
    low, high = found[width].interval
    print(
        f"width {width:3d}: {sizes[width]:6,d} parameters reach {baselines[width]:.3f}; "
        f"90 % of that takes {found[width].dimension} dimensions, for no seed {low}, for every seed {high}"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", width_ratios=(2, 1))
colours = dict(zip(widths, ("tab:orange", "tab:blue", "tab:green"), strict=True))
for width, result in found.items():
    scores = np.array(list(result.scores.values()))
    left.plot(candidates, scores.mean(axis=1), "o-", ms=4, color=colours[width], label=f"{sizes[width]:,d} parameters")
    left.fill_between(candidates, scores.min(axis=1), scores.max(axis=1), color=colours[width], alpha=0.15, lw=0)
left.axhline(0.9 * baselines[64], color="black", lw=1, ls=":")
left.text(candidates[-1], 0.9 * baselines[64] - 0.02, "90 % of full training", ha="right", va="top", fontsize=9)
left.set(xlabel="dimensions d of the subspace", ylabel="accuracy on test digits", ylim=(0, 1), xlim=(0, None))
left.legend(loc="lower right", fontsize=9)
for width, result in found.items():
    low, high = result.interval
    right.plot([sizes[width]] * 2, [low, high], color=colours[width], lw=6, alpha=0.25, solid_capstyle="butt")
    right.plot(sizes[width], result.dimension, "o", color=colours[width])
right.set(xscale="log", xlim=(2e3, 5e4), ylim=(0, most), xlabel="parameters D", ylabel="dimensions needed")
right.set_xticks(list(sizes.values()), [f"{size:,d}" for size in sizes.values()], fontsize=8)
right.minorticks_off()
right.set_title("bars: from no seed to every seed", fontsize=9)
plt.show()

# %% [markdown]
# The network grew eightfold; the dimensions needed hardly changed. They belong to the problem more than to the network:
# every parameter that a network has beyond them is one more direction in which solutions extend.

# %%
needed = [result.dimension for result in found.values()]
print(f"parameters grow {sizes[128] / sizes[32]:.1f}-fold, dimensions lie within a factor {max(needed) / min(needed):.2f}")
assert sizes[128] > 7 * sizes[32]
assert max(needed) < 2 * min(needed)

# %% [markdown]
# ## What makes a problem larger
#
# The same network, the same images, but labels drawn at random: nothing is left to understand, all must be memorised.
# Here the score is the accuracy on 200 training images, which full training brings to 1 for either labelling.

# %%
few, wide = 200, 512
drawn = jax.random.randint(jax.random.key(1), (few,), 0, 10)
labellings = {"true labels": y_train[:few], "random labels": drawn}
sweep = (8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512)
memorised = {}
for name, y in labellings.items():
    assert accuracy(full(seeds[0], x_train[:few], y, 64, 800), x_train[:few], y) > 0.99

    def evaluate(d, y=y):
        layers, _ = confined(seeds[0], x_train[:few], y, d, 64, 800, wide)
        return accuracy(layers, x_train[:few], y)

    memorised[name] = intrinsic_dimension(evaluate, sweep, 1.0, search="all")
    print(f"{name:14s} {memorised[name].dimension} dimensions for 90 % of {few} images")
ratio = memorised["random labels"].dimension / memorised["true labels"].dimension
assert ratio > 3

# %%
figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
for (name, result), colour in zip(memorised.items(), ("tab:blue", "tab:red"), strict=True):
    axis.semilogx(list(result.scores), [float(s.mean()) for s in result.scores.values()], "o-", color=colour, label=name)
axis.axhline(0.9, color="black", lw=1, ls=":")
axis.set(xlabel="dimensions d of the subspace", ylabel=f"accuracy on its {few} training images", ylim=(0, 1.03))
axis.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
axis.minorticks_off()
axis.legend(loc="upper left", fontsize=9)
plt.show()

# %% [markdown]
# ## A network in a few hundred bytes
#
# Start and subspace come from one random key, so that a trained network is its key and its theta. Rebuilt from these
# alone it is the same network.

# %%
d = found[64].dimension
trained, theta = confined(seeds[0], x_train, y_train, d, 64)
letter = (jax.random.key_data(seeds[0]), theta[:d])  # all that is sent


@jax.jit
def rebuild(key_data, kept):
    key = jax.random.wrap_key_data(key_data)
    theta, subspace = random_subspace(network(jax.random.split(key)[0], 64), key, most, kind="sparse")
    return subspace.params(theta.at[:d].set(kept))


rebuilt = rebuild(*letter)
assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-5)), rebuilt, trained)))
sent, whole = sum(part.nbytes for part in letter), 4 * sizes[64]
print(f"{sent} bytes instead of {whole:,d}, {whole / sent:.0f} times fewer, with accuracy", end=" ")
print(f"{float(accuracy(rebuilt, x_test, y_test)):.3f} instead of {baselines[64]:.3f}")

# %% [markdown]
# ## What to take along
#
# - The number of parameters says little about how hard a problem is. The ten conditions took ten dimensions of a
#   thousand, exactly; the digits take about 110 to 130, whether the network has 3,500 parameters or 26,000.
# - Labels that must be memorised take many times more dimensions than labels that follow from the image.
# - The figure is for a score: 90 % of full training. The curve has no step at it as the toy has, and the last per
#   cents cost more than all before: at 320 dimensions some accuracy is still missing.
# - It is an upper bound with noise: seeds differ by a candidate or two, and an optimiser that stalls looks like a
#   subspace that is too small. `interval` says how far seeds disagree, `monotone` whether a larger d did worse.
# - Training in a subspace saves memory of the result, not time: every step still runs the whole network.
