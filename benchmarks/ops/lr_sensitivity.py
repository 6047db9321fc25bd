"""Learning-rate sensitivity of a small transformer with and without the cures of attention and output logits.

Two layers of width 32 learn a Markov chain of 64 tokens in 500 steps at seven learning rates. The cures are given one
by one and together: layer norm of queries and keys, the log Z penalty, independent weight decay. Losses are those of
held-out sequences, without the penalty.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from benchmarks.registry import Params, Row, Target, register

TOKENS, WIDTH, HEADS, LAYERS = 64, 32, 2, 2
LENGTH, BATCH, STEPS, SEEDS = 32, 8, 500, 5
LOW, HIGH, POINTS = 10**-3.5, 10**-0.5, 7
# (layer norm of queries and keys, log Z penalty, independent decay)
CASES = {
    "none": (False, False, False),
    "qk_layernorm": (True, False, False),
    "log_z": (False, True, False),
    "independent_decay": (False, False, True),
    "all": (True, True, True),
}


def sequences(key: jax.Array, chain: jax.Array, count: int) -> jax.Array:
    """Sequences [count, LENGTH + 1] of a Markov chain with the given logits [TOKENS, TOKENS]."""
    start, rest = jax.random.split(key)
    first = jax.random.randint(start, (count,), 0, TOKENS)

    def step(token, key):
        following = jax.random.categorical(key, chain[token])
        return following, following

    _, others = jax.lax.scan(step, first, jax.random.split(rest, LENGTH))
    return jnp.concatenate([first[None], others]).T


def weights(key: jax.Array) -> dict:
    keys = iter(jax.random.split(key, 3 + 4 * LAYERS))

    def normal(*shape, fan_in=WIDTH):
        return jax.random.truncated_normal(next(keys), -2, 2, shape) / fan_in**0.5

    head, ones = WIDTH // HEADS, jnp.ones(WIDTH)
    blocks = [
        {
            "qkv": normal(3, WIDTH, HEADS, head),
            "out": normal(HEADS, head, WIDTH),
            "up": normal(WIDTH, 4 * WIDTH),
            "down": normal(4 * WIDTH, WIDTH, fan_in=4 * WIDTH),
            "before": ones,
            "between": ones,
            "scale_q": jnp.ones(head),
            "scale_k": jnp.ones(head),
        }
        for _ in range(LAYERS)
    ]
    return {
        "embedding": normal(TOKENS, WIDTH),
        "place": normal(LENGTH, WIDTH),
        "logits": normal(WIDTH, TOKENS),
        "after": ones,
        "blocks": blocks,
    }


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x - x.mean(axis=-1, keepdims=True)
    return scale * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def model(params: dict, tokens: jax.Array, normalised: bool) -> tuple[jax.Array, jax.Array]:
    """Logits of the next token, and the largest attention logit."""
    from jaxnum.training import qk_layernorm

    x, largest = params["embedding"][tokens] + params["place"], []
    visible = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for block in params["blocks"]:
        q, k, v = jnp.einsum("btd,sdhe->sbthe", norm(x, block["before"]), block["qkv"])
        if normalised:
            q, k = qk_layernorm(q, k, block["scale_q"], block["scale_k"])
        scores = jnp.einsum("bthe,bshe->bhts", q, k) * (HEADS / WIDTH) ** 0.5
        scores = jnp.where(visible, scores, -jnp.inf)
        largest.append(scores.max())
        x = x + jnp.einsum("bhts,bshe,hed->btd", jax.nn.softmax(scores), v, block["out"])
        x = x + jax.nn.gelu(norm(x, block["between"]) @ block["up"]) @ block["down"]
    return norm(x, params["after"]) @ params["logits"], jnp.stack(largest).max()


def train(normalised: bool, penalised: bool, independent: bool, rate: jax.Array, key: jax.Array):
    """Loss before and after training, and the largest attention logit of the run."""
    from jaxnum.training import cross_entropy_with_log_z
    from jaxnum.transforms import adamw_independent

    keys = jax.random.split(key, 4)
    chain = 2 * jax.random.gumbel(keys[0], (TOKENS, TOKENS))
    held_out = sequences(keys[1], chain, 64)
    share = optax.warmup_cosine_decay_schedule(0.0, 1.0, STEPS // 20, STEPS)
    if independent:
        optimiser = adamw_independent(rate, share)
    else:
        coupled = optax.adamw(lambda count: rate * share(count), b2=0.95, weight_decay=1e-4)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), coupled)

    def loss(params, tokens, coefficient):
        logits, largest = model(params, tokens[:, :-1], normalised)
        return cross_entropy_with_log_z(logits, tokens[:, 1:], coefficient=coefficient).loss.mean(), largest

    def step(carry, key):
        params, state = carry
        tokens = sequences(key, chain, BATCH)
        gradient, largest = jax.grad(loss, has_aux=True)(params, tokens, 1e-4 if penalised else 0.0)
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), largest

    params = weights(keys[2])
    (last, _), largest = jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(keys[3], STEPS))
    return loss(params, held_out, 0.0)[0], loss(last, held_out, 0.0)[0], largest.max()


def cures() -> dict[str, float]:
    from jaxnum.training import lr_sensitivity_sweep

    keys = jax.random.split(jax.random.key(0), SEEDS)
    sensitivity, logit = {}, {}
    for name, switches in CASES.items():
        run = functools.partial(train, *switches)
        sweep = lr_sensitivity_sweep(lambda rate, key, run=run: run(rate, key)[:2], keys, low=LOW, high=HIGH)
        sensitivity[name] = float(sweep.sensitivity.mean())
        if name in ("none", "all"):
            logit[name] = float(jax.jit(jax.vmap(run, (None, 0)))(HIGH, keys)[2].mean())
    figures = {f"sensitivity_{name}": value for name, value in sensitivity.items()}
    figures |= {f"largest_logit_{name}": value for name, value in logit.items()}
    over = {f"{name}_over_none": value / sensitivity["none"] for name, value in sensitivity.items() if name != "none"}
    return figures | over | {"largest_logit_none_over_all": logit["none"] / logit["all"]}


def make(params: Params) -> tuple:
    losses = jax.random.uniform(jax.random.key(0), (params["rates"], params["runs"]), maxval=2.0)
    return jnp.geomspace(3e-4, 3e-1, params["rates"]), losses, jnp.ones(params["runs"])


def run(params: Params):
    from jaxnum.training import lr_sensitivity

    return lr_sensitivity


def reference(params: Params):
    def sensitivity(rates, final, initial):
        losses = jnp.minimum(final, initial)
        return losses.mean(axis=0) - losses.min(axis=0)

    return sensitivity


register(
    Row(
        name="lr_sensitivity",
        covers=("lr_sensitivity", "lr_sensitivity_sweep"),
        shapes={"16_rates_10k_runs": {"rates": 16, "runs": 10_000}},
        make=make,
        run=run,
        reference=reference,
        modes=("fwd",),
        tests=("tests/training/test_lr_sensitivity.py", "tests/training/test_qk_layernorm.py"),
        targets=(
            Target("figure", 0.5, "With all cures at most half the sensitivity.", figure="all_over_none"),
            Target(
                "figure",
                3.0,
                "At the largest rate attention logits at least 3x smaller.",
                at_least=True,
                figure="largest_logit_none_over_all",
            ),
            Target("error", 1e-6, "Means in float32."),
        ),
        figures={"cures": cures},
    )
)
