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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnum/jaxnum/blob/main/notebooks/04_long_sequences.ipynb)
#
# # Long sequences at constant cost
#
# Linear attention and the delta rule carry one matrix from token to token. A token costs the same at place one hundred
# and at place one hundred thousand; a sequence can be cut anywhere and go on from the matrix; and the price of all that
# is what a matrix can hold. This notebook shows each of the three. Runs in under a minute on two CPU cores.

# %% [markdown]
# Outside a checkout of the repository, install the library first: `pip install "jaxnum[notebooks]"`. The next cell
# does so where it is missing.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("kernels_pallas") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "jaxnum[notebooks]"], check=True)

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from kernels_pallas import attention, delta_rule, delta_rule_step, linear_attention

DIM, HEADS = 64, 2
COLOURS = {"attention": "#d9722e", "linear_attention": "#2f6db5", "delta_rule": "#3f9b6a"}


def example(length, seed=0):
    """Queries, keys of length 1, values [1, length, HEADS, DIM]; beta and log decays [1, length, HEADS]."""
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = jax.random.normal(keys[0], (3, 1, length, HEADS, DIM))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta = jax.random.uniform(keys[1], (1, length, HEADS))
    gates = jax.nn.log_sigmoid(4 + jax.random.normal(keys[2], (1, length, HEADS)))
    return q, k, v, beta, gates


OPERATIONS = {
    "attention": lambda q, k, v, beta, gates: attention(q, k, v, causal=True),
    "linear_attention": lambda q, k, v, beta, gates: linear_attention(q, k, v, log_decay=gates)[0],
    "delta_rule": lambda q, k, v, beta, gates: delta_rule(q, k, v, beta, log_decay=gates)[0],
}

# %% [markdown]
# ## Time and memory
#
# Microseconds a token of the forward pass, best of a few runs. Softmax attention pays for every token that precedes.


# %%
def microseconds_a_token(function, length, rounds=3):
    inputs = example(length)
    run = jax.jit(function)
    jax.block_until_ready(run(*inputs))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        seconds.append(time.perf_counter() - start)
    return 1e6 * min(seconds) / length


lengths = {"attention": [1024, 4096, 16384], "linear_attention": [1024, 4096, 16384, 65536]}
lengths["delta_rule"] = lengths["linear_attention"]
times = {name: [microseconds_a_token(OPERATIONS[name], n) for n in own] for name, own in lengths.items()}
for name, own in times.items():
    print(f"{name:>17}: " + ", ".join(f"{n}: {t:.2f}" for n, t in zip(lengths[name], own)) + " microseconds a token")


# %% [markdown]
# And what the gradient reserves beyond inputs and outputs, as the compiler tells it without running anything: beside
# `lax.scan` over the recurrence, which keeps the matrix of every token.


# %%
def scan(q, k, v, beta, gates):
    """The recurrence of linear attention, token by token."""

    def step(S, token):
        q, k, v, g = token
        S = jnp.exp(g)[..., None, None] * S + k[..., None] * v[..., None, :]
        return S, DIM**-0.5 * jnp.einsum("bhkv,bhk->bhv", S, q)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, gates))
    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros((1, HEADS, DIM, DIM)), tokens)[1], 0, 1)


def scratch_bytes(function, length):
    gradient = jax.grad(lambda *x: jnp.sum(function(*x) ** 2), (0, 1, 2, 3, 4))
    shapes = jax.eval_shape(lambda: example(length))
    return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


x = example(1024)
difference = float(jnp.abs(scan(*x) - OPERATIONS["linear_attention"](*x)).max())
print(f"largest difference from the scan: {difference:.1e}")
assert difference < 1e-5

memory_lengths = [1024, 4096, 16384]
memory = {name: [scratch_bytes(f, n) for n in memory_lengths] for name, f in [("lax.scan", scan), *OPERATIONS.items()]}
for name, own in memory.items():
    print(f"{name:>17}: " + ", ".join(f"{n}: {b / 2**20:,.0f} MiB" for n, b in zip(memory_lengths, own)))
assert all(8 * ours < scans for ours, scans in zip(memory["linear_attention"][1:], memory["lax.scan"][1:]))

fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
for name, own in times.items():
    left.loglog(lengths[name], own, "o-", color=COLOURS[name], label=name)
left.set(xlabel="tokens", ylabel="microseconds a token", title="time of the forward pass")
left.set_xticks(lengths["delta_rule"], [f"{n:,}" for n in lengths["delta_rule"]])
for name, own in memory.items():
    right.loglog(memory_lengths, np.array(own) / 2**20, "o-", color=COLOURS.get(name, "#8a8f98"), label=name)
right.set(xlabel="tokens", ylabel="MiB", title="scratch memory of the gradient")
right.set_xticks(memory_lengths, [f"{n:,}" for n in memory_lengths])
for ax in (left, right):
    ax.minorticks_off()
    ax.grid(True, alpha=0.3)
    ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Cut anywhere
