"""The short causal convolution of recurrent layers against JAX's own depthwise convolution."""

import jax
import jax.numpy as jnp

from benchmarks.registry import Params, Peer, Row, register


def make(params: Params) -> tuple:
    shapes = (params["batch"], params["length"], params["width"]), (params["taps"], params["width"])
    return tuple(jax.random.normal(jax.random.key(i), s, jnp.float32) for i, s in enumerate(shapes))


def run(params: Params):
    from jaxnum.sequence import short_convolution

    return lambda x, kernel: short_convolution(x, kernel)[0]


def jax_lax(params: Params):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel[:, None],
            (1,),
            [(params["taps"] - 1, 0)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=params["width"],
            precision=jax.lax.Precision.HIGHEST,
        )

    return convolve


register(
    Row(
        name="short_convolution",
        covers=("short_convolution", "short_convolution_step"),
        shapes={"mamba_2048": {"batch": 1, "length": 2048, "width": 512, "taps": 4}},
        make=make,
        run=run,
        reference=jax_lax,
        modes=("fwd", "fwd_bwd"),
        tests=("tests/sequence/test_short_convolution.py",),
        peers={"jax.lax": Peer("jax", jax_lax)},
    )
)
