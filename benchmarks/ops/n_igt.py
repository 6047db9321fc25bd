"""Implicit gradient transport and Hessian-aided momentum on a noisy quadratic, beside momentum; and a step's time.

The momentum beside them is the same normalised one with gradients at the iterate and its own best-known schedule of
averaging, (2 / (t + 2))^(2/3), in place of 4/5. Where steps are ten times as long all are limited by the noise, and the
order can change: that is shown too.

And policy gradients, which the methods are from: policies learn from one trajectory a step (HARP: from two, in half of
the steps) beside REINFORCE, which is plain SGD, and normalised momentum, each at its best of six rates. One has a
softmax of two actions in two states, whose best policy is at infinity, where steps of fixed length that shrink come
late; the other steers a linear system with normal noise, which is the setting of the paper's theory. What is compared
is how far the expected return of the last policy is from the best one's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.registry import Params, Row, Target, register
from benchmarks.training import donated, tree

STEPS, SEEDS = 2000, 5
DISCOUNT, HORIZON, TRAJECTORIES, RUNS = 0.9, 40, 2000, 20


def noisy(optimiser_of, rate: float) -> float:
    """Norm of the gradient at the last iterate, mean over seeds."""
    from jaxnum.transforms import n_igt_params

    curvature = jnp.logspace(-2, 0.5, 20)

    def one(key):
        optimiser, transported = optimiser_of(lambda t: rate / (t + 10))
        start = jnp.ones(20)

        def step(carry, noise):
            x, state = carry
            loss = lambda x: 0.5 * jnp.sum(curvature * x**2)  # noqa: E731
            gradient = curvature * x + 3 * noise
            updates, state = optimiser.update(gradient, state, x, obj_fn=loss)
            return (optax.apply_updates(x, updates), state), None

        (x, state), _ = jax.lax.scan(step, (start, optimiser.init(start)), jax.random.normal(key, (STEPS, 20)))
        return jnp.linalg.norm(curvature * (n_igt_params(state, x) if transported else x))

    return float(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), SEEDS)).mean())


def momentum(rate):
    """Normalised steps along an average of gradients at the iterate."""

    def update(gradient, state, params=None, **extra):
        count, d = state
        eta = (2 / (count + 2)) ** (2 / 3)
        d = (1 - eta) * d + eta * gradient
        return -rate(count) * d / jnp.linalg.norm(d), (count + 1, d)

    start = lambda params: (jnp.int32(0), jnp.zeros_like(params))  # noqa: E731
    return optax.GradientTransformationExtraArgs(start, update), False


def quadratic() -> dict[str, float]:
    from jaxnum.transforms import harp, n_igt

    figures = {}
    for label, rate in (("", 1.0), ("_long_steps", 10.0)):
        ours = noisy(lambda rate: (n_igt(rate), True), rate)
        aided = noisy(lambda rate: (harp(rate, jax.random.key(1)), False), rate)
        plain = noisy(momentum, rate)
        figures[f"igt_over_momentum{label}"] = ours / plain
        figures[f"harp_over_igt{label}"] = aided / ours
        figures[f"gradient_momentum{label}"] = plain
    return figures


class Chain:
    """Two states: an action asks for one and mostly gets it; leaving state 0 costs now what state 1 pays later."""

    start, rates = jnp.zeros((2, 2)), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    moves = jnp.array([[0.9, 0.1], [0.1, 0.9]])
    rewards = jnp.array([[0.2, -0.5], [0.0, 1.0]])

    @classmethod
    def value(cls, theta):
        """Expected discounted return from state 0, by one linear system."""
        policy = jax.nn.softmax(theta)
        moved = policy @ cls.moves
        return jnp.linalg.solve(jnp.eye(2) - DISCOUNT * moved, jnp.sum(policy * cls.rewards, axis=1))[0]

    @classmethod
    def best(cls):
        return max(float(cls.value(100.0 * jnp.array([[a, -a], [b, -b]]))) for a in (-1, 1) for b in (-1, 1))

    @classmethod
    def trajectory(cls, key, theta):
        def step(state, key):
            keys = jax.random.split(key)
            action = jax.random.categorical(keys[0], theta[state])
            following = jax.random.categorical(keys[1], jnp.log(cls.moves[action]))
            return following, (state, action, cls.rewards[state, action])

        return jax.lax.scan(step, jnp.int32(0), jax.random.split(key, HORIZON))[1]

    @staticmethod
    def log_probabilities(theta, states, actions):
        return jax.nn.log_softmax(theta)[states, actions]


class Regulator:
    """x' = A x + B u + 0.1 noise with u drawn around K x, at a cost of |x|² + |u|²; theta is K."""

    start, rates = jnp.zeros((1, 2)), (1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 3e-6)
    a, b, deviation = jnp.array([[1.0, 0.2], [0.0, 1.0]]), jnp.array([[0.0], [0.2]]), 0.3

    @classmethod
    def value(cls, theta):
        """Expected discounted return over the horizon from x of covariance I, by the recursion of covariances."""
        closed, noise = cls.a + cls.b @ theta, cls.deviation**2 * cls.b @ cls.b.T + 0.01 * jnp.eye(2)

        def step(covariance, discount):
            cost = jnp.trace((jnp.eye(2) + theta.T @ theta) @ covariance) + cls.deviation**2
            return closed @ covariance @ closed.T + noise, -discount * cost

        return jax.lax.scan(step, jnp.eye(2), DISCOUNT ** jnp.arange(HORIZON))[1].sum()

    @classmethod
    def best(cls):
        from scipy.optimize import minimize

        cost = jax.jit(jax.value_and_grad(lambda theta: -cls.value(theta.reshape(1, 2))))
        found = minimize(
            lambda x: [np.asarray(part, np.float64) for part in cost(jnp.float32(x))], [0.0, 0.0], jac=True
        )
        return -float(found.fun)

    @classmethod
    def trajectory(cls, key, theta):
        def step(x, key):
            keys = jax.random.split(key)
            u = theta @ x + cls.deviation * jax.random.normal(keys[0], (1,))
            following = cls.a @ x + cls.b @ u + 0.1 * jax.random.normal(keys[1], (2,))
            return following, (x, u, -jnp.sum(x**2) - jnp.sum(u**2))

        keys = jax.random.split(key, HORIZON + 1)
        return jax.lax.scan(step, jax.random.normal(keys[0], (2,)), keys[1:])[1]

    @classmethod
    def log_probabilities(cls, theta, states, actions):
        return -jnp.sum((actions - states @ theta.T) ** 2, axis=1) / (2 * cls.deviation**2)