#
# The state after a part is all that the next part needs: a document that does not fit is read in pieces, and a prompt
# is read at once and then continued one token at a time, at a cost that does not know how long the prompt was. A cache
# of keys and values would have grown with every token.

# %%
q, k, v, beta, gates = example(8192, seed=1)
whole, end = delta_rule(q, k, v, beta, log_decay=gates)


@jax.jit
def piece(state, q, k, v, beta, gates):
    return delta_rule(q, k, v, beta, log_decay=gates, initial_state=state)


state, outputs = jnp.zeros((1, HEADS, DIM, DIM)), []
for start in range(0, 8000, 2000):
    cut = slice(start, start + 2000)
    o, state = piece(state, q[:, cut], k[:, cut], v[:, cut], beta[:, cut], gates[:, cut])
    outputs.append(o)


@jax.jit
def token(state, q, k, v, beta, gates):
    return delta_rule_step(state, q, k, v, beta, log_decay=gates)


for t in range(8000, 8192):
    o, state = token(state, q[:, t], k[:, t], v[:, t], beta[:, t], gates[:, t])
    outputs.append(o[:, None])

difference = float(jnp.abs(jnp.concatenate(outputs, 1) - whole).max())
cache = 2 * q.size * q.dtype.itemsize
print(f"four pieces and 192 single tokens: largest difference from one call {difference:.1e}")
print(f"the state: {state.nbytes // 1024} KiB; a cache of keys and values here: {cache // 1024:,} KiB, and growing")
assert difference < 1e-4

# %% [markdown]
# ## Many documents in a row
#
# Documents of different lengths share a row by `segment_ids`. The state starts anew at each, and padding (a negative
# id) passes it on unchanged. What one document says cannot reach another: the gradient between them is not small, it
# is zero.

# %%
ids = jnp.asarray(np.repeat([0, 1, 2, -1], [300, 500, 180, 44])[None], jnp.int32)
q, k, v, beta, gates = example(1024, seed=2)


def second_document(v):
    o, _ = delta_rule(q, k, v, beta, log_decay=gates, segment_ids=ids)
    return jnp.sum(jnp.where((ids == 1)[..., None, None], o, 0) ** 2)


reach = jnp.linalg.norm(jax.grad(second_document)(v)[0], axis=(-2, -1))
for name, where in (("first", ids[0] == 0), ("second", ids[0] == 1), ("third", ids[0] == 2), ("padding", ids[0] < 0)):
    print(f"the second document's loss depends on the {name:>7}: {float(jnp.max(jnp.where(where, reach, 0))):.3f}")
assert float(jnp.max(jnp.where(ids[0] == 1, 0, reach))) == 0.0

# %% [markdown]
# ## What a matrix can hold
#
# Nothing is free. Write n pairs of random keys and values into a memory of 64 x 64 numbers, then ask for each value by
# its key. Linear attention adds, so that other pairs answer too; the delta rule writes only what the memory did not yet
# say, and holds far more before it fails, until the keys are more than the dimensions. Softmax attention keeps all
# pairs, at a price that grows with them.


# %%
@jax.jit
def recall_errors(key):
    """Mean squared error of values read back, after each number of pairs in `pairs`, relative to their size."""
    keys = jax.random.split(key, 2)
    k = jax.random.normal(keys[0], (1, pairs[-1], 8, DIM))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = jax.random.normal(keys[1], (1, pairs[-1], 8, DIM))
    errors = {name: [] for name in COLOURS}
    for n in pairs:
        known = k[:, :n], v[:, :n]
        ones = jnp.ones((1, n, 8))
        # Five readings of the list, as training would give.
        again = [jnp.tile(x, (1, 5, 1, 1)) for x in known]
        _, added = linear_attention(known[0], *known)
        _, corrected = delta_rule(again[0], *again, jnp.tile(ones, (1, 5, 1)))
        read = {
            "linear_attention": jnp.einsum("bthk,bhkv->bthv", known[0], added),
            "delta_rule": jnp.einsum("bthk,bhkv->bthv", known[0], corrected),
            # Sharp scores: keys are told apart by their angle.
            "attention": attention(40.0 * known[0], *known, scale=1.0),
        }
        for name, value in read.items():
            errors[name].append(jnp.mean((value - known[1]) ** 2))
    return errors


pairs = [4, 8, 16, 32, 48, 64, 96, 128, 192]
errors = jax.tree.map(float, recall_errors(jax.random.key(3)))
for name, own in errors.items():
    print(f"{name:>17}: " + ", ".join(f"{n}: {e:.1e}" for n, e in zip(pairs, own)))

fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
for name, own in errors.items():
    ax.semilogy(pairs, np.maximum(own, 1e-12), "o-", color=COLOURS[name], label=name)
ax.axvline(DIM, color="#8a8f98", linestyle="--", linewidth=1, label="dimensions of a key")
ax.set(xlabel="pairs written", ylabel="mean squared error of a reading", title="keys and values at random, 64 wide")
ax.grid(True, alpha=0.3)
ax.legend(frameon=False)
plt.show()
assert errors["delta_rule"][3] < 0.1 * errors["linear_attention"][3]
