"""Value iteration on random graphs, learned: a graph network with a convergent layer, and the same network without it.

A state has 5 to 10 actions, each leads to a state and pays a reward of U(-1, 1); the network sees the graph and the
rewards and predicts V = max_a (r + 0.9 V(next)) at every state. Both networks have three layers of messages and see
three steps ahead; the convergent layer solves for the whole graph. Trained on 10 to 20 states, judged there and on 40.
Training is cut to 300 updates of 16 graphs from the paper's 5,000 of 64, and both networks are far from their best.
Two things are not the authors': the solution is scaled by 1 - gamma, without which gamma = 0.9 does not train in so few
updates, and it is read beside the states' own features. The time is that of the layer alone, beside optimistix.

So short a training leaves much to the first weights: the figures give the mean over seeds and the worst one. The larger
graphs are no safer ground for the convergent layer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.registry import Params, Peer, Row, Target, register

DISCOUNT = 0.9
RTOL = 1e-4
HIDDEN = 64
BATCH = 16
UPDATES = 300
SEEDS = 3
TESTED = 64


def graphs(rng: np.random.Generator, count: int, fewest: int, most: int) -> tuple[np.ndarray, ...]:
    """Random graphs side by side as one: where each edge starts and leads, its reward, and the value of each state."""
    sizes = rng.integers(fewest, most, count, endpoint=True)
    actions = np.repeat(rng.integers(5, 10, count, endpoint=True), sizes)
    first, size = (np.repeat(x, sizes) for x in (np.cumsum(sizes) - sizes, sizes))
    senders = np.repeat(np.arange(actions.size), actions)
    receivers = (first + rng.integers(0, 2**31, (10, size.size)) % size).T[np.arange(10) < actions[:, None]]
    rewards = rng.uniform(-1, 1, senders.size)
    starts, values = np.cumsum(actions) - actions, np.zeros(actions.size)
    for _ in range(250):  # 0.9^250 is 4e-12
        values = np.maximum.reduceat(rewards + DISCOUNT * values[receivers], starts)
    return senders, receivers, rewards, values


def padded(batches: list) -> tuple[jax.Array, ...]:
    """Batches of one size, stacked, and which states are real: idle edges run from the last state, idle, to itself."""
    edges = max(len(batch[0]) for batch in batches)
    states = max(len(batch[3]) for batch in batches) + 1
    ends = [[np.pad(end, (0, edges - len(end)), constant_values=states - 1) for end in batch[:2]] for batch in batches]
    senders, receivers = np.asarray(ends, np.int32).swapaxes(0, 1)
    rewards = np.asarray([np.pad(batch[2], (0, edges - len(batch[2]))) for batch in batches], np.float32)
    values = np.asarray([np.pad(batch[3], (0, states - len(batch[3]))) for batch in batches], np.float32)
    real = np.asarray([np.arange(states) < len(batch[3]) for batch in batches])
    return tuple(jnp.asarray(leaf) for leaf in (senders, receivers, rewards, values, real))


@functools.cache
def data(seed: int) -> dict[str, tuple[jax.Array, ...]]:
    rng = np.random.default_rng(seed)
    sets = {"train": (UPDATES, BATCH, 10, 20), "same": (1, TESTED, 10, 20), "larger": (1, TESTED, 40, 40)}
    return {name: padded([graphs(rng, *sizes) for _ in range(many)]) for name, (many, *sizes) in sets.items()}


def initial(key: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Weights of both networks: without the convergent layer, "weigh" is idle, 3 % of them."""
    wide = {"reward": 1, "shift": HIDDEN, "weigh": HIDDEN, "read": 2 * HIDDEN, "deep": HIDDEN, "value": HIDDEN}
    for layer in range(3):
        parts = {"start": 1, "end": 1, "edge": 1, "message": 1, "update": 3, "state": 1}
        wide |= {f"{part}{layer}": times * HIDDEN for part, times in parts.items()}
    weights = {}
    for k, (name, size) in zip(jax.random.split(key, len(wide)), wide.items(), strict=True):
        out = 1 if name == "value" else HIDDEN
        weights[name] = jax.random.normal(k, (size, out)) * (2 / size) ** 0.5, jnp.zeros(out)
    return weights


