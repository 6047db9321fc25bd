"""Several finished models from one run: WSD-S and branches of WSD beside a run of its own for each length.

A network of two hidden layers learns one mixture of Gaussians with Adam in batches of 32, hardly any example twice;
losses are those of examples that were not learned from, means of five seeds of weights and batches. Separate runs draw
other batches, as they would. Noise is the standard error of the difference of two means. Two rules of decay: a fifth
of a cycle, and as many steps in the separate run; or a tenth of a cycle, and in the separate run a tenth of its own
length, which is longer at all endpoints but the first. A branch may decay as long as the separate run does; WSD-S may
not, since its next cycle has to begin.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.registry import Params, Peer, Row, Target, register
from benchmarks.training import mean_loss, mixture, network

SEEDS = 5
PEAK, WARMUP = 3e-3, 50
ENDPOINTS = (1000, 2000, 4000)
TRAIN, TEST, BATCH = 64_000, 16_000, 32


def make(params: Params) -> tuple:
    return (jnp.arange(ENDPOINTS[-1], dtype=jnp.int32),)


def run(params: Params):
    from jaxnum.schedules import wsd

    return jax.vmap(wsd(PEAK, ENDPOINTS[-1], WARMUP, 400, decay="linear"))


def by_pieces(params: Params):
    """The same of optax's pieces, which have no inverse decay."""
    pieces = [
        optax.linear_schedule(0.0, PEAK, WARMUP),
        optax.constant_schedule(PEAK),
        optax.linear_schedule(PEAK, 0.1 * PEAK, 400),
    ]
    return jax.vmap(optax.join_schedules(pieces, [WARMUP, ENDPOINTS[-1] - 400]))


def reference(params: Params):
    return lambda counts: PEAK * jnp.minimum(counts / WARMUP, 1 - 0.9 * jnp.maximum(counts - 3600, 0) / 400)


@functools.cache
def examples() -> tuple[jax.Array, jax.Array]:
    return mixture(0, size=TRAIN + TEST)


def trained(schedule: optax.Schedule, carry: tuple | None, steps: range, order: int) -> tuple:
    """Weights and Adam's state of every seed after these steps of a run, from a checkpoint or, at None, the start."""
    tx = optax.adam(schedule)
    inputs, labels = (part[:TRAIN] for part in examples())

    def one(carry, seed):
        def step(carry, count):
            layers, state = carry
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(order), seed), count)
            chosen = jax.random.randint(key, (BATCH,), 0, TRAIN)
            gradient = jax.grad(mean_loss)(layers, inputs[chosen], labels[chosen])
            updates, state = tx.update(gradient, state, layers)
            return (optax.apply_updates(layers, updates), state), None

        return jax.lax.scan(step, carry, jnp.arange(steps.start, steps.stop))[0]

    def start(seed):
        layers = network(seed + 100)
        return layers, tx.init(layers)

    seeds = jnp.arange(SEEDS)
    return jax.jit(jax.vmap(one))(jax.jit(jax.vmap(start))(seeds) if carry is None else carry, seeds)


def losses(layers: list) -> jax.Array:
    """Loss of every seed's network on examples that it has not learned from."""
    inputs, labels = (part[TRAIN:] for part in examples())
    return jax.jit(jax.vmap(mean_loss, in_axes=(0, None, None)))(layers, inputs, labels)


def several_lengths(share: float, own: bool, prefix: str) -> dict[str, float]:
    """Losses at three endpoints, differences in units of their noise, and steps, as shares of separate runs'.

    `own`: separate runs decay for that share of their own length, rather than of the cycle.
    """
    from jaxnum.schedules import wsd, wsd_branch, wsd_s

    last = ENDPOINTS[-1]
    one, main = wsd_s(PEAK, ENDPOINTS, WARMUP, decay_fraction=share), wsd(PEAK, 10 * last, WARMUP, 1)
    kept = stable = None
    before, left, figures = 0, 0, {}
    steps = {"wsd": sum(ENDPOINTS), "wsd_s": last, "wsd_branch": last}
    for turn, end in enumerate(ENDPOINTS):
        decay = round(share * (end - before))
        length = round(share * end) if own else decay
        alone = trained(wsd(PEAK, end, WARMUP, length), None, range(end), order=1 + turn)
        kept = trained(one, kept, range(before, end), order=0)
        stable = trained(main, stable, range(left, end - length), order=0)
        branch = trained(wsd_branch(PEAK, end - length, length), stable, range(end - length, end), order=0)
        steps["wsd_branch"] += length if end < last else 0
        before, left = end, end - length
        found = {"wsd": alone, "wsd_s": kept, "wsd_branch": branch, "undecayed": stable}
        found = {name: np.asarray(losses(carry[0]), np.float64) for name, carry in found.items()}
        figures |= {f"{name}_{end}": values.mean() for name, values in found.items()}
        for name in ("wsd_s", "wsd_branch"):
            noise = np.sqrt((found[name].var(ddof=1) + found["wsd"].var(ddof=1)) / SEEDS)
            figures[f"{name}_minus_wsd_over_noise_{end}"] = (found[name].mean() - found["wsd"].mean()) / noise
            figures[f"{name}_over_wsd_{end}"] = found[name].mean() / found["wsd"].mean()
        figures[f"wsd_spread_of_seeds_{end}"] = found["wsd"].std(ddof=1) / found["wsd"].mean()
    figures |= {f"{name}_steps_over_wsd": steps[name] / steps["wsd"] for name in ("wsd_s", "wsd_branch")}
    return {prefix + name: value for name, value in figures.items()}


RULES = {"": (0.2, False), "own_": (0.1, True)}
EQUAL = "WSD-S branches equal to separately trained WSD runs within noise."
register(
    Row(
        name="wsd",
        covers=("wsd", "wsd_s", "wsd_branch"),
        shapes={"4000_steps": {}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd",),
        tests=("tests/schedules/test_wsd.py",),
        peers={"optax.join_schedules": Peer("optax", by_pieces)},
        targets=(
            Target("error", 1e-6, "Linear pieces in float32."),
            *(
                Target("figure", 2.0, EQUAL, figure=f"{prefix}{name}_minus_wsd_over_noise_{end}")
                for prefix in RULES
                for name in ("wsd_s", "wsd_branch")
                for end in ENDPOINTS
            ),
            *(
                Target("figure", 0.99, "At lower cost.", figure=f"{prefix}{name}_steps_over_wsd")
                for prefix in RULES
                for name in ("wsd_s", "wsd_branch")
            ),
        ),
        figures={
            f"{prefix}several_lengths": functools.partial(several_lengths, share, own, prefix)
            for prefix, (share, own) in RULES.items()
        },
    )
)
