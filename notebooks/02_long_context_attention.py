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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnum/jaxnum/blob/main/notebooks/02_long_context_attention.ipynb)
#
# # Long context on a CPU, and what the log-sum-exp is for
#
# Attention without the matrix of scores: memory that grows with the length and not with its square, partial results
# that merge exactly because each says how much it weighs, and a model of memory traffic that tells which blocks to
# use. Runs in under a minute on two CPU cores.

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

from kernels_pallas import BlockSizes, attention, attention_io, choose_attention_blocks

DIM = 64


def example(length, heads=1, seed=0):
    """Queries, keys and values [1, length, heads, DIM]."""
    return jax.random.normal(jax.random.key(seed), (3, 1, length, heads, DIM))


def dense(q, k, v):
    return attention(q, k, v, implementation="reference")


def causal(q, k, v):
    return attention(q, k, v, causal=True)


# %% [markdown]
# ## Memory
#
# The dense formula holds T × T scores, and its gradient holds them several times. `attention` walks over tiles of the
# scores and keeps two numbers a query, the running maximum and the normaliser; the gradient makes the tiles again.
# The compiler tells what each program reserves, without running it.


# %%
def scratch_bytes(function, length):
    gradient = jax.grad(lambda *x: jnp.sum(function(*x)), (0, 1, 2))
    spec = jax.ShapeDtypeStruct((1, length, 1, DIM), jnp.float32)
    return jax.jit(gradient).lower(spec, spec, spec).compile().memory_analysis().temp_size_in_bytes


lengths = [1024, 2048, 4096, 8192, 16384]
memory = {
    "dense": [scratch_bytes(dense, n) for n in lengths[:4]],
    "kernels_pallas.attention": [scratch_bytes(attention, n) for n in lengths],
}
for name, sizes in memory.items():
    print(f"{name:>25}: " + ", ".join(f"{n}: {size / 2**20:,.0f} MiB" for n, size in zip(lengths, sizes)))
dense_sizes, our_sizes = memory.values()
assert dense_sizes[3] / dense_sizes[1] > 15  # fourfold length, sixteenfold memory
assert our_sizes[4] / our_sizes[2] < 4.4  # fourfold length, at most fourfold memory

fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for (name, sizes), colour in zip(memory.items(), ("#d9722e", "#2f6db5")):
    ax.loglog(lengths[: len(sizes)], np.array(sizes) / 2**20, "o-", color=colour, label=name)
ax.set(xlabel="tokens", ylabel="scratch memory of the gradient, MiB", title="one head, 64 wide, float32")
ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
ax.minorticks_off()
ax.grid(True, alpha=0.3)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Time
#
# The tiles above the diagonal of a causal mask are never computed, and those that are stay in the cache. Best of a few
# runs at 4096 tokens and 4 heads, against JAX's own call.


# %%
def best_seconds(function, *inputs, rounds=5):
    run = jax.jit(function)
    jax.block_until_ready(run(*inputs))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


q, k, v = example(4096, heads=4)
ours = best_seconds(causal, q, k, v)
jax_nn = best_seconds(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), q, k, v, rounds=3)
print(f"jax.nn.dot_product_attention {1e3 * jax_nn:.0f} ms, attention {1e3 * ours:.0f} ms: {jax_nn / ours:.1f} x")

# %% [markdown]
# ## Two halves make a whole
#
# Softmax over keys A and B is a weighted mean of softmax over A and softmax over B, and the weights are what the
# log-sum-exp says: lse = log Σⱼ exp sⱼ over the keys a query has seen. With lse = log(exp lse_A + exp lse_B),
#
# o = exp(lse_A − lse) o_A + exp(lse_B − lse) o_B.
#
# Nothing is approximated: the difference below is rounding.