def predict(weights: dict, senders, receivers, rewards, states: int, layer) -> jax.Array:
    """Values of the states, in units of the training's spread about its mean."""
    through = lambda name, x: x @ weights[name][0] + weights[name][1]  # noqa: E731
    edges, nodes = jax.nn.relu(through("reward", rewards[:, None])), jnp.zeros((states, HIDDEN))
    count = jnp.maximum(jax.ops.segment_sum(jnp.ones_like(rewards), senders, states), 1)[:, None]
    for k in range(3):
        ends = through(f"start{k}", nodes)[senders] + through(f"end{k}", nodes)[receivers]
        edges = edges + through(f"message{k}", jax.nn.relu(ends + through(f"edge{k}", edges)))
        mean = jax.ops.segment_sum(edges, senders, states) / count
        top = jax.ops.segment_max(edges, senders, states)
        seen = jnp.concatenate([nodes, mean, jnp.where(jnp.isfinite(top), top, 0)], axis=1)
        nodes = nodes + through(f"state{k}", jax.nn.relu(through(f"update{k}", seen)))
    far = layer(through("weigh", edges), through("shift", nodes), senders, receivers)
    read = jax.nn.relu(through("read", jnp.concatenate([nodes, far], axis=1)))
    return through("value", jax.nn.relu(through("deep", read)))[:, 0]


def convergent(logits, b, senders, receivers, *, mode: str, gamma: float, rtol: float = RTOL):
    """The layer, times 1 - gamma, which keeps it at the size of b: a weighted mean of what a state can reach."""
    from jaxnum.solvers import convergent_graph_solver, convergent_graph_solver_weights

    weights = convergent_graph_solver_weights(logits, senders, b.shape[0], mode=mode)
    options = {"gamma": gamma, "rtol": rtol, "atol": 1e-6, "on_failure": "return"}
    return (1 - gamma) * convergent_graph_solver(weights, b, senders, receivers, **options).x


def without(logits, b, senders, receivers):
    """No layer: gamma = 0."""
    return b


# The authors' code, and the one that a policy's values solve exactly.
LAYERS = {
    "degree_0.5": functools.partial(convergent, mode="degree", gamma=0.5),
    "softmax_0.9": functools.partial(convergent, mode="softmax", gamma=DISCOUNT),
}


@functools.partial(jax.jit, static_argnums=0)
def fit(layer, weights: dict, batches: tuple, mean: jax.Array, spread: jax.Array) -> Any:
    """Adam on the squared error, one update a batch."""
    optimizer = optax.adam(1e-3)

    def loss(weights, senders, receivers, rewards, values, real):
        guess = predict(weights, senders, receivers, rewards, values.size, layer)
        return jnp.sum(jnp.where(real, guess - (values - mean) / spread, 0) ** 2) / jnp.sum(real)

    def update(carry, batch):
        weights, state = carry
        change, state = optimizer.update(jax.grad(loss)(weights, *batch), state)
        return (optax.apply_updates(weights, change), state), None

    return jax.lax.scan(update, (weights, optimizer.init(weights)), batches)[0][0]


def percentage(guess: jax.Array, values: jax.Array, real: jax.Array) -> float:
    """Mean absolute error in per cent of the values, which are all far from 0."""
    return 100 * float(jnp.mean(jnp.abs(guess[real] / values[real] - 1)))


def judged(seed: int) -> dict[str, float]:
    """Percentage errors of the networks, and of the training's mean as a guess, on both sizes of graph."""
    sets = data(seed)
    known = sets["train"][3][sets["train"][4]]
    mean, spread = known.mean(), known.std()
    guess_of = jax.jit(predict, static_argnums=(4, 5))
    found = {}
    for name, layer in {"mpnn": without, **LAYERS}.items():
        weights = fit(layer, initial(jax.random.key(seed)), sets["train"], mean, spread)
        for kind in ("same", "larger"):
            *inputs, values, real = (leaf[0] for leaf in sets[kind])
            guess = mean + spread * guess_of(weights, *inputs, len(values), layer)
            found[f"{name}_{kind}"] = percentage(guess, values, real)
            found[f"constant_{kind}"] = percentage(jnp.full_like(values, mean), values, real)
    return found


