"""Target-based surrogates on logistic regression: the loss left after 50 expensive calls, and an outer step's time.

Full batch, n = 200, features of many scales; inner gradient descent with steps 1 / L of the surrogate, and η = 1 / L,
beside gradient descent with 1 / L. Logistic loss bears longer steps than that, in both: with a tenth of the labels
turned round, so that there is an optimum, what each leaves above it at its best of ten multiples of η or the step is
shown too. The paper's imitation learning is not repeated here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.registry import Params, Row, Target, register

EXAMPLES, WIDTH, CALLS, SEEDS = 200, 50, 50, 5
ETA = 4.0 * EXAMPLES


def problem(seed: int, wrong: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, d] and labels ±1 of a plane, a share of them turned round."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(EXAMPLES, WIDTH)) * np.logspace(0, -1.5, WIDTH)
    labels = np.sign(features @ rng.normal(size=WIDTH))
    return features, np.where(rng.uniform(size=EXAMPLES) < wrong, -labels, labels)


def rate(features) -> float:
    return 4 * EXAMPLES / np.linalg.norm(features, 2) ** 2


def loss_of(labels):
    return lambda z: jnp.mean(jnp.logaddexp(0, -labels * z))


def surrogates(features, labels, steps: int, factors=(1.0,)) -> float:
    """Loss after all calls with so many inner steps, at the best multiple of η."""
    from jaxnum.training import sso

    loss = loss_of(labels)

    def run(factor):
        init, step = sso(optax.sgd(factor * rate(features)), steps, factor * ETA)

        def outer(carry, _):
            params, state, _ = step(*carry, lambda p: features @ p, jax.value_and_grad(loss))
            return (params, state), None

        start = jnp.zeros(WIDTH)
        (params, _), _ = jax.lax.scan(outer, (start, init(start)), None, length=CALLS)
        return loss(features @ params)

    return float(jax.jit(jax.vmap(run))(jnp.asarray(factors)).min())


def descent(features, labels, factors=(1.0,)) -> float:
    """Loss after as many gradients of gradient descent, at the best multiple of the step."""
    loss = loss_of(labels)
    slope = jax.grad(lambda p: loss(features @ p))

    def run(factor):
        step = factor * rate(features)
        return loss(features @ jax.lax.fori_loop(0, CALLS, lambda _, p: p - step * slope(p), jnp.zeros(WIDTH)))

    return float(jax.jit(jax.vmap(run))(jnp.asarray(factors)).min())


def projected(features, labels) -> float:
    """Loss of the limit of many inner steps, by the pseudo-inverse."""
    loss, inverse = loss_of(labels), np.linalg.pinv(features)
    params, slope = jnp.zeros(WIDTH), jax.jit(jax.grad(loss))
    for _ in range(CALLS):
        params = params - ETA * inverse @ slope(features @ params)
    return float(loss(features @ params))


def optimum(features, labels) -> float:
    """Least loss, by Newton's method."""
    loss = loss_of(labels)
    f = lambda p: loss(features @ p)  # noqa: E731
    newton = jax.jit(lambda p: p - jnp.linalg.solve(jax.hessian(f)(p), jax.grad(f)(p)))
    params = jnp.zeros(WIDTH)
    for _ in range(30):
        params = newton(params)
    return float(f(params))


def logistic() -> dict[str, float]:
    losses: dict[str, list[float]] = {}
    factors = 2.0 ** np.arange(10)
    for seed in range(SEEDS):
        features, labels = problem(seed)
        found = {f"m_{m}": surrogates(features, labels, m) for m in (1, 5, 20, 100)}
        found |= {"m_infinite": projected(features, labels), "descent": descent(features, labels)}
        features, labels = problem(seed, wrong=0.1)
        least = optimum(features, labels)
        found["noisy_excess_m_20_best_eta"] = surrogates(features, labels, 20, factors) - least
        found["noisy_excess_descent_best_step"] = descent(features, labels, factors) - least
        for name, value in found.items():
            losses.setdefault(name, []).append(value)
    figures = {f"loss_{name}": float(np.mean(values)) for name, values in losses.items()}
    ratios = [ours / theirs for ours, theirs in zip(losses["m_20"], losses["descent"], strict=True)]
    return figures | {"m_20_over_descent": max(ratios)}


def make(params: Params) -> tuple:
    features, labels = problem(0)
    return tuple(jnp.asarray(x) for x in (np.linspace(-1, 1, WIDTH), features, labels))


def run(params: Params):
    from jaxnum.training import sso

    init, step = sso(optax.sgd(rate(problem(0)[0])), params["m"], ETA)

    def outer(start, features, labels):
        return step(start, init(start), lambda p: features @ p, jax.value_and_grad(loss_of(labels)))[0]

    return outer


def reference(params: Params):
    """The same steps in NumPy."""

    def outer(start, features, labels):
        point, step = start, rate(features)
        z = features @ start
        d = -labels / (1 + np.exp(labels * z)) / EXAMPLES
        for _ in range(params["m"]):
            point = point - step * features.T @ (d + (features @ point - z) / ETA)
        return point

    return lambda *inputs: outer(*(np.asarray(x, np.float64) for x in inputs))


register(
    Row(
        name="sso",
        covers=("sso", "sso_surrogate"),
        shapes={"m_20": {"m": 20}},
        make=make,
        run=run,
        reference=reference,
        modes=("step",),
        tests=("tests/training/test_sso.py",),
        targets=(
            Target(
                "figure",
                0.55,
                "m = 20 at most 0.55x the loss of gradient descent at equal expensive calls.",
                figure="m_20_over_descent",
            ),
            Target("error", 1e-12, "The steps of a loop in NumPy.", shape="m_20"),
        ),
        figures={"logistic": logistic},
        x64=True,
    )
)