# %%
def merge(a, b):
    """One result (o, lse) of two over different keys; o [B, T, H, D], lse [B, H, T]."""
    (o_a, lse_a), (o_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    # Queries that have seen nothing yet weigh nothing: their lse is -inf.
    safe = jnp.where(lse == -jnp.inf, 0, lse)
    weights = [jnp.swapaxes(jnp.exp(part - safe), 1, 2)[..., None] for part in (lse_a, lse_b)]
    return weights[0] * o_a + weights[1] * o_b, lse


q, k, v = example(2048, heads=2)
half = 1024
whole = attention(q, k, v, return_lse=True)
merged = merge(
    attention(q, k[:, :half], v[:, :half], return_lse=True),
    attention(q, k[:, half:], v[:, half:], return_lse=True),
)
difference = max(float(jnp.abs(a - b).max()) for a, b in zip(whole, merged))
print("largest difference of o and lse:", difference)
assert difference < 1e-5

# %% [markdown]
# ## A context that would not fit
#
# So a long context can be read in chunks. Say that only 2048 keys and values fit at a time and 8192 tokens are to be
# read: each chunk of keys visits the queries, and what comes of it is merged into what was there. `q_positions` and
# `kv_positions` say where the pieces stand, so that the causal mask is that of the whole. Chunks that no query may see
# are left out.

# %%
length, chunk = 8192, 2048
q, k, v = (np.asarray(x) for x in example(length, seed=1))


@jax.jit
def visit(state, q, k, v, q_start, k_start):
    positions = jnp.arange(chunk, dtype=jnp.int32)
    part = attention(
        q, k, v, causal=True, q_positions=q_start + positions, kv_positions=k_start + positions, return_lse=True
    )
    return merge(state, part)


outputs = []
for q_start in range(0, length, chunk):
    state = jnp.zeros((1, chunk, 1, DIM)), jnp.full((1, 1, chunk), -jnp.inf)
    for k_start in range(0, q_start + chunk, chunk):
        # Slices of NumPy arrays: the device holds one chunk of each at a time.
        rows, columns = slice(q_start, q_start + chunk), slice(k_start, k_start + chunk)
        state = visit(state, q[:, rows], k[:, columns], v[:, columns], q_start, k_start)
    outputs.append(state[0])
streamed = jnp.concatenate(outputs, axis=1)

difference = float(jnp.abs(streamed - causal(q, k, v)).max())
print(f"{length} tokens in chunks of {chunk}: largest difference from one call {difference:.1e}")
assert difference < 1e-5

# %% [markdown]
# ## The gradient goes through it
#
# The merge uses the log-sum-exp as a number like any other, so its derivative counts: `attention` takes the cotangent
# of lse as well as that of o. Leave it out, here by `stop_gradient`, and the gradient of the merged result is wrong,
# although the result itself is right.

# %%
q, k, v = example(512, heads=2, seed=2)
target = jax.random.normal(jax.random.key(3), q.shape)


def in_halves(q, k, v, through_lse=True):
    parts = []
    for keys in (slice(0, 256), slice(256, 512)):
        o, lse = attention(q, k[:, keys], v[:, keys], return_lse=True)
        parts.append((o, lse if through_lse else jax.lax.stop_gradient(lse)))
    return merge(*parts)[0]


def loss(function, k):
    return jnp.sum(target * function(q, k, v))


want = jax.grad(lambda k: loss(attention, k))(k)
errors = {}
for through in (True, False):
    got = jax.grad(lambda k: loss(lambda q, k, v: in_halves(q, k, v, through), k))(k)
    errors[through] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
print(f"relative error of the gradient in k: {errors[True]:.1e} with that of the lse, {errors[False]:.2f} without")
assert errors[True] < 1e-5 < 0.01 < errors[False]

# %% [markdown]
# ## Which blocks, and why
#
# Every block of queries reads all keys it sees, so long blocks of queries move fewer words; but a tile must stay in the
# cache, a short one costs its overhead, and under a causal mask a large tile wastes the part above the diagonal.
# `attention_io` counts the words exactly, and `choose_attention_blocks` weighs them against arithmetic and overhead.
# `explain()` says what it found.

# %%
choice = choose_attention_blocks(4096, 4096, DIM, hardware="cpu", heads=4, causal=True)
print(choice.explain())

# %% [markdown]
# Predicted words beside measured time. For each length of a block of queries and of keys, the left picture shows the
# words moved, the right one the time on this machine.

# %%
sizes = (256, 512, 1024, 2048)
q, k, v = example(4096, heads=4)
words, seconds, runs = np.empty((4, 4)), np.full((4, 4), np.inf), {}
for i, block_q in enumerate(sizes):
    for j, block_kv in enumerate(sizes):
        cost = attention_io(4096, 4096, DIM, block_q=block_q, block_kv=block_kv, causal=True).times(4)
        words[i, j] = cost.words / 1e6
        blocks = BlockSizes(q=block_q, kv=block_kv, compute=block_kv)
        run = jax.jit(lambda q, k, v, blocks=blocks: attention(q, k, v, causal=True, block_sizes=blocks))
        runs[i, j] = run.lower(q, k, v).compile()
# Round by round, so that a busy moment does not fall on one pair of blocks alone.
for _ in range(6):
    for at, run in runs.items():
        start = time.perf_counter()
        jax.block_until_ready(run(q, k, v))
        seconds[at] = min(seconds[at], time.perf_counter() - start)
milliseconds = 1e3 * seconds
blocks = choice.block_sizes
chosen = sizes.index(blocks.q), sizes.index(blocks.kv)
print(f"chosen {blocks.q} x {blocks.kv}: {milliseconds[chosen]:.0f} ms; best of the grid {milliseconds.min():.0f} ms")

fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
titles = "predicted: million words moved", "measured: milliseconds"
for ax, values, title in zip(axes, (words, milliseconds), titles):
    ax.imshow(np.log(values), cmap="Blues", origin="lower")
    for (i, j), value in np.ndenumerate(values):
        dark = np.log(value) > (np.log(values).min() + np.log(values).max()) / 2
        ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if dark else "black")
    ax.add_patch(plt.Rectangle((chosen[1] - 0.5, chosen[0] - 0.5), 1, 1, fill=False, edgecolor="#d9722e", linewidth=3))
    ax.set(xlabel="keys a block", ylabel="queries a block", title=title)
    ax.set_xticks(range(4), sizes)
    ax.set_yticks(range(4), sizes)