def errors() -> dict[str, float]:
    """Mean absolute percentage errors, the mean over the seeds, and their ratios: the mean and the worst seed's."""
    seeds = [judged(seed) for seed in range(SEEDS)]
    figures = {f"mape_{name}": float(np.mean([found[name] for found in seeds])) for name in seeds[0]}
    for name in LAYERS:
        for kind in ("same", "larger"):
            ratios = [found[f"{name}_{kind}"] / found[f"mpnn_{kind}"] for found in seeds]
            figures[f"{name}_to_mpnn_{kind}"] = float(np.mean(ratios))
            figures[f"{name}_to_mpnn_{kind}_worst"] = max(ratios)
    return figures


def graph(params: Params) -> tuple[jax.Array, jax.Array, int]:
    senders, receivers, _, values = graphs(np.random.default_rng(0), params["graphs"], params["n"], params["n"])
    return jnp.asarray(senders, jnp.int32), jnp.asarray(receivers, jnp.int32), values.size


def make(params: Params) -> tuple:
    senders, _, states = graph(params)
    keys = jax.random.split(jax.random.key(0))
    return tuple(
        jax.random.normal(k, (n, HIDDEN), jnp.float32) for k, n in zip(keys, (senders.size, states), strict=True)
    )


def run(params: Params):
    senders, receivers, _ = graph(params)
    return lambda logits, b: convergent(logits, b, senders, receivers, mode="softmax", gamma=DISCOUNT, rtol=1e-5)


def optimistix(params: Params):
    import lineax
    import optimistix

    senders, receivers, states = graph(params)
    solver = optimistix.FixedPointIteration(rtol=1e-5, atol=1e-6)
    # Its default would write the layer's Jacobian down, dense.
    adjoint = optimistix.ImplicitAdjoint(linear_solver=lineax.GMRES(rtol=1e-5, atol=1e-6))

    def through(x, args):
        weights, b = args
        return DISCOUNT * jax.ops.segment_sum(weights * x[receivers], senders, states) + b

    def solve(logits, b):
        args = softmax(logits, senders, states), b
        found = optimistix.fixed_point(through, solver, b, args, adjoint=adjoint, max_steps=1000, throw=False)
        return (1 - DISCOUNT) * found.value

    return solve


def softmax(logits, senders, states: int):
    raised = jnp.exp(logits)
    return raised / jax.ops.segment_sum(raised, senders, states)[senders]


def reference(params: Params):
    senders, receivers, states = graph(params)

    def solve(logits, b):
        A = jnp.zeros((HIDDEN, states, states)).at[:, senders, receivers].add(softmax(logits, senders, states).T)
        return (1 - DISCOUNT) * jnp.linalg.solve(jnp.eye(states) - DISCOUNT * A, b.T[:, :, None])[:, :, 0].T

    return solve


register(
    Row(
        name="convergent_graph_solver",
        covers=("convergent_graph_solver", "convergent_graph_solver_weights"),
        shapes={"states_8x40": {"graphs": 8, "n": 40}},
        make=make,
        run=run,
        reference=reference,
        modes=("solve", "fwd_bwd"),
        tests=("tests/solvers/test_convergent_graph_solver.py",),
        peers={"optimistix": Peer("optimistix", optimistix)},
        targets=tuple(
            Target("figure", 1.0, f"Mean percentage error below the MPNN's{where}.", figure=f"{name}_to_mpnn_{kind}")
            for name in LAYERS
            for kind, where in (("same", ""), ("larger", ", on graphs larger than those trained on"))
        ),
        figures={"errors": errors},
    )
)
