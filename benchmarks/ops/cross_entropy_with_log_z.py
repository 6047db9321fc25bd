"""Cross-entropy with the log Z penalty, forwards and backwards, beside optax's loss with jax.nn's log-sum-exp."""

import jax
import jax.numpy as jnp
import optax

from benchmarks.registry import Params, Peer, Row, Target, register

COEFFICIENT = 1e-4


def make(params: Params) -> tuple:
    return (jax.random.normal(jax.random.key(0), (params["tokens"], params["classes"]), params["dtype"]),)


def labels(logits: jax.Array) -> jax.Array:
    return (7 * jnp.arange(logits.shape[0], dtype=jnp.int32)) % logits.shape[1]


def run(params: Params):
    from jaxnum.training import cross_entropy_with_log_z

    return lambda logits: cross_entropy_with_log_z(logits, labels(logits), coefficient=COEFFICIENT).loss


def with_optax(params: Params):
    def loss(logits):
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(wide, labels(logits))
        return cross_entropy + COEFFICIENT * jax.nn.logsumexp(wide, axis=-1) ** 2

    return loss


register(
    Row(
        name="cross_entropy_with_log_z",
        covers=("cross_entropy_with_log_z",),
        shapes={
            "1k_tokens_16k_classes": {"tokens": 1024, "classes": 16_384, "dtype": "float32"},
            "1k_tokens_16k_classes_bf16": {"tokens": 1024, "classes": 16_384, "dtype": "bfloat16"},
        },
        make=make,
        run=run,
        reference=with_optax,
        modes=("fwd_bwd",),
        tests=("tests/training/test_cross_entropy_with_log_z.py",),
        peers={"optax": Peer("optax", with_optax)},
        targets=(
            Target("error", 1e-5, "Sums in float32.", shape="1k_tokens_16k_classes"),
            Target("error", 1e-2, "One rounding to bfloat16.", shape="1k_tokens_16k_classes_bf16"),
            Target("ratio", 1.05, "One pass takes no longer than two losses."),
        ),
    )
)
