import jax
import jax.numpy as jnp
import pytest

from jaxnum.sequence import transnormer_block
from tests.sequence.layer_contract import check_layer


@pytest.mark.parametrize(
    "options",
    [{"layer": 1, "num_layers": 3}, {"relative_phase": True, "gate": "linear", "value_activation": None}],
    ids=["paper", "variants"],
)
def test_contract(options):
    check_layer(transnormer_block(8, 2, **options), 8, size=8 * 11, condition=10)


def test_bad_input():
    block = transnormer_block(8, 2)
    params = block.init(jax.random.key(0))
    x = jnp.ones((1, 3, 8))
    for call, error, sentence in (
        (
            lambda: transnormer_block(8, 3),
            ValueError,
            "`width` must be a multiple of heads=3; got 8. Or give head_dim.",
        ),
        (lambda: transnormer_block(8, 2, gate="tanh"), ValueError, "`gate` must be one of 'sigmoid', 'linear'"),
        (lambda: block.apply(params, x[..., :4]), ValueError, r"`x` must have shape \(\*B, T, 8\); got \(1, 3, 4\)"),
        (lambda: block.apply(params, x.astype(int)), TypeError, "`x` must have a floating-point dtype; got int32"),
        (lambda: block.apply(params, x, cache=block.init_cache(2)), ValueError, r"`cache\.state` must have shape"),
        (lambda: block.step(params, x[:, 0], x), ValueError, "`cache` must have the tree structure"),
        (lambda: block.apply(params, x, segment_ids=jnp.ones((1, 2), int)), ValueError, "`segment_ids` must have"),
    ):
        with pytest.raises(error, match=f"transnormer_block: {sentence}"):
            call()