fig.suptitle("causal attention, 4096 tokens, 4 heads; the chosen blocks are framed", fontsize=11)
plt.show()

# %% [markdown]
# Words fall with the queries a block and hardly depend on the keys, but this machine has arithmetic to do and a last
# level cache that hides most of the traffic: the time is that of the products of the live tiles, plus a price for every
# tile. With less fast memory, the words decide: this is how the traffic of one head grows as the fast memory shrinks,
# and where it pays to write the scores out after all: below M = d² / 4 or so.

# %%
rooms = np.array([2.0**n for n in range(8, 20)]).astype(int)
d = DIM
counts = {"flash": [], "small": []}
for schedule, found in counts.items():
    for room in rooms:
        fits = schedule == "small" or room >= 4 * d + 3
        found.append(attention_io(4096, 4096, d, schedule=schedule, fast_words=int(room)).words if fits else np.nan)
least = attention_io(4096, 4096, d, fast_words=int(rooms[-1])).least_words
fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.loglog(rooms, counts["flash"], "o-", color="#2f6db5", label="flash: N² d² / M")
ax.loglog(rooms, counts["small"], "s-", color="#3f9b6a", label="scores in slow memory: N² d / √M")
ax.axhline(least, color="#8a8f98", linestyle="--", linewidth=1, label="inputs and outputs once")
ax.axvline(d**2, color="#8a8f98", linewidth=0.8)
ax.annotate("M = d²", (d**2, ax.get_ylim()[1]), xytext=(4, -12), textcoords="offset points", color="#555555")
ax.set(xlabel="words of fast memory M", ylabel="words moved", title="one head of 4096 tokens, 64 wide, not causal")
ax.grid(True, alpha=0.3)
ax.legend(frameon=False)
plt.show()
