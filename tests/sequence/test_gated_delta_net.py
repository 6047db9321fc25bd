import jax
import jax.numpy as jnp
import pytest

from jaxnum.sequence import gated_delta_net
from tests.sequence.layer_contract import check_layer


@pytest.mark.parametrize(
    "options",
    [
        {"eigenvalues": "symmetric", "value_heads": 2},
        {"updates_per_token": 2, "decay": "channel", "conv_width": 1, "gate": False},
    ],
    ids=["gated", "product"],
)
def test_contract(options):
    layer = gated_delta_net(6, 1, key_dim=3, value_dim=4, **options)
    check_layer(layer, 6, size=6 * 20, condition=100)


def test_without_decay_the_state_keeps_what_it_was_told():
    layer = gated_delta_net(4, 1, decay=None)
    params = layer.init(jax.random.key(0))
    assert not {"decay", "log_rate"} & set(params)
    _, cache = layer.apply(params, jnp.ones((2, 3, 4)))
    _, later = layer.apply(params, jnp.zeros((2, 9, 4)), cache=cache._replace(convolution=0 * cache.convolution))
    # Keys of zero length write nothing.
    assert bool(jnp.allclose(later.state, cache.state))


def test_bad_input():
    for options, sentence in (
        ({"heads": 3}, "`width` must be a multiple of heads=3; got 8. Or give key_dim."),
        ({"value_heads": 3}, "`value_heads` must be a multiple of heads=2; got 3."),
        ({"decay": "head"}, "`decay` must be one of None, 'token', 'channel'; got 'head'"),
        ({"eigenvalues": "negative"}, "`eigenvalues` must be one of 'positive', 'symmetric'; got 'negative'"),
        ({"conv_width": 0}, "`conv_width` must be an int of at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=f"gated_delta_net: {sentence}"):
            gated_delta_net(8, **({"heads": 2} | options))