def policy_gap(world, optimiser_of, rates, transported: bool = False, products: bool = False) -> float:
    """Least mean distance from the best return, over rates."""
    from jaxnum.transforms import n_igt_params

    def surrogate(theta, states, actions, rewards):
        """Minus the log-probabilities times what is still to come, whose gradient is REINFORCE's."""
        discounted = rewards * DISCOUNT ** jnp.arange(HORIZON)
        return -jnp.sum(world.log_probabilities(theta, states, actions) * jnp.cumsum(discounted[::-1])[::-1])

    def one(rate, key):
        optimiser, theta = optax.with_extra_args_support(optimiser_of(rate)), world.start

        def step(carry, key):
            theta, state = carry
            keys = jax.random.split(key)
            gradient = jax.grad(surrogate)(theta, *world.trajectory(keys[0], theta))

            def product(point, vector):
                seen = world.trajectory(keys[1], point)
                first = jax.grad(surrogate)(point, *seen)
                likelihood = jax.grad(lambda p: jnp.sum(world.log_probabilities(p, *seen[:2])))(point)
                second = jax.jvp(jax.grad(lambda p: surrogate(p, *seen)), (point,), (vector,))[1]
                return first * jnp.vdot(likelihood, vector) + second

            extra = {"hvp_fn": product} if products else {}
            updates, state = optimiser.update(gradient, state, theta, **extra)
            return (optax.apply_updates(theta, updates), state), None

        steps = TRAJECTORIES // (2 if products else 1)
        carry = (theta, optimiser.init(theta))
        (theta, state), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
        return world.value(n_igt_params(state, theta) if transported else theta)

    keys = jax.random.split(jax.random.key(3), RUNS)
    values = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(jnp.asarray(rates), keys).mean(axis=1)
    return world.best() - float(np.nanmax(values))


def policies() -> dict[str, float]:
    from jaxnum.transforms import harp, n_igt

    figures = {}
    for world in (Chain, Regulator):
        lengths = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
        gaps = {
            "reinforce": policy_gap(world, optax.sgd, world.rates),
            "momentum": policy_gap(world, lambda rate: momentum(lambda t: rate / (t + 10))[0], lengths),
            "igt": policy_gap(world, lambda rate: n_igt(lambda t: rate / (t + 10)), lengths, transported=True),
            "harp": policy_gap(
                world, lambda rate: harp(lambda t: rate / (t + 10), jax.random.key(1)), lengths, products=True
            ),
        }
        label = world.__name__.lower()
        figures |= {f"{label}_gap_{name}": gap for name, gap in gaps.items()}
        figures |= {
            f"{label}_{name}_over_{peer}": gaps[name] / gaps[peer]
            for name in ("igt", "harp")
            for peer in ("reinforce", "momentum")
        }
    return figures


def donated_steps() -> dict[str, float]:
    from jaxnum.transforms import n_igt

    return donated(n_igt(1e-3), {"optax.adamw": optax.adamw(1e-3)})


def make(params: Params) -> tuple:
    """Iterate, gradient, momentum."""
    return tuple(tree(seed) for seed in range(3))


def run(params: Params):
    from jaxnum.transforms import n_igt

    optimiser = n_igt(1e-3)

    def step(x, gradient, d):
        state = optimiser.init(x)._replace(count=jnp.int32(3), d=d)
        updates, state = optimiser.update(gradient, state, x)
        return optax.apply_updates(x, updates), state.d

    return step


def reference(params: Params):
    def step(x, gradient, d):
        eta, following = (0.4**0.8, (1 / 3) ** 0.8)
        d = jax.tree.map(lambda d, g: (1 - eta) * d + eta * g, d, gradient)
        scale = 1e-3 / optax.tree.norm(d)
        return jax.tree.map(lambda x, d: x - scale * d / following, x, d), d

    return step


register(
    Row(
        name="n_igt",
        covers=("n_igt", "n_igt_params", "harp", "scale_by_harp"),
        shapes={"10m": {}},
        make=make,
        run=run,
        reference=reference,
        modes=("step",),
        tests=("tests/transforms/test_n_igt.py", "tests/transforms/test_harp.py"),
        targets=(
            Target("figure", 0.85, "N-IGT <= 0.85x momentum.", figure="igt_over_momentum"),
            Target("figure", 0.85, "HARP <= 0.85x N-IGT.", figure="harp_over_igt"),
        ),
        figures={"quadratic": quadratic, "policies": policies, "donated": donated_steps},
    )
)
