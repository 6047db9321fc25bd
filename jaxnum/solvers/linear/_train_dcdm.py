"""Training of the network of the deep conjugate direction method, without solutions to imitate.

Source: Kaneda et al. 2023; training on the residuals of the method's own runs is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnum.core import functions, trees
from jaxnum.core import progress as progress_
from jaxnum.core.loops import begin
from jaxnum.core.problems import Linear
from jaxnum.solvers.linear._dcdm import dcdm, dcdm_loss, normalised
from kernels_pallas import checks

PyTree = Any


class DCDMTraining(NamedTuple):
    """What `train_dcdm` returns: the weights, and the mean loss of each batch [steps]."""

    params: PyTree
    losses: jax.Array


class _Settings(NamedTuple):
    direction: Callable
    rounds: int
    per_round: int
    batch: int
    follow: int
    followed: int
    hook: Any


def train_dcdm(
    direction: Callable,
    params: PyTree,
    A: Callable,
    dataset: PyTree,
    key: jax.Array,
    *,
    steps: int = 800,
    batch: int = 10,
    learning_rate: float | jax.Array = 5e-3,
    follow: int = 6,
    rounds: int = 8,
    progress: Any = None,
) -> DCDMTraining:
    """Train the directions of `dcdm` by Adam on `dcdm_loss`, on right-hand sides and on the residuals they lead to.

    The first round sees the right-hand sides alone. Before each later round the method runs `follow` steps with its
    present weights on some of them, and the normalised residuals of these steps join the data: what the network is
    asked for in a run is no right-hand side but what its own earlier directions left over. Gradients are clipped
    to norm 1, and the learning rate falls to zero along a cosine.

    Args:
      direction: f(params, r) as for `dcdm`, a module-level function.
      params: weights to start from, as of `init_dcdm_network`.
      A: linear function v -> A v, symmetric positive definite. Captured arrays are hoisted.
      dataset: tree of right-hand sides with a leading axis, as of `ritz_dataset`.
      key: typed PRNG key, for the batches.
      steps: Adam steps, divisible by rounds.
      batch: right-hand sides a step >= 1.
      learning_rate: real scalar > 0, of the first step. 5e-3 suits the linear network; the paper's wants 1e-3.
      follow: steps of the method whose residuals are learned from, >= 0; 0 is the paper's training.
      rounds: how often they are taken anew, >= 1.
      progress: None, "text", "tqdm" or a callable, as for `jaxnum.solve`; the residual reported is the loss.

    Returns:
      A `DCDMTraining`.

    Raises:
      ValueError: an argument out of its range. FloatingPointError: an eager call whose loss became NaN or infinite.

    Cost: one compilation; about three networks and two A a right-hand side and step.

    Source: Kaneda, Akar, Chen, Kala, Hyde & Teran, "A deep conjugate direction method for iteratively solving linear
      systems" (ICML 2023), section 4; there Adam at 1e-4 for up to 1000 epochs of 20,000 right-hand sides.

    Example:
      >>> import jax, jax.numpy as jnp, jaxnum
      >>> A = lambda v: jnp.array([1.0, 4.0]) * v
      >>> scaled = lambda scale, r: scale * r
      >>> data = jax.random.normal(jax.random.key(0), (20, 2))
      >>> trained = jaxnum.solvers.train_dcdm(
      ...     scaled, jnp.ones(2), A, data, jax.random.key(1), steps=400, learning_rate=0.03
      ... )
      >>> print(f"{float(trained.params[0] / trained.params[1]):.1f}")  # any multiple of the inverse is perfect
      4.0
    """
    name = "train_dcdm"
    for argument, given, least in (
        ("steps", steps, 1),
        ("batch", batch, 1),
        ("follow", follow, 0),
        ("rounds", rounds, 1),
    ):
        ok = isinstance(given, int) and not isinstance(given, bool) and given >= least
        checks.value(name, argument, ok, f"be a Python int >= {least}", given)
    checks.value(name, "steps", steps % rounds == 0, f"be divisible by rounds ({rounds})", steps)
    if not checks.traced(learning_rate):
        checks.value(name, "learning_rate", 0 < float(learning_rate) < jnp.inf, "be positive and finite", learning_rate)
    dataset, params = (trees.strong(jax.tree.map(jnp.asarray, tree)) for tree in (dataset, params))
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(dataset)}
    checks.value(name, "dataset", len(sizes) == 1 and () not in sizes, "have one leading axis of samples", sizes)
    checks.value(name, "dataset", sizes != {(0,)}, "have a sample", sizes)
    operator = functions.trace(functions.as_function(A), jax.tree.map(lambda leaf: leaf[0], dataset))
    hook = progress_.resolve(name, progress)
    samples = jax.tree.leaves(dataset)[0].shape[0]
    # Residuals and right-hand sides in equal numbers.
    followed = min(samples, -(-samples // max(1, follow)))
    settings = _Settings(direction, rounds, steps // rounds, batch, follow, followed, hook)
    progress_.announce(hook, steps)
    trained = _train(settings, params, operator, dataset, key, jnp.asarray(learning_rate))
    if not checks.traced(trained.losses) and not bool(jnp.isfinite(trained.losses).all()):
        step = int(jnp.argmin(jnp.isfinite(trained.losses)))
        raise FloatingPointError(
            f"{name}: the loss must stay finite; got {float(trained.losses[step])} at step {step}. "
            "Lower `learning_rate`, or see whether A is positive definite."
        )
    return trained


@partial(jax.jit, static_argnames="settings")
def _train(
    settings: _Settings, params: PyTree, A: Any, dataset: PyTree, key: jax.Array, learning_rate: jax.Array
) -> DCDMTraining:
    total = settings.rounds * settings.per_round
    adam = optax.adam(lambda count: learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * count / total)))
    # A direction nearly orthogonal to b has a gradient that would spoil Adam's averages for a hundred steps.
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), adam)

    def loss(params: PyTree, bs: PyTree) -> jax.Array:
        return jnp.mean(jax.vmap(lambda b: dcdm_loss(settings.direction, params, A, b))(bs))

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        params, state, data, count = carry
        size = jax.tree.leaves(data)[0].shape[0]
        chosen = jax.random.randint(key, (settings.batch,), 0, size)
        value, gradient = jax.value_and_grad(loss)(params, jax.tree.map(lambda leaf: leaf[chosen], data))
        updates, state = optimiser.update(gradient, state)
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        progress_.report(settings.hook, count + 1, total, value, count + 1 == total)
        return (params, state, data, count + 1), value

    def one_round(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        params, state, count = carry
        some, batches = jax.random.split(key)
        data = dataset
        if settings.follow > 0:
            chosen = jax.random.randint(some, (settings.followed,), 0, jax.tree.leaves(dataset)[0].shape[0])
            starts = jax.tree.map(lambda leaf: leaf[chosen], dataset)
            more = _leftovers(settings, params, A, starts, count == 0)
            data = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), dataset, more)
        keys = jax.random.split(batches, settings.per_round)
        (params, state, _, count), losses = jax.lax.scan(step, (params, state, data, count), keys)
        return (params, state, count), losses

    start = (params, optimiser.init(params), jnp.int32(0))
    (params, _, _), losses = jax.lax.scan(one_round, start, jax.random.split(key, settings.rounds))
    return DCDMTraining(params, losses.reshape(total))


def _leftovers(settings: _Settings, params: PyTree, A: Any, bs: PyTree, untrained: jax.Array) -> PyTree:
    """Unit residuals of the first steps of the method on each right-hand side [samples * follow, ...].

    The right-hand side itself stands in where there are none worth learning from: before any training, and where a run
    has reached its rounding.
    """
    solver = dcdm(settings.direction, params)

    def run(b: PyTree) -> PyTree:
        problem = Linear(A, b)
        x = jax.tree.map(jnp.zeros_like, b)

        def advance(pair: tuple, _: None) -> tuple[tuple, PyTree]:
            pair = solver.step(solver.hyper, *pair, problem)
            r, size = normalised(pair[1].base.r)
            fit = ~untrained & jnp.isfinite(size) & (size > 100 * jnp.finfo(size.dtype).eps)
            return pair, trees.where(fit, r, b)

        return jax.lax.scan(advance, (x, begin(solver, x, problem)), None, length=settings.follow)[1]

    residuals = jax.lax.map(run, bs)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), residuals)
